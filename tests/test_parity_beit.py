"""The image path against transformers' BeitForMaskedImageModeling, through `vlbeit convert`.

Logits, hidden states, loss and gradients must agree to rounding, and stop agreeing as soon as any
mapped tensor is disturbed. transformers' default LayerNorm eps is 1e-12, BEiT's own is 1e-6, so it
is set here. Square grids only: on others the peer reads its relative table transposed.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BeitConfig, BeitForMaskedImageModeling

from foreign_files import imported, mapped, model_of, save_peer, worst
from tiny_models import exactly, fill_normal, random_pixels
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
def case(request, batch, tmp_path):
    peer = build_peer(request.param)
    converted = imported("hf-beit", save_peer(peer, tmp_path))
    return converted, peer, model_of(converted), batch


def peer_answer(peer: nn.Module, batch: Batch, **more: object):
    pixels = batch.pixels.float() / 127.5 - 1
    labels = batch.patch_codes[batch.patch_masked]
    return peer(pixels, bool_masked_pos=batch.patch_masked, labels=labels, **more)


def our_logits(model: VLBeit, batch: Batch) -> Tensor:
    states = model.embed_image(batch.pixels, batch.patch_masked)
    return model.heads["mim"](model.backbone(states)[:, 1:])


def test_every_tensor_of_the_peer_is_mapped(case):
    converted, peer, _, _ = case
    entries = converted.receipt.entries
    taken = {name for entry in entries for name in entry.sources}
    assert len(taken) == len(dict(peer.named_parameters()))
    assert {entry.action for entry in entries} == {"renamed", "initialised"}
    fresh = {entry.target for entry in converted.receipt.named("initialised")}
    assert not any(name.startswith(("image.", "heads.mim", "backbone.norm")) for name in fresh)
    assert not any(".attention." in name or ".experts.v." in name for name in fresh)


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
    converted, peer, ours, batch = case
    peer_answer(peer, batch).loss.backward()
    logits = our_logits(ours, batch)[batch.patch_masked]
    F.cross_entropy(logits, batch.patch_codes[batch.patch_masked]).backward()
    theirs = mapped(converted, {name: p.grad for name, p in peer.named_parameters()}, "hf-beit")
    mine = dict(ours.named_parameters())
    for name, wanted in theirs.items():
        found = mine[name].grad
        scale = wanted.abs().max().item()
        assert scale > 0, name
        assert worst(found, wanted) <= 1e-4 * scale + 1e-7, name
    table = mine["backbone.relative_bias.table"].grad
    assert table[IMAGE_TABLE_ROWS:].abs().max() == 0  # an image touches no row of the text


def test_disturbing_any_mapped_tensor_breaks_the_agreement(case):
    converted, peer, ours, batch = case
    theirs = mapped(converted, dict(peer.named_parameters()), "hf-beit")
    own = dict(ours.named_parameters())
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        expected = peer_answer(peer, batch).logits
        for name in theirs:
            kept = own[name].clone()
            own[name] += torch.randn(kept.shape, generator=generator)
            assert worst(our_logits(ours, batch), expected) > 1e-3, name
            own[name].copy_(kept)
        assert worst(our_logits(ours, batch), expected) <= 1e-5


def test_tensors_of_other_modalities_do_not_reach_an_image(case):
    converted, peer, ours, batch = case
    theirs = mapped(converted, dict(peer.named_parameters()), "hf-beit")
    with torch.no_grad():
        before = our_logits(ours, batch)
        for name, parameter in ours.named_parameters():
            if name not in theirs:
                parameter.add_(1.0)
            elif name == "backbone.relative_bias.table":
                parameter[IMAGE_TABLE_ROWS:] += 1.0
        assert torch.equal(our_logits(ours, batch), before)
