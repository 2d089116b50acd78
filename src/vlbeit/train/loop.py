"""The training step, on one page: of pretraining and of every downstream task.

    for each step: plan -> micro-batches -> scores -> one backward per micro-batch
                   -> add over ranks -> clip -> guard -> update -> rows of the log -> checkpoint

What is learned comes as an argument (`Learning`): the loop knows names, weights and sums.

Sums of loss are divided once, by the counts of the whole global batch, before the backward pass;
so micro-batches, ranks and accumulation change nothing but rounding.
"""

import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlbeit.config import FinetuneConfig, PretrainConfig
from vlbeit.data.loader import Cursors, SkipBudget, StepData, StepLoader
from vlbeit.errors import NonFiniteError, StopRequested
from vlbeit.nn.linear import RoundedWeights, autocast
from vlbeit.nn.model import VLBeit
from vlbeit.train.distributed import World
from vlbeit.train.empty_batch import fill_gaps
from vlbeit.train.feed import Movable, closing, feed
from vlbeit.train.gradients import Gradients
from vlbeit.train.memory import ActivationMemory, memory_mb
from vlbeit.train.optim import lr_at, set_lr
from vlbeit.train.runfolder import RunFolder
from vlbeit.train.signals import StopSignal
from vlbeit.types import Score


class MicroBatch(Movable, Protocol):
    """What the loop asks of a micro-batch."""

    @property
    def stream(self) -> str: ...

    def __len__(self) -> int: ...

    def padding(self) -> int:
        """Places that hold no token and are computed all the same."""


B = TypeVar("B", bound=MicroBatch)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Learning(Generic[B]):
    """What a run learns, as far as the loop has to know."""

    weights: dict[str, float]
    """Of each objective in the sum that is minimised, in the order of the log."""
    score: Callable[[B], dict[str, Score]]
    """The scores of a micro-batch by objective, with a gradient."""
    count: Callable[[B], dict[str, int]]
    """How many positions or samples `score` will count, known before any forward pass."""
    prepare: Callable[[B], B]
    """The micro-batch, on the device, as `score` wants it; runs once and without precision's
    autocast."""
    tokens: Callable[[B], int]
    """Real tokens of a micro-batch."""
    flops: Callable[[B], int]
    """Useful arithmetic of forward and backward."""
    gathers: bool = False
    """Whether `score` exchanges tensors with the other ranks."""


class Learner(nn.Module, Generic[B]):
    """Model and scores as one module: the root that a sharded model is entered through."""

    def __init__(self, model: nn.Module, score: Callable[[B], dict[str, Score]]) -> None:
        super().__init__()
        self.model = model
        self.score = score

    def forward(self, batch: B, factors: dict[str, float]) -> tuple[Tensor, dict[str, Score]]:
        """The micro-batch's share of the step's loss, and its scores.

        `factors` holds weight / global count by objective.
        """
        scores = self.score(batch)
        parts = [factors[name] * score.loss_sum for name, score in scores.items()]
        return torch.stack([part.float() for part in parts]).sum(), scores

    def inside(self, ask: Callable[[], T]) -> T:
        """What `ask` returns, while a sharded model's weights can be had: without a gradient and
        at every rank together."""
        return ask()


@dataclass(kw_only=True)
class Progress:
    """Where a run stands: all of a checkpoint's state beside tensors. Plain JSON."""

    step: int
    cursors: Cursors
    nonfinite_in_row: int = 0
    nonfinite: int = 0


@dataclass(kw_only=True)
class Run(Generic[B]):
    """What a training loop needs; made by `learn` (opening.py)."""

    config: PretrainConfig | FinetuneConfig
    world: World
    model: VLBeit
    learner: Learner[B]
    """The model with the scores of `learning`; sharded or not."""
    gradients: Gradients
    """How the ranks' gradients are added."""
    optimizer: torch.optim.Optimizer
    learning: Learning[B]
    loader: StepLoader[B]
    budget: SkipBudget
    progress: Progress
    folder: RunFolder | None
    """At rank 0 only."""
    stop: StopSignal
    matrix_limit: float
    """Measured matrix products of this process, FLOP/s."""
    save: Callable[[], None]
    evaluate: Callable[[int], None]
    updated: Callable[[], None]
    """Called after each step that changed the weights."""


