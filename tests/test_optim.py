"""Which parameters decay and how fast each layer learns, the schedule, and moments that survive."""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tiny_models import TINY, masked_batch, tiny_model
from vlbeit.config import ObjectiveConfig, OptimConfig
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import score_batch
from vlbeit.train.optim import (
    build_optimizer,
    layer_of,
    load_optimizer_tensors,
    lr_at,
    named_parameters,
    optimizer_tensors,
    param_groups,
    set_lr,
)
from vlbeit.types import Stream

CONFIG = OptimConfig(lr=1e-2, weight_decay=0.05, layer_decay=0.5, warmup_steps=10, total_steps=50)
MODELS = {
    "plain": {},
    "shared bias": {"relative_bias": "shared"},
    "bias per layer, no absolute positions": {
        "relative_bias": "per_layer",
        "absolute_positions": False,
    },
    "no LayerScale, no VL-expert": {"layer_scale": 0.0, "vl_layers": 0},
}

models = pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)


def settings_of(model: nn.Module, config: OptimConfig = CONFIG) -> dict[str, dict[str, object]]:
    """The group of each parameter, by name."""
    groups = param_groups(model, config, TINY.layers)
    return {name: group for group in groups for name in group["names"]}  # type: ignore[attr-defined]


def step(
    model: VLBeit, optimizer: torch.optim.Optimizer, seed: int, streams: tuple[Stream, ...]
) -> None:
    for stream in streams:
        for score in score_batch(
            model, masked_batch(stream, seed=seed), ObjectiveConfig()
        ).values():
            score.mean_loss().backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# ------------------------------------------------------------------ groups


@models
def test_the_weights_of_products_and_word_tables_decay_and_nothing_else_does(changes):
    model = tiny_model(**changes)
    expected = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding)
    }
    found = settings_of(model)
    assert {name for name, group in found.items() if group["weight_decay"]} == expected
    assert {group["weight_decay"] for group in found.values()} == {0.0, CONFIG.weight_decay}
    for special in ("image.cls", "image.masked_patch", "heads.mlm.bias", "backbone.norm.weight"):
        assert found[special]["weight_decay"] == 0.0


@models
def test_every_parameter_is_in_exactly_one_group(changes):
    model = tiny_model(**changes)
    groups = param_groups(model, CONFIG, TINY.layers)
    named = list(itertools.chain.from_iterable(g["names"] for g in groups))  # type: ignore[call-overload]
    assert sorted(named) == sorted(dict(model.named_parameters()))
    model.image.cls.requires_grad_(False)
    left = set(settings_of(model))
    assert set(named) - left == {"image.cls"}


@models
def test_a_layer_learns_by_the_layer_decay_faster_than_the_one_below(changes):
    found = settings_of(tiny_model(**changes))
    for name, group in found.items():
        block = re.match(r"backbone\.blocks\.(\d+)\.", name)
        if block:  # the last block is one below the heads
            below = TINY.layers - int(block.group(1))
        elif name.startswith(("image.", "text.", "backbone.relative_bias.")):
            below = TINY.layers + 1
        else:
            assert name.startswith(("heads.", "backbone.norm."))
            below = 0
        assert group["lr_factor"] == CONFIG.layer_decay**below, name
    assert len({group["lr_factor"] for group in found.values()}) == TINY.layers + 2


def test_without_layer_decay_all_layers_learn_alike():
    found = settings_of(tiny_model(), replace(CONFIG, layer_decay=1.0))
    assert {group["lr_factor"] for group in found.values()} == {1.0}
    assert len({layer_of(name, TINY.layers) for name in found}) == TINY.layers + 2


def test_the_rate_of_a_step_reaches_each_group_times_its_factor():
    optimizer = build_optimizer(tiny_model(), CONFIG, TINY.layers)
    for rate in (1e-3, 5e-4):
        set_lr(optimizer, rate)
        for group in optimizer.param_groups:
            assert group["lr"] == rate * group["lr_factor"]


