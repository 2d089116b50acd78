"""Image-text contrast and hard negatives: the arithmetic of retrieval, without a model.

B is the number of pairs of a rank and N that of all ranks. Every image is asked which of the N
texts is its own and every text which of the N images is (symmetric cross-entropy, one learnable
temperature without a clamp: VLMo section 3.3 and its code). Vectors are gathered over the ranks
WITH their gradient, so that the sum of all ranks' losses has the gradient that one process with
all pairs would have.

Several captions of one image in a batch are no negatives of each other. Pairs carry the id of their
image; VLMo's code ignores it, here there are two ways:
    "positives"  every pair of the same image is right, the target is spread evenly (ALBEF)
    "masked"     only a pair's own partner is right; other pairs of its image are left out
Without repeated images both are the plain cross-entropy.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from vlbeit.draws import Draws
from vlbeit.types import Score

START_LOG_SCALE = math.log(1 / 0.07)
"""Where the learnable logarithm of 1 / temperature starts (VLMo, CLIP)."""

Repeated = Literal["positives", "masked"]


class Shares(NamedTuple):
    """Who has how many pairs of the micro-batch that all ranks look at together."""

    rank: int
    sizes: tuple[int, ...]
    """Pairs of each rank. They may differ: a bad sample is missing where it was read."""

    @property
    def places(self) -> range:
        """Where this rank's pairs stand among all, rank after rank."""
        start = sum(self.sizes[: self.rank])
        return range(start, start + self.sizes[self.rank])


def share_sizes(pairs: int, device: torch.device) -> Shares:
    """Agree on the sizes; every rank calls it. One process alone needs no group."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return Shares(0, (pairs,))
    sizes = torch.zeros(dist.get_world_size(), dtype=torch.int64, device=device)
    sizes[dist.get_rank()] = pairs
    dist.all_reduce(sizes)
    return Shares(dist.get_rank(), tuple(sizes.tolist()))


def gather_values(x: Tensor, shares: Shares) -> Tensor:
    """(N, ...) from (B, ...) of every rank, rank after rank, without gradient.

    All but the first dimension must be the same on every rank.
    """
    if len(shares.sizes) == 1:
        return x
    sent = x.detach()
    sent = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
    # Collectives want equal shapes: short shares are filled up, and cut again.
    filled = sent.new_zeros(max(shares.sizes), *sent.shape[1:])
    filled[: len(sent)] = sent
    pieces = [torch.empty_like(filled) for _ in shares.sizes]
    dist.all_gather(pieces, filled)
    cut = [piece[:size] for piece, size in zip(pieces, shares.sizes, strict=True)]
    return torch.cat(cut).view(x.dtype)


class _Gather(torch.autograd.Function):
    """all_gather; backward adds what all ranks want of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shares: Shares) -> Tensor:
        ctx.places = shares.places
        return gather_values(x, shares)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        wanted = gradient.contiguous().clone()
        dist.all_reduce(wanted)
        return wanted[ctx.places.start : ctx.places.stop], None


def gather_with_gradient(x: Tensor, shares: Shares) -> Tensor:
    """`gather_values`, and a gradient to every rank from every rank's loss.

    It is the gradient of the SUM of the ranks' losses, as `Score` sums are added. VLMo's gather
    keeps the gradient of the local part only, which is another, smaller one.
    """
    if len(shares.sizes) == 1:
        return x
    out: Tensor = _Gather.apply(x, shares)  # type: ignore[no-untyped-call]
    return out


def gather_words(words: Tensor, valid: Tensor, shares: Shares) -> tuple[Tensor, Tensor]:
    """Texts of all ranks, filled up to the longest width. Shapes: (B, W) -> (N, longest W)."""
    if len(shares.sizes) == 1:
        return words, valid
    width = torch.tensor(words.shape[1], device=words.device)
    dist.all_reduce(width, op=dist.ReduceOp.MAX)
    lacking = int(width) - words.shape[1]
    return (
        gather_values(F.pad(words, (0, lacking)), shares),
        gather_values(F.pad(valid, (0, lacking), value=False), shares),
    )


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """What comparing the pairs of all ranks gave.

    Shapes: `score` sums over this rank's 2 B questions; `text_logits` (B, N): this rank's images
    against all texts, `image_logits` (B, N): its texts against all images, both without gradient
    and over the temperature; `same` (B, N) bool: pairs of the same image, oneself included.
    """

    score: Score
    text_logits: Tensor
    image_logits: Tensor
    same: Tensor


