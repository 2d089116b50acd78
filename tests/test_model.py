"""Laws of the model: routing, padding, stochastic depth, rows, kernels, start values, sizes."""

import json
import math
from dataclasses import replace
from statistics import NormalDist

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tiny_models import (
    TINY,
    fill_normal,
    gradients,
    masked_batch,
    random_pixels,
    tiny_config,
    tiny_model,
)
from vlbeit.config import ModelConfig, to_dict
from vlbeit.draws import Draws
from vlbeit.errors import InputError
from vlbeit.nn import model as model_module
from vlbeit.nn.attention import Attention, attend, rollout, split_heads
from vlbeit.nn.backbone import Backbone
from vlbeit.nn.embed import to_patches
from vlbeit.nn.model import VLBeit
from vlbeit.nn.mome import Block
from vlbeit.nn.weights import PIECE, truncated_normal
from vlbeit.types import Modality, Span, States

STREAMS = ("image", "text", "pair")


def states_of(model: VLBeit, stream: str, samples: int = 4, *, dropping: bool = False) -> States:
    batch = masked_batch(stream, samples, config=model.config, depth_draws=dropping)
    draws = batch.depth_draws[:, 0] if dropping else None
    if stream == "image":
        return model.embed_image(batch.pixels, batch.patch_masked, draws)
    if stream == "text":
        return model.embed_text(batch.words_given, batch.word_valid, draws)
    return model.embed_pair(
        batch.words_given, batch.word_valid, batch.pixels, batch.patch_masked, draws
    )


