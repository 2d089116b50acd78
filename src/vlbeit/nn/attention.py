"""Multi-head self-attention shared by all modalities, and the one place that picks its kernel."""

import math

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
        scores = torch.matmul(query * (1 / math.sqrt(query.shape[-1])), key.transpose(-2, -1))
        if bias is not None:
            scores = scores + bias.to(scores.dtype)
        return torch.matmul(scores.softmax(dim=-1), value)
    if bias is not None:
        bias = bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)


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

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        qkv_bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        qkv = F.linear(x, self.qkv.weight, qkv_bias)
        qkv = qkv.view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)  # each (B, H, L, d)
        mixed = attend(query, key, value, bias)
        return mixed.transpose(1, 2).reshape(batch, length, width)
