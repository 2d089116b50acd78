"""The image path against transformers' BeitForMaskedImageModeling, weights mapped name by name.

Logits, hidden states, loss and gradients must agree to rounding, and stop agreeing as soon as any
mapped tensor is disturbed. transformers' default LayerNorm eps is 1e-12, BEiT's own is 1e-6, so it
is set here. Square grids only: on others the peer reads its relative table transposed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BeitConfig, BeitForMaskedImageModeling

from tiny_models import exactly, fill_normal, random_pixels, tiny_config
from vlbeit.config import ObjectiveConfig
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import score_batch
from vlbeit.types import Batch

LAYERS, WIDTH, HEADS, CODES, IMAGE_TABLE_ROWS = 3, 32, 4, 40, 7 * 7 + 3
KINDS = ("shared", "per_layer")


def build_peer(kind: str) -> BeitForMaskedImageModeling:
    peer = BeitForMaskedImageModeling(
        BeitConfig(
            vocab_size=CODES,
            hidden_size=WIDTH,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=48,
            image_size=32,
            patch_size=8,
            use_mask_token=True,
            use_shared_relative_position_bias=kind == "shared",
            use_relative_position_bias=kind == "per_layer",
            layer_norm_eps=1e-6,
        )
    )
    fill_normal(peer, seed=1)
    return peer.eval()


def build_ours(kind: str) -> VLBeit:
    config = tiny_config(
        layers=LAYERS, vl_layers=0, absolute_positions=False, relative_bias=kind, codes=CODES
    )
    model = VLBeit(config)
    fill_normal(model, seed=2)  # what is not mapped must not matter
    return model


def mapped(peer: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """The peer's tensors (weights or their gradients) under our names."""
    ours = {
        "image.proj.weight": peer["beit.embeddings.patch_embeddings.projection.weight"].flatten(1),
        "image.proj.bias": peer["beit.embeddings.patch_embeddings.projection.bias"],
        "image.cls": peer["beit.embeddings.cls_token"].flatten(),
        "image.masked_patch": peer["beit.embeddings.mask_token"].flatten(),
        "backbone.norm.weight": peer["layernorm.weight"],
        "backbone.norm.bias": peer["layernorm.bias"],
        "heads.mim.weight": peer["lm_head.weight"],
        "heads.mim.bias": peer["lm_head.bias"],
    }
    for layer in range(LAYERS):
        theirs, mine = f"beit.layers.{layer}.", f"backbone.blocks.{layer}."
        ours[mine + "attention.qkv.weight"] = torch.cat(
            [peer[f"{theirs}attention.{part}_proj.weight"] for part in "qkv"]
        )
        for here, there in {
            "attention.q_bias": "attention.q_proj.bias",
            "attention.v_bias": "attention.v_proj.bias",
            "attention.proj.weight": "attention.o_proj.weight",
            "attention.proj.bias": "attention.o_proj.bias",
            "norm1.weight": "layernorm_before.weight",
            "norm1.bias": "layernorm_before.bias",
            "experts.v.norm.weight": "layernorm_after.weight",
            "experts.v.norm.bias": "layernorm_after.bias",
            "experts.v.fc1.weight": "mlp.fc1.weight",
            "experts.v.fc1.bias": "mlp.fc1.bias",
            "experts.v.fc2.weight": "mlp.fc2.weight",
            "experts.v.fc2.bias": "mlp.fc2.bias",
            "gamma_1": "lambda_1",
            "gamma_2": "lambda_2",
        }.items():
            ours[mine + here] = peer[theirs + there]
    leaf = "relative_position_bias_table"
    if kind == "shared":
        table = peer[f"beit.shared_position_bias.{leaf}"]
    else:
        tables = [f"beit.layers.{i}.relative_position_bias.{leaf}" for i in range(LAYERS)]
        table = torch.cat([peer[name] for name in tables], dim=1)
    ours["backbone.relative_bias.table"] = table  # image rows only
    return ours


