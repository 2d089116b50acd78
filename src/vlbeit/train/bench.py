"""`vlbeit bench`: what a pretraining step costs on this machine, its data, an answer, a whole run.

    vlbeit bench [step] [--recipe base] [--samples 4] [--threads N] [--precision bf16] [--json]
    vlbeit bench step   --find-micro [--recipe base] [--peak-tflops P] [--json]
    vlbeit bench data   [--recipe base] [--samples 4] [--threads N] [--json]
    vlbeit bench plan   [--recipe base] --gpus N (--measured JSON | --peak-tflops P --share S)
    vlbeit bench growth [--plot PNG] [--json]
    vlbeit bench gpu    [--recipes small base] [--minutes 8] [--out FOLDER]
    vlbeit bench serve RUN ... [--mode answer] [--clients 1 8 64] [--json]

Every setting of a recipe can be given to the first two, such as `--objective.mvlm joint`.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from vlbeit.allocator import keep_freed_memory
from vlbeit.config import BatchConfig, PretrainConfig
from vlbeit.errors import ConfigError
from vlbeit.overrides import parse_config
from vlbeit.recipes import PRETRAIN
from vlbeit.serve.bench_serve import main as bench_serve
from vlbeit.train.bench_data import describe_data, measure_data
from vlbeit.train.bench_gpu import main as bench_gpu
from vlbeit.train.bench_growth import main as bench_growth
from vlbeit.train.bench_micro import describe_micro, find_micro
from vlbeit.train.bench_plan import check_number
from vlbeit.train.bench_plan import main as bench_plan
from vlbeit.train.bench_step import BenchConfig, describe_step, measure_step
from vlbeit.train.distributed import use_deterministic_kernels

USAGE = (__doc__ or "").replace("\n\n    vlbeit", "\n\nusage:\n    vlbeit", 1).strip()


def main(argv: list[str]) -> int:
    """Run one benchmark and print it, as text or as one JSON object."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n`vlbeit bench step --help` and so on list the flags of each.")
        return 0
    others = {
        "serve": bench_serve, "plan": bench_plan, "growth": bench_growth, "gpu": bench_gpu,
    }  # fmt: skip
    if argv and argv[0] in others:
        return others[argv[0]](argv[1:])
    kind, words = (argv[0], argv[1:]) if argv and argv[0] in ("step", "data") else ("step", argv)
    bench = parse(words, f"vlbeit bench {kind}")
    use_deterministic_kernels()  # as every run does
    keep_freed_memory()
    if kind == "data" and bench.find_micro:
        raise ConfigError("--find-micro is of `vlbeit bench step`")
    if kind == "data":
        show(bench, measure_data(bench), describe_data)
    elif bench.find_micro:
        show(bench, find_micro(bench), describe_micro)
    else:
        show(bench, measure_step(bench), describe_step)
    return 0


def show(
    bench: BenchConfig, report: dict[str, Any], describe: Callable[[dict[str, Any]], str]
) -> None:
    """Print a report as one JSON object or as text."""
    print(json.dumps(report, indent=1) if bench.as_json else describe(report))


def parse(words: Sequence[str], command: str) -> BenchConfig:
    """The benchmark's own flags; the others are settings of the recipe."""
    parser = argparse.ArgumentParser(
        prog=command,
        description="Any setting of the recipe may follow, such as --precision fp32.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--recipe",
        default="base",
        choices=list(PRETRAIN),
        help="whose model and batches (default: base)",
    )
    parser.add_argument("--samples", type=int, help="of each stream in a step (default 4)")
    parser.add_argument(
        "--find-micro", action="store_true", help="try 1, 2, 4 ... samples and pick the best"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument(
        "--peak-tflops", type=float, help="the device's stated peak: gives the share of it (MFU)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    own, rest = parser.parse_known_args(list(words))
    if own.find_micro and own.samples is not None:
        raise ConfigError("--find-micro tries its own numbers of samples; leave out --samples")
    for name in ("samples", "steps"):
        if getattr(own, name) is not None and getattr(own, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, found {getattr(own, name)}")
    check_number("peak_tflops", own.peak_tflops)
    if own.threads < 0:
        raise ConfigError(f"--threads must be at least 0, found {own.threads}")
    if own.threads:
        torch.set_num_threads(own.threads)
    run = parse_config(PretrainConfig, PRETRAIN, [own.recipe, *rest], command=command)
    count = 4 if own.samples is None else own.samples
    run = replace(run, batch=BatchConfig(images=count, texts=count, pairs=count, micro=count))
    cuda = run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
    return BenchConfig(
        run=run,
        steps=own.steps,
        device=torch.device("cuda" if cuda else "cpu"),
        as_json=own.json,
        find_micro=own.find_micro,
        peak_flops=(own.peak_tflops or 0.0) * 1e12,
    )
