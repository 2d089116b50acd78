"""`vlbeit bench`: what a pretraining step costs on this machine, its data, and an answer.

    vlbeit bench [step] [--recipe base] [--samples 4] [--threads N] [--precision bf16] [--json]
    vlbeit bench data   [--recipe base] [--samples 4] [--threads N] [--json]
    vlbeit bench serve RUN ... [--mode answer] [--clients 1 8 64] [--json]

Every setting of a recipe can be given to the first two, such as `--objective.mvlm joint`.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace

import torch

from vlbeit.config import BatchConfig, PretrainConfig
from vlbeit.errors import ConfigError
from vlbeit.overrides import parse_config
from vlbeit.recipes import PRETRAIN
from vlbeit.serve.bench_serve import main as bench_serve
from vlbeit.train.bench_data import describe_data, measure_data
from vlbeit.train.bench_step import BenchConfig, describe_step, measure_step
from vlbeit.train.distributed import use_deterministic_kernels

USAGE = (__doc__ or "").replace("\n\n    vlbeit", "\n\nusage:\n    vlbeit", 1).strip()


def main(argv: list[str]) -> int:
    """Run one benchmark and print it, as text or as one JSON object."""
    if argv and argv[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n`vlbeit bench step --help` and so on list the flags of each.")
        return 0
    if argv[:1] == ["serve"]:
        return bench_serve(argv[1:])
    kind, words = (argv[0], argv[1:]) if argv and argv[0] in ("step", "data") else ("step", argv)
    bench = parse(words, f"vlbeit bench {kind}")
    use_deterministic_kernels()  # as every run does
    if kind == "data":
        report, text = measure_data(bench), describe_data
    else:
        report, text = measure_step(bench), describe_step
    print(json.dumps(report, indent=1) if bench.as_json else text(report))
    return 0


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
    parser.add_argument("--samples", type=int, default=4, help="of each stream in a step")
    parser.add_argument("--steps", type=int, default=3, help="timed, after one to warm up")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: as torch chooses")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    own, rest = parser.parse_known_args(list(words))
    for name in ("samples", "steps"):
        if getattr(own, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, found {getattr(own, name)}")
    if own.threads < 0:
        raise ConfigError(f"--threads must be at least 0, found {own.threads}")
    if own.threads:
        torch.set_num_threads(own.threads)
    run = parse_config(PretrainConfig, PRETRAIN, [own.recipe, *rest], command=command)
    count = own.samples
    run = replace(run, batch=BatchConfig(images=count, texts=count, pairs=count, micro=count))
    cuda = run.device == "cuda" or (run.device == "auto" and torch.cuda.is_available())
    return BenchConfig(
        run=run,
        steps=own.steps,
        device=torch.device("cuda" if cuda else "cpu"),
        as_json=own.json,
    )
