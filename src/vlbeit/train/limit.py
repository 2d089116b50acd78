"""What this machine can do at most: the rate of large matrix products."""

import time
from collections.abc import Callable

import torch

_FEWEST = 3
"""Products timed even where one takes longer than `seconds` (a busy machine): never none."""


def matrix_limit(
    device: torch.device,
    precision: str,
    seconds: float = 0.2,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Best FLOP/s of a (2048, 768) x (768, 3072) product, forward shape, after a warm-up.

    `clock` is `time.process_time` where other jobs share the cores and one thread is used.

    The share of this rate that a training step turns into useful work says how well the step
    uses the machine, whatever the machine is.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.ones(2048, 768, dtype=dtype, device=device)
    weight = torch.ones(3072, 768, dtype=dtype, device=device)
    best, tries = 0.0, 0
    with torch.inference_mode():
        torch.nn.functional.linear(x, weight)
        started = time.perf_counter()
        while tries < _FEWEST or time.perf_counter() - started < seconds:
            tries += 1
            synchronize(device)
            began = clock()
            torch.nn.functional.linear(x, weight)
            synchronize(device)
            best = max(best, 2 * 2048 * 768 * 3072 / (clock() - began))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
