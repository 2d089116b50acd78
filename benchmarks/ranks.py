"""What more processes pay: one step of a recipe with the same global batch on 1, 2 ... of them.

    python benchmarks/ranks.py --recipe small --samples 32 --micro 16 --steps 5 --ranks 1 2

One thread a process. Every way of adding gradients is run on every number of processes, started by
torchrun as a run is:

    summed    train/gradients.py: buckets after the last backward pass
    ddp       torch's DistributedDataParallel, which needs a zero of every parameter in the last
              backward pass (decision 0009); here for comparison only
    ordered   `runtime.exact`: as many parts as the most processes
    sharded   `runtime.sharding full`; from two processes on

Printed are medians over the steps and the slowest process: wall seconds of a step, CPU seconds of
a process, seconds between the last backward pass and the added, clipped gradients, and both
speed-ups over one process. That by CPU seconds is what the processes could reach if each had a
core to itself: it holds on a machine that other jobs use, but leaves out waiting for each other.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from vlbeit.allocator import keep_freed_memory
from vlbeit.config import PretrainConfig
from vlbeit.nn.model import VLBeit
from vlbeit.objectives import OBJECTIVES, count_targets, score_batch
from vlbeit.recipes import PRETRAIN
from vlbeit.train.bench_step import random_batch
from vlbeit.train.distributed import init_world, use_deterministic_kernels
from vlbeit.train.gradients import Gradients, OrderedGradients, SummedGradients
from vlbeit.train.loop import Learner, autocast
from vlbeit.train.optim import build_optimizer
from vlbeit.train.sharding import ShardedGradients, shard_model
from vlbeit.types import Batch

STREAMS = ("image", "text", "pair")
WAYS = ("summed", "ddp", "ordered", "sharded")


class Touching(nn.Module):
    """What DDP asks of a model: every parameter in the last backward pass."""

    def __init__(self, learner: Learner[Batch]) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Batch, factors: dict[str, float], touch: bool) -> Tensor:
        loss, _ = self.learner(batch, factors)
        if touch:
            loss = loss + sum(0.0 * p.sum() for p in self.parameters())
        return loss


def rank_main(args: argparse.Namespace) -> None:
    """One process: prints a JSON line of its medians."""
    keep_freed_memory()  # as a run does
    world = init_world("cpu", 600)
    torch.set_num_threads(1)
    use_deterministic_kernels()
    config: PretrainConfig = PRETRAIN[args.recipe]()
    model = VLBeit(config.model, config.seed).train()
    learner: Learner[Batch] = Learner(model, lambda b: score_batch(model, b, config.objective))
    gradients: Gradients = SummedGradients(model.parameters(), world)
    parts = 1
    wrapped: Any = None
    if args.way == "sharded":
        shard_model(learner, model, world)
        gradients = ShardedGradients(model.parameters(), world)
    elif args.way == "ordered":
        gradients = OrderedGradients(model.parameters(), world)
        parts = args.most // world.size
    elif args.way == "ddp" and world.size > 1:
        wrapped = DistributedDataParallel(Touching(learner), gradient_as_bucket_view=True)
    optimizer = build_optimizer(model, config.optim, config.model.layers)
    share = args.samples // world.size // parts
    sizes = [args.micro] * (share // args.micro) + [share % args.micro] * (share % args.micro > 0)
    micro = [random_batch(stream, size, config) for stream in STREAMS for size in sizes]
    factors = dict.fromkeys(OBJECTIVES, 0.0)
    for batch in micro:
        for name, count in count_targets(batch, config.objective).items():
            factors[name] += count
    factors = {name: 1 / max(1.0, count * world.size) for name, count in factors.items()}

    walls, cpus, finishes = [], [], []
    for step in range(args.steps + 1):
        world.barrier()
        wall, cpu = time.perf_counter(), time.process_time()
        for part in range(parts):
            for number, batch in enumerate(micro):
                last = part == parts - 1 and number == len(micro) - 1
                with contextlib.ExitStack() as stack:
                    stack.enter_context(autocast(world.device, config.precision))
                    if wrapped is None:
                        loss, _ = learner(batch, factors)
                    else:
                        if not last:
                            stack.enter_context(wrapped.no_sync())
                        loss = wrapped(batch, factors, last) * world.size
                loss.backward()
            gradients.end_part()
        began = time.perf_counter()
        if wrapped is None:
            gradients.finish(3.0)
        else:
            nn.utils.clip_grad_norm_(model.parameters(), 3.0)
        finish = time.perf_counter() - began
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step:  # the first warms up
            walls.append(time.perf_counter() - wall)
            cpus.append(time.process_time() - cpu)
            finishes.append(finish)
    own = [statistics.median(values) for values in (walls, cpus, finishes)]
    slowest = [max(column) for column in zip(*world.gather_objects(own), strict=True)]
    if world.main:
        names = ("wall", "cpu", "finish")
        print("measured " + json.dumps(dict(zip(names, slowest, strict=True))), flush=True)
    world.close()


def measure(args: argparse.Namespace, way: str, ranks: int) -> dict[str, float]:
    """One way on so many processes."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    words += ["--nproc-per-node", str(ranks), __file__, "--way", way]
    for name in ("recipe", "samples", "micro", "steps"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--ranks", *map(str, args.ranks)]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("measured ")]
    if done.returncode or not lines:
        raise SystemExit(f"{way} on {ranks} processes failed:\n{done.stdout}{done.stderr}")
    found: dict[str, float] = json.loads(lines[0].removeprefix("measured "))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="small", choices=list(PRETRAIN))
    parser.add_argument("--samples", type=int, default=32, help="of each stream, over all ranks")
    parser.add_argument("--micro", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--way", choices=WAYS, default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.most = max(args.ranks)
    if args.samples % args.most:
        parser.error(f"--samples must be a multiple of {args.most}, found {args.samples}")
    if args.way:
        rank_main(args)
        return
    print("| way | processes | wall s | CPU s | finish s | speed-up wall | by CPU |")
    print("|---|---|---|---|---|---|---|")
    first = measure(args, "summed", 1)
    for way in args.ways:
        for ranks in args.ranks:
            if ranks == 1 and way in ("ddp", "sharded"):
                continue
            found = first if (way, ranks) == ("summed", 1) else measure(args, way, ranks)
            print(
                f"| {way} | {ranks} | {found['wall']:.2f} | {found['cpu']:.2f} | "
                f"{found['finish']:.3f} | {first['wall'] / found['wall']:.2f} | "
                f"{first['cpu'] / found['cpu']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
