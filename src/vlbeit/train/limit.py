"""What this machine can do at most: the rate of large matrix products."""

import time

import torch


def matrix_limit(device: torch.device, precision: str, seconds: float = 0.2) -> float:
    """Best FLOP/s of a (2048, 768) x (768, 3072) product, forward shape, after a warm-up.

    The share of this rate that a training step turns into useful work says how well the step
    uses the machine, whatever the machine is.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.ones(2048, 768, dtype=dtype, device=device)
    weight = torch.ones(3072, 768, dtype=dtype, device=device)
    best, started = 0.0, time.perf_counter()
    with torch.inference_mode():
        torch.nn.functional.linear(x, weight)
        while time.perf_counter() - started < seconds:
            synchronize(device)
            began = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            synchronize(device)
            best = max(best, 2 * 2048 * 768 * 3072 / (time.perf_counter() - began))
    return best


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