def contrast(
    image: Tensor,
    text: Tensor,
    log_scale: Tensor,
    image_ids: Tensor,
    repeated: Repeated = "positives",
    shares: Shares | None = None,
) -> Contrast:
    """Compare this rank's pairs with those of all ranks, in float32. Every rank must call it.

    Shapes: image, text (B, D), both of length 1; log_scale a scalar; image_ids (B,) int64.
    """
    shares = shares or share_sizes(len(image), image.device)
    with torch.autocast(image.device.type, enabled=False):
        both = torch.cat((image.float(), text.float()), dim=1)  # one gather, so one order
        all_images, all_texts = gather_with_gradient(both, shares).chunk(2, dim=1)
        scale = log_scale.float().exp()
        text_logits = scale * image.float() @ all_texts.T  # (B, N)
        image_logits = scale * text.float() @ all_images.T
    same = image_ids[:, None] == gather_values(image_ids, shares)[None, :]
    places = torch.tensor(shares.places, dtype=torch.int64, device=image.device)
    score = ask(text_logits, same, places, repeated) + ask(image_logits, same, places, repeated)
    return Contrast(
        score=score,
        text_logits=text_logits.detach(),
        image_logits=image_logits.detach(),
        same=same,
    )


def ask(logits: Tensor, same: Tensor, places: Tensor, repeated: Repeated) -> Score:
    """Cross-entropy of one direction, as sums.

    A question is answered when the best of the compared pairs is one of the same image.

    Shapes: logits (B, N), same (B, N) bool, places (B,) int64: each row's own column.
    """
    if repeated == "masked":
        others = same.scatter(1, places[:, None], False)
        logits = logits.masked_fill(others, float("-inf"))
        loss = F.cross_entropy(logits, places, reduction="sum")
    else:
        targets = same.float() / same.sum(dim=1, keepdim=True)
        loss = F.cross_entropy(logits, targets, reduction="sum")
    best = logits.detach().argmax(dim=1, keepdim=True)
    return Score(
        loss_sum=loss,
        count=torch.tensor(len(logits), device=logits.device),
        correct=same.gather(1, best).sum(),
    )


def keyed_uniforms(sample_ids: Sequence[str], *key: int | str) -> Tensor:
    """(B,) float64 in [0, 1): one draw per sample, the same on any rank and in any batch."""
    drawn = [Draws(*key, sample).uniform() for sample in sample_ids]
    return torch.tensor(drawn, dtype=torch.float64)


def draw_hard(logits: Tensor, same: Tensor, uniforms: Tensor, hardness: float = 1.0) -> Tensor:
    """(B,) int64: for each row a column of another image, drawn from the softmax of its logits
    times `hardness`.

    The likelier a mistake, the likelier it is drawn (ALBEF section 3.2 and VLMo: hardness 1; at 0
    all other images are alike). Never a column of the same image. -1 where there is no other image
    at all.

    Shapes: logits (B, N), same (B, N) bool, uniforms (B,) in [0, 1).
    """
    # On the CPU in float64: sums in a fixed order, and no weight is lost beside a large one.
    weights = (hardness * logits.to("cpu", torch.float64)).masked_fill(same.cpu(), float("-inf"))
    possible = weights.isfinite()
    weights = (weights - weights.amax(dim=1, keepdim=True)).exp().masked_fill(~possible, 0.0)
    reached = weights.cumsum(dim=1)  # (B, N)
    goal = uniforms[:, None] * reached[:, -1:]
    # The first column whose sum is above the goal; columns of weight 0 never are that.
    drawn = (reached <= goal).sum(dim=1)
    # A goal rounded up to the whole sum: the last column with a weight.
    last = (weights > 0).long().mul(torch.arange(1, weights.shape[1] + 1)).amax(dim=1) - 1
    drawn = torch.minimum(drawn, last)
    return torch.where(possible.any(dim=1), drawn, -1).to(logits.device)
