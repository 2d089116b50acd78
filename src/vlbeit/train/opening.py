"""How every run begins, goes on, saves and ends: the run folder, the lock, the resume.

Pretraining, fine-tuning and the training of a visual tokenizer open their run here; the first two
also learn here (`learn`). What differs between them comes as arguments.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

from vlbeit.allocator import keep_freed_memory
from vlbeit.checkpoint import (
    Checkpoint,
    Tokenizer,
    check_space,
    clear_shares,
    list_checkpoints,
    load_newest,
    merged_shares,
    open_checkpoint,
    remove_leftovers,
    save_checkpoint,
    write_shares,
)
from vlbeit.config import FinetuneConfig, PretrainConfig, RuntimeConfig, from_dict, to_dict
from vlbeit.data.loader import SkipBudget, StepLoader
from vlbeit.data.records import RecordSource
from vlbeit.errors import ConfigError, InputError
from vlbeit.nn.model import VLBeit
from vlbeit.tensorfile import tensor_bytes
from vlbeit.train.distributed import World, init_world, set_threads, use_deterministic_kernels
from vlbeit.train.event_files import EventFiles
from vlbeit.train.gradients import Gradients, OrderedGradients, SummedGradients
from vlbeit.train.loop import Learner, Learning, MicroBatch, Progress, Run, train
from vlbeit.train.optim import load_optimizer_tensors, optimizer_tensors
from vlbeit.train.runfolder import RunFolder, environment
from vlbeit.train.sharding import (
    ShardedGradients,
    ask_inside,
    load_optimizer_shares,
    local,
    shard_model,
)
from vlbeit.train.signals import StopSignal

B = TypeVar("B", bound=MicroBatch)

MAY_CHANGE = (
    "run_dir",
    "data",
    "max_steps",
    "save_every",
    "device",
    "log",
    "runtime",
    "batch.micro",
    "input.workers",
    "input.loader_timeout",
    "input.skip_budget",
)
"""Settings that a resumed run may have otherwise: none of them changes what is learned from what,
except by rounding. The sources of the data must keep their names and records."""


class RunConfig(Protocol):
    """What every run's config has."""

    @property
    def run_dir(self) -> str: ...
    @property
    def device(self) -> Literal["auto", "cpu", "cuda"]: ...
    @property
    def runtime(self) -> RuntimeConfig: ...


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A run folder that this process (rank 0) holds, and where the run stands in it."""

    run_dir: Path
    world: World
    threads: int
    folder: RunFolder | None
    """At rank 0 only."""
    stop: StopSignal
    checkpoint: Checkpoint | None
    """The newest good one: the run goes on from it. None: it begins."""

    def log(self, text: str) -> None:
        """One line to terminal and log.txt, from rank 0."""
        if self.folder is not None:
            self.folder.log(text)

    def write_start(self, step: int, config: Any) -> None:
        """At rank 0, once everything is loaded: cut the rows after `step`, note what runs where.

        A run killed before its first checkpoint starts over, its step-0 rows included.
        """
        assert self.folder is not None
        self.folder.truncate_after(step if self.checkpoint is not None else -1)
        self.folder.write_json("config.json", to_dict(config))
        self.folder.write_json(
            "env.json",
            environment(world_size=self.world.size, threads=self.threads, device=self.world.device),
        )


@contextlib.contextmanager
def open_run(config: RunConfig) -> Iterator[Opened]:
    """Signals, ranks, threads, the lock of the run folder, and the checkpoint to go on from.

    Raises:
        SaveError: another process holds the folder.
        InputError: there are checkpoints, and none of them is good.
    """
    stop = StopSignal().install()
    world = init_world(config.device, config.runtime.step_timeout)
    check_parts(config.runtime.exact, world.size)
    threads = set_threads(config.runtime.threads, world.local_size)
    use_deterministic_kernels()
    keep_freed_memory()
    run_dir = Path(config.run_dir)
    folder = RunFolder(run_dir) if world.main else None
    log: Callable[[str], None] = folder.log if folder is not None else (lambda text: None)

    def choose() -> str:
        remove_leftovers(run_dir, log)
        newest = load_newest(run_dir, log)
        return "" if newest is None else str(newest.folder)

    try:
        world.on_main(lambda: folder.acquire() if folder is not None else None)
        chosen = world.on_main(choose)
        checkpoint = open_checkpoint(Path(chosen)) if chosen else None
        yield Opened(
            run_dir=run_dir,
            world=world,
            threads=threads,
            folder=folder,
            stop=stop,
            checkpoint=checkpoint,
        )
    finally:
        if folder is not None:
            folder.release()


def check_same_run(opened: Opened, config: Any, may_change: Sequence[str] = MAY_CHANGE) -> None:
    """Compare the config with that of the run to be resumed; note what changes only rounding.

    Raises:
        ConfigError: with every setting that differs.
    """
    checkpoint = opened.checkpoint
    if checkpoint is None:
        return
    try:
        # A setting that is younger than the checkpoint had its default then.
        before = to_dict(from_dict(type(config), checkpoint.config))
    except ConfigError:  # one that this release does not know: it is listed below
        before = checkpoint.config
    now, then = flat(to_dict(config)), flat(before)
    differ = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
        and not any(name == free or name.startswith(free + ".") for free in may_change)
    ]
    if differ:
        raise ConfigError(
            f"{checkpoint.folder} belongs to a run with other settings: {'; '.join(differ)}. "
            "Give the same settings, or another --run-dir"
        )
    parts = config.runtime.exact
    exact = parts > 0 and then.get("runtime.exact") == parts
    for words in checkpoint.differences(
        world_size=opened.world.size, threads=opened.threads, exact=exact
    ):
        opened.log(f"note: {words}")


def check_same_data(
    checkpoint: Checkpoint,
    now: Mapping[str, Mapping[str, int]],
    contents: Mapping[str, Mapping[str, str]],
) -> None:
    """Raise InputError when a source has other samples than when the checkpoint was written.

    Args:
        now: samples by stream and source.
        contents: digests of the records by stream and source (`source_contents`).
    """
    then: dict[str, dict[str, int]] = checkpoint.state["sources"]
    if then != now:
        raise InputError(
            f"{checkpoint.folder} was trained on {then} (records by stream and source), --data now "
            f"has {now}: give the same data, or another --run-dir"
        )
    # Checkpoints of release 0.1 do not know what the records held.
    known: dict[str, dict[str, str]] = checkpoint.state.get("contents", {})
    for stream, sources in known.items():
        for name, digest in sources.items():
            if contents[stream][name] != digest:
                raise InputError(
                    f"{checkpoint.folder}: source {name} of {stream} has as many records as when "
                    f"it was written, but others: their digest was {digest} and is "
                    f"{contents[stream][name]}. Give the same data, or begin anew with another "
                    "--run-dir"
                )


def source_facts(
    sources: Mapping[str, Sequence[RecordSource]],
) -> dict[str, dict[str, int]]:
    """Records by stream and source: what a resume must find again."""
    return {stream: {s.name: len(s) for s in group} for stream, group in sources.items()}


def source_contents(
    sources: Mapping[str, Sequence[RecordSource]],
) -> dict[str, dict[str, str]]:
    """Digests of the records by stream and source: so are these."""
    return {
        stream: {s.name: s.records_digest() for s in group} for stream, group in sources.items()
    }


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.002, ...}"""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{prefix}{name}."))
        else:
            leaves[prefix + name] = value
    return leaves


