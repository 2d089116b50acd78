"""Gradients of a step, added over ranks once its last backward pass is done.

Not by DistributedDataParallel: it adds in the hooks of the last backward pass and waits there for
every parameter, while a micro-batch of one stream does not reach all experts
(docs/decisions/0009). Every rank adds its micro-batches by itself; then the sums are added in
buckets, or in a fixed order.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vlbeit.train.distributed import World

BUCKET = 64 << 20
"""Bytes that ranks add in one call: enough to be worth it, little beside the model."""


def fill_missing(parameters: Iterable[nn.Parameter]) -> None:
    """Zeros where nothing gave a gradient, so that the update does not depend on how samples fell
    to micro-batches and ranks: without a gradient AdamW would leave a parameter as it is."""
    for parameter in parameters:
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def sum_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """The gradients of all ranks added up, at every rank; zeros where there were none.

    The order of the ranks' terms is the library's: another number of ranks rounds otherwise.

    Raises:
        LostWorkerError: another rank is gone or silent.
    """
    learning = [p for p in parameters if p.requires_grad]
    fill_missing(learning)
    if world.size == 1:
        return
    with world.guard("adding gradients"):
        # All at once: while one bucket is under way the next is put together.
        sent = []
        for bucket in buckets(learning):
            flat = torch.cat([grad_of(p).flatten() for p in bucket])
            take_from(bucket, flat)
            sent.append(dist.all_reduce(flat, async_op=True))
        for work in sent:
            work.wait()


def buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """The parameters in their order, in lists of about BUCKET bytes and one type each."""
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        added = parameter.numel() * parameter.element_size()
        if bucket and (size + added > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += added
    if bucket:
        yield bucket


def grad_of(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        raise ValueError("a parameter without a gradient")
    return parameter.grad


def take_from(parameters: Sequence[nn.Parameter], flat: Tensor) -> None:
    """Make views of `flat` (the numbers of all of them, end to end) their gradients."""
    pieces = flat.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.grad = piece.view_as(parameter)


class Gradients(Protocol):
    """How a step's gradients come together."""

    def end_part(self) -> None:
        """A part of the step (`StepData.parts`) has had its backward passes."""

    def finish(self, limit: float) -> Tensor:
        """All of this rank's parts have ended: the gradients become those of the whole step, scaled
        down to a norm of `limit`. Returns the norm before that, the same at every rank.

        Raises:
            LostWorkerError: another rank is gone or silent.
        """


class SummedGradients:
    """Added over ranks in the order that the library has."""

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._world = world

    def end_part(self) -> None:
        """Backward passes add to the gradients by themselves."""

    def finish(self, limit: float) -> Tensor:
        sum_gradients(self._parameters, self._world)
        return torch.nn.utils.clip_grad_norm_(self._parameters, limit)


class OrderedGradients:
    """Added as one binary tree over the step's parts, whatever the number of ranks.

        ((g0 + g1) + (g2 + g3)) + ((g4 + g5) + (g6 + g7))

    A rank has as many neighbouring parts as every other, a power of two of them: a whole branch of
    the tree, which it adds by itself as its parts come. The upper branches are added between
    ranks, each rank for its share of the numbers. Addition of two floats does not depend on which
    comes first, so nothing else has to be agreed on.

    Costs: log2(parts of a rank) more copies of the gradients, and an addition of the gradients a
    part.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], world: World) -> None:
        self._parameters = [p for p in parameters if p.requires_grad]
        self._world = world
        self._branches: list[tuple[int, list[Tensor]]] = []
        """Finished branches from left to right: how many parts each holds, and its sums."""

    def end_part(self) -> None:
        fill_missing(self._parameters)
        held, sums = 1, [grad_of(p) for p in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        while self._branches and self._branches[-1][0] == held:
            _, left = self._branches.pop()
            for own, other in zip(left, sums, strict=True):
                own.add_(other)
            held, sums = 2 * held, left
        self._branches.append((held, sums))

    def finish(self, limit: float) -> Tensor:
        ((_, sums),) = self._branches  # one branch: a power of two of parts has ended
        self._branches = []
        for parameter, total in zip(self._parameters, sums, strict=True):
            parameter.grad = total
        if self._world.size > 1:
            with self._world.guard("adding gradients in order"):
                for bucket in buckets(self._parameters):
                    flat = torch.cat([grad_of(p).flatten() for p in bucket])
                    take_from(bucket, sum_in_rank_order(flat, self._world.size))
        return torch.nn.utils.clip_grad_norm_(self._parameters, limit)


def sum_in_rank_order(flat: Tensor, ranks: int) -> Tensor:
    """(n,) of every rank, a power of two of them, added as a binary tree over the ranks.

    Every rank adds a share of the n numbers and hands it round: the traffic of an all-reduce.
    """
    share = -(-len(flat) // ranks)
    sent = nn.functional.pad(flat, (0, ranks * share - len(flat)))
    rows = torch.empty_like(sent)
    dist.all_to_all_single(rows, sent)
    rows = rows.view(ranks, share)  # row r: rank r's numbers of this rank's share
    while len(rows) > 1:
        rows = rows[0::2] + rows[1::2]
    dist.all_gather_into_tensor(sent, rows[0].contiguous())
    return sent[: len(flat)]
