"""The codebook: unit vectors that follow the encoder, and are not allowed to die.

Looking up changes nothing; `update`, `revive` and `start` are the only calls that move codes, and
only training makes them. (BEiT v2's codebook also moves its statistics in eval mode.) With
`across_ranks` the three work on the vectors of all ranks, in rank order, so every rank holds the
same codebook, and the one that a single process with the whole batch would hold.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.draws import Draws

LOOKUP_ROWS = 16_384
"""Vectors compared with the codebook at a time: bounds memory to this many times `codes`."""
SAMPLES_PER_CODE = 64
"""k-means looks at no more than this many vectors a code."""


class Quantized(NamedTuple):
    """What a lookup gives.

    Shapes, for z (..., C):
        units       (..., C) z at length one, float32, with a gradient
        codes       (...) int64
        vectors     (..., C) the codes' vectors; the gradient goes straight through to z
        commitment  scalar, mean squared difference between a unit vector and its code's vector
    """

    units: Tensor
    codes: Tensor
    vectors: Tensor
    commitment: Tensor


class CodeUse(NamedTuple):
    """How evenly a codebook is used, from counts of its codes.

    used        share of the codes that occur
    perplexity  exp(entropy): the number of codes an even use with this entropy would have
    entropy     in nats
    top         share of the most frequent code
    """

    used: float
    perplexity: float
    entropy: float
    top: float


def code_use(counts: Tensor) -> CodeUse:
    """(V,) counts or shares of codes -> how evenly they are used; zeros for no codes at all."""
    total = counts.double().sum()
    if total <= 0:
        return CodeUse(0.0, 0.0, 0.0, 0.0)
    share = counts.double() / total
    entropy = float(-torch.xlogy(share, share).sum())
    used = float((counts > 0).double().mean())
    return CodeUse(used, math.exp(entropy), entropy, float(share.max()))


class CosineCodebook(nn.Module):
    """`codes` unit vectors, moved by an exponential mean of what they stand for (BEiT v2).

    One `update` with decay d: new = normalise(d w + (1 - d) normalise(mean of the unit vectors
    assigned to w)); a code without vectors keeps w. This is unilm's norm-EMA.

    `across_ranks` is set by a training in which every rank of torch.distributed takes part. It is
    not read off torch.distributed: rank 0 may train a tokenizer while the others wait.

    Buffers:
        weight  (V, C) float32, unit rows; zeros until `start` or a load fills them
        share   (V,) float32, exponential mean of the share of vectors that took each code
    """

    weight: Tensor
    share: Tensor

    def __init__(self, codes: int, width: int, decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.across_ranks = False
        self.register_buffer("weight", torch.zeros(codes, width))
        self.register_buffer("share", torch.full((codes,), 1.0 / codes))

    @property
    def codes(self) -> int:
        return len(self.weight)

    def lookup(self, units: Tensor) -> Tensor:
        """(..., C) unit vectors -> (...) int64, the code of largest cosine (first of equals).

        Always float32: in half precision near ties fall otherwise.
        """
        flat = units.detach().float().reshape(-1, units.shape[-1])
        with torch.autocast(units.device.type, enabled=False):
            found = [
                (rows @ self.weight.T).argmax(dim=-1)
                for rows in flat.split(LOOKUP_ROWS)
                if len(rows)
            ]
        codes = torch.cat(found) if found else flat.new_zeros(0, dtype=torch.int64)
        return codes.reshape(units.shape[:-1])

    def forward(self, z: Tensor) -> Quantized:
        """Nearest codes of (..., C) vectors. Changes nothing, in training mode neither."""
        with torch.autocast(z.device.type, enabled=False):
            units = F.normalize(z.float(), dim=-1)
            codes = self.lookup(units)
            near = F.embedding(codes, self.weight)
            commitment = F.mse_loss(units, near) if near.numel() else units.sum()
            vectors = units + (near - units).detach()
        return Quantized(units, codes, vectors, commitment)

    @torch.no_grad()
    def counts(self, codes: Tensor) -> Tensor:
        """(V,) float64: how often each code occurs, over all ranks."""
        return self._sum(torch.bincount(codes.flatten(), minlength=self.codes).double())

    @torch.no_grad()
    def update(self, units: Tensor, codes: Tensor) -> Tensor:
        """Move the codes towards the vectors that took them; (V,) counts over all ranks."""
        units, codes = units.detach().reshape(-1, units.shape[-1]).double(), codes.flatten()
        counts = self.counts(codes)
        sums = torch.zeros_like(self.weight, dtype=torch.float64)
        sums = self._sum(sums.index_add_(0, codes, units))
        taken = counts > 0
        mean = F.normalize(sums / counts.clamp(min=1)[:, None], dim=-1)
        moved = F.normalize(self.decay * self.weight.double() + (1 - self.decay) * mean, dim=-1)
        self.weight.copy_(torch.where(taken[:, None], moved, self.weight.double()))
        if (total := counts.sum()) > 0:
            self.share.lerp_((counts / total).to(self.share.dtype), 1 - self.decay)
        return counts

    @torch.no_grad()
    def revive(self, units: Tensor, codes: Tensor, draws: Draws, below: float) -> int:
        """Restart codes whose share fell under `below` times the mean share; how many.

        A dead code gets a vector of this batch, drawn without repeats, vectors that their code
        fits badly more likely. It starts with the mean share, so it has time to find its place.
        """
        dead = (self.share < below / self.codes).nonzero().flatten()
        if not len(dead):
            return 0
        flat = self._gather(units.detach().reshape(-1, units.shape[-1]))
        near = F.embedding(self._gather(codes.flatten()), self.weight)
        misfit = (1 - (flat.double() * near.double()).sum(dim=-1)).clamp(min=1e-9)
        # Weighted draw without repeats (Efraimidis and Spirakis): the largest u ** (1 / weight).
        uniform = torch.from_numpy(draws.uniforms(len(flat))).to(flat.device)
        keys = torch.log(uniform.clamp(min=1e-300)) / misfit
        dead = dead[: len(flat)]
        chosen = keys.topk(len(dead)).indices
        self.weight[dead] = F.normalize(flat[chosen].float(), dim=-1)
        self.share[dead] = 1.0 / self.codes
        return len(dead)

    @torch.no_grad()
    def start_random(self, draws: Draws) -> None:
        """Random directions, without a look at the data (`kmeans_iterations` 0)."""
        uniform = draws.uniforms(2 * self.weight.numel()).reshape(2, *self.weight.shape)
        normal = np.sqrt(-2 * np.log1p(-uniform[0])) * np.cos(2 * np.pi * uniform[1])
        self.weight.copy_(F.normalize(torch.from_numpy(normal), dim=-1))
        self.share.fill_(1.0 / self.codes)

    @torch.no_grad()
    def start(self, units: Tensor, draws: Draws, iterations: int) -> None:
        """Set the codes by k-means on (N, C) unit vectors of all ranks.

        First codes by k-means++ (each far from those before, so plain grounds that repeat a
        thousand times take few of them), then Lloyd's steps with the cosine. With fewer vectors
        than codes the rest stay near copies and are revived later.
        """
        flat = F.normalize(
            self._gather(units.detach().reshape(-1, units.shape[-1])).float(), dim=-1
        )
        most = SAMPLES_PER_CODE * self.codes
        if len(flat) > most:
            flat = flat[torch.from_numpy(draws.permutation(len(flat))[:most]).to(flat.device)]
        self.weight.copy_(_far_apart(flat, self.codes, draws))
        codes = self.lookup(flat)
        for _ in range(iterations):
            sums = torch.zeros_like(self.weight, dtype=torch.float64)
            sums.index_add_(0, codes, flat.double())
            taken = torch.bincount(codes, minlength=self.codes) > 0
            centres = F.normalize(sums, dim=-1).to(self.weight.dtype)
            self.weight.copy_(torch.where(taken[:, None], centres, self.weight))
            codes = self.lookup(flat)
        counts = torch.bincount(codes, minlength=self.codes).double()
        self.share.copy_(counts / counts.sum())

    def _sum(self, tensor: Tensor) -> Tensor:
        if self.across_ranks:
            dist.all_reduce(tensor)
        return tensor

    def _gather(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, laid end to end in rank order; ranks may have different numbers."""
        if not self.across_ranks:
            return rows
        sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=rows.device)
        sizes[dist.get_rank()] = len(rows)
        dist.all_reduce(sizes)
        longest = int(sizes.max())
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        pieces = [torch.zeros_like(padded) for _ in sizes]
        dist.all_gather(pieces, padded)
        return torch.cat([part[:size] for part, size in zip(pieces, sizes.tolist(), strict=True)])


def _far_apart(flat: Tensor, count: int, draws: Draws) -> Tensor:
    """(count, C): vectors of (N, C), each drawn by its squared distance to those before it."""
    uniform = draws.uniforms(count)
    chosen = flat.new_empty(count, flat.shape[-1])
    distance = flat.new_ones(len(flat), dtype=torch.float64)
    for number in range(count):
        ends = distance.cumsum(0)
        if ends[-1] <= 0:  # every vector is a code already: repeat them
            distance = torch.ones_like(distance)
            ends = distance.cumsum(0)
        at = int(torch.searchsorted(ends, ends[-1] * uniform[number], right=True))
        chosen[number] = flat[min(at, len(flat) - 1)]
        gap = 2 - 2 * (flat @ chosen[number]).double()
        # Equal vectors differ by rounding; that must not make them look far.
        distance = torch.minimum(distance, torch.where(gap > 1e-5, gap, torch.zeros_like(gap)))
    return chosen
