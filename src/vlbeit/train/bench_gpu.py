"""`vlbeit bench gpu`: what a device does with this package, in under eight minutes.

    vlbeit bench gpu [--recipes small base] [--minutes 8] [--peak-tflops 989] [--out FOLDER]

    limits       matrix products and copies, plain torch
    correctness  losses and gradients of each stream against float64 on the CPU
    sizes        seconds a step by recipe and micro-batch (--find-micro), share of the limit, MFU
    levers       the step of the last recipe with one thing changed at a time
    profile      where the time of that step goes

Nothing is built and no data is needed. What the minutes no longer reach is named as left out. Also
runs on a CPU (`--device cpu --recipes tiny`), which proves the program and says nothing of a GPU.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from vlbeit.config import PretrainConfig
from vlbeit.errors import ConfigError, SaveError
from vlbeit.nn.linear import autocast
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import score_batch
from vlbeit.recipes import PRETRAIN
from vlbeit.train.bench_micro import describe_micro, find_micro, sized
from vlbeit.train.bench_plan import check_number
from vlbeit.train.bench_step import (
    BenchConfig,
    build_step,
    describe_machine,
    machine,
    measure_step,
    random_batch,
)
from vlbeit.train.block_settings import compiles, set_blocks
from vlbeit.train.distributed import choose_device, use_deterministic_kernels
from vlbeit.train.limit import matrix_limit, synchronize
from vlbeit.types import STREAMS, Batch

COMMAND = "vlbeit bench gpu"
CORRECT_SAMPLES = 4
WORST: dict[str, float] = {"fp32": 1e-4, "bf16": 5e-2}
"""Largest |gradient - float64 gradient| / |float64 gradient| over all parameters, by precision."""
COPIED_BYTES = 1 << 28
PROFILED_ROWS = 15
Change = Callable[[PretrainConfig], PretrainConfig]


def with_runtime(**changes: Any) -> Change:
    return lambda run: replace(run, runtime=replace(run.runtime, **changes))


def with_model(**changes: Any) -> Change:
    return lambda run: replace(run, model=replace(run.model, **changes))


LEVERS: dict[str, Change] = {
    "blocks not compiled": with_runtime(compile="off"),
    "activations made again": with_runtime(checkpoint_activations=True),
    "fp32": lambda run: replace(run, precision="fp32"),
    "one view a pair": lambda run: replace(run, objective=replace(run.objective, mvlm="joint")),
    "no drop path": with_model(drop_path=0.0),
    "relative positions in every layer": with_model(relative_bias="per_layer"),
}
"""What is changed, one at a time; the time is divided by that of the step as it is."""


@dataclass(frozen=True, kw_only=True)
class GpuRun:
    """What the words of the command ask for."""

    runs: tuple[PretrainConfig, ...]
    """The recipes; the last is the one that levers and profile look at."""
    device: torch.device
    seconds: float
    peak_flops: float = 0.0
    largest: int = 512
    """Largest micro-batch tried."""

    def bench(self, run: PretrainConfig, steps: int = 3) -> BenchConfig:
        return BenchConfig(
            run=run, steps=steps, device=self.device, as_json=False, peak_flops=self.peak_flops
        )


def copy_rate(device: torch.device, size: int = COPIED_BYTES) -> float:
    """Bytes read and written a second by a copy of `size` bytes; the best of five."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = 0.0
    for _ in range(5):
        synchronize(device)
        began = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        best = max(best, 2 * size / (time.perf_counter() - began))
    return best


def limits(asked: GpuRun) -> dict[str, Any]:
    """TFLOP/s of matrix products by precision and GB/s of copies."""
    found = {name: matrix_limit(asked.device, name, seconds=1.0) / 1e12 for name in WORST}
    return {
        "tflops": {name: float(f"{rate:.4g}") for name, rate in found.items()},
        "copy_gb_per_second": float(f"{copy_rate(asked.device) / 1e9:.4g}"),
    }


def loss_and_gradient(
    model: VLBeit, batch: Batch, run: PretrainConfig, precision: str
) -> tuple[float, Tensor]:
    """Sum of the losses of a micro-batch, and all gradients end to end, float64 on the CPU."""
    model.zero_grad()
    device = next(model.parameters()).device
    with autocast(device, precision):
        scores = score_batch(model, batch, run.objective)
    loss = torch.stack([score.loss_sum for score in scores.values()]).sum()
    loss.backward()
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return float(loss.detach()), torch.cat([g.detach().flatten().double().cpu() for g in gradients])


