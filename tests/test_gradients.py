"""Laws of adding gradients: over micro-batches, parts and ranks."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rank_jobs import on_ranks
from tiny_models import masked_batch, tiny_model
from vlbeit.config import ObjectiveConfig
from vlbeit.errors import ConfigError
from vlbeit.objectives import score_batch
from vlbeit.train import gradients
from vlbeit.train.distributed import World
from vlbeit.train.empty_batch import empty_batch, fill_gaps, layout_of
from vlbeit.train.gradients import OrderedGradients, SummedGradients, buckets
from vlbeit.train.loop import Learning
from vlbeit.train.opening import check_exact, check_parts

PARTS = 8
STREAMS = ("image", "text", "pair")
MODES = ("two_views", "half", "joint")


def numbers(part: int, size: int = 50) -> Tensor:
    """Gradients of one part, of unlike sizes: added in another order they round otherwise."""
    generator = torch.Generator().manual_seed(part)
    return torch.randn(size, generator=generator) * 10.0 ** (part % 4)


def tree(terms: list[Tensor]) -> Tensor:
    """((g0 + g1) + (g2 + g3)) + ..."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[0::2], terms[1::2], strict=True)]
    return terms[0]


def test_parts_are_added_as_a_binary_tree_and_not_one_after_the_other():
    parameter = nn.Parameter(torch.zeros(50))
    ordered = OrderedGradients([parameter], World())
    for part in range(PARTS):
        parameter.grad = numbers(part)
        ordered.end_part()
    norm = ordered.finish(float("inf"))
    wanted = tree([numbers(part) for part in range(PARTS)])
    assert parameter.grad is not None and torch.equal(parameter.grad, wanted)
    assert torch.equal(norm, torch.linalg.vector_norm(wanted))
    in_a_row = sum(numbers(part) for part in range(PARTS))
    assert not torch.equal(parameter.grad, in_a_row)  # so the order matters here


def test_a_parameter_that_nothing_asked_has_a_gradient_of_zero():
    asked, idle, frozen = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(False)
    for way in (SummedGradients, OrderedGradients):
        asked.grad, idle.grad = torch.tensor([3.0, 0.0, 4.0]), None
        found = way([asked, idle, frozen], World())
        found.end_part()
        assert found.finish(1.0).item() == 5.0
        torch.testing.assert_close(asked.grad, torch.tensor([0.6, 0.0, 0.8]))
        assert torch.equal(idle.grad, torch.zeros(3)) and frozen.grad is None


def test_buckets_hold_everything_once_in_order_and_no_more_than_their_size(monkeypatch):
    monkeypatch.setattr(gradients, "BUCKET", 100)
    sizes = (5, 10, 30, 1, 1, 24, 26)
    parameters = [nn.Parameter(torch.zeros(n)) for n in sizes]
    parameters[3] = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    found = list(buckets(parameters))
    assert [p for bucket in found for p in bucket] == parameters
    for bucket in found:
        assert len({p.dtype for p in bucket}) == 1
        assert len(bucket) == 1 or sum(p.numel() * p.element_size() for p in bucket) <= 100
    assert len(found) == 5


# ----------------------------------------------------------------------------- no sample at all


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("stream", STREAMS)
def test_an_empty_batch_has_the_layout_of_another_and_adds_exactly_nothing(stream, mode):
    model = tiny_model(drop_path=0.3)
    full = masked_batch(stream, depth_draws=True)
    layout = json.loads(json.dumps(layout_of(full)))  # as another rank gets it
    empty = empty_batch(layout, torch.device("cpu"))
    assert len(empty) == 0 and empty.stream == stream
    for name, value in vars(full).items():
        if isinstance(value, Tensor):
            made = getattr(empty, name)
            assert made.dtype == value.dtype and made.shape == (0, *value.shape[1:])
    model.zero_grad()
    scores = score_batch(model, empty, ObjectiveConfig(mvlm=mode))
    assert scores.keys() == score_batch(model, full, ObjectiveConfig(mvlm=mode)).keys()
    for score in scores.values():
        assert score.count == 0 and score.loss_sum.item() == 0
    torch.stack([score.loss_sum for score in scores.values()]).sum().backward()
    reached = [p.grad for p in model.parameters() if p.grad is not None]
    assert reached and all(torch.equal(grad, torch.zeros_like(grad)) for grad in reached)


def test_one_process_alone_leaves_out_what_it_has_no_sample_for():
    batch = masked_batch("text")
    parts = {2: [batch, None], 3: [None]}
    for aligned in (False, True):
        assert fill_gaps(parts, World(), aligned) == {2: [batch], 3: []}


