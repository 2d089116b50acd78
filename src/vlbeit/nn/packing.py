"""The real tokens of padded sequences on one axis: no product, norm or GELU is spent on padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vlbeit.types import Span

ROWS_STEP = 64
"""Rows whose number differs from step to step are filled up to a multiple of this. A matrix library
that compiles a product for every shape it meets (bf16 on a CPU) would compile new ones for ever and
keep them: memory grew by 40 % over 250 steps of `tiny`."""


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where each token of an axis (T,) stands in padded sequences (B, L).

    Tokens stand span by span and, inside a span, sample by sample, so that each expert serves one
    slice of the axis. Every span is filled up to a multiple of `ROWS_STEP` with copies of the first
    token, which are never read again: they cost work and get no gradient.

    Shapes:
        places  (T,) int64, row-major places in (B, L); B * L for what fills up
    """

    batch: int
    length: int
    places: Tensor
    counts: tuple[int, ...]
    """Tokens of each span of the route, those that fill up included."""

    @staticmethod
    def of(valid: Tensor, route: Sequence[Span]) -> "Packing":
        """valid (B, L) bool, at least one token in all."""
        batch, length = valid.shape
        order = torch.arange(batch * length, device=valid.device).view(batch, length)
        lengths = [span.length for span in route]
        found = zip(order.split(lengths, dim=1), valid.split(lengths, dim=1), strict=True)
        return Packing._filled([places[real] for places, real in found], batch, length)

    @staticmethod
    def _filled(pieces: Sequence[Tensor], batch: int, length: int) -> "Packing":
        filled = [F.pad(p, (0, -len(p) % ROWS_STEP), value=batch * length) for p in pieces]
        return Packing(
            batch=batch,
            length=length,
            places=torch.cat(filled),
            counts=tuple(len(piece) for piece in filled),
        )

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (T, C)."""
        return x.flatten(0, 1).index_select(0, torch.where(self.real, self.places, self.places[0]))

    def unpack(self, x: Tensor) -> Tensor:
        """(T, C) -> (B, L, C), zeros where there is no token."""
        rows = self.batch * self.length
        spread = x.new_zeros(rows + 1, x.shape[1]).index_copy(0, self.places, x)
        return spread[:rows].view(self.batch, self.length, -1)

    @property
    def real(self) -> Tensor:
        """(T,) bool: a token, and nothing that fills up."""
        return self.places < self.batch * self.length

    def rows_of(self, places: Tensor) -> Tensor:
        """(N,) int64, where the tokens of places (N,) in (B, L) stand on the axis."""
        rows = torch.zeros(self.batch * self.length + 1, dtype=torch.int64, device=places.device)
        rows[self.places] = torch.arange(len(self.places), device=places.device)
        return rows[places]

    def of_samples(self, wanted: Tensor) -> tuple[Tensor, "Packing"]:
        """The tokens of some samples and their own packing.

        Shapes: wanted (B,) bool, one True at least; return (N,) int64, the rows of those tokens on
        this axis, in the order of their packing; 0 for what fills up.
        """
        number = wanted.cumsum(0) - 1
        rows, pieces, start = [], [], 0
        for places in self.places.split(self.counts):
            sample, column = places // self.length, places % self.length
            ours = F.pad(wanted, (0, 1))[sample]
            here = ours.nonzero().squeeze(1)
            pieces.append(number[sample[here]] * self.length + column[here])
            rows.append(F.pad(here + start, (0, -len(here) % ROWS_STEP)))
            start += len(places)
        packing = Packing._filled(pieces, int(wanted.sum()), self.length)
        return torch.cat(rows), packing