def train(run: Run[B]) -> None:
    """Run the steps from `run.progress.step` + 1 to `config.max_steps`.

    Raises:
        StopRequested: after a signal, once the state is saved.
        NonFiniteError: `optim.nonfinite_limit` steps in a row had to be skipped.
        DataBudgetError: more bad samples than `input.skip_budget`.
        LostWorkerError, SaveError: see distributed.py and checkpoint.py.
    """
    config, world, progress = run.config, run.world, run.progress
    learning = run.learning
    run.model.train()
    # Gathered weights are dropped after each pass: nothing to keep from one to the next.
    sharded = config.runtime.sharding != "none"
    first = progress.step + 1
    started, saved = time.perf_counter(), progress.step
    steps = run.loader.steps(progress.cursors, first, config.max_steps)
    for fed in closing(feed(steps, world.device, config.input.loader_timeout)):
        data, parts = fed.data, fed.parts
        began = time.perf_counter()
        lr = lr_at(data.step, config.optim)
        set_lr(run.optimizer, lr)

        # ---- forward and backward: one micro-batch after the other
        batches = [batch for part in parts.values() for batch in part if batch is not None]
        factors, skipped = global_factors(run, batches, data)
        table = torch.zeros(
            run.loader.parts, len(factors), 3, dtype=torch.float64, device=world.device
        )
        held = ActivationMemory(world.device)
        with contextlib.nullcontext() if sharded else RoundedWeights():
            for number, part in fill_gaps(parts, world, run.loader.aligned).items():
                scores = {name: Score.zero(world.device) for name in factors}
                for batch in part:
                    batch = learning.prepare(batch)
                    with RoundedWeights():  # what is computed again in backward rounds them alike
                        with (
                            held.forward(batch.stream),
                            autocast(world.device, config.precision),
                            world.guard("a forward pass"),
                        ):
                            loss, found = run.learner(batch, factors)
                        with world.guard("a backward pass"):
                            loss.backward()
                    for name, score in found.items():
                        scores[name] = scores[name] + score.detach()
                table[number] = table_of(scores)
                run.gradients.end_part()

        # ---- guard and update
        grad_norm = run.gradients.finish(config.optim.clip or float("inf"))
        sums = global_sums(run, table)
        finite = bool(torch.isfinite(grad_norm)) and all(s["finite"] for s in sums.values())
        if finite:
            run.optimizer.step()
            run.updated()
            progress.nonfinite_in_row = 0
        else:
            progress.nonfinite_in_row += 1
            progress.nonfinite += 1
        run.optimizer.zero_grad(set_to_none=True)
        progress.step, progress.cursors = data.step, data.cursors
        run.budget.add(data.visits, skipped)

        # ---- log
        if run.folder is not None:
            took = time.perf_counter() - began
            row = metrics_row(run, data, sums, lr, float(grad_norm), took, batches)
            row["activation_mb"] = held.mb()
            write_rows(run, run.folder, data, row, skipped, finite)
            if data.step % config.log.print_every == 0 or data.step in (first, config.max_steps):
                done = data.step - first + 1
                left = (time.perf_counter() - started) / done * (config.max_steps - data.step)
                run.folder.log(console_line(row, left))

        # ---- evaluate, save, stop (in this order: a checkpoint's rows are all written before it)
        run.budget.check()
        if progress.nonfinite_in_row >= config.optim.nonfinite_limit:
            raise NonFiniteError(
                f"step {data.step}: loss or gradient was not finite {progress.nonfinite_in_row} "
                "steps in a row (optim.nonfinite_limit). The newest checkpoint is from before; "
                "lower optim.lr, raise optim.warmup_steps or look at the samples named in log.txt"
            )
        if config.log.eval_every and data.step % config.log.eval_every == 0:
            run.evaluate(data.step)
            run.model.train()
        stopping = bool(flag_over_ranks(world, run.stop.requested))
        ending = stopping or data.step == config.max_steps
        if data.step % config.save_every == 0 or ending:
            # A skipped step leaves the weights of the last good one; those are saved at the end.
            if progress.nonfinite_in_row == 0 or ending:
                run.save()
                saved = data.step
        if stopping:
            raise StopRequested(
                f"stopped by {run.stop.name or 'a signal to another rank'} after step {data.step}; "
                f"saved as step {saved}. Run the same command again to go on."
            )


def flag_over_ranks(world: World, flag: bool) -> int:
    """How many ranks raise it; the same answer everywhere."""
    if world.size == 1:
        return int(flag)
    return int(world.sum_over_ranks(torch.tensor([float(flag)], device=world.device)).item())


