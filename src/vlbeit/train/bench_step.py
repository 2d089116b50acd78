"""`vlbeit bench step`: one pretraining step on random inputs, against the machine's limit.

The step is the one of the training loop (same objectives, optimizer, clipping, one backward per
micro-batch), so no data is needed. The share of the limit is the arithmetic that the method needs
(nn/flops.py: padding not counted, heads on masked positions only) over what plain matrix products
reach in the same minute: it means the same on every machine.
"""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlbeit.config import PretrainConfig
from vlbeit.data.collate import Sample, collate
from vlbeit.data.order import Visit
from vlbeit.data.streams import PictureSettings, WordSettings
from vlbeit.draws import Draws
from vlbeit.nn.flops import training_flops
from vlbeit.nn.linear import RoundedWeights, autocast
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import OBJECTIVES, count_targets, score_batch, views
from vlbeit.tokens.text import SPECIALS, TextTokenizer
from vlbeit.train.block_settings import set_blocks
from vlbeit.train.limit import matrix_limit, synchronize
from vlbeit.train.loop import Learner
from vlbeit.train.memory import ActivationMemory, memory_mb
from vlbeit.train.optim import build_optimizer
from vlbeit.types import STREAMS, Batch, Stream


class Took:
    """Seconds of one call, on the wall and of this process on all its threads."""

    def __init__(self, call: Callable[[], object], device: torch.device) -> None:
        synchronize(device)
        wall, processor = time.perf_counter(), time.process_time()
        call()
        synchronize(device)
        self.wall = time.perf_counter() - wall
        self.processor = time.process_time() - processor


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """What the words of the command ask for."""

    run: PretrainConfig
    steps: int
    device: torch.device
    as_json: bool
    find_micro: bool = False
    """Try micro-batches of several sizes, not only that of `run`."""
    peak_flops: float = 0.0
    """Of the device, as its maker states it; 0: not stated, and no MFU is given."""


def random_batch(stream: Stream, count: int, config: PretrainConfig) -> Batch:
    """A micro-batch of noise, masked as in a run; texts and captions have full length."""
    model, given, masking = config.model, config.input, config.masking
    pictures = PictureSettings(
        image_size=model.image_size, patch=model.patch, crop=given.images, masking=masking
    )
    rate = masking.text if stream == "text" else masking.pair_text
    texts = WordSettings(vocab_size=model.vocab, rate=rate, masking=masking)
    length = given.text_length if stream == "text" else given.pair_text_length
    samples = []
    for index in range(count):
        draws = Draws(config.seed, "bench", stream, index)
        parts: dict[str, np.ndarray] = {}
        if stream != "text":
            numbers = draws.integers(0, 256, 3 * model.image_size[0] * model.image_size[1])
            parts["pixels"] = numbers.astype(np.uint8).reshape(3, *model.image_size)
            parts["patch_masked"] = pictures.masked(draws)
        if stream != "image":
            words = draws.integers(len(SPECIALS), model.vocab, length).astype(np.int32)
            words[0], words[-1] = TextTokenizer.cls, TextTokenizer.sep
            words_given, word_masked = texts.masked(words, draws)
            parts |= {"words": words, "words_given": words_given, "word_masked": word_masked}
        if model.drop_path > 0:
            passes = views(config.objective) if stream == "pair" else 1
            numbers = draws.uniforms(passes * 2 * model.layers)
            parts["depth_draws"] = numbers.astype(np.float32).reshape(passes, -1)
        samples.append(Sample(visit=Visit("noise", 0, index), **parts))
    batch = collate(stream, samples)
    if batch.patch_masked is None:
        return batch
    codes = Draws(config.seed, "bench codes", stream)
    numbers = codes.integers(0, model.codes, batch.patch_masked.numel())
    return batch.with_codes(torch.from_numpy(numbers).view(batch.patch_masked.shape))