def random_wanted(states: States, seed: int = 5) -> Tensor:
    wanted = torch.rand(states.x.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.4
    return wanted if states.valid is None else wanted & states.valid


# ------------------------------------------------------------------------ padding


@pytest.mark.parametrize("relative_bias", ["none", "per_layer"])
@pytest.mark.parametrize("stream", ["text", "pair"])
def test_what_stands_at_padding_changes_nothing(stream, relative_bias):
    model = tiny_model(relative_bias=relative_bias)
    batch = masked_batch(stream)
    valid = batch.word_valid
    assert not valid.all()

    def read(words: Tensor, valid: Tensor | None) -> Tensor:
        if stream == "text":
            states = model.embed_text(words, valid)
            return model.backbone(states)[batch.word_valid]
        states = model.embed_pair(words, valid, batch.pixels)
        out = model.backbone(states)
        width = words.shape[1]
        return torch.cat((out[:, :width][batch.word_valid], out[:, width:].flatten(0, 1)))

    scribbled = torch.where(valid, batch.words, torch.full_like(batch.words, 17))
    with torch.no_grad():
        assert torch.equal(read(batch.words, valid), read(scribbled, valid))
        # without `valid` the same scribble is read
        assert (read(batch.words, None) - read(scribbled, None)).abs().max() > 1e-3


def test_a_text_means_the_same_alone_and_padded_beside_a_longer_one():
    model = tiny_model()
    batch = masked_batch("text", lengths=(9, 5, 7, 9))
    together = model.backbone(model.embed_text(batch.words, batch.word_valid))
    for row, length in enumerate((9, 5, 7, 9)):
        alone = model.backbone(model.embed_text(batch.words[row : row + 1, :length]))
        torch.testing.assert_close(together[row, :length], alone[0], rtol=0, atol=1e-5)


# ------------------------------------------------------------------------ rows


@pytest.mark.parametrize("relative_bias", ["none", "shared"])
@pytest.mark.parametrize("dropping", [False, True])
@pytest.mark.parametrize("vl_layers", [0, 2, 4])
@pytest.mark.parametrize("stream", STREAMS)
def test_rows_are_the_wanted_rows_of_forward(stream, vl_layers, dropping, relative_bias):
    model = tiny_model(vl_layers=vl_layers, drop_path=0.5, relative_bias=relative_bias)
    weight = torch.randn(32, generator=torch.Generator().manual_seed(1))

    def run(rows: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        states = states_of(model, stream, dropping=dropping)
        wanted = random_wanted(states)
        out = model.backbone.rows(states, wanted) if rows else model.backbone(states)[wanted]
        (out * weight).sum().backward()
        return out.detach(), gradients(model)

    (whole, whole_grads), (rows, row_grads) = run(rows=False), run(rows=True)
    torch.testing.assert_close(rows, whole, rtol=0, atol=1e-5)
    for name, wanted in whole_grads.items():
        found = row_grads.get(name, torch.zeros_like(wanted))
        scale = wanted.abs().max().item()
        assert (found - wanted).abs().max() <= 1e-4 * scale + 1e-6, name


def test_rows_come_in_row_major_order():
    model = tiny_model()
    states = states_of(model, "text", 2)
    wanted = torch.zeros(states.x.shape[:2], dtype=torch.bool)
    wanted[0, 5] = wanted[0, 2] = wanted[1, 1] = True
    out = model.backbone(states)
    expected = torch.stack((out[0, 2], out[0, 5], out[1, 1]))
    torch.testing.assert_close(model.backbone.rows(states, wanted), expected, rtol=0, atol=1e-5)


def test_taps_are_the_states_between_the_blocks():
    model = tiny_model()
    states = states_of(model, "pair")
    first, last = model.backbone.taps(states, [1, 4])
    torch.testing.assert_close(model.backbone.norm(last), model.backbone(states))
    assert not torch.equal(first, last)


# ------------------------------------------------------------------------ stochastic depth


def test_drop_rates_rise_linearly_from_none_to_the_last_block():
    rates = [block.drop_rate for block in tiny_model(layers=5, drop_path=0.2).backbone.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert tiny_model(layers=1, vl_layers=1, drop_path=0.2).backbone.blocks[0].drop_rate == 0


def attention_only(rate: float, samples: int) -> tuple[Block, Tensor]:
    """A block whose expert adds nothing, so that one residual branch is left."""
    block = Block(16, 2, 24, (Modality.TEXT,), 0.0, rate, 1e-6)
    fill_normal(block)
    nn.init.zeros_(block.experts["l"].fc2.weight)
    nn.init.zeros_(block.experts["l"].fc2.bias)
    x = torch.randn(1, 6, 16, generator=torch.Generator().manual_seed(0)).expand(samples, 6, 16)
    return block, x.contiguous()


def test_a_kept_branch_is_scaled_and_a_dropped_one_is_gone():
    block, x = attention_only(0.25, 2)
    route = (Span(Modality.TEXT, 6),)
    plain = block(x, route)
    draws = torch.tensor([[0.25, 0.9], [0.2499, 0.9]])  # not below the rate: kept; below: dropped
    out = block(x, route, None, draws)
    torch.testing.assert_close(out[0], x[0] + (plain - x)[0] / 0.75)
    assert torch.equal(out[1], x[1])


def test_the_expected_value_of_a_branch_is_the_branch():
    block, x = attention_only(0.25, 100)
    route = (Span(Modality.TEXT, 6),)
    draws = (torch.arange(100) / 100)[:, None].expand(100, 2)  # every percentile once
    mean = block(x, route, None, draws).mean(dim=0)
    torch.testing.assert_close(mean, block(x, route)[0], rtol=1e-4, atol=1e-5)


def test_both_branches_listen_to_their_own_draw():
    model = tiny_model(drop_path=0.5)
    states = states_of(model, "pair")
    count = 2 * len(model.backbone.blocks)
    kept = torch.ones(4, count)
    reference = model.backbone(replace(states, depth_draws=kept))
    for place in range(count):
        draws = kept.clone()
        draws[0, place] = 0.0
        out = model.backbone(replace(states, depth_draws=draws))
        same = [(out[row] - reference[row]).abs().max().item() < 1e-5 for row in range(4)]
        # the first block has rate 0 and drops nothing; elsewhere only sample 0 moves
        assert same == [place < 2, True, True, True]


def test_the_same_draws_give_the_same_states_and_no_draws_drop_nothing():
    model = tiny_model(drop_path=0.5)
    with_draws = states_of(model, "pair", dropping=True)
    first, second = model.backbone(with_draws), model.backbone(with_draws)
    assert torch.equal(first, second)
    none = model.backbone(replace(with_draws, depth_draws=None))
    assert (first - none).abs().max() > 1e-3
    model.train()
    assert torch.equal(model.backbone(replace(with_draws, depth_draws=None)), none)


def test_rate_zero_ignores_the_draws():
    model = tiny_model(drop_path=0.0)
    states = states_of(model, "pair", dropping=True)
    out = model.backbone(replace(states, depth_draws=torch.zeros_like(states.depth_draws)))
    assert torch.equal(out, model.backbone(replace(states, depth_draws=None)))


# ------------------------------------------------------------------------ attention


def heads_attend(qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """The definition, in the precision of its input."""
    batch, length, wide = qkv.shape
    parts = qkv.view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    mixed = F.scaled_dot_product_attention(*parts, attn_mask=bias)
    return mixed.transpose(1, 2).reshape(batch, length, wide // 3)


def attention_case(kind: str, length: int) -> tuple[Tensor, Tensor | None]:
    """(3, L, 3 * 64) queries, keys and values of 4 heads, and a bias with a gradient."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(3, length, 192, generator=generator)
    if kind == "relative":
        return qkv, torch.randn(1, 4, length, length, generator=generator)
    if kind == "padding":
        hidden = torch.zeros(3, 1, 1, length)
        hidden[1, ..., length - 3 :] = float("-inf")
        return qkv, hidden
    return qkv, None


@pytest.mark.parametrize("length", [7, 50])
@pytest.mark.parametrize("kind", ["none", "relative", "padding"])
@pytest.mark.parametrize("learning", [False, True])
def test_bf16_attention_is_attention(kind, length, learning):
    qkv, bias = attention_case(kind, length)
    exact = heads_attend(qkv, 4, bias)
    low = qkv.bfloat16().requires_grad_(learning)  # a gradient picks the products
    found = attend(low, 4, bias).detach().float()
    # bf16 keeps 8 bits: scores of size 4 are off by up to 2^-7, values of size 1 by 2^-9
    assert (found - exact).abs().max() < 0.04
    flipped = torch.cat((low[..., :64], low[..., 64:128].flip(1), low[..., 128:]), dim=-1)
    assert (attend(flipped, 4, bias).detach().float() - exact).abs().max() > 0.2


@pytest.mark.parametrize("kind", ["none", "relative", "padding"])
def test_bf16_attention_has_the_gradients_of_attention(kind):
    qkv, bias = attention_case(kind, 20)
    weight = torch.randn(3, 20, 64, generator=torch.Generator().manual_seed(1))
    exact, low = qkv.clone().requires_grad_(), qkv.bfloat16().requires_grad_()
    ours = theirs = bias
    if kind == "relative":
        ours, theirs = (bias.clone().requires_grad_() for _ in range(2))
    (heads_attend(exact, 4, theirs) * weight).sum().backward()
    (attend(low, 4, ours).float() * weight).sum().backward()
    # queries, keys and values one by one: an error in the smallest must not hide behind the others
    pairs = list(zip(low.grad.float().split(64, dim=-1), exact.grad.split(64, dim=-1), strict=True))
    if kind == "relative":
        pairs.append((ours.grad, theirs.grad))
    for mine, true in pairs:
        assert (mine - true).abs().max() < 0.03 * true.abs().max()
        assert (mine.flip(1) - true).abs().max() > 0.2 * true.abs().max()


def test_a_bf16_step_stays_near_the_fp32_step():
    model = tiny_model()
    states = states_of(model, "pair")
    exact = model.backbone(states)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.backbone(states_of(model, "pair"))
    assert (low.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("relative_bias", ["none", "per_layer"])
@pytest.mark.parametrize("stream", STREAMS)
def test_attention_weights_mix_the_values_to_what_every_layer_gives(stream, relative_bias):
    model = tiny_model(relative_bias=relative_bias)
    states = states_of(model, stream)
    weights = model.backbone.attention_weights(states)
    assert len(weights) == len(model.backbone.blocks)
    inputs = [states.x, *model.backbone.taps(states, range(1, TINY.layers))]
    biases = model.backbone._biases(states)
    for block, x, found, bias in zip(model.backbone.blocks, inputs, weights, biases, strict=True):
        torch.testing.assert_close(found.sum(dim=-1), torch.ones(found.shape[:3]))
        if states.valid is not None:
            assert (found.transpose(1, 3)[~states.valid] == 0).all()
        normed = block.norm1(x)
        value = split_heads(block.attention.project(normed), block.attention.heads)[2]
        mixed = torch.matmul(found, value).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(mixed, block.attention(normed, bias), atol=1e-5, rtol=1e-4)
    wrong = torch.matmul(weights[0], value).transpose(1, 2).reshape(x.shape)
    assert (wrong - mixed).abs().max() > 1e-3


def test_rollout_of_attention_to_oneself_stays_and_of_even_attention_spreads(gen):
    still = torch.eye(5).expand(2, 3, 5, 5)
    torch.testing.assert_close(rollout([still] * 4), torch.eye(5).expand(2, 5, 5))
    even = torch.full((2, 3, 5, 5), 0.2)
    spread = rollout([even] * 4)
    kept = 0.5**4
    torch.testing.assert_close(spread, kept * torch.eye(5).expand(2, 5, 5) + (1 - kept) * 0.2)
    drawn = [torch.randn(2, 3, 5, 5, generator=gen).softmax(-1) for _ in range(3)]
    torch.testing.assert_close(rollout(drawn).sum(dim=-1), torch.ones(2, 5))


def test_attention_has_no_key_bias():
    attention = Attention(16, 2)
    biases = {name for name, _ in attention.named_parameters() if "bias" in name}
    assert biases == {"q_bias", "v_bias", "proj.bias"}


# ------------------------------------------------------------------------ switches


def test_layer_scale_zero_builds_a_model_without_gains():
    bare = tiny_model(layer_scale=0.0)
    assert not [name for name, _ in bare.named_parameters() if "gamma" in name]
    scaled = VLBeit(tiny_config(layer_scale=0.3))
    gains = [p for name, p in scaled.named_parameters() if "gamma" in name]
    assert len(gains) == 2 * TINY.layers
    assert all(torch.equal(p, torch.full_like(p, 0.3)) for p in gains)


def test_gains_of_one_are_the_model_without_gains():
    bare, scaled = tiny_model(layer_scale=0.0), tiny_model(layer_scale=1.0)
    with torch.no_grad():
        for name, parameter in scaled.named_parameters():
            parameter.copy_(
                torch.ones_like(parameter) if "gamma" in name else bare.get_parameter(name)
            )
    states = states_of(bare, "pair")
    assert torch.equal(bare.backbone(states), scaled.backbone(states))


@pytest.mark.parametrize("vl_layers", range(5))
def test_the_top_layers_and_no_others_have_a_vl_expert(vl_layers):
    blocks = tiny_model(vl_layers=vl_layers).backbone.blocks
    has = ["vl" in block.experts for block in blocks]
    assert has == [False] * (4 - vl_layers) + [True] * vl_layers


@pytest.mark.parametrize("vl_layers", [-1, 5])
def test_more_vl_layers_than_layers_are_refused(vl_layers):
    with pytest.raises(ValueError, match=f"0..4.*{vl_layers}"):
        tiny_model(vl_layers=vl_layers)


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="32.*5"):
        tiny_model(heads=5)


def test_a_route_that_does_not_cover_the_sequence_is_refused():
    with pytest.raises(ValueError, match="5 tokens, x has 6"):
        States(x=torch.zeros(1, 6, 4), valid=None, route=(Span(Modality.TEXT, 5),))


def test_a_pair_is_text_then_image():
    model = tiny_model()
    batch = masked_batch("pair")
    states = model.embed_pair(batch.words, batch.word_valid, batch.pixels, batch.patch_masked)
    width = batch.words.shape[1]
    assert states.route == (Span(Modality.TEXT, width), Span(Modality.IMAGE, 17))
    text = model.embed_text(batch.words, batch.word_valid)
    image = model.embed_image(batch.pixels, batch.patch_masked)
    assert torch.equal(states.x, torch.cat((text.x, image.x), dim=1))
    assert torch.equal(states.valid[:, :width], batch.word_valid)
    assert states.valid[:, width:].all()


def test_two_calls_with_different_routes_do_not_disturb_each_other():
    model = tiny_model()
    image, pair = states_of(model, "image"), states_of(model, "pair")
    before = model.backbone(image)
    model.backbone(pair)
    assert torch.equal(model.backbone(image), before)


# ------------------------------------------------------------------------ pixels


def test_bytes_and_floats_in_minus_one_to_one_are_the_same_image():
    model = tiny_model()
    pixels = random_pixels(2, (32, 32))
    floats = pixels.float() / 127.5 - 1
    assert floats.min() >= -1 and floats.max() <= 1
    assert torch.equal(model.image(pixels), model.image(floats))


def test_patches_by_reshape_are_the_convolution():
    pixels = torch.randn(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    by_convolution = F.conv2d(pixels, weight, stride=8).flatten(2).transpose(1, 2)
    by_product = to_patches(pixels, 8) @ weight.flatten(1).T
    torch.testing.assert_close(by_product, by_convolution, rtol=1e-4, atol=1e-4)


def test_what_lies_under_a_masked_patch_is_never_seen():
    model = tiny_model()
    batch = masked_batch("image")
    hidden = batch.patch_masked.reshape(4, 1, 4, 4)
    hidden = hidden.repeat_interleave(8, dim=2).repeat_interleave(8, dim=3)
    scribbled = torch.where(hidden, random_pixels(4, (32, 32), seed=9), batch.pixels)
    assert not torch.equal(scribbled, batch.pixels)
    first = model.embed_image(batch.pixels, batch.patch_masked)
    assert torch.equal(first.x, model.embed_image(scribbled, batch.patch_masked).x)
    assert not torch.equal(first.x, model.embed_image(scribbled, None).x)


# ------------------------------------------------------------------------ memory


@pytest.mark.parametrize("stream", STREAMS)
def test_recomputing_activations_gives_the_same_gradients(stream):
    model = tiny_model(drop_path=0.4)

    def run(recompute: bool) -> dict[str, Tensor]:
        model.zero_grad()
        model.backbone.checkpoint_activations = recompute
        states = states_of(model, stream, dropping=True)
        model.backbone.rows(states, random_wanted(states)).pow(3).sum().backward()
        return gradients(model)

    stored, recomputed = run(recompute=False), run(recompute=True)
    assert stored.keys() == recomputed.keys()
    assert all(torch.equal(stored[name], recomputed[name]) for name in stored)


# ------------------------------------------------------------------------ start values


def test_the_same_seed_gives_the_same_weights_and_another_seed_others():
    first, second, other = (VLBeit(TINY, seed) for seed in (3, 3, 4))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
    assert not torch.equal(first.text.words.weight, other.text.words.weight)


def test_start_values_do_not_read_the_global_generator():
    torch.manual_seed(0)
    first = VLBeit(TINY)
    torch.manual_seed(1)
    torch.rand(7)
    second = VLBeit(TINY)
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


def test_adding_a_layer_changes_no_other_parameter():
    small = VLBeit(tiny_config(layers=3, vl_layers=0))
    large = VLBeit(tiny_config(layers=4, vl_layers=2, relative_bias="shared"))
    for name, parameter in small.named_parameters():
        assert torch.equal(parameter, large.get_parameter(name)), name


def test_matrices_start_truncated_normal_and_vectors_at_rest():
    model = VLBeit(tiny_config(width=64, ffn=128, vocab=500, codes=300))
    # a normal of std 0.02 cut at one std has std 0.02 * 0.5396
    std = 0.02 * math.sqrt(1 - 2 * 0.2419707 / 0.6826895)
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters()}
    checked = set()
    for name, parameter in model.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if id(parameter) in norms:
            wanted = torch.ones_like(parameter) if leaf == "weight" else torch.zeros_like(parameter)
            assert torch.equal(parameter, wanted), name
        elif leaf.endswith("bias"):
            assert parameter.abs().max() == 0, name
        elif "gamma" not in leaf:
            rescaled = "attention.proj" in name or "fc2" in name
            factor = math.sqrt(2 * (int(name.split(".")[2]) + 1)) if rescaled else 1.0
            values = parameter.detach() * factor
            assert values.abs().max() <= 0.02 * (1 + 1e-6), name
            assert values.std().item() == pytest.approx(std, rel=0.3 if values.ndim == 1 else 0.05)
            assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel()), name
            checked.add(leaf if not rescaled else "rescaled")
    assert checked == {"weight", "positions", "cls", "masked_patch", "rescaled"}


def quantile_error(values: torch.Tensor) -> float:
    """Largest distance of the values from the quantiles of a normal cut at one standard deviation,
    in standard deviations."""
    normal = NormalDist()
    places = (torch.arange(len(values)) + 0.5) / len(values)
    inside = normal.cdf(-1) + places * (normal.cdf(1) - normal.cdf(-1))
    wanted = torch.tensor([normal.inv_cdf(p) for p in inside.tolist()])
    return (values.sort().values - wanted).abs().max().item()


def test_fresh_weights_follow_the_distribution_function_of_a_cut_normal():
    values = torch.empty(3 * PIECE + 77)
    truncated_normal(values, 1.0, Draws("values"))
    assert quantile_error(values) < 0.02
    assert quantile_error(torch.randn(len(values)).clamp(-1, 1)) > 0.1
    assert len(values.unique()) > 0.99 * len(values)  # no piece is drawn twice


def test_fresh_weights_are_the_same_on_any_number_of_threads():
    made = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        values = torch.empty(10 * PIECE + 3)
        truncated_normal(values, 0.02, Draws("values"))
        made.append(values)
    torch.set_num_threads(1)
    assert torch.equal(*made)


def test_every_expert_of_a_block_is_rescaled():
    model = VLBeit(TINY)
    for depth, block in enumerate(model.backbone.blocks, 1):
        for expert in block.experts.values():
            limit = 0.02 / math.sqrt(2 * depth)
            assert 0.97 * limit < expert.fc2.weight.abs().max() <= limit * (1 + 1e-6)
            assert expert.fc1.weight.abs().max() > 0.97 * 0.02


# ------------------------------------------------------------------------ sizes


def numbers(module: nn.Module, *without: str) -> int:
    named = module.named_parameters()
    return sum(p.numel() for n, p in named if not any(part in n for part in without))


@pytest.fixture
def build_unfilled(monkeypatch):
    """Builds at full size without memory or start values: only shapes are asked for."""
    monkeypatch.setattr(model_module, "initialise", lambda *_: None)

    def build(**changes: object) -> VLBeit:
        with torch.device("meta"):
            return VLBeit(replace(ModelConfig(), **changes))

    return build


def test_base_has_the_parameters_that_the_sizes_say(build_unfilled):
    base = build_unfilled()
    block = base.backbone.blocks[0]
    network = numbers(block.experts["v"], "norm")
    assert network == 2 * 768 * 3072 + 3072 + 768 == 4_722_432
    assert numbers(block.attention) == 4 * 768 * 768 + 3 * 768 == 2_361_600
    heads, body = numbers(base.heads), numbers(base, "heads")
    assert numbers(base.heads["mim"]) == 769 * 8192
    assert numbers(base.heads["mlm"]) == 769 * 64000
    embedded = (64000 + 196 + 197 + 2) * 768 + (3 * 16 * 16 + 1) * 768
    layers = 12 * (2_361_600 + 2 * (network + 1536) + 1536 + 1536) + 2 * (network + 1536)
    assert body == embedded + layers + 1536
    assert round(body / 1e6, 1) == 201.2
    assert numbers(base) == body + heads == 256_762_368


@pytest.mark.parametrize(
    ("vl_layers", "body", "whole"), [(0, 191.8, 247.3), (2, 201.2, 256.8), (3, 206.0, 261.5)]
)
def test_vl_experts_add_one_network_a_layer(build_unfilled, vl_layers, body, whole):
    model = build_unfilled(vl_layers=vl_layers)
    assert numbers(model, "heads") / 1e6 == pytest.approx(body, abs=0.06)
    assert numbers(model) / 1e6 == pytest.approx(whole, abs=0.06)


def test_the_vision_path_alone_is_a_vit_base(build_unfilled):
    model = build_unfilled(vl_layers=0)
    vision = numbers(model, "heads", "text.", "experts.l.")
    assert round(vision / 1e6, 1) == 85.8


def test_a_stack_can_be_built_for_images_alone():
    backbone = Backbone(32, 2, 4, 48, experts=(Modality.IMAGE,))
    assert [list(block.experts) for block in backbone.blocks] == [["v"], ["v"]]


# ------------------------------------------------------------------------ loading


def write_checkpoint(folder, model: VLBeit, tensors: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps({"model": to_dict(model.config)}))
    save_file(tensors, folder / "model.safetensors")


def test_a_saved_model_loads_with_the_same_weights(tmp_path):
    model = tiny_model(relative_bias="per_layer")
    write_checkpoint(tmp_path, model, model.state_dict())
    loaded = VLBeit.from_pretrained(tmp_path)
    assert loaded.config == model.config
    states = states_of(model, "pair")
    assert torch.equal(loaded.backbone(states), model.backbone(states))


def test_weights_that_do_not_fit_are_refused_by_name(tmp_path):
    model = tiny_model()
    tensors = model.state_dict()
    tensors["stranger"] = torch.zeros(2)
    del tensors["image.cls"]
    tensors["heads.mim.bias"] = torch.zeros(41)
    write_checkpoint(tmp_path, model, tensors)
    with pytest.raises(InputError) as caught:
        VLBeit.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing image.cls" in message
    assert "unknown stranger" in message
    assert "heads.mim.bias is (41,), the model has (40,)" in message


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_folder_without_a_checkpoint_says_which_file_is_missing(tmp_path, name):
    model = tiny_model()
    write_checkpoint(tmp_path, model, model.state_dict())
    (tmp_path / name).unlink()
    with pytest.raises(InputError, match=name):
        VLBeit.from_pretrained(tmp_path)
