"""The stack of MoME blocks: States in, rows out. It never asks what the tokens mean."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vlbeit.nn.mome import Block
from vlbeit.nn.packing import ROWS_STEP, Packing
from vlbeit.nn.positions import RelativeBias
from vlbeit.types import Modality, Span, States

PACKED_FROM = 0.15
"""Share of the tokens that packing must spare; less, and moving them costs what it saves
(docs/notebook.md)."""


class Backbone(nn.Module):
    """Blocks with V- and L-experts in every layer and a VL-expert in the top `vl_layers`.

    Image only: V-experts in all layers. Text only: L-experts in all layers. Pair: L- and
    V-experts below, the VL-expert for all tokens on top (VLMo section 3.2; BEiT-3 Figure 3).
    Drop rates rise linearly from 0 at the first block to `drop_path` at the last.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        ffn: int,
        experts: Sequence[Modality] = (Modality.IMAGE, Modality.TEXT),
        vl_layers: int = 0,
        layer_scale: float = 0.0,
        drop_path: float = 0.0,
        norm_eps: float = 1e-6,
        relative_bias: RelativeBias | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= vl_layers <= layers:
            raise ValueError(f"vl_layers must be 0..{layers} (the layers), found {vl_layers}")
        self.checkpoint_activations = False
        self.blocks = nn.ModuleList(
            Block(
                width,
                heads,
                ffn,
                (*experts, Modality.FUSED) if layer >= layers - vl_layers else experts,
                layer_scale,
                drop_path * layer / max(layers - 1, 1),
                norm_eps,
            )
            for layer in range(layers)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.relative_bias = relative_bias

    def _biases(self, states: States, packing: Packing | None = None) -> list[Tensor | None]:
        """What is added to the attention scores of each layer: padding, relative positions. A
        packing in groups knows its padding."""
        padding = None
        if packing is not None and packing.groups:
            return [None] * len(self.blocks)
        # A graph that is exported cannot look at its input, and a GPU is not asked, since that
        # would wait for it (`Batch.valid_words` has said so before): there padding is always added,
        # which is 0 where every token is real.
        blind = torch.compiler.is_exporting() or (
            states.valid is not None and states.valid.device.type != "cpu"
        )
        if states.valid is not None and (blind or not bool(states.valid.all())):
            padding = torch.zeros(states.valid.shape, dtype=states.x.dtype, device=states.x.device)
            padding = padding.masked_fill(~states.valid, float("-inf"))[:, None, None, :]
        if self.relative_bias is None:
            return [padding] * len(self.blocks)
        relative = self.relative_bias(states.route, states.grid)
        if padding is None:
            return list(relative)
        return [bias + padding for bias in relative]

    def _packed(self, states: States) -> tuple[Tensor, Packing | None]:
        """The tokens that the blocks work on: (B, L, D) as they are, or (T, D) without the padding,
        where there is enough of it and the number of tokens may differ from step to step."""
        valid = states.valid
        # Asked first: the length of a batch, once looked at, is a constant of an exported graph.
        if torch.compiler.is_exporting() or any(block.static_shapes for block in self.blocks):
            return states.x, None
        if valid is None or valid.device.type != "cpu" or not len(valid):
            return states.x, None
        packing = Packing.of(valid, states.route, grouped=self.relative_bias is None)
        if len(packing.places) > (1 - PACKED_FROM) * valid.numel():
            return states.x, None
        return packing.pack(states.x), packing

    def _block(
        self,
        block: nn.Module,
        x: Tensor,
        states: States,
        bias: Tensor | None,
        draws: Tensor | None,
        packing: Packing | None,
    ) -> Tensor:
        given = (x, states.route, bias, draws, packing)
        if self.checkpoint_activations and torch.is_grad_enabled():
            out: Tensor = checkpoint(block, *given, use_reentrant=False)
            return out
        out = block(*given)
        return out

    def forward(self, states: States) -> Tensor:
        """(B, L, D), every token after the final norm; what padding gets means nothing."""
        x, packing = self._packed(states)
        biases = self._biases(states, packing)
        for layer, block in enumerate(self.blocks):
            x = self._block(block, x, states, biases[layer], layer_draws(states, layer), packing)
        out: Tensor = self.norm(x)
        return out if packing is None else packing.unpack(out)

    def taps(self, states: States, layers: Sequence[int]) -> list[Tensor]:
        """(B, L, D) after each of the named blocks (1 = the first), without the final norm."""
        (x, packing), kept = self._packed(states), {}
        biases = self._biases(states, packing)
        for layer, block in enumerate(self.blocks):
            x = self._block(block, x, states, biases[layer], layer_draws(states, layer), packing)
            kept[layer + 1] = x
        wanted = [kept[layer] for layer in layers]
        return wanted if packing is None else [packing.unpack(x) for x in wanted]

    def attention_weights(self, states: States) -> list[Tensor]:
        """(B, H, L, L) of every layer, the first first: what its attention mixes the values with.

        Fused kernels never hold these numbers, so they are computed beside the forward pass, from
        the same projections; a row adds up to 1 and padding gets 0.
        """
        x, kept = states.x, []
        biases = self._biases(states)
        for layer, block in enumerate(self.blocks):
            kept.append(block.attention.weights(block.norm1(x), biases[layer]))  # type: ignore[operator, union-attr]
            x = self._block(block, x, states, biases[layer], layer_draws(states, layer), None)
        return kept

    def rows(self, states: States, wanted: Tensor, count: int | None = None) -> Tensor:
        """(N, D), the wanted tokens in row-major order: the same numbers as `forward(...)[wanted]`.

        The last block's projection and expert and the final norm run on those rows only.

        Args:
            count: how many are wanted, where the host knows it; as in `places_of`.
        """
        places = places_of(wanted, count)
        count = len(places)
        places = F.pad(places, (0, -count % ROWS_STEP))
        return self._rows_at(states, places, states.route)[:count]

    def first(self, states: States) -> Tensor:
        """(B, D), the first token after the final norm: [T_CLS] of a text or a pair, [I_CLS] of an
        image."""
        batch, length = states.x.shape[:2]
        places = torch.arange(batch, device=states.x.device) * length
        # All of them are the first span's, so no expert need ask which rows are its own.
        route = self.blocks[-1].spans(states.route)[:1]  # type: ignore[operator]
        return self._rows_at(states, places, route)

    def _rows_at(self, states: States, places: Tensor, route: Sequence[Span]) -> Tensor:
        """(N, D), the tokens at the places (N,) of (B, L) after the final norm; `route` says which
        experts of the last block serve them."""
        x, packing = self._packed(states)
        biases = self._biases(states, packing)
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            draws = layer_draws(states, layer)
            if layer == last:
                x = block.rows(x, route, places, biases[layer], draws, packing)  # type: ignore[operator]
            else:
                x = self._block(block, x, states, biases[layer], draws, packing)
        out: Tensor = self.norm(x)
        return out

    def mean(self, states: States, wanted: Tensor) -> Tensor:
        """(B, D), the mean of the wanted tokens after the final norm; wanted (B, L) bool, at least
        one in each row."""
        share = wanted / wanted.sum(dim=1, keepdim=True)
        return torch.einsum("bl,bld->bd", share.to(states.x.dtype), self(states))


def places_of(wanted: Tensor, count: int | None = None) -> Tensor:
    """(N,) int64: row-major places of the True ones.

    Args:
        count: N, where the host knows it: then nothing waits for the device to count.
    """
    flat = wanted.flatten()
    if count is None:
        return flat.nonzero().squeeze(1)
    if flat.device.type == "cpu" and int(flat.sum()) != count:
        raise ValueError(f"{int(flat.sum())} are wanted, {count} were counted")
    return torch.nonzero_static(flat, size=count).squeeze(1)


def layer_draws(states: States, layer: int) -> Tensor | None:
    """(B, 2): the draws of the attention and the expert branch of a layer."""
    if states.depth_draws is None:
        return None
    return states.depth_draws[:, 2 * layer : 2 * layer + 2]
