"""Parameter groups, the learning-rate schedule and the optimizer."""

import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from vlbeit.config import OptimConfig

NO_DECAY = ("positions", "cls", "masked_patch", "table", "gamma_1", "gamma_2")


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices only.

    Biases, norms, gains, position tables, [CLS] and the mask vector are left alone (BEiT's
    optim_factory; there the mask vector does decay, which we do not copy).
    """
    return parameter.ndim > 1 and name.rsplit(".", 1)[-1] not in NO_DECAY


def layer_of(name: str, layers: int) -> int:
    """Depth for layer-wise decay: embeddings 0, block l (from 1) l, everything above layers + 1."""
    block = re.search(r"(?:^|\.)blocks\.(\d+)\.", name)
    if block:
        return int(block.group(1)) + 1
    if name.startswith(("image.", "text.")) or name.endswith("relative_bias.table"):
        return 0
    return layers + 1


def param_groups(
    model: nn.Module, config: OptimConfig, layers: int, head_lr: float = 1.0
) -> list[dict[str, object]]:
    """Groups of equal weight decay and equal `lr_factor`; names are kept for checkpoints.

    Args:
        head_lr: factor of a task's head (`task.*`).
    """
    groups: dict[tuple[float, float, bool], dict[str, object]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        decay = config.weight_decay if decays(name, parameter) else 0.0
        factor = config.layer_decay ** (layers + 1 - layer_of(name, layers))
        factor *= head_lr if name.startswith("task.") else 1.0
        group = groups.setdefault(
            (decay, factor, isinstance(parameter, DTensor)),  # shares do not mix with tensors
            {"params": [], "names": [], "weight_decay": decay, "lr_factor": factor},
        )
        group["params"].append(parameter)  # type: ignore[attr-defined]
        group["names"].append(name)  # type: ignore[attr-defined]
    return list(groups.values())


def build_optimizer(
    model: nn.Module, config: OptimConfig, layers: int, head_lr: float = 1.0
) -> torch.optim.AdamW:
    """Fused AdamW ("Adam" in the paper; its decay of 0.05 is the decoupled one, as BEiT's)."""
    return torch.optim.AdamW(
        param_groups(model, config, layers, head_lr),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def lr_at(step: int, config: OptimConfig) -> float:
    """Learning rate of step 1, 2, ...: linear warmup, then cosine or linear to `min_lr`.

    Behind `total_steps` the rate stays at `min_lr`.
    """
    if step <= config.warmup_steps:
        return config.lr * step / max(config.warmup_steps, 1)
    span = max(config.total_steps - config.warmup_steps, 1)
    done = min((step - config.warmup_steps) / span, 1.0)
    left = 1 - done if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * left


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)


def named_parameters(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, nn.Parameter]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as flat names: "exp_avg/image.proj.weight" and so on."""
    tensors = {}
    for name, parameter in named_parameters(optimizer):
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`. Raises KeyError when a parameter has no state."""
    keys = sorted({name.split("/", 1)[0] for name in tensors})
    for name, parameter in named_parameters(optimizer):
        if not any(f"{key}/{name}" in tensors for key in keys):
            continue  # a parameter that has had no gradient yet
        state = {}
        for key in keys:
            value = tensors[f"{key}/{name}"]
            # fused AdamW keeps its step counters in fp32 on the parameter's device
            state[key] = value.to(parameter.device).clone()
        optimizer.state[parameter] = state
