"""The MoME block: attention for everyone, one feed-forward expert per modality."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vlbeit.nn.attention import Attention
from vlbeit.nn.linear import Linear
from vlbeit.nn.packing import Packing
from vlbeit.types import Modality, Span


class Expert(nn.Module):
    """The paper's V-FFN, L-FFN or VL-FFN: a feed-forward layer with its own LayerNorm in front."""

    def __init__(self, width: int, hidden: int, norm_eps: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.fc1 = Linear(width, hidden)
        self.act = nn.GELU()
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(self.norm(x))))
        return out


def residual(x: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
    return x + branch if gamma is None else x + gamma * branch


class Block(nn.Module):
    """Pre-LN Transformer block with modality experts (VLMo eq. 1-2).

        h = x + gamma_1 * Attention(LN1(x))
        y = h + gamma_2 * Expert_m(LN2_m(h))        m: the modality of the token

    LN1, attention and the gammas are shared by all modalities. The route is an argument and not
    a setting of the module, so two calls with different routes never disturb each other.

    Stochastic depth runs the kept samples only and divides their branch by the keep rate. With
    `static_shapes` it runs all and multiplies a dropped branch by 0: the same numbers up to
    rounding and more work, but no shape depends on the draws, which on a GPU would have to be
    waited for and could not be compiled.

    With a packing x is (T, D), the real tokens alone, span by span: the same numbers, and only
    attention sees the padding.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        experts: Sequence[Modality],
        layer_scale: float,
        drop_rate: float,
        norm_eps: float,
    ) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.static_shapes = False
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attention = Attention(width, heads)
        self.experts = nn.ModuleDict(
            {modality.value: Expert(width, hidden, norm_eps) for modality in experts}
        )
        self.gamma_1 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None
        self.gamma_2 = nn.Parameter(torch.full((width,), layer_scale)) if layer_scale else None

    def spans(self, route: Sequence[Span]) -> tuple[Span, ...]:
        """The route through this block: a pair is one span where there is a VL-expert."""
        if len(route) > 1 and Modality.FUSED.value in self.experts:
            return (Span(Modality.FUSED, sum(span.length for span in route)),)
        return tuple(route)

    def _attention_branch(self, x: Tensor, bias: Tensor | None, packing: Packing | None) -> Tensor:
        if packing is None:
            mixed = self.attention(self.norm1(x), bias)
        else:
            mixed = packing.from_groups(self.attention.packed(self.norm1(x), bias, packing))
        out: Tensor = self.attention.proj(mixed)
        return out

    def _expert_branch(self, x: Tensor, route: Sequence[Span], packing: Packing | None) -> Tensor:
        spans = self.spans(route)
        if len(spans) == 1:
            out: Tensor = self.experts[spans[0].modality.value](x)
            return out
        axis = 1 if packing is None else 0
        counts = [span.length for span in spans] if packing is None else packing.counts
        pieces = x.split(counts, dim=axis)
        served = [self.experts[s.modality.value](p) for s, p in zip(spans, pieces, strict=True)]
        return torch.cat(served, dim=axis)

    def _kept(
        self, keep: Tensor, packing: Packing | None
    ) -> tuple[Tensor, Packing | None, Tensor | float]:
        """The rows of the kept samples, their packing, and what their branch is multiplied by.

        Shapes: keep (B,) bool; return rows (K,) into the first axis of x, a factor or one a row.
        """
        scale = 1 / (1 - self.drop_rate)
        if packing is None:
            return keep.nonzero().squeeze(1), None, scale
        rows, packing = packing.of_samples(keep)
        return rows, packing, packing.real[:, None] * scale

    def forward(
        self,
        x: Tensor,
        route: Sequence[Span],
        bias: Tensor | None = None,
        draws: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """Shapes: x and the result (B, L, D), or (T, D) with a packing; bias broadcastable to
        (B, H, L, L), draws (B, 2) or None."""
        if draws is None or self.drop_rate == 0:
            x = residual(x, self._attention_branch(x, bias, packing), self.gamma_1)
            return residual(x, self._expert_branch(x, route, packing), self.gamma_2)
        if self.static_shapes:
            scale_1, scale_2 = kept(draws, self.drop_rate).to(x.dtype)[..., None, None].unbind(1)
            x = residual(x, self._attention_branch(x, bias, None) * scale_1, self.gamma_1)
            return residual(x, self._expert_branch(x, route, None) * scale_2, self.gamma_2)
        keep_1, keep_2 = (draws >= self.drop_rate).unbind(1)
        if keep_1.any():
            rows, packed, scale = self._kept(keep_1, packing)
            part = bias[keep_1] if bias is not None and bias.shape[0] > 1 else bias
            branch = self._attention_branch(x[rows], part, packed) * scale
            x = add_rows(x, rows, branch, self.gamma_1)
        if keep_2.any():
            rows, packed, scale = self._kept(keep_2, packing)
            branch = self._expert_branch(x[rows], route, packed) * scale
            x = add_rows(x, rows, branch, self.gamma_2)
        return x

    def rows(
        self,
        x: Tensor,
        route: Sequence[Span],
        places: Tensor,
        bias: Tensor | None = None,
        draws: Tensor | None = None,
        packing: Packing | None = None,
    ) -> Tensor:
        """The block's output at some tokens only.

        Attention still sees every token; its projection, the second norm and the experts run on
        the wanted rows. The numbers are those of `forward`.

        Shapes: places (N,) int64, row-major indices into (B, L); return (N, D).
        """
        if packing is None:
            length = x.shape[1]
            mixed = self.attention(self.norm1(x), bias).flatten(0, 1)[places]  # (N, D)
            x = x.flatten(0, 1)[places]
        else:
            length = packing.valid.shape[1]
            here = packing.rows_of(places)
            mixed = packing.from_groups(self.attention.packed(self.norm1(x), bias, packing), here)
            x = x[here]
        branch = self.attention.proj(mixed)
        sample = places // length if draws is not None and self.drop_rate else None
        if sample is not None and draws is not None:
            branch = branch * kept(draws[:, 0], self.drop_rate)[sample, None].to(branch.dtype)
        picked = residual(x, branch, self.gamma_1)
        branch = self._expert_rows(picked, route, places % length)
        if sample is not None and draws is not None:
            branch = branch * kept(draws[:, 1], self.drop_rate)[sample, None].to(branch.dtype)
        return residual(picked, branch, self.gamma_2)

    def _expert_rows(self, picked: Tensor, route: Sequence[Span], columns: Tensor) -> Tensor:
        """Shapes: picked (N, D), columns (N,) the place of each row in its sequence."""
        spans = self.spans(route)
        if len(spans) == 1:
            out: Tensor = self.experts[spans[0].modality.value](picked)
            return out
        branch, start = None, 0
        for span in spans:
            inside = (columns >= start) & (columns < start + span.length)
            here = inside.nonzero().squeeze(1)
            start += span.length
            if len(here):
                served = self.experts[span.modality.value](picked[here])
                if len(here) == len(picked):
                    return served  # type: ignore[no-any-return]
                if branch is None:
                    branch = served.new_zeros(picked.shape)
                branch = branch.index_copy(0, here, served)
        return torch.zeros_like(picked) if branch is None else branch


def kept(draws: Tensor, rate: float) -> Tensor:
    """1 / (1 - rate) where the draw keeps the branch, 0 where it drops it."""
    return (draws >= rate).float() / (1 - rate)


def add_rows(x: Tensor, rows: Tensor, branch: Tensor, gamma: Tensor | None) -> Tensor:
    """x with gamma * branch added to the given samples."""
    branch = branch if gamma is None else gamma * branch
    return x.index_add(0, rows, branch.to(x.dtype))
