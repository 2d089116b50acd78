"""`vlbeit bench growth`: does a step cost what its arithmetic says?

    vlbeit bench growth [--repeats 5] [--precision fp32] [--plot growth.png] [--json]

One size of a small model is varied at a time: depth, width, image size, samples. For each, a
straight line t = fixed + seconds per FLOP x FLOPs is fitted to the CPU seconds of whole steps, on
one thread; what is reported is how far the points lie from it. A quadratic cost that nobody wanted,
or a size that falls off the fast path, shows as a bend.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlbeit.config import (
    BatchConfig,
    InputConfig,
    ModelConfig,
    ObjectiveConfig,
    PretrainConfig,
)
from vlbeit.errors import ConfigError, SaveError
from vlbeit.train.bench_step import BenchConfig, Took, build_step, machine, needed_flops

COMMAND = "vlbeit bench growth"
MODEL = ModelConfig(
    width=384, layers=6, heads=6, ffn=1536, image_size=(160, 160), vocab=4000, codes=2048,
    text_positions=128, drop_path=0.0,
)  # fmt: skip
"""The size that the others depart from: 11 TFLOP for a hundred samples."""
SAMPLES = 4
WORST = 0.10
"""Largest share by which a point may lie off its line."""
AXES: dict[str, tuple[int, ...]] = {
    "depth": (2, 4, 6, 8, 10),
    "width": (192, 256, 384, 512, 640),
    "image size": (96, 128, 160, 192, 224),
    "samples": (2, 4, 6, 8, 12),
}
"""What is varied, in layers, channels, pixels of a side and samples of each stream."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A straight line through points. Shapes: x, y (n,)."""

    fixed: float
    slope: float
    worst: float
    """Largest |y / line - 1|."""

    @staticmethod
    def of(x: Sequence[float], y: Sequence[float]) -> "Fit":
        """The line with the least sum of squared relative distances.

        Raises:
            ValueError: fewer than three points, through which any line would go.
        """
        if len(x) < 3:
            raise ValueError(f"a line through {len(x)} points says nothing; at least 3")
        across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
        table = np.stack((1 / up, across / up), axis=1)  # each row divided by its y: relative
        fixed, slope = np.linalg.lstsq(table, np.ones(len(up)), rcond=None)[0]
        line = fixed + slope * across
        return Fit(fixed=float(fixed), slope=float(slope), worst=float(np.abs(up / line - 1).max()))


def point_config(axis: str, value: int, precision: str, model: ModelConfig = MODEL) -> BenchConfig:
    """The step of one point."""
    samples = value if axis == "samples" else SAMPLES
    if axis == "depth":
        model = replace(model, layers=value)
    elif axis == "width":
        model = replace(model, width=value, heads=max(value // 64, 1), ffn=4 * value)
    elif axis == "image size":
        model = replace(model, image_size=(value, value))
    run = PretrainConfig(
        recipe=f"{axis} {value}",
        precision=precision,  # type: ignore[arg-type]
        model=model,
        input=InputConfig(text_length=model.text_positions, pair_text_length=32),
        objective=ObjectiveConfig(mvlm="joint"),
        batch=BatchConfig(images=samples, texts=samples, pairs=samples, micro=samples),
    )
    return BenchConfig(run=run, steps=1, device=torch.device("cpu"), as_json=False)


def measure_growth(
    axes: dict[str, tuple[int, ...]], repeats: int, precision: str, model: ModelConfig = MODEL
) -> dict[str, Any]:
    """CPU seconds and FLOPs of every point, and the line of every axis.

    The points of an axis are timed in turns, so that a slow minute hits them alike; the median of
    the turns counts.
    """
    found: dict[str, Any] = {}
    for axis, values in axes.items():
        steps = {}
        for value in values:
            bench = point_config(axis, value, precision, model)
            step, _ = build_step(bench)
            step()
            steps[value] = (step, needed_flops(bench.run, step.batches))
        took: dict[int, list[float]] = {value: [] for value in values}
        for _ in range(repeats):
            for value, (step, _) in steps.items():
                took[value].append(Took(step, torch.device("cpu")).processor)
        flops = [steps[value][1] for value in values]
        seconds = [statistics.median(took[value]) for value in values]
        fit = Fit.of(flops, seconds)
        found[axis] = {
            "values": list(values),
            "gflop": [round(f / 1e9, 2) for f in flops],
            "cpu_seconds": [round(s, 4) for s in seconds],
            "fixed_seconds": round(fit.fixed, 4),
            "gflops": round(1e-9 / fit.slope, 1) if fit.slope > 0 else 0.0,
            "worst": round(fit.worst, 4),
        }
    return {
        **machine(torch.device("cpu")),
        "precision": precision,
        "repeats": repeats,
        "axes": found,
        "straight": all(axis["worst"] <= WORST for axis in found.values()),
    }


def draw_growth(report: dict[str, Any], path: Path) -> None:
    """The points and their lines, one panel an axis. Needs the `report` extra.

    Raises:
        SaveError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(report["axes"])))
    for panel, (axis, found) in zip(panels, report["axes"].items(), strict=True):
        ends = np.array([0, max(found["gflop"])])
        slope = 1 / found["gflops"] if found["gflops"] else 0.0
        panel.plot(ends, found["fixed_seconds"] + slope * ends, color="0.6", linewidth=1)
        panel.plot(found["gflop"], found["cpu_seconds"], "o", color="C0", markersize=4)
        for x, y, value in zip(found["gflop"], found["cpu_seconds"], found["values"], strict=True):
            panel.annotate(str(value), (x, y), (4, -9), textcoords="offset points", fontsize=7)
        panel.set_title(f"{axis}: off by {100 * found['worst']:.1f} % at most", fontsize=9)
        panel.set_xlabel("GFLOP a step", fontsize=8)
        panel.set_xlim(left=0)
        panel.set_ylim(bottom=0)
        panel.tick_params(labelsize=7)
    panels[0].set_ylabel("CPU seconds a step", fontsize=8)
    try:
        figure.savefig(path, dpi=130)
    except OSError as error:
        raise SaveError(f"--plot {path}: cannot be written ({error.strerror})") from None


def describe_growth(report: dict[str, Any]) -> str:
    """The report as lines for a person."""
    lines = [f"{report['machine']}, 1 thread, {report['precision']}, load {report['load']}"]
    for axis, found in report["axes"].items():
        points = ", ".join(
            f"{value}: {seconds:.3f} s"
            for value, seconds in zip(found["values"], found["cpu_seconds"], strict=True)
        )
        lines.append(
            f"{axis:<11} {points}; {found['fixed_seconds']:.3f} s + FLOPs at "
            f"{found['gflops']:.0f} GFLOP/s, off by {100 * found['worst']:.1f} % at most"
        )
    return "\n".join(lines)


def main(words: list[str]) -> int:
    """Measure and print, as text or as one JSON object."""
    parser = argparse.ArgumentParser(prog=COMMAND, allow_abbrev=False)
    parser.add_argument("--repeats", type=int, default=5, help="of every point, in turns")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--plot", metavar="PNG", help="draw it (the `report` extra)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    own = parser.parse_args(words)
    if own.repeats < 1:
        raise ConfigError(f"--repeats must be at least 1, found {own.repeats}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        report = measure_growth(AXES, own.repeats, own.precision)
    finally:
        torch.set_num_threads(threads)
    if own.plot:
        draw_growth(report, Path(own.plot))
    print(json.dumps(report, indent=1) if own.json else describe_growth(report))
    return 0
