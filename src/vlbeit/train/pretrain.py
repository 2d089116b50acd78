"""`vlbeit pretrain`: from a config to a finished run folder, or from where it was left."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vlbeit.checkpoint import (
    Checkpoint,
    check_space,
    list_checkpoints,
    load_newest,
    open_checkpoint,
    remove_leftovers,
    save_checkpoint,
)
from vlbeit.config import PretrainConfig, to_dict
from vlbeit.data.loader import SkipBudget, build_loader, build_streams, open_streams
from vlbeit.data.probe import check_sources
from vlbeit.data.records import RecordSource
from vlbeit.data.streams import TextStream
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.heldout import HeldOut
from vlbeit.nn.model import VLBeit
from vlbeit.tokens.text import TextTokenizer
from vlbeit.tokens.visual import VisualTokenizer, load_visual_tokenizer
from vlbeit.train.distributed import World, init_world, set_threads, use_deterministic_kernels
from vlbeit.train.limit import matrix_limit
from vlbeit.train.loop import Progress, Run, train
from vlbeit.train.optim import build_optimizer, load_optimizer_tensors, optimizer_tensors
from vlbeit.train.runfolder import RunFolder, environment
from vlbeit.train.signals import StopSignal
from vlbeit.train.tokenizers import find_tokenizers, train_missing_tokenizers
from vlbeit.types import Stream
from vlbeit.validate import validate

MAY_CHANGE = (
    "run_dir",
    "data",
    "max_steps",
    "save_every",
    "device",
    "log",
    "runtime",
    "tokenizers",
    "batch.micro",
    "input.workers",
    "input.loader_timeout",
    "input.skip_budget",
)
"""Settings that a resumed run may have otherwise: none of them changes what is learned from what,
except by rounding. The sources of the data must keep their names and numbers of records; the
tokenizers are the checkpoint's."""


def pretrain(config: PretrainConfig) -> Path:
    """Run or resume; returns the run folder.

    Raises:
        VLBeitError: every way to end early has its exit code (errors.py).
    """
    validate(config)
    stop = StopSignal().install()
    world = init_world(config.device, config.runtime.step_timeout)
    threads = set_threads(config.runtime.threads, world.local_size)
    use_deterministic_kernels()
    folder = RunFolder(config.run_dir) if world.main else None
    try:
        world.on_main(lambda: folder.acquire() if folder is not None else None)
        return _pretrain(config, world, threads, folder, stop)
    finally:
        if folder is not None:
            folder.release()


