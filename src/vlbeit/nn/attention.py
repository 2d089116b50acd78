"""Multi-head self-attention shared by all modalities, and the one place that picks its kernel."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlbeit.nn.linear import Linear
from vlbeit.nn.packing import Packing


def attend(qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v, by heads.

    The kernel follows device, dtype and whether a gradient is wanted. bf16 on a CPU with a
    gradient: products and a softmax, twice as fast there as the fused kernel, whose backward pass
    is slow; everything else: PyTorch's fused attention.

    Shapes:
        qkv     (B, L, 3 * D), queries, keys and values side by side
        bias    broadcastable to (B, H, L, L), added to the scores; -inf hides a key
        return  (B, L, D)
    """
    if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16 and qkv.requires_grad:
        out: Tensor = ProductAttention.apply(qkv, heads, bias)  # type: ignore[no-untyped-call]
        return out
    query, key, value = split_heads(qkv, heads)
    if bias is not None:
        bias = bias.to(query.dtype)
    mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return mixed.transpose(1, 2).flatten(2)


def split_heads(qkv: Tensor, heads: int) -> Tensor:
    """(B, L, 3 * D) -> (3, B, H, L, d): queries, keys, values."""
    batch, length, wide = qkv.shape
    parts = qkv.view(batch, length, 3, heads, wide // (3 * heads))
    return parts.permute(2, 0, 3, 1, 4)


class ProductAttention(torch.autograd.Function):
    """Attention by batched products, with its derivatives written out.

    Autograd would scale, copy and stack queries, keys and values one by one in both directions;
    here they are copied once into the layout of the products and once back.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, heads: int, bias: Tensor | None) -> Tensor:
        """Shapes as of `attend`."""
        parts = split_heads(qkv, heads).contiguous()  # (3, B, H, L, d)
        _, batch, _, length, depth = parts.shape
        query, key, value = parts.flatten(1, 2)
        scale = 1 / math.sqrt(depth)
        scores = torch.baddbmm(parts.new_empty(1, 1, 1), query, key.mT, beta=0, alpha=scale)
        if bias is not None:
            # Rounded first: an addition in two dtypes would copy the scores there and back.
            scores.view(batch, heads, length, length).add_(bias.to(scores.dtype))
        weights = scores.softmax(dim=-1)
        ctx.save_for_backward(parts, weights)
        ctx.scale, ctx.bias = scale, None if bias is None else (bias.shape, bias.dtype)
        mixed = torch.bmm(weights, value).view(batch, heads, length, depth)
        return mixed.transpose(1, 2).flatten(2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        parts, weights = ctx.saved_tensors
        _, batch, heads, length, depth = parts.shape
        query, key, value = parts.flatten(1, 2)
        mixed = gradient.view(batch, length, heads, depth).transpose(1, 2).reshape(query.shape)
        of_scores = torch._softmax_backward_data(
            torch.bmm(mixed, value.mT), weights, -1, weights.dtype
        )
        of_parts = torch.empty_like(parts)
        of_query, of_key, of_value = of_parts.flatten(1, 2)
        nothing = parts.new_empty(1, 1, 1)
        torch.baddbmm(nothing, of_scores, key, beta=0, alpha=ctx.scale, out=of_query)
        torch.baddbmm(nothing, of_scores.mT, query, beta=0, alpha=ctx.scale, out=of_key)
        torch.bmm(weights.mT, mixed, out=of_value)
        of_bias = None
        if ctx.needs_input_grad[2]:
            shape, dtype = ctx.bias
            of_bias = of_scores.view(batch, heads, length, length).to(dtype).sum_to_size(shape)
        return of_parts.permute(1, 3, 0, 2, 4).flatten(2), None, of_bias


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias): (B, H, L, L), rows add up to 1.

    Shapes: query and key (B, H, L, d), bias as of `attend`.
    """
    scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1])), key.transpose(-2, -1))
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1)


def rollout(weights: Sequence[Tensor]) -> Tensor:
    """Attention rollout (Abnar & Zuidema 2020, arXiv 2005.00928, section 3): what of each input
    token reaches each token after the last of these layers, if the residual path carries half.

    Each layer's weights are averaged over the heads and mixed half and half with the identity; the
    layers are multiplied.

    Shapes: weights (B, H, L, L) of each layer, the first layer first; return (B, L, L), rows add up
    to 1.
    """
    first = weights[0]
    reached = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device)
    reached = reached.expand(len(first), -1, -1)
    for layer in weights:
        reached = 0.5 * (torch.matmul(layer.mean(dim=1), reached) + reached)
    return reached


class Attention(nn.Module):
    """Self-attention without a key bias (softmax cancels it; BEiT and VLMo have none).

    Shapes: x (B, L, D), bias broadcastable to (B, H, L, L) or None, return (B, L, D) before the
    output projection, which the block applies to the rows it needs.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.qkv = Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = Linear(width, width)

    def project(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, 3 * D), queries, keys and values side by side."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        return self.qkv.product(x, bias)

    def weights(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, H, L, L): what `forward` mixes the values with, rows add up to 1."""
        query, key, _ = split_heads(self.project(x), self.heads)
        return attention_weights(query, key, bias)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return attend(self.project(x), self.heads, bias)

    def packed(self, x: Tensor, bias: Tensor | None, packing: Packing) -> list[Tensor]:
        """Of real tokens x (T, D) alone: (samples, length, D) of each group of the packing."""
        parts = packing.to_groups(self.project(x))
        biases: list[Tensor | None] = [group.hidden for group in packing.groups] or [bias]
        return [attend(part, self.heads, b) for part, b in zip(parts, biases, strict=True)]