# ----------------------------------------------------------------------------------- over ranks


RANKS = """
import torch
from test_gradients import PARTS, numbers, tree, lopsided
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from vlbeit.train.distributed import init_world
from vlbeit.train.gradients import OrderedGradients, SummedGradients

world = init_world("cpu", 30)
share = PARTS // world.size
mine = range(world.rank * share, (world.rank + 1) * share)

parameters = [nn.Parameter(torch.zeros(n)) for n in (7, 1, 42)]  # 50 numbers: no multiple of 4
ordered = OrderedGradients(parameters, world)
for part in mine:
    for p, piece in zip(parameters, numbers(part).split([7, 1, 42])):
        p.grad = piece.clone()
    ordered.end_part()
norm = ordered.finish(float("inf"))
found = torch.cat([p.grad for p in parameters])
assert torch.equal(found, tree([numbers(part) for part in range(PARTS)])), "tree"

# torch's own way of adding over ranks: the same sums, where every rank reaches everything
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 40), nn.GELU(), nn.Linear(40, 3))
wrapped = DistributedDataParallel(model)
x = torch.randn(4, 6, generator=torch.Generator().manual_seed(world.rank))
(wrapped(x).square().sum() * world.size).backward()  # DDP takes the mean over ranks
theirs = [p.grad.clone() for p in model.parameters()]
model.zero_grad()
model(x).square().sum().backward()
norm = SummedGradients(model.parameters(), world).finish(float("inf"))
for p, grad in zip(model.parameters(), theirs):
    torch.testing.assert_close(p.grad, grad, rtol=1e-6, atol=1e-6)

# ranks that reach different weights: what one process with everything has
experts = nn.ModuleList(nn.Linear(3, 2) for _ in range(world.size))
lopsided(experts, [world.rank])
SummedGradients(experts.parameters(), world).finish(float("inf"))
ours = [p.grad.clone() for p in experts.parameters()]
experts.zero_grad()
lopsided(experts, range(world.size))
for p, grad in zip(experts.parameters(), ours):
    assert torch.equal(p.grad, grad), "lopsided"
print(f"<{world.rank}> fine")
world.close()
"""


def lopsided(experts: nn.ModuleList, reached: object) -> None:
    for place in reached:  # type: ignore[attr-defined]
        experts[place](torch.full((2, 3), place + 1.0)).sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_add_what_one_process_and_what_torchs_ddp_would(tmp_path: Path, ranks: int):
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    assert on_ranks(ranks, str(script)).count("> fine") == ranks


GAPS = """
import torch
from tiny_models import masked_batch
from vlbeit.train.distributed import init_world
from vlbeit.train.empty_batch import fill_gaps

world = init_world("cpu", 30)
text, pair = masked_batch("text"), masked_batch("pair")
# Rank 0 lacks the second, rank 1 the first, and nobody has the third.
parts = {world.rank: [text, None, None] if world.rank == 0 else [None, pair, None]}
(found,) = fill_gaps(parts, world, True).values()
assert [b.stream for b in found] == ["text", "pair"], found
assert [len(b) for b in found] == ([len(text), 0] if world.rank == 0 else [0, len(pair)])
print(f"<{world.rank}> fine")
world.close()
"""


@pytest.mark.slow
def test_a_rank_without_a_sample_gets_an_empty_batch_where_another_has_one(tmp_path: Path):
    script = tmp_path / "gaps.py"
    script.write_text(GAPS)
    assert on_ranks(2, str(script)).count("> fine") == 2


# ------------------------------------------------------------------- what cannot be bit-equal


def test_exact_parts_are_shared_by_powers_of_two_and_others_are_named():
    for ranks in (1, 2, 4, 8):
        check_parts(8, ranks)
    check_parts(0, 3)  # off
    for ranks in (3, 6, 16):
        with pytest.raises(ConfigError, match=f"by 1, 2, 4, 8 processes, found {ranks}"):
            check_parts(8, ranks)


def test_exact_is_refused_where_ranks_would_show_in_what_is_learned():
    learning: Learning[Any] = Learning(
        weights={}, score=dict, count=dict, prepare=dict, tokens=len, flops=len
    )
    check_exact(nn.Linear(2, 2), learning)
    with pytest.raises(ConfigError, match="statistics of 1 are each process's own"):
        check_exact(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), learning)
    with pytest.raises(ConfigError, match="compares samples over all processes"):
        check_exact(nn.Linear(2, 2), replace(learning, gathers=True))