def load_mapped(model: VLBeit, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in tensors:
                parameter[: len(tensors[name])] = tensors[name]


@pytest.fixture
def batch() -> Batch:
    codes = torch.randint(0, CODES, (2, 16), generator=torch.Generator().manual_seed(3))
    return Batch(
        stream="image",
        sample_ids=("images:0:0", "images:0:1"),
        pixels=random_pixels(2, (32, 32)),
        patch_masked=exactly(6, 2, 16),
        patch_codes=codes,
    )


@pytest.fixture(params=KINDS)
def case(request, batch):
    kind = request.param
    peer, ours = build_peer(kind), build_ours(kind)
    load_mapped(ours, mapped(dict(peer.named_parameters()), kind))
    return kind, peer, ours, batch


def peer_answer(peer: nn.Module, batch: Batch, **more: object):
    pixels = batch.pixels.float() / 127.5 - 1
    labels = batch.patch_codes[batch.patch_masked]
    return peer(pixels, bool_masked_pos=batch.patch_masked, labels=labels, **more)


def our_logits(model: VLBeit, batch: Batch) -> Tensor:
    states = model.embed_image(batch.pixels, batch.patch_masked)
    return model.heads["mim"](model.backbone(states)[:, 1:])


def worst(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def test_every_tensor_of_the_peer_is_mapped(case):
    kind, peer, ours, _ = case
    numbers = sum(p.numel() for p in peer.parameters())
    assert sum(t.numel() for t in mapped(dict(peer.named_parameters()), kind).values()) == numbers


def test_logits_and_hidden_states_agree_with_the_peer(case):
    _, peer, ours, batch = case
    with torch.no_grad():
        answer = peer_answer(peer, batch, output_hidden_states=True)
        states = ours.embed_image(batch.pixels, batch.patch_masked)
        taps = ours.backbone.taps(states, range(1, LAYERS + 1))
        assert worst(states.x, answer.hidden_states[0]) <= 1e-5
        assert len(answer.hidden_states) == LAYERS + 1
        for mine, theirs in zip(taps, answer.hidden_states[1:], strict=True):
            assert worst(mine, theirs) <= 1e-5
        logits = our_logits(ours, batch)
    assert logits.std() > 0.1
    assert worst(logits, answer.logits) <= 1e-5


def test_the_loss_on_masked_patches_agrees_with_the_peer(case):
    _, peer, ours, batch = case
    theirs = peer_answer(peer, batch).loss
    score = score_batch(ours, batch, ObjectiveConfig())["mim"]
    assert int(score.count) == 12
    assert abs(score.mean_loss().item() - theirs.item()) <= 1e-5


def test_gradients_of_shared_tensors_agree_with_the_peer(case):
    kind, peer, ours, batch = case
    peer_answer(peer, batch).loss.backward()
    logits = our_logits(ours, batch)[batch.patch_masked]
    F.cross_entropy(logits, batch.patch_codes[batch.patch_masked]).backward()
    theirs = mapped({name: p.grad for name, p in peer.named_parameters()}, kind)
    mine = dict(ours.named_parameters())
    for name, wanted in theirs.items():
        found = mine[name].grad[: len(wanted)]
        scale = wanted.abs().max().item()
        assert scale > 0, name
        assert worst(found, wanted) <= 1e-4 * scale + 1e-7, name
    table = mine["backbone.relative_bias.table"].grad
    assert table[IMAGE_TABLE_ROWS:].abs().max() == 0  # an image touches no row of the text


def test_disturbing_any_mapped_tensor_breaks_the_agreement(case):
    kind, peer, ours, batch = case
    theirs = mapped(dict(peer.named_parameters()), kind)
    own = dict(ours.named_parameters())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        expected = peer_answer(peer, batch).logits
        for name, tensor in theirs.items():
            kept = own[name].clone()
            own[name][: len(tensor)] += torch.randn(tensor.shape, generator=generator)
            assert worst(our_logits(ours, batch), expected) > 1e-3, name
            own[name].copy_(kept)
        assert worst(our_logits(ours, batch), expected) <= 1e-5


def test_tensors_of_other_modalities_do_not_reach_an_image(case):
    kind, peer, ours, batch = case
    theirs = mapped(dict(peer.named_parameters()), kind)
    with torch.no_grad():
        before = our_logits(ours, batch)
        for name, parameter in ours.named_parameters():
            if name not in theirs:
                parameter.add_(1.0)
            elif name == "backbone.relative_bias.table":
                parameter[IMAGE_TABLE_ROWS:] += 1.0
        assert torch.equal(our_logits(ours, batch), before)
