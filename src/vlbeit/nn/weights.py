"""Initialisation as BEiT's (paper section 3.1)."""

import math
from collections.abc import Container

import torch
from torch import Tensor, nn

from vlbeit.draws import Draws
from vlbeit.nn.mome import Block

BEIT_STD = 0.02
WITHIN_ONE_STD = math.erf(1 / math.sqrt(2))
"""Share of a normal that is kept."""
PIECE = 1 << 14
"""Numbers made at a time: they stay in the cache. An even one, as `Draws.words` makes pairs."""


def initialise(
    module: nn.Module,
    seed: int,
    std: float = BEIT_STD,
    position_std: float = BEIT_STD,
    only: Container[str] | None = None,
) -> None:
    """Fill every parameter in place, the same for the same seed.

    Matrices, tables, position, [CLS] and mask vectors: normal with `std` truncated to one standard
    deviation (BEiT: 0.02); the image's position table takes `position_std`. Biases 0, norms 1
    and 0, LayerScale and relative bias as built. Then the attention projection and every expert's
    second layer of block l (from 1) are divided by sqrt(2 l). Each parameter has its own stream,
    keyed by its name: adding one changes no other.

    Args:
        only: names of the parameters to fill (those that no file has); None: all.
    """
    norms = {
        id(p)
        for part in module.modules()
        if isinstance(part, (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm2d))
        for p in part.parameters()
    }
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if id(parameter) in norms or leaf in ("gamma_1", "gamma_2", "table"):
                continue
            if only is not None and name not in only:
                continue
            if leaf.endswith("bias"):
                parameter.zero_()
            else:
                spread = position_std if name.endswith("image.positions") else std
                truncated_normal(parameter, spread, Draws(seed, "init", name))
        depth = 0
        for path, part in module.named_modules():
            if isinstance(part, Block):
                depth += 1
                last = {"attention.proj.weight": part.attention.proj.weight}
                for kind, expert in part.experts.items():
                    last[f"experts.{kind}.fc2.weight"] = expert.fc2.weight  # type: ignore[union-attr, assignment]
                for name, weight in last.items():
                    if only is None or f"{path}.{name}" in only:
                        weight.div_(math.sqrt(2 * depth))


def truncated_normal(tensor: Tensor, std: float, draws: Draws) -> None:
    """Fill in place with a normal of mean 0 cut at one `std`: its inverse distribution function of
    uniform draws. A billion numbers a quarter of a minute on one core; the same ones on any number
    of threads, since a piece is too small for torch to share among them.
    """
    fresh = torch.empty(tensor.numel())
    for start in range(0, len(fresh), PIECE):
        piece = fresh[start : start + PIECE]
        piece.copy_(torch.from_numpy(draws.words(len(piece)))).mul_(WITHIN_ONE_STD / 2**31)
        torch.erfinv(piece, out=piece)
        piece.mul_(math.sqrt(2) * std).clamp_(-std, std)
    tensor.copy_(fresh.view(tensor.shape))
