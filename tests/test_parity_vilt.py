"""The joint pass of a pair against transformers' ViltModel, and the routing it cannot show.

ViLT has one feed-forward layer where we have experts, so all our experts are tied to it. Its type
embeddings are folded: the image's into patch bias, [I_CLS] and mask vector, the text's into the
bias of the LayerNorm that ViLT has after its text embedding and we have not (the test applies it).
Its key bias is dropped: softmax cancels it. ViLT returns image tokens in random order, so image
states are compared as a set. Tied experts hide a wrong expert; the routing tests untie them.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViltConfig, ViltModel

from tiny_models import fill_normal, masked_batch, random_pixels, tiny_config, tiny_model
from vlbeit.nn.model import VLBeit
from vlbeit.types import Modality, States

LAYERS, WIDTH, VOCAB, WORDS = 3, 32, 50, 12


def build_peer() -> ViltModel:
    peer = ViltModel(
        ViltConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            max_position_embeddings=WORDS,
            layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    )
    fill_normal(peer, seed=1)
    return peer.eval()


def mapped(peer: dict[str, Tensor]) -> dict[str, Tensor]:
    """The peer's weights under our names; every expert of a layer is named."""
    image_type = peer["embeddings.token_type_embeddings.weight"][1]
    text = "embeddings.text_embeddings."
    # BERT's own type embedding is one more constant added to every word before the LayerNorm.
    word_type = peer[text + "token_type_embeddings.weight"][0]
    ours = {
        "image.proj.weight": peer["embeddings.patch_embeddings.projection.weight"].flatten(1),
        "image.proj.bias": peer["embeddings.patch_embeddings.projection.bias"] + image_type,
        "image.cls": peer["embeddings.cls_token"].flatten() + image_type,
        "image.positions": peer["embeddings.position_embeddings"][0],
        "text.words.weight": peer[text + "word_embeddings.weight"] + word_type,
        "text.positions": peer[text + "position_embeddings.weight"],
        "backbone.norm.weight": peer["layernorm.weight"],
        "backbone.norm.bias": peer["layernorm.bias"],
    }
    for layer in range(LAYERS):
        theirs, mine = f"encoder.layer.{layer}.", f"backbone.blocks.{layer}."
        ours[mine + "attention.qkv.weight"] = torch.cat(
            [peer[f"{theirs}attention.attention.{p}.weight"] for p in ("query", "key", "value")]
        )
        for here, there in {
            "attention.q_bias": "attention.attention.query.bias",
            "attention.v_bias": "attention.attention.value.bias",
            "attention.proj.weight": "attention.output.dense.weight",
            "attention.proj.bias": "attention.output.dense.bias",
            "norm1.weight": "layernorm_before.weight",
            "norm1.bias": "layernorm_before.bias",
        }.items():
            ours[mine + here] = peer[theirs + there]
        for expert in ("v", "l", "vl"):
            for here, there in EXPERT.items():
                ours[f"{mine}experts.{expert}.{here}"] = peer[theirs + there]
    return ours


EXPERT = {
    "norm.weight": "layernorm_after.weight",
    "norm.bias": "layernorm_after.bias",
    "fc1.weight": "intermediate.dense.weight",
    "fc1.bias": "intermediate.dense.bias",
    "fc2.weight": "output.dense.weight",
    "fc2.bias": "output.dense.bias",
}


@pytest.fixture(params=[0, 2, LAYERS], ids="vl_layers={}".format)
def case(request):
    peer = build_peer()
    model = VLBeit(tiny_config(layers=LAYERS, vl_layers=request.param, layer_scale=0.0))
    fill_normal(model, seed=2)
    weights = mapped(dict(peer.named_parameters()))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    batch = masked_batch("pair", 2, lengths=(9, 6))
    return peer, model, batch


def our_states(model: VLBeit, peer: ViltModel, batch) -> States:
    """Our pair, with the LayerNorm that ViLT puts after the text embedding."""
    states = model.embed_pair(batch.words, batch.word_valid, batch.pixels)
    norm = peer.embeddings.text_embeddings.LayerNorm
    bias = norm.bias + peer.embeddings.token_type_embeddings.weight[0]
    width = batch.words.shape[1]
    text = F.layer_norm(states.x[:, :width], (WIDTH,), norm.weight, bias, norm.eps)
    return replace(states, x=torch.cat((text, states.x[:, width:]), dim=1))


def peer_states(peer: ViltModel, batch) -> Tensor:
    return peer(
        input_ids=batch.words,
        attention_mask=batch.word_valid.long(),
        pixel_values=batch.pixels.float() / 127.5 - 1,
    ).last_hidden_state


