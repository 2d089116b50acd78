"""Laws of the matrix product with weights, nn/linear.py."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from tiny_models import masked_batch, tiny_model
from vlbeit.config import ObjectiveConfig
from vlbeit.nn import linear
from vlbeit.nn.linear import Bf16Product, Linear, RoundedWeights
from vlbeit.objectives import score_batch

BF16 = torch.bfloat16


def autocast() -> torch.autocast:
    return torch.autocast("cpu", BF16)


def twins(gen: torch.Generator, bias: bool = True) -> tuple[Linear, nn.Linear]:
    """Ours and torch's, with the same weights."""
    ours, theirs = Linear(24, 36, bias), nn.Linear(24, 36, bias)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=gen))
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def gradients(layer: nn.Module, x: Tensor, weight: Tensor) -> list[Tensor]:
    """Of the input and of every parameter."""
    x = x.clone().requires_grad_()
    with autocast(), RoundedWeights():
        out = layer(x)
    (out.float() * weight).sum().backward()
    found = [x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_bf16_product_is_that_of_torch_and_so_are_its_gradients(gen, monkeypatch, tiles, bias):
    monkeypatch.setattr(Bf16Product, "tiles", tiles)
    ours, theirs = twins(gen, bias)
    x, weight = torch.randn(3, 7, 24, generator=gen), torch.randn(3, 7, 36, generator=gen)
    with autocast(), RoundedWeights():
        assert torch.equal(ours(x), theirs(x))
    for mine, other in zip(gradients(ours, x, weight), gradients(theirs, x, weight), strict=True):
        assert mine.dtype == other.dtype
        assert (mine - other).abs().max() <= 2**-7 * other.abs().max()
        assert (mine.flip(0) - other).abs().max() > 0.1 * other.abs().max()


def test_without_autocast_it_is_torchs_own_product(gen):
    ours, theirs = twins(gen)
    x = torch.randn(5, 24, generator=gen)
    with RoundedWeights():
        assert torch.equal(ours(x), theirs(x))
        with torch.autocast("cpu", torch.float16):  # another dtype is torch's business too
            assert ours(x).dtype == torch.float16


def test_a_gradient_that_is_a_slice_of_a_wider_one_is_read_right(gen):
    ours, theirs = twins(gen)
    x = torch.randn(4, 9, 24, generator=gen)
    weight = torch.randn(4, 9, 36, generator=gen)

    def sliced(layer: nn.Module) -> list[Tensor]:
        given = x.clone().requires_grad_()
        with autocast(), RoundedWeights():
            joined = torch.cat((layer(given[:, :2]), layer(given[:, 2:])), dim=1)
        (joined.float() * weight).sum().backward()
        return [given.grad, layer.weight.grad, layer.bias.grad]

    for mine, other in zip(sliced(ours), sliced(theirs), strict=True):
        assert (mine - other).abs().max() <= 2**-6 * other.abs().max()


def test_a_weight_is_rounded_once_while_it_cannot_change(gen):
    layer, _ = twins(gen)
    x = torch.randn(5, 24, generator=gen)
    weights = RoundedWeights()
    with weights, autocast():
        layer(x)
        first = weights.of(layer.weight)
        with RoundedWeights() as inner, torch.no_grad():  # inside another it has no effect
            layer(x)
            assert inner.of(layer.weight) is first
    with weights:
        assert weights.of(layer.weight) is first
    with RoundedWeights() as others:
        assert others.of(layer.weight) is not first


def test_after_the_block_a_changed_weight_is_seen(gen):
    layer, _ = twins(gen)
    x = torch.randn(5, 24, generator=gen)
    with autocast(), RoundedWeights():
        before = layer(x)
    with torch.no_grad():
        layer.weight.mul_(2)
    with autocast():
        expected = F.linear(x, layer.weight, layer.bias)
        assert torch.equal(layer(x), expected)
        with RoundedWeights():
            assert torch.equal(layer(x), expected)
    assert not torch.equal(before, expected)


def test_a_weight_whose_place_in_memory_is_given_to_another_is_not_mistaken_for_it():
    weights = RoundedWeights()
    for value in range(50):
        weight = torch.full((4, 4), float(value))  # freed at once, were it not kept
        assert float(weights.of(weight)[0, 0]) == value


@pytest.mark.parametrize("stream", ["image", "text", "pair"])
def test_the_levers_of_a_bf16_step_leave_loss_and_gradients_as_plain_layers_give_them(
    stream, monkeypatch
):
    batch = masked_batch(stream, 4)

    def step() -> tuple[float, dict[str, Tensor]]:
        model = tiny_model()
        with autocast(), RoundedWeights():
            scores = score_batch(model, batch, ObjectiveConfig())
            loss = torch.stack([s.mean_loss() for s in scores.values()]).sum()
        loss.backward()
        return float(loss.detach()), {
            name: p.grad for name, p in model.named_parameters() if p.grad is not None
        }

    loss, found = step()
    monkeypatch.setattr(linear, "bf16_autocast", lambda: False)  # as nn.Linear
    plain_loss, plain = step()
    assert loss == plain_loss
    assert found.keys() == plain.keys()
    for name, gradient in found.items():
        distance = (gradient - plain[name]).norm() / plain[name].norm().clamp(min=1e-12)
        assert distance < 0.01, name


@pytest.mark.parametrize("stream", ["image", "text", "pair"])
def test_activations_computed_again_in_the_backward_pass_give_the_same_gradients(stream):
    batch = masked_batch(stream, 4)

    def gradients_with(again: bool, kept: bool) -> list[Tensor]:
        model = tiny_model()
        model.backbone.checkpoint_activations = again
        with RoundedWeights() if kept else contextlib.nullcontext():
            with linear.autocast(torch.device("cpu"), "bf16"):
                scores = score_batch(model, batch, ObjectiveConfig())
                loss = torch.stack([s.mean_loss() for s in scores.values()]).sum()
            loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    for mine, other in zip(gradients_with(True, True), gradients_with(False, True), strict=True):
        assert torch.equal(mine, other)
    with pytest.raises(CheckpointError):  # the backward pass outside of it would round otherwise
        gradients_with(True, False)