def _pretrain(
    config: PretrainConfig, world: World, threads: int, folder: RunFolder | None, stop: StopSignal
) -> Path:
    log: Callable[[str], None] = folder.log if folder is not None else (lambda text: None)
    run_dir = Path(config.run_dir)

    # ---- the checkpoint to go on from, if any
    def choose() -> str:
        remove_leftovers(run_dir, log)
        newest = load_newest(run_dir, log)
        return "" if newest is None else str(newest.folder)

    chosen = world.on_main(choose)
    checkpoint = open_checkpoint(Path(chosen)) if chosen else None
    if checkpoint is not None:
        check_same_run(config, checkpoint)
        for words in checkpoint.differences(world_size=world.size, threads=threads):
            log(f"note: {words}")

    # ---- tokenizers and data
    sources = open_streams(config, "train")
    world.on_main(lambda: check_sources(sources))
    paths = find_tokenizers(config, None if checkpoint is None else checkpoint.folder)
    if paths.missing():
        if world.main:
            train_missing_tokenizers(config, paths, sources, world.device, log)
        else:
            wait_for(paths.complete, "rank 0 to train the tokenizers")
    text = TextTokenizer.load(paths.text)
    visual = load_visual_tokenizer(paths.visual).to(world.device) if paths.visual else None
    check_tokenizers(config, text, visual)
    streams = build_streams(config, sources, text, log=log)
    loader = build_loader(config, streams, rank=world.rank, world=world.size)

    if checkpoint is not None:
        check_same_data(checkpoint, sources)

    # ---- model and optimizer
    model = VLBeit(config.model, seed=config.seed).to(world.device)
    model.backbone.checkpoint_activations = config.runtime.checkpoint_activations
    optimizer = build_optimizer(model, config.optim, config.model.layers)
    progress = Progress(step=0, cursors=loader.start_cursors())
    budget = SkipBudget(config.input.skip_budget)
    if checkpoint is not None:
        model.load_tensors(checkpoint.model_tensors(), str(checkpoint.folder))
        load_optimizer_tensors(optimizer, checkpoint.optimizer_tensors())
        progress = Progress(
            step=checkpoint.step,
            cursors=checkpoint.state["cursors"],
            nonfinite_in_row=checkpoint.state["nonfinite_in_row"],
            nonfinite=checkpoint.state["nonfinite"],
        )
        budget = SkipBudget(config.input.skip_budget, checkpoint.state["budget"])

    # ---- the run folder
    held_out = HeldOut(config, text, visual)

    def start() -> None:
        assert folder is not None
        parameters = sum(p.numel() * p.element_size() for p in model.parameters())
        if checkpoint is None:
            check_space(run_dir, 3 * parameters)  # weights and two moments
        # A run killed before its first checkpoint starts over, its step-0 rows included.
        folder.truncate_after(progress.step if checkpoint is not None else -1)
        folder.write_json("config.json", to_dict(config))
        folder.write_json(
            "env.json", environment(world_size=world.size, threads=threads, device=world.device)
        )
        if checkpoint is None:
            for row in [row for s in streams if isinstance(s, TextStream) for row in s.skips()]:
                folder.skips.append({"step": 0, **row})
        log(summary(config, model, sources, world, threads))
        if checkpoint is not None:
            log(f"going on from {checkpoint.folder} (step {checkpoint.step})")

    world.on_main(start)

    def save() -> None:
        def write() -> None:
            assert folder is not None
            folder.sync()
            began = time.perf_counter()
            place = save_checkpoint(
                run_dir,
                progress.step,
                model_tensors=model.state_dict(),
                optimizer_tensors=optimizer_tensors(optimizer),
                state={
                    "cursors": progress.cursors,
                    "nonfinite_in_row": progress.nonfinite_in_row,
                    "nonfinite": progress.nonfinite,
                    "budget": budget.state(),
                    "sources": source_facts(sources),
                    "seed": config.seed,
                },
                config=to_dict(config),
                preprocessor=preprocessor(config),
                text_tokenizer=text,
                visual_tokenizer=visual,
                world_size=world.size,
                threads=threads,
                keep=config.log.keep,
                log=log,
            )
            log(f"saved {place} in {time.perf_counter() - began:.1f} s")

        world.on_main(write)

    def evaluate(step: int) -> None:
        # Every rank could take a share; at these sizes rank 0 alone is quick enough.
        def measure() -> None:
            assert folder is not None
            found = held_out.measure(model, world.device)
            if found:
                folder.evals.append({"step": step, "objectives": found})
                folder.log(held_out_line(step, found))

        world.on_main(measure)

    if progress.step >= config.max_steps:
        log(f"step {progress.step} of {config.max_steps} is already done: nothing to do")
        return run_dir
    if checkpoint is None and config.log.eval_every:
        evaluate(0)
    with loader:
        train(
            Run(
                config=config,
                world=world,
                model=model,
                optimizer=optimizer,
                visual=visual,
                loader=loader,
                budget=budget,
                progress=progress,
                folder=folder,
                stop=stop,
                matrix_limit=matrix_limit(world.device, config.precision),
                save=save,
                evaluate=evaluate,
            )
        )
    world.on_main(
        lambda: log(
            f"done: {progress.step} steps, {budget.skipped} samples skipped, {progress.nonfinite} "
            f"steps not finite. Newest checkpoint: {list_checkpoints(run_dir)[-1][1]}"
        )
    )
    world.close()
    return run_dir


