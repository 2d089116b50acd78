"""The joint pass of a pair against transformers' ViltModel, and the routing it cannot show.

The weights come through `vlbeit convert`: ViLT's one feed-forward layer is every expert, its type
vectors are folded, its key bias is dropped, and its words are in another order than ours. ViLT
returns image tokens in random order, so image states are compared as a set. Tied experts hide a
wrong expert; the routing tests untie them.
"""

import pytest
import torch
from torch import Tensor
from transformers import ViltConfig, ViltModel

from foreign_files import (
    WORDS,
    bert_ids,
    imported,
    mapped,
    model_of,
    save_peer,
    worst,
    write_vocabulary,
)
from tiny_models import fill_normal, masked_batch, random_pixels, tiny_config, tiny_model
from vlbeit.nn.model import VLBeit
from vlbeit.types import Modality, States

LAYERS, WIDTH, TEXTS = 3, 32, 12


def build_peer() -> ViltModel:
    peer = ViltModel(
        ViltConfig(
            vocab_size=WORDS,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            max_position_embeddings=TEXTS,
            layer_norm_eps=1e-6,
        ),
        add_pooling_layer=False,
    )
    fill_normal(peer, seed=1)
    return peer.eval()


EXPERT = {
    "norm.weight": "layernorm_after.weight",
    "norm.bias": "layernorm_after.bias",
    "fc1.weight": "intermediate.dense.weight",
    "fc1.bias": "intermediate.dense.bias",
    "fc2.weight": "output.dense.weight",
    "fc2.bias": "output.dense.bias",
}


@pytest.fixture(params=[0, 2, LAYERS], ids="vl_layers={}".format)
def case(request, tmp_path):
    peer = build_peer()
    write_vocabulary(save_peer(peer, tmp_path))
    converted = imported("hf-vilt", tmp_path, vl_layers=request.param)
    batch = masked_batch("pair", 2, lengths=(9, 6), config=tiny_config(vocab=WORDS))
    return peer, model_of(converted), batch, converted


def our_states(model: VLBeit, batch) -> States:
    return model.embed_pair(batch.words, batch.word_valid, batch.pixels)


def peer_states(peer: ViltModel, batch) -> Tensor:
    return peer(
        input_ids=bert_ids(batch.words),
        attention_mask=batch.word_valid.long(),
        pixel_values=batch.pixels.float() / 127.5 - 1,
    ).last_hidden_state


def nearest(mine: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """(B, P): how far each of our rows is from their nearest row, and which row that is."""
    return (mine[:, :, None] - theirs[:, None]).abs().amax(dim=-1).min(dim=-1)


def test_text_states_agree_exactly_and_image_states_as_a_set(case):
    peer, model, batch, _ = case
    width, valid = batch.words.shape[1], batch.word_valid
    with torch.no_grad():
        mine = model.backbone(our_states(model, batch))
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
    peer, model, batch, converted = case
    summed(peer_states(peer, batch), batch.word_valid).backward()
    summed(model.backbone(our_states(model, batch)), batch.word_valid).backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in peer.named_parameters()
    }
    theirs = mapped(converted, gradients, "hf-vilt")
    mine = dict(model.named_parameters())
    compared = 0
    for name, wanted in theirs.items():
        if ".experts." in name:
            continue  # summed over the experts below
        if name in ("image.proj.bias", "image.cls", "text.words.weight", "text.norm.bias"):
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
    peer, model, batch, converted = case
    width, valid = batch.words.shape[1], batch.word_valid
    rules = mapped(converted, dict(peer.named_parameters()), "hf-vilt")
    used = [name for name in rules if in_joint_pass(model, name)]
    own = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(4)

    def disagreement() -> float:
        mine = model.backbone(our_states(model, batch))
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