def test_decay_pulls_a_matrix_by_rate_times_decay_and_leaves_the_rest():
    model = tiny_model()
    config = replace(CONFIG, layer_decay=1.0)
    optimizer = build_optimizer(model, config, TINY.layers)
    before = weights(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, group in settings_of(model, config).items():
        kept = 1 - config.lr * float(group["weight_decay"])  # type: ignore[arg-type]
        torch.testing.assert_close(model.get_parameter(name), before[name] * kept)
    assert not torch.equal(model.heads["mlm"].weight, before["heads.mlm.weight"])


# ------------------------------------------------------------------ schedule


@st.composite
def schedules(draw: st.DrawFn) -> OptimConfig:
    warmup = draw(st.integers(0, 300))
    lr = draw(st.floats(1e-5, 1.0))
    return OptimConfig(
        lr=lr,
        min_lr=lr * draw(st.floats(0, 1)),
        warmup_steps=warmup,
        total_steps=warmup + draw(st.integers(1, 1000)),
        schedule=draw(st.sampled_from(["cosine", "linear"])),
    )


@given(schedules())
def test_the_rate_follows_its_closed_form(config):
    warmup, total = config.warmup_steps, config.total_steps
    span = config.lr - config.min_lr
    for now in range(1, total + 1):
        if now <= warmup:
            expected = config.lr * now / warmup
        elif config.schedule == "linear":
            expected = config.lr - span * (now - warmup) / (total - warmup)
        else:  # half a wave of a cosine: sin^2 of what is left of a quarter turn
            left = (total - now) / (total - warmup)
            expected = config.min_lr + span * math.sin(math.pi / 2 * left) ** 2
        assert lr_at(now, config) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@given(schedules())
def test_the_rate_rises_to_its_peak_and_never_rises_again(config):
    rates = [lr_at(now, config) for now in range(1, config.total_steps + 20)]
    top = max(config.warmup_steps, 1) - 1
    slack = 1e-12
    assert all(b >= a - slack for a, b in itertools.pairwise(rates[: top + 1]))
    assert all(b <= a + slack for a, b in itertools.pairwise(rates[top:]))
    if config.warmup_steps:
        assert rates[top] == pytest.approx(config.lr, rel=1e-12)


@given(schedules())
def test_the_rate_makes_no_jump(config):
    """A step of warmup is lr / warmup; the steepest step behind it is pi / 2 of a linear one."""
    behind = (config.lr - config.min_lr) / (config.total_steps - config.warmup_steps)
    largest = max(config.lr / max(config.warmup_steps, 1), math.pi / 2 * behind) * (1 + 1e-9)
    rates = [lr_at(now, config) for now in range(1, config.total_steps + 20)]
    assert all(abs(b - a) <= largest + 1e-15 for a, b in itertools.pairwise(rates))


@given(schedules(), st.integers(0, 10**6))
def test_behind_the_schedule_the_rate_stays_at_its_smallest(config, steps):
    assert lr_at(config.total_steps + steps, config) == pytest.approx(config.min_lr, abs=1e-15)


def test_a_schedule_that_is_all_warmup_ends_at_the_peak():
    config = OptimConfig(lr=1.0, min_lr=0.1, warmup_steps=10, total_steps=10)
    assert [lr_at(now, config) for now in (5, 10)] == [0.5, 1.0]
    assert lr_at(11, config) == pytest.approx(0.1)


# ------------------------------------------------------------------ state


def trained(steps: range, start: tuple[VLBeit, torch.optim.Optimizer] | None = None):
    model = tiny_model()
    model, optimizer = start or (model, build_optimizer(model, CONFIG, TINY.layers))
    for number in steps:
        set_lr(optimizer, lr_at(number + 1, CONFIG))
        step(model, optimizer, number, ("image", "text", "pair"))
    return model, optimizer


def copy_of(model: VLBeit) -> VLBeit:
    other = tiny_model(seed=99)
    other.load_state_dict(model.state_dict())
    return other


def test_moments_that_were_saved_and_loaded_give_the_same_steps_bit_by_bit():
    model, optimizer = trained(range(3))
    tensors = {name: value.clone() for name, value in optimizer_tensors(optimizer).items()}
    resumed = copy_of(model)
    loaded = build_optimizer(resumed, CONFIG, TINY.layers)
    load_optimizer_tensors(loaded, tensors)
    fresh = copy_of(model)
    forgetful = build_optimizer(fresh, CONFIG, TINY.layers)
    for pair in ((model, optimizer), (resumed, loaded), (fresh, forgetful)):
        trained(range(3, 6), pair)
    same = weights(model)
    assert all(torch.equal(value, same[name]) for name, value in weights(resumed).items())
    theirs, ours = optimizer_tensors(optimizer), optimizer_tensors(loaded)
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(value, ours[name]) for name, value in theirs.items())
    # Without the moments the steps are others, so the comparison can fail.
    assert not torch.equal(fresh.heads["mlm"].weight, same["heads.mlm.weight"])