def nearest(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P): how far each of our rows is from their nearest row, and which row that is."""
    return (mine[:, :, None] - theirs[:, None]).abs().amax(dim=-1).min(dim=-1)


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_text_states_agree_exactly_and_image_states_as_a_set(case):
    peer, model, batch = case
    width, valid = batch.words.shape[1], batch.word_valid
    with torch.no_grad():
        mine = model.backbone(our_states(model, peer, batch))
        theirs = peer_states(peer, batch)
    assert not valid.all(), "a test without padding would prove too little"
    assert worst(mine[:, :width][valid], theirs[:, :width][valid]) <= 1e-5
    assert worst(mine[:, width], theirs[:, width]) <= 1e-5  # [I_CLS] keeps its place
    distance, which = nearest(mine[:, width + 1 :], theirs[:, width + 1 :])
    assert distance.max().item() <= 1e-5
    for row in which.tolist():
        assert sorted(row) == list(range(len(row))), "not one to one"


def summed(states: Tensor, valid: Tensor) -> Tensor:
    """A number that the order of the image tokens does not change."""
    width = valid.shape[1]
    text = (states[:, :width] * torch.arange(states.shape[-1]).sin())[valid]
    return text.sum() + states[:, width:].pow(3).sum()


def test_gradients_of_shared_tensors_agree_with_the_peer(case):
    peer, model, batch = case
    summed(peer_states(peer, batch), batch.word_valid).backward()
    summed(model.backbone(our_states(model, peer, batch)), batch.word_valid).backward()
    theirs = mapped({n: p.grad for n, p in peer.named_parameters() if p.grad is not None})
    mine = dict(model.named_parameters())
    compared = 0
    for name, wanted in theirs.items():
        if ".experts." in name:
            continue  # summed over the experts below
        if name in ("image.proj.bias", "image.cls", "text.words.weight"):
            continue  # a type embedding was folded into them: its gradient is not theirs
        scale = wanted.abs().max().item()
        assert worst(mine[name].grad, wanted) <= 1e-4 * scale + 1e-7, name
        compared += 1
    assert compared > 6 * LAYERS
    for layer in range(LAYERS):
        for here, there in EXPERT.items():
            wanted = dict(peer.named_parameters())[f"encoder.layer.{layer}.{there}"].grad
            experts = model.backbone.blocks[layer].experts.values()
            parts = [expert.get_parameter(here).grad for expert in experts]
            total = sum(part for part in parts if part is not None)
            assert worst(total, wanted) <= 1e-4 * wanted.abs().max().item() + 1e-7


def test_disturbing_any_mapped_tensor_breaks_the_agreement(case):
    peer, model, batch = case
    width, valid = batch.words.shape[1], batch.word_valid
    used = [name for name in mapped(dict(peer.named_parameters())) if in_joint_pass(model, name)]
    own = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(4)

    def disagreement() -> float:
        mine = model.backbone(our_states(model, peer, batch))
        text = worst(mine[:, :width][valid], theirs[:, :width][valid])
        return max(text, nearest(mine[:, width:], theirs[:, width:])[0].max().item())

    with torch.no_grad():
        theirs = peer_states(peer, batch)
        for name in used:
            kept = own[name].clone()
            own[name].add_(torch.randn(kept.shape, generator=generator))
            assert disagreement() > 1e-3, name
            own[name].copy_(kept)
        assert disagreement() <= 1e-5


def in_joint_pass(model: VLBeit, name: str) -> bool:
    """Whether a pair reads that tensor: the VL-expert where there is one, else the other two."""
    if ".experts." not in name:
        return True
    layer, expert = int(name.split(".")[2]), name.split(".")[4]
    fused = Modality.FUSED.value in model.backbone.blocks[layer].experts
    return (expert == "vl") == fused


# ---------------------------------------------------------------- routing, with untied experts


def moved(model: VLBeit, states: States, layer: int, expert: str) -> Tensor:
    """(L,) bool: the tokens that change after block `layer` when its expert is silenced."""
    with torch.no_grad():
        before = model.backbone.taps(states, [layer + 1])[0]
        network = model.backbone.blocks[layer].experts[expert]
        kept = [p.clone() for p in (network.fc2.weight, network.fc2.bias)]
        network.fc2.weight.zero_()
        network.fc2.bias.zero_()
        after = model.backbone.taps(states, [layer + 1])[0]
        network.fc2.weight.copy_(kept[0])
        network.fc2.bias.copy_(kept[1])
    changed = (before - after).abs().amax(dim=-1) > 0  # (B, L)
    assert torch.equal(changed.all(dim=0), changed.any(dim=0))
    return changed.all(dim=0)


@pytest.mark.parametrize("vl_layers", [0, 2])
def test_an_expert_moves_only_its_own_tokens_in_its_own_layer(vl_layers):
    model = tiny_model(vl_layers=vl_layers)
    batch = masked_batch("pair", 2)
    states = model.embed_pair(batch.words, batch.word_valid, batch.pixels)
    is_text = torch.arange(states.x.shape[1]) < batch.words.shape[1]
    for layer, block in enumerate(model.backbone.blocks):
        expected = {"l": is_text, "v": ~is_text}
        if layer >= len(model.backbone.blocks) - vl_layers:
            nobody = torch.zeros_like(is_text)
            expected = {"l": nobody, "v": nobody, "vl": ~nobody}
        assert set(block.experts) == set(expected)
        for expert, tokens in expected.items():
            assert torch.equal(moved(model, states, layer, expert), tokens), (layer, expert)


@pytest.mark.parametrize(("stream", "expert"), [("image", "v"), ("text", "l")])
def test_a_single_modality_uses_its_expert_in_every_layer(stream, expert):
    model = tiny_model(vl_layers=2)
    batch = masked_batch(stream, 2)
    if stream == "image":
        states = model.embed_image(random_pixels(2, (32, 32)))
    else:
        states = model.embed_text(batch.words, batch.word_valid)
    for layer, block in enumerate(model.backbone.blocks):
        for name in block.experts:
            assert moved(model, states, layer, name).any() == (name == expert), (layer, name)