class Step:
    """One whole training step on fixed micro-batches: what the loop does between two log rows."""

    def __init__(
        self,
        model: VLBeit,
        batches: Sequence[Batch],
        optimizer: torch.optim.Optimizer,
        config: PretrainConfig,
        device: torch.device,
    ) -> None:
        self.learner: Learner[Batch] = Learner(
            model, lambda batch: score_batch(model, batch, config.objective)
        )
        self.batches = batches
        self.optimizer = optimizer
        self.device = device
        self.held = ActivationMemory(device)
        self.precision = config.precision
        self.clip = config.optim.clip
        counts = dict.fromkeys(OBJECTIVES, 0)
        for batch in batches:
            for name, count in count_targets(batch, config.objective).items():
                counts[name] += count
        self.factors = {
            name: getattr(config.objective, name) / max(count, 1) for name, count in counts.items()
        }

    def __call__(self) -> float:
        """Forward and backward per micro-batch, then the update; returns the loss."""
        losses = []
        with RoundedWeights():
            for batch in self.batches:
                with self.held.forward(batch.stream), autocast(self.device, self.precision):
                    loss, _ = self.learner(batch, self.factors)
                loss.backward()
                losses.append(loss.detach())
        if self.clip:
            nn.utils.clip_grad_norm_(self.learner.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(torch.stack(losses).sum())  # the one place that waits for the device


def build_step(bench: BenchConfig) -> tuple[Step, VLBeit]:
    """A fresh model of the recipe's size with a step on random inputs of all three streams."""
    config, device = bench.run, bench.device
    model = VLBeit(config.model, config.seed).to(device).train()
    set_blocks(model, config.runtime, device)
    # A schedule has no meaning here; a rate of 0 would let the update skip no work either.
    optim = replace(config.optim, lr=config.optim.min_lr)
    optimizer = build_optimizer(model, optim, config.model.layers)
    batches = [random_batch(name, config.batch.micro, config).to(device) for name in STREAMS]
    return Step(model, batches, optimizer, config, device), model


def needed_flops(config: PretrainConfig, batches: Sequence[Batch]) -> int:
    """Useful arithmetic of a step on these micro-batches (nn/flops.py)."""
    return sum(
        training_flops(
            config.model,
            batch,
            views(config.objective) if batch.stream == "pair" else 1,
            count_targets(batch, config.objective),
        )
        for batch in batches
    )


def measure_step(bench: BenchConfig) -> dict[str, Any]:
    """Time a step. Rates follow the wall clock; with one thread the CPU clock is given too."""
    config, device = bench.run, bench.device
    step, model = build_step(bench)
    by_processor = device.type == "cpu" and torch.get_num_threads() == 1
    step()
    limits, processor_limits, took = [], [], []
    for _ in range(bench.steps):  # taken in turns, so that a slow minute hits both
        limits.append(matrix_limit(device, config.precision))
        if by_processor:
            limit = matrix_limit(device, config.precision, clock=time.process_time)
            processor_limits.append(limit)
        took.append(Took(step, device))
    limit = max(limits)
    seconds = statistics.median(t.wall for t in took)
    flops = needed_flops(config, step.batches)
    report: dict[str, Any] = {
        **machine(device),
        "recipe": config.recipe,
        "precision": config.precision,
        "mvlm": config.objective.mvlm,
        "drop_path": config.model.drop_path,
        "parameters": sum(p.numel() for p in model.parameters()),
        "samples": {batch.stream: len(batch) for batch in step.batches},
        "tokens": {batch.stream: batch.tokens() for batch in step.batches},
        "steps": bench.steps,
        "step_seconds": round(seconds, 4),
        "step_seconds_all": [round(t.wall, 4) for t in took],
        "samples_per_second": round(sum(len(b) for b in step.batches) / seconds, 3),
        "tokens_per_second": round(sum(b.tokens() for b in step.batches) / seconds, 1),
        "needed_tflop": round(flops / 1e12, 4),
        "limit_gflops": round(limit / 1e9, 1),
        "limit_share": round(flops / seconds / limit, 4),
        "activation_mb": step.held.mb(),
        "memory_mb": memory_mb(device),
    }
    if bench.peak_flops:
        report["mfu"] = round(flops / seconds / bench.peak_flops, 4)
    if by_processor:
        processor = statistics.median(t.processor for t in took)
        report["step_cpu_seconds"] = round(processor, 4)
        report["limit_cpu_gflops"] = round(max(processor_limits) / 1e9, 1)
        report["limit_share_cpu"] = round(flops / processor / max(processor_limits), 4)
    return report


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = processor_name()
    return {
        "device": device.type,
        "machine": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "torch": torch.__version__,
    }


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def describe_step(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    samples = " + ".join(f"{count} {name}s" for name, count in report["samples"].items())
    tokens = " + ".join(str(count) for count in report["tokens"].values())
    lines = [
        ("machine", describe_machine(report)),
        (
            "model",
            f"{report['recipe']}, {report['parameters'] / 1e6:.1f} M parameters, "
            f"{report['precision']}, pairs: {report['mvlm']}, drop path {report['drop_path']:g}",
        ),
        ("step", f"{samples} ({tokens} tokens)"),
        ("time", f"{report['step_seconds']:.3f} s (median of {report['steps']})"),
        ("samples/s", f"{report['samples_per_second']:.2f}"),
        ("tokens/s", f"{report['tokens_per_second']:.0f}"),
        ("needed", f"{report['needed_tflop']:.3f} TFLOP a step"),
        ("limit", f"{report['limit_gflops']:.0f} GFLOP/s in plain matrix products"),
        ("share", f"{100 * report['limit_share']:.1f} % of the limit"),
    ]
    if "mfu" in report:
        lines.append(("MFU", f"{100 * report['mfu']:.1f} % of the stated peak"))
    if "limit_share_cpu" in report:
        share, seconds = 100 * report["limit_share_cpu"], report["step_cpu_seconds"]
        limit = report["limit_cpu_gflops"]
        lines.append(("by CPU time", f"{seconds:.3f} s, {share:.1f} % of {limit:.0f} GFLOP/s"))
    held = " + ".join(f"{mb:.0f} {name}s" for name, mb in report["activation_mb"].items())
    held = f"; MB held for a backward pass: {held}" if held else ""
    lines.append(("memory", f"{report['memory_mb']} MB at most{held}"))
    return "\n".join(f"{name:<12} {value}" for name, value in lines)


def describe_machine(report: dict[str, Any]) -> str:
    return (
        f"{report['machine']}, {report['threads']} of {report['cores']} cores, load "
        f"{report['load']}, torch {report['torch']}"
    )