def test_loaded_moments_are_the_optimizers_own():
    _, optimizer = trained(range(1))
    tensors = optimizer_tensors(optimizer)
    kept = {name: value.clone() for name, value in tensors.items()}
    model = tiny_model()
    loaded = build_optimizer(model, CONFIG, TINY.layers)
    load_optimizer_tensors(loaded, tensors)
    trained(range(1, 2), (model, loaded))
    assert all(torch.equal(value, kept[name]) for name, value in tensors.items())


def test_state_is_two_moments_and_a_counter_for_each_name():
    model, optimizer = trained(range(2))
    tensors = optimizer_tensors(optimizer)
    kinds = ("exp_avg", "exp_avg_sq", "step")
    assert set(tensors) == {f"{kind}/{name}" for kind in kinds for name in weights(model)}
    for name, parameter in model.named_parameters():
        assert tensors[f"exp_avg/{name}"].shape == parameter.shape
        assert float(tensors[f"step/{name}"]) == 2.0


def unused_by(stream: Stream) -> Iterator[str]:
    for name in weights(tiny_model()):
        other = {"image": (".experts.l.", "text.", "heads.mlm."), "text": (".experts.v.",)}
        if ".experts.vl." in name or any(part in name for part in other[stream]):
            yield name


@pytest.mark.parametrize("stream", ["image", "text"])
def test_a_parameter_that_had_no_gradient_keeps_no_state_and_does_not_decay(stream):
    model = tiny_model()
    before = weights(model)
    optimizer = build_optimizer(model, CONFIG, TINY.layers)
    for number in range(2):
        step(model, optimizer, number, (stream,))
    tensors = optimizer_tensors(optimizer)
    idle = set(unused_by(stream))
    assert idle
    for name, parameter in model.named_parameters():
        has_state = f"exp_avg/{name}" in tensors
        assert has_state != torch.equal(parameter, before[name]), name
        assert not (has_state and name in idle), name
    # Their state begins with their first gradient, after a resume as without one.
    loaded = build_optimizer(copy_of(model), CONFIG, TINY.layers)
    load_optimizer_tensors(loaded, tensors)
    with_state = {name for name, parameter in named_parameters(loaded) if parameter in loaded.state}
    assert with_state == {name.split("/", 1)[1] for name in tensors}
    assert not with_state & idle


def test_half_a_parameters_state_is_refused():
    _, optimizer = trained(range(1))
    tensors = optimizer_tensors(optimizer)
    del tensors["exp_avg_sq/image.proj.weight"]
    loaded = build_optimizer(tiny_model(), CONFIG, TINY.layers)
    with pytest.raises(KeyError, match="exp_avg_sq/image.proj.weight"):
        load_optimizer_tensors(loaded, tensors)
