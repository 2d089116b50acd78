"""The matrix product with weights: nn.Linear, with less work around it for bf16 on a CPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def has_bf16_tiles() -> bool:
    """Whether this CPU multiplies bf16 tiles in hardware (AMX)."""
    if not hasattr(torch.cpu, "get_capabilities"):  # before torch 2.13
        return False
    return bool(torch.cpu.get_capabilities().get("amx_bf16", False))


class Bf16Product(torch.autograd.Function):
    """x W^T + b in bf16 with fp32 weights, as autocast does it, but

    * the rounded weight is given, so that it is made once per update and not once per pass, and
    * on a CPU with bf16 tiles the weight's gradient g^T x is taken from a transposed copy of g:
      the product reads both its operands along their rows then, which is 1.3-1.9 times faster
      there, copy included.
    """

    tiles = has_bf16_tiles()

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rounded: Tensor
    ) -> Tensor:
        """Shapes: x (..., in), weight and rounded (out, in), bias (out); return (..., out) bf16."""
        given = x.to(torch.bfloat16)
        ctx.save_for_backward(given, rounded)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        return F.linear(given, rounded, None if bias is None else bias.to(torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        given, rounded = ctx.saved_tensors
        x_dtype, weight_dtype, bias_dtype = ctx.dtypes
        of_x = of_weight = of_bias = None
        rows = gradient.flatten(0, -2)  # as one matrix: a product per sample would be slower
        if ctx.needs_input_grad[0]:
            of_x = torch.mm(rows, rounded).view(given.shape).to(x_dtype)
        if ctx.needs_input_grad[1]:
            turned = rows.t().contiguous() if Bf16Product.tiles else rows.t()
            of_weight = torch.mm(turned, given.flatten(0, -2)).to(weight_dtype)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(dim=0).to(bias_dtype)  # added up in fp32 inside
        return of_x, of_weight, of_bias, None


class RoundedWeights:
    """A stretch of work in which no weight changes, so that each is rounded to bf16 only once.

        with RoundedWeights():  # the micro-batches of one step, or an evaluation
            ...

    Ends with the block, or lives as long as the object where it is entered again and again. Inside
    another one it has no effect. A weight that does change inside is used as it was: an optimizer's
    step belongs outside, and where activations are computed again in the backward pass, that
    belongs inside. Costs 2 bytes for each number of the weights that were used.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._before: list[Token[RoundedWeights | None]] = []

    def __enter__(self) -> "RoundedWeights":
        working = _ROUNDED.get() or self
        self._before.append(_ROUNDED.set(working))
        return working

    def __exit__(self, *_: object) -> None:
        _ROUNDED.reset(self._before.pop())

    def of(self, weight: Tensor) -> Tensor:
        """The weight in bf16, without a gradient."""
        kept = self._kept.get(id(weight))
        if kept is None:  # the weight itself is kept too: its id is not given to another one
            kept = self._kept[id(weight)] = (weight, weight.detach().to(torch.bfloat16))
        return kept[1]


_ROUNDED: ContextVar[RoundedWeights | None] = ContextVar("rounded weights", default=None)


class Linear(nn.Linear):
    """nn.Linear: same parameters, same names, same numbers.

    With bf16 autocast on a CPU inside `RoundedWeights` its products are `Bf16Product`.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias, with a bias that need not be this layer's own.

        Shapes: x (..., in), bias (out) or None; return (..., out).
        """
        kept = _ROUNDED.get() if x.device.type == "cpu" and bf16_autocast() else None
        if kept is None:
            return F.linear(x, self.weight, bias)
        rounded = kept.of(self.weight)
        out: Tensor = Bf16Product.apply(x, self.weight, bias, rounded)  # type: ignore[no-untyped-call]
        return out


def bf16_autocast() -> bool:
    """Whether products on the CPU are to be taken in bf16 here."""
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


@contextmanager
def autocast(device: torch.device, precision: str) -> Iterator[None]:
    """Products in "bf16" or "fp32", with fp32 weights; losses and softmax stay in fp32.

    No weight may change inside (`RoundedWeights`).
    """
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
        with RoundedWeights():
            yield