class RunningMean:
    """An exponential running mean of a model's trained weights (EMA)."""

    def __init__(self, model: VLBeit, decay: float) -> None:
        self.model, self.decay = model, decay
        self.mean = {
            name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad
        }
        """On a sharded model its shares."""

    def update(self) -> None:
        """mean = decay * mean + (1 - decay) * weights."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    local(self.mean[name]).lerp_(local(parameter), 1 - self.decay)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the mean inside the block, and its own weights again after it."""
        own = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        try:
            self._fill(self.mean)
            yield
        finally:
            self._fill(own)

    def _fill(self, tensors: Mapping[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name in tensors:
                    local(parameter).copy_(local(tensors[name]))


TRAINED = "trained/"
"""In optimizer.safetensors of a run with a running mean: the weights that training goes on from.
model.safetensors then holds the mean, because it is what everybody else should use."""


def learn(
    opened: Opened,
    config: PretrainConfig | FinetuneConfig,
    *,
    model: VLBeit,
    optimizer: Callable[[], torch.optim.Optimizer],
    learning: Learning[B],
    loader: StepLoader[B],
    sources: Mapping[str, Mapping[str, int]],
    contents: Mapping[str, Mapping[str, str]],
    preprocessor: Mapping[str, Any],
    text: Tokenizer,
    visual: Tokenizer | None,
    evaluate: Callable[[], Mapping[str, Any]],
    summary: str,
    matrix_limit: float,
    first_skips: Sequence[Mapping[str, Any]] = (),
    files: Mapping[str, Mapping[str, Any]] = {},
    ema: float = 0.0,
) -> Path:
    """Train from the beginning, or from the checkpoint in `opened`; returns the run folder.

    Args:
        model: fresh or as it starts; a resume overwrites it from the checkpoint, and a sharded run
            shares its parameters out.
        optimizer: makes that of the model's parameters as they are then.
        sources: samples by stream and source (`source_facts`).
        contents: digests of their records (`source_contents`).
        preprocessor: what `preprocessing` says.
        evaluate: held-out scores of the model as it is, the columns of a row of eval.jsonl;
            empty: nothing held out.
        summary: the line that says what is trained on what.
        first_skips: rows of skips.jsonl from before the first step.
        files: more JSON files for every checkpoint, by name.
        ema: decay of the running mean of the weights that is saved as the model; 0: none is kept.
    """
    world, folder, checkpoint = opened.world, opened.folder, opened.checkpoint
    sharded = config.runtime.sharding == "full" and world.size > 1
    if config.runtime.exact:
        check_exact(model, learning)
    progress = Progress(step=0, cursors=loader.start_cursors())
    budget = SkipBudget(config.input.skip_budget)

    # ---- weights while they are whole, then who keeps what, then the state that goes with them
    if checkpoint is not None:
        model.load_tensors(checkpoint.model_tensors(), str(checkpoint.folder))
    parameters = tensor_bytes(dict(model.named_parameters()))
    learner = Learner(model, learning.score)
    gradients: Gradients
    if sharded:
        shard_model(learner, model, world)
        gradients = ShardedGradients(model.parameters(), world)
    elif config.runtime.exact:
        gradients = OrderedGradients(model.parameters(), world)
    else:
        gradients = SummedGradients(model.parameters(), world)
    adamw = optimizer()
    mean = RunningMean(model, ema) if ema else None

    def trained() -> dict[str, Tensor]:
        names = () if mean is None else mean.mean
        return {TRAINED + name: model.get_parameter(name).detach() for name in names}

    if checkpoint is not None:
        # With a running mean the weights above were the mean; training goes on from its own.
        if sharded:
            load_optimizer_shares(adamw, checkpoint.optimizer_place, trained())
        else:
            moments = checkpoint.optimizer_tensors()
            for name, weights in trained().items():
                weights.copy_(moments.pop(name))
            load_optimizer_tensors(adamw, moments)
        progress = Progress(
            step=checkpoint.step,
            cursors=checkpoint.state["cursors"],
            nonfinite_in_row=checkpoint.state["nonfinite_in_row"],
            nonfinite=checkpoint.state["nonfinite"],
        )
        budget = SkipBudget(config.input.skip_budget, checkpoint.state["budget"])

    def start() -> None:
        assert folder is not None
        if checkpoint is None:
            check_space(opened.run_dir, 3 * parameters)  # weights and two moments
        opened.write_start(progress.step, config)
        if config.log.tensorboard:
            # Those of a run that was killed before its first checkpoint are void as a whole.
            after = progress.step + 1 if checkpoint is not None else 0
            folder.events = EventFiles(opened.run_dir, after)
        if checkpoint is None:
            for row in first_skips:
                folder.skips.append({"step": 0, **row})
        opened.log(summary)
        if checkpoint is not None:
            opened.log(f"going on from {checkpoint.folder} (step {checkpoint.step})")

    world.on_main(start)
    averaged = contextlib.nullcontext if mean is None else mean.in_place

    def save() -> None:
        began = time.perf_counter()
        state = optimizer_tensors(adamw) | {n: w.clone() for n, w in trained().items()}
        if sharded:
            world.on_main(lambda: clear_shares(opened.run_dir))
            with averaged(), world.guard("writing shares"):
                write_shares(opened.run_dir, model.state_dict(), state)

        def write() -> None:
            assert folder is not None
            folder.sync()
            with averaged():
                whole: tuple[Mapping[str, Tensor], Mapping[str, Tensor] | Path]
                whole = (model.state_dict(), state)
                if sharded:
                    whole = merged_shares(opened.run_dir)
                place = save_checkpoint(
                    opened.run_dir,
                    progress.step,
                    model_tensors=whole[0],
                    optimizer_tensors=whole[1],
                    state={
                        "cursors": progress.cursors,
                        "nonfinite_in_row": progress.nonfinite_in_row,
                        "nonfinite": progress.nonfinite,
                        "budget": budget.state(),
                        "sources": sources,
                        "contents": contents,
                        "seed": config.seed,
                    },
                    config=to_dict(config),
                    preprocessor=preprocessor,
                    text_tokenizer=text,
                    visual_tokenizer=visual,
                    world_size=world.size,
                    threads=opened.threads,
                    keep=config.log.keep,
                    log=opened.log,
                    files=files,
                )
            clear_shares(opened.run_dir)
            opened.log(f"saved {place} in {time.perf_counter() - began:.1f} s")

        world.on_main(write)

    def evaluate_at(step: int) -> None:
        # Every rank could take a share; at these sizes rank 0 alone is quick enough. Where it does
        # not have the weights, all ranks do the same work together.
        together = None
        if sharded:
            with averaged():
                together = ask_inside(learner, evaluate)

        def measure() -> None:
            assert folder is not None
            found = together
            if found is None:
                with averaged():
                    found = evaluate()
            if found:
                folder.add_evaluation({"step": step, **found})
                folder.log(held_out_line(step, found))

        world.on_main(measure)

    if progress.step >= config.max_steps:
        opened.log(f"step {progress.step} of {config.max_steps} is already done: nothing to do")
        return opened.run_dir
    if checkpoint is None and config.log.eval_every:
        evaluate_at(0)
    with loader:
        train(
            Run(
                config=config,
                world=world,
                model=model,
                learner=learner,
                gradients=gradients,
                optimizer=adamw,
                learning=learning,
                loader=loader,
                budget=budget,
                progress=progress,
                folder=folder,
                stop=opened.stop,
                matrix_limit=matrix_limit,
                save=save,
                evaluate=evaluate_at,
                updated=(lambda: None) if mean is None else mean.update,
            )
        )
    world.on_main(
        lambda: opened.log(
            f"done: {progress.step} steps, {budget.skipped} samples skipped, {progress.nonfinite} "
            f"steps not finite. Newest checkpoint: {list_checkpoints(opened.run_dir)[-1][1]}"
        )
    )
    world.close()
    return opened.run_dir


def check_parts(parts: int, ranks: int) -> None:
    """Raise ConfigError when so many ranks cannot share the parts of `runtime.exact`."""
    if parts % ranks:
        legal = ", ".join(str(2**i) for i in range(parts.bit_length()))
        raise ConfigError(
            f"runtime.exact {parts} can be shared by {legal} processes, found {ranks}: start so "
            "many, or set it to 0"
        )


def check_exact(model: nn.Module, learning: Learning[B]) -> None:
    """Raise ConfigError where another number of ranks would learn something else after all."""
    if learning.gathers:
        raise ConfigError(
            "runtime.exact: this task compares samples over all processes, so what it learns "
            "depends on their number; set it to 0"
        )
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        raise ConfigError(
            f"runtime.exact: the running statistics of {norms[0]} are each process's own; use "
            "another norm, or set runtime.exact to 0"
        )


def held_out_line(step: int, found: Mapping[str, Any]) -> str:
    """What a person reads of an evaluation."""
    words = [
        f"{k} {s['loss']:.3f} ({100 * s['accuracy']:.1f} %)" for k, s in found["objectives"].items()
    ]
    words += [f"{name} {value:.4f}" for name, value in found.get("figures", {}).items()]
    return " | ".join([f"step {step:>7}", "held out", *words])


def wait_for(ready: Callable[[], bool], what: str, hours: float = 24.0) -> None:
    """Poll until rank 0 has done something longer than a collective may take."""
    deadline = time.monotonic() + hours * 3600
    while not ready():
        if time.monotonic() > deadline:
            raise InputError(f"rank {os.environ.get('RANK', '0')} waited {hours} h for {what}")
        time.sleep(0.2)
