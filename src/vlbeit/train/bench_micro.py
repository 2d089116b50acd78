"""`vlbeit bench step --find-micro`: the micro-batch that a device does most samples a second with.

Samples of each stream in one forward pass are doubled until they do not fit, or until two doublings
in a row have gained nothing. The smallest that comes within 2 % of the best rate is picked: what
is above it costs memory and brings nothing.
"""

import gc
import math
import os
import time
from dataclasses import replace
from typing import Any

import torch

from vlbeit.config import BatchConfig
from vlbeit.errors import ConfigError
from vlbeit.train.bench_step import BenchConfig, describe_machine, machine, measure_step

ENOUGH = 0.98
"""Of the best rate."""
LARGEST = 4096
MARGIN = 0.9
"""Of a CPU's free memory may be filled. There is no error to catch there: the process is killed."""


def sized(bench: BenchConfig, micro: int) -> BenchConfig:
    """The step with `micro` samples of each stream."""
    batch = BatchConfig(images=micro, texts=micro, pairs=micro, micro=micro)
    return replace(bench, run=replace(bench.run, batch=batch))


def available_bytes() -> float:
    """Memory that a process may still take on this machine."""
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def find_micro(
    bench: BenchConfig, largest: int = LARGEST, until: float = math.inf
) -> dict[str, Any]:
    """Measure micro-batches of 1, 2, 4 ... up to `largest` and pick one.

    Args:
        until: of `time.perf_counter`; no further one is begun after it.

    Raises:
        ConfigError: not even one sample of each stream fits.
    """
    rows: list[dict[str, Any]] = []
    stopped = f"at the largest, {largest}"
    micro = 1
    while micro <= largest:
        if rows and time.perf_counter() > until:
            stopped = "no time left"
            break
        if rows and not fits(rows[-1], bench.device):
            stopped = f"{micro} would not fit the memory that is free"
            break
        if bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(bench.device)
        try:
            report = measure_step(sized(bench, micro))
        except torch.OutOfMemoryError:
            stopped = f"{micro} do not fit the device"
            break
        finally:
            gc.collect()  # the step before it holds its model by cycles
            if bench.device.type == "cuda":
                torch.cuda.empty_cache()
        rows.append({"micro": micro, **{name: report[name] for name in KEPT if name in report}})
        tried = [rate(row) for row in rows]
        if len(tried) > 2 and max(tried[-2:]) < max(tried[:-2]) / ENOUGH:
            stopped = "two doublings in a row gained nothing"
            break
        micro *= 2
    if not rows:
        raise ConfigError(
            "--find-micro: one sample of each stream does not fit the device; take a smaller "
            "recipe, or set --runtime.checkpoint-activations"
        )
    picked = next(row for row in rows if rate(row) >= ENOUGH * max(map(rate, rows)))
    return {
        **machine(bench.device),
        "recipe": bench.run.recipe,
        "precision": bench.run.precision,
        "micro": picked["micro"],
        "stopped": stopped,
        "tried": rows,
    }


KEPT = (
    "step_seconds", "step_cpu_seconds", "samples_per_second", "limit_share", "mfu",
    "activation_mb", "memory_mb",
)  # fmt: skip
"""Of the report of a step."""


def fits(row: dict[str, Any], device: torch.device) -> bool:
    """Whether twice the micro-batch of a row can be tried: a GPU says so itself."""
    if device.type == "cuda":
        return True
    held = max(row["activation_mb"].values(), default=0.0) * 2**20
    return 2 * held < MARGIN * available_bytes()


def rate(row: dict[str, Any]) -> float:
    """Samples of all streams a second; by CPU time where it is known, which is what others on the
    machine leave alone."""
    seconds = row["step_seconds"] / row.get("step_cpu_seconds", row["step_seconds"])
    return float(row["samples_per_second"] * seconds)


def describe_micro(found: dict[str, Any]) -> str:
    """The table as lines for a person."""
    lines = [
        describe_machine(found),
        f"{found['recipe']}, {found['precision']}",
        f"{'micro':>6} {'seconds':>9} {'samples/s':>10} {'of limit':>9} {'MFU':>7} {'held MB':>9} "
        f"{'peak MB':>9}",
    ]
    for row in found["tried"]:
        mfu = f"{100 * row['mfu']:.1f} %" if "mfu" in row else "-"
        held = max(row["activation_mb"].values(), default=0.0)
        lines.append(
            f"{row['micro']:>6} {row['step_seconds']:>9.3f} {rate(row):>10.1f} "
            f"{100 * row['limit_share']:>7.1f} % {mfu:>7} {held:>9.0f} {row['memory_mb']:>9}"
        )
    lines.append(f"pick {found['micro']} (stopped: {found['stopped']})")
    return "\n".join(lines)