def global_factors(
    run: Run[B], batches: list[B], data: StepData[B]
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """weight / (positions to predict in the global batch) by objective; and all ranks' skips."""
    weights = run.learning.weights
    names = list(weights)
    counts = torch.zeros(len(names) + 1, dtype=torch.float64)
    for batch in batches:
        for name, count in run.learning.count(batch).items():
            counts[names.index(name)] += count
    counts[-1] = len(data.skips)
    counts = run.world.sum_over_ranks(counts.to(run.world.device)).cpu()
    factors = {
        name: weights[name] / max(float(count), 1.0)
        for name, count in zip(names, counts, strict=False)
    }
    skipped = data.skips
    if counts[-1] > 0 and run.world.size > 1:
        skipped = [skip for rank in run.world.gather_objects(data.skips) for skip in rank]
    return factors, skipped


def table_of(scores: dict[str, Score]) -> Tensor:
    """(objectives, 3) float64: sum of the loss, count, correct."""
    return torch.stack(
        [torch.stack([s.loss_sum.double(), s.count, s.correct]) for s in scores.values()]
    )


def global_sums(run: Run[B], table: Tensor) -> dict[str, dict[str, Any]]:
    """Scores over all ranks, by objective; those that predicted nothing are left out.

    Shapes: table (parts, objectives, 3) with this rank's parts in it and zeros for the others', so
    that the order in which ranks are added does not matter.
    """
    table = run.world.sum_over_ranks(table).cpu().sum(dim=0)
    return {
        name: {
            "loss": float(loss / count),
            "count": int(count),
            "accuracy": float(correct / count),
            "finite": bool(torch.isfinite(loss)),
        }
        for name, (loss, count, correct) in zip(run.learning.weights, table, strict=True)
        if count > 0
    }


def metrics_row(
    run: Run[B],
    data: StepData[B],
    sums: dict[str, dict[str, Any]],
    lr: float,
    grad_norm: float,
    took: float,
    batches: list[B],
) -> dict[str, Any]:
    """One row of metrics.jsonl. `loss` is hexadecimal, so that equal rows mean equal bits.

    `padding_share` is that of rank 0. Rates are of rank 0 times the ranks; `limit_share` is the
    step's useful FLOP/s over the matrix products this process was measured to do at the start.
    """
    learning = run.learning
    padding = sum(batch.padding() for batch in batches)
    total = sum(learning.weights[name] * s["loss"] for name, s in sums.items())
    samples = sum(len(batch) for batch in batches)
    tokens = sum(learning.tokens(batch) for batch in batches)
    flops = sum(learning.flops(batch) for batch in batches)
    return {
        "step": data.step,
        "loss": float(total).hex(),
        "objectives": {
            name: {key: s[key] for key in ("loss", "count", "accuracy")} for name, s in sums.items()
        },
        "lr": lr,
        "grad_norm": grad_norm,
        "seconds": round(took, 4),
        "waited": round(data.waited, 4),
        "samples_per_second": round(samples * run.world.size / took, 1),
        "tokens_per_second": round(tokens * run.world.size / took),
        "padding_share": round(padding / (tokens + padding), 4),
        "limit_share": round(flops / took / run.matrix_limit, 4),
        "memory_mb": memory_mb(run.world.device),
    }


def write_rows(
    run: Run[B],
    folder: RunFolder,
    data: StepData[B],
    row: dict[str, Any],
    skipped: list[dict[str, Any]],
    finite: bool,
) -> None:
    """The step's rows in metrics.jsonl, ledger.jsonl and skips.jsonl."""
    for skip in skipped:
        folder.skips.append(skip)
        folder.log(
            f"step {data.step}: skipped {skip['sample_id']} ({skip['shard']}: {skip['member']}: "
            f"{skip['reason']})"
        )
    folder.ledger.append(ledger_row(data, run.config.log.ledger))
    if not finite:
        row["skipped"] = "non-finite"
        folder.log(
            f"step {data.step}: loss or gradient is not finite; the step was skipped on all "
            f"ranks. Samples: {data.ledger}"
        )
    if data.step % run.config.log.every == 0 or not finite:
        folder.add_metrics(row)


def ledger_row(data: StepData[B], kind: str) -> dict[str, Any]:
    """The ordered sample ids of the global step by stream and source, or one digest for each."""
    if kind == "full":
        return {"step": data.step, **data.ledger}
    return {
        "step": data.step,
        **{
            stream: {name: digest_of(ids) for name, ids in sources.items()}
            for stream, sources in data.ledger.items()
        },
    }


def digest_of(ids: list[str]) -> str:
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


def console_line(row: dict[str, Any], left: float) -> str:
    """What a person reads while a run goes on."""
    parts = [f"step {row['step']:>7}", f"loss {float.fromhex(row['loss']):7.4f}"]
    for name, s in row["objectives"].items():
        parts.append(f"{name} {s['loss']:.3f} ({100 * s['accuracy']:.1f} %)")
    parts += [
        f"lr {row['lr']:.2e}",
        f"|g| {row['grad_norm']:.2f}",
        f"{row['samples_per_second']:.0f} samples/s",
        f"{row['tokens_per_second']} tokens/s",
        f"{100 * row['limit_share']:.0f} % of limit",
        f"{row['memory_mb']} MB",
        f"left {time.strftime('%H:%M:%S', time.gmtime(left))}",
    ]
    return " | ".join(parts)