def source_facts(sources: dict[Stream, list[RecordSource]]) -> dict[str, dict[str, int]]:
    """Records by stream and source: what a resume must find again."""
    return {stream: {s.name: len(s) for s in group} for stream, group in sources.items()}


def check_tokenizers(
    config: PretrainConfig, text: TextTokenizer, visual: VisualTokenizer | None
) -> None:
    """Raise ConfigError when the tokenizers do not fit the model."""
    if text.size > config.model.vocab:
        raise ConfigError(
            f"model.vocab is {config.model.vocab}, the text tokenizer has {text.size} pieces: "
            f"set --model.vocab {text.size} or train a smaller one"
        )
    if visual is None:
        return
    if visual.codes != config.model.codes:
        raise ConfigError(
            f"model.codes is {config.model.codes}, the visual tokenizer has {visual.codes} codes: "
            f"set --model.codes {visual.codes}"
        )
    if visual.patch != config.model.patch:
        raise ConfigError(
            f"model.patch is {config.model.patch}, the visual tokenizer's is {visual.patch}: "
            "every patch needs one code"
        )


def check_same_run(config: PretrainConfig, checkpoint: Checkpoint) -> None:
    """Raise ConfigError with every setting that differs from the run to be resumed."""
    now, then = flat(to_dict(config)), flat(checkpoint.config)
    differ = [
        f"{name} was {then.get(name)!r} and is {now.get(name)!r}"
        for name in sorted({*now, *then})
        if now.get(name) != then.get(name)
        and not any(name == free or name.startswith(free + ".") for free in MAY_CHANGE)
    ]
    if differ:
        raise ConfigError(
            f"{checkpoint.folder} belongs to a run with other settings: {'; '.join(differ)}. "
            "Give the same settings, or another --run-dir"
        )


def check_same_data(checkpoint: Checkpoint, sources: dict[Stream, list[RecordSource]]) -> None:
    """Raise InputError when a source has other records than when the checkpoint was written."""
    then: dict[str, dict[str, int]] = checkpoint.state["sources"]
    now = source_facts(sources)
    if then != now:
        raise InputError(
            f"{checkpoint.folder} was trained on {then} (records by stream and source), --data now "
            f"has {now}: give the same data, or another --run-dir"
        )


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim.lr": 0.002, ...}"""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            leaves.update(flat(value, f"{prefix}{name}."))
        else:
            leaves[prefix + name] = value
    return leaves


def preprocessor(config: PretrainConfig) -> dict[str, Any]:
    """What somebody needs beside the weights to feed the model as in training."""
    return {
        "image_size": list(config.model.image_size),
        "patch": config.model.patch,
        "pixels": "uint8 RGB / 127.5 - 1 (mean = std = 0.5)",
        "resize": "bicubic, squashed to image_size",
        "pair_text_length": config.input.pair_text_length,
        "text_length": config.input.text_length,
    }


def summary(
    config: PretrainConfig,
    model: VLBeit,
    sources: dict[Stream, list[RecordSource]],
    world: World,
    threads: int,
) -> str:
    """One line about what is trained on what, where."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    data = "; ".join(
        f"{stream}s: " + ", ".join(f"{s.name} {len(s)}" for s in group)
        for stream, group in sources.items()
    )
    return (
        f"{config.recipe}: {parameters:.1f} M parameters, {data}; {world.size} process(es) x "
        f"{threads} thread(s) on {world.device}, {config.precision}"
    )


def held_out_line(step: int, found: dict[str, dict[str, float]]) -> str:
    """What a person reads of an evaluation."""
    words = [f"{k} {s['loss']:.3f} ({100 * s['accuracy']:.1f} %)" for k, s in found.items()]
    return " | ".join([f"step {step:>7}", "held out", *words])


def wait_for(ready: Callable[[], bool], what: str, hours: float = 24.0) -> None:
    """Poll until rank 0 has done something longer than a collective may take."""
    deadline = time.monotonic() + hours * 3600
    while not ready():
        if time.monotonic() > deadline:
            raise InputError(f"rank {os.environ.get('RANK', '0')} waited {hours} h for {what}")
        time.sleep(0.2)