def correctness(asked: GpuRun) -> list[dict[str, Any]]:
    """Losses and gradients of the first recipe on the device against float64 on the CPU."""
    run = with_model(drop_path=0.0)(asked.runs[0])
    exact = VLBeit(run.model, run.seed).double()
    rows = []
    for stream in STREAMS:
        batch = random_batch(stream, CORRECT_SAMPLES, run)
        wide = batch
        if batch.pixels is not None:
            wide = replace(batch, pixels=batch.pixels.double() / 127.5 - 1)
        wanted_loss, wanted = loss_and_gradient(exact, wide.to("cpu"), run, "fp32")
        for precision, worst in WORST.items():
            for setting in ("off", "on") if compiles(run.runtime, asked.device) else ("off",):
                model = VLBeit(run.model, run.seed).to(asked.device)
                set_blocks(model, replace(run.runtime, compile=setting), asked.device)
                here = batch.to(asked.device)
                loss, gradient = loss_and_gradient(model, here, run, precision)
                error = float((gradient - wanted).norm() / wanted.norm())
                rows.append(
                    {
                        "stream": stream,
                        "precision": precision,
                        "compile": setting,
                        "loss_error": float(f"{abs(loss / wanted_loss - 1):.3g}"),
                        "gradient_error": float(f"{error:.3g}"),
                        "ok": math.isfinite(error) and error <= worst,
                    }
                )
    return rows


def sizes(asked: GpuRun, until: float) -> dict[str, Any]:
    """The table of micro-batches of every recipe."""
    return {
        run.recipe: find_micro(asked.bench(run), largest=asked.largest, until=until)
        for run in asked.runs
    }


def levers(asked: GpuRun, micro: int, until: float) -> list[dict[str, Any]]:
    """Seconds of the last recipe's step with one thing changed, over those of the step as it is."""
    run = asked.runs[-1]

    def seconds(changed: PretrainConfig) -> float:
        report = measure_step(sized(asked.bench(changed), micro))
        return float(report.get("step_cpu_seconds", report["step_seconds"]))

    plain = seconds(run)
    rows: list[dict[str, Any]] = [{"changed": "nothing", "seconds": round(plain, 4), "ratio": 1.0}]
    for name, change in LEVERS.items():
        if time.perf_counter() > until:
            rows.append({"changed": name, "left_out": "no time left"})
            continue
        try:
            took = seconds(change(run))
        except torch.OutOfMemoryError:
            rows.append({"changed": name, "left_out": "does not fit the device"})
            continue
        rows.append({"changed": name, "seconds": round(took, 4), "ratio": round(took / plain, 3)})
    return rows


def profiled(asked: GpuRun, micro: int) -> str:
    """Where the time of one step of the last recipe goes, as the profiler's table."""
    step, _ = build_step(sized(asked.bench(asked.runs[-1]), micro))
    step()
    cuda = asked.device.type == "cuda"
    kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with profile(activities=kinds) as found:
        step()
    order = "self_cuda_time_total" if cuda else "self_cpu_time_total"
    table: str = found.key_averages().table(sort_by=order, row_limit=PROFILED_ROWS)
    return table


def run_all(asked: GpuRun, log: Callable[[str], None] = print) -> dict[str, Any]:
    """All sections in their order; those that come too late are in "left_out"."""
    began = time.perf_counter()
    until = began + asked.seconds
    found: dict[str, Any] = {**machine(asked.device), "left_out": []}
    if asked.device.type == "cuda":
        found["cuda"] = torch.version.cuda
        found["capability"] = ".".join(map(str, torch.cuda.get_device_capability(asked.device)))

    def micro() -> int:
        table = found.get("sizes", {}).get(asked.runs[-1].recipe)
        return int(table["micro"]) if table else 1

    sections: dict[str, Callable[[], Any]] = {
        "limits": lambda: limits(asked),
        "correctness": lambda: correctness(asked),
        # A fifth of the time is kept for what follows.
        "sizes": lambda: sizes(asked, began + 0.8 * asked.seconds),
        "levers": lambda: levers(asked, micro(), until),
        "profile": lambda: profiled(asked, micro()),
    }
    for name, section in sections.items():
        if time.perf_counter() > until:
            found["left_out"].append(name)
            continue
        log(f"{time.perf_counter() - began:5.0f} s  {name}")
        found[name] = section()
    found["seconds"] = round(time.perf_counter() - began, 1)
    return found


