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

GROUPS, LENGTH_STEP = 4, 16
"""Attention takes samples of like length together, a quarter of them at a time, with lengths filled
up to a multiple of 16: little padding, and few shapes, for the reason above."""


@dataclass(frozen=True)
class Group:
    """Samples that attention takes together: shapes (samples, length, C), and what is added to
    their scores, (samples, 1, 1, length): 0, or -inf at padding."""

    samples: int
    length: int
    hidden: Tensor


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Where the real tokens of padded sequences (B, L) stand, twice:

    * on one axis (T,), span by span and, inside a span, sample by sample, so that each expert
      serves one slice of it. Every span is filled up to a multiple of `ROWS_STEP` by copies of
      some token, which are never read again: they cost work and get no gradient.
    * in slots (S,), sample by sample, for attention: as groups of like length, or padded as they
      were, where relative positions are added to the scores.

    Shapes:
        valid   (B, L) bool
        places  (T,) int64, row-major places in (B, L); B * L for what fills up
        slots   (T,) int64, places in (S,); S for what fills up
    """

    valid: Tensor
    route: tuple[Span, ...]
    places: Tensor
    counts: tuple[int, ...]
    """Tokens of each span of the route, those that fill up included."""
    slots: Tensor
    groups: tuple[Group, ...]
    """Empty: one, (B, L), and what is added to its scores is the block's bias."""

    @staticmethod
    def of(valid: Tensor, route: Sequence[Span], grouped: bool = True) -> "Packing":
        """
        Args:
            valid: (B, L) bool, at least one token in each sample.
            grouped: slots in groups of like length; else padded as they were.
        """
        batch, length = valid.shape
        order = torch.arange(batch * length, device=valid.device).view(batch, length)
        lengths = [span.length for span in route]
        found = zip(order.split(lengths, dim=1), valid.split(lengths, dim=1), strict=True)
        places = [filled_up(places[real], batch * length) for places, real in found]
        slot_of, groups = in_groups(valid) if grouped else (order, ())
        held = sum(group.samples * group.length for group in groups) or batch * length
        joined = torch.cat(places)
        return Packing(
            valid=valid,
            route=tuple(route),
            places=joined,
            counts=tuple(len(piece) for piece in places),
            slots=F.pad(slot_of.flatten(), (0, 1), value=held)[joined],
            groups=groups,
        )

    @property
    def real(self) -> Tensor:
        """(T,) bool: a token, and nothing that fills up."""
        return self.places < self.valid.numel()

    def pack(self, x: Tensor) -> Tensor:
        """(B, L, C) -> (T, C)."""
        return x.flatten(0, 1).index_select(0, self.places.where(self.real, self.places[0]))

    def unpack(self, x: Tensor) -> Tensor:
        """(T, C) -> (B, L, C), zeros where there is no token."""
        spread = spread_out(x, self.places, self.valid.numel())
        return spread[:-1].view(*self.valid.shape, x.shape[1])

    def to_groups(self, x: Tensor) -> list[Tensor]:
        """(T, C) -> (samples, length, C) of each group, zeros at padding."""
        if not self.groups:
            return [self.unpack(x)]
        sizes = [group.samples * group.length for group in self.groups]
        *parts, _ = spread_out(x, self.slots, sum(sizes)).split([*sizes, 1])
        return [
            part.view(group.samples, group.length, -1)
            for part, group in zip(parts, self.groups, strict=True)
        ]

    def from_groups(self, parts: Sequence[Tensor], rows: Tensor | None = None) -> Tensor:
        """(samples, length, C) of each group -> (T, C), or (N, C) at rows (N,) of the axis."""
        joined = torch.cat([part.flatten(0, 1) for part in parts])
        slots = self.slots.where(self.real, self.slots[0])
        return joined.index_select(0, slots if rows is None else slots[rows])

    def rows_of(self, places: Tensor) -> Tensor:
        """(N,) int64, where the tokens of places (N,) in (B, L) stand on the axis."""
        rows = torch.zeros(self.valid.numel() + 1, dtype=torch.int64, device=places.device)
        rows[self.places] = torch.arange(len(self.places), device=places.device)
        return rows[places]

    def of_samples(self, wanted: Tensor) -> tuple[Tensor, "Packing"]:
        """The tokens of some samples and their own packing.

        Shapes: wanted (B,) bool, one True at least; return (N,) int64, the rows of those tokens on
        this axis, in the order of their packing; 0 for what fills up.
        """
        rows, start = [], 0
        asked = F.pad(wanted, (0, 1))  # what fills up is of no sample
        for places in self.places.split(self.counts):
            here = asked[places // self.valid.shape[1]].nonzero().squeeze(1)
            rows.append(filled_up(here + start, 0))
            start += len(places)
        packing = Packing.of(self.valid[wanted], self.route, grouped=bool(self.groups))
        return torch.cat(rows), packing


def filled_up(places: Tensor, value: int) -> Tensor:
    """(N,) -> (a multiple of ROWS_STEP,)"""
    return F.pad(places, (0, -len(places) % ROWS_STEP), value=value)


def spread_out(x: Tensor, places: Tensor, count: int) -> Tensor:
    """(T, C) at places (T,) -> (count + 1, C), zeros where there is none; the last row is of what
    fills up."""
    return x.new_zeros(count + 1, x.shape[1]).index_copy_(0, places, x)


def in_groups(valid: Tensor) -> tuple[Tensor, tuple[Group, ...]]:
    """(B, L) int64, the slot of each real token, and the groups that the slots make up."""
    lengths = valid.sum(dim=1)
    ordered = lengths.argsort(descending=True, stable=True)
    start = torch.empty_like(lengths)
    groups, held = [], 0
    for samples in ordered.split(-(-len(lengths) // GROUPS)):
        longest = int(lengths[samples[0]])
        length = longest + -longest % LENGTH_STEP
        start[samples] = held + length * torch.arange(len(samples), device=valid.device)
        empty = torch.arange(length, device=valid.device) >= lengths[samples, None]
        hidden = torch.zeros(empty.shape, device=valid.device).masked_fill(empty, float("-inf"))
        groups.append(Group(len(samples), length, hidden[:, None, None, :]))
        held += len(samples) * length
    return start[:, None] + valid.cumsum(dim=1) - 1, tuple(groups)