def describe_gpu(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [f"# {describe_machine(found)}", ""]
    if "cuda" in found:
        lines += [f"CUDA {found['cuda']}, compute capability {found['capability']}.", ""]
    if "limits" in found:
        rates = ", ".join(f"{name} {rate:g}" for name, rate in found["limits"]["tflops"].items())
        lines += [
            f"Matrix products: {rates} TFLOP/s; copies: "
            f"{found['limits']['copy_gb_per_second']:g} GB/s.",
            "",
        ]
    if "correctness" in found:
        lines += ["## Against float64 on the CPU", "", "| stream | precision | compile | loss | "
                  "gradients | |", "|---|---|---|---|---|---|"]  # fmt: skip
        for row in found["correctness"]:
            lines.append(
                f"| {row['stream']} | {row['precision']} | {row['compile']} "
                f"| {row['loss_error']:.1e} | {row['gradient_error']:.1e} "
                f"| {'right' if row['ok'] else 'WRONG'} |"
            )
        lines.append("")
    for recipe, table in found.get("sizes", {}).items():
        lines += [f"## {recipe}: micro-batches", "", "```", describe_micro(table), "```", ""]
    if "levers" in found:
        lines += ["## One thing changed", "", "| changed | seconds | of the step as it is |",
                  "|---|---|---|"]  # fmt: skip
        lines += [
            f"| {row['changed']} | {row['left_out']} | |"
            if "left_out" in row
            else f"| {row['changed']} | {row['seconds']:.4f} | {row['ratio']:.2f} x |"
            for row in found["levers"]
        ]
        lines.append("")
    if "profile" in found:
        lines += ["## Profile of a step", "", "```", found["profile"].strip("\n"), "```", ""]
    if found["left_out"]:
        lines += [f"Left out, no time left: {', '.join(found['left_out'])}.", ""]
    lines.append(f"{found['seconds']:.0f} s together.")
    return "\n".join(lines)


def parse_gpu(words: Sequence[str]) -> tuple[GpuRun, Path | None]:
    """What to run, and the folder to write to.

    Raises:
        ConfigError: numbers that make no sense, or a device that is not there.
    """
    parser = argparse.ArgumentParser(prog=COMMAND, allow_abbrev=False)
    parser.add_argument(
        "--recipes", nargs="+", default=["small", "base"], choices=list(PRETRAIN), metavar="RECIPE"
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--peak-tflops", type=float, help="stated bf16 peak of the device: for MFU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cuda")
    parser.add_argument("--largest", type=int, default=512, help="largest micro-batch tried")
    parser.add_argument("--out", metavar="FOLDER", help="write gpu.json and gpu.md there")
    own = parser.parse_args(list(words))
    check_number("minutes", own.minutes)
    check_number("peak_tflops", own.peak_tflops)
    if own.largest < 1:
        raise ConfigError(f"--largest must be at least 1, found {own.largest}")
    asked = GpuRun(
        runs=tuple(PRETRAIN[name]() for name in own.recipes),
        device=choose_device(own.device, 0, 1),
        seconds=60 * own.minutes,
        peak_flops=(own.peak_tflops or 0.0) * 1e12,
        largest=own.largest,
    )
    return asked, None if own.out is None else Path(own.out)


def main(words: list[str]) -> int:
    """Run, print Markdown, write both files; exit code 1 where a result is wrong."""
    asked, out = parse_gpu(words)
    use_deterministic_kernels()  # as every run does
    found = run_all(asked)
    text = describe_gpu(found)
    print(text)
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
            (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n")
            (out / "gpu.md").write_text(text + "\n")
        except OSError as error:
            raise SaveError(f"--out {out}: cannot be written ({error.strerror})") from None
    return 0 if all(row["ok"] for row in found.get("correctness", [])) else 1
