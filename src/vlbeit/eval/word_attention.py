"""From words to patches: what of a word's attention goes where in the picture."""

from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from vlbeit.errors import ConfigError
from vlbeit.eval.downstream import TaskRun
from vlbeit.eval.evaluate import LoadedRun
from vlbeit.nn.attention import rollout

Layer: TypeAlias = int | Literal["rollout"]
"""1 is the first layer."""


class Attended(NamedTuple):
    """Attention of one text on one picture."""

    words: list[str]
    """W pieces of the vocabulary, [T_CLS] first and [T_SEP] last."""
    grid: tuple[int, int]
    """Rows and columns of patches."""
    weights: np.ndarray
    """(W, P) float32 in [0, 1], patches row-major: what of each word's attention goes to each
    patch. What is missing from 1 goes to words and to [I_CLS]."""
    layer: Layer


def word_attention(
    run: LoadedRun | TaskRun, ids: np.ndarray, picture: np.ndarray, layer: Layer
) -> Attended:
    """Attention of the fused pass, [text ; image], averaged over heads.

    Args:
        layer: that layer's, or "rollout": all layers multiplied, see `vlbeit.nn.attention.rollout`.

    Shapes: ids (W,) with [T_CLS] and [T_SEP]; picture (3, height, width) uint8.

    Raises:
        ConfigError: there is no such layer.
    """
    layers = len(run.model.backbone.blocks)
    if layer != "rollout" and not (type(layer) is int and 1 <= layer <= layers):
        raise ConfigError(
            f"layer must be a whole number in 1..{layers} or 'rollout', found {layer!r}"
        )
    words = torch.from_numpy(ids.astype(np.int64))[None].to(run.device)
    pixels = torch.from_numpy(picture)[None].to(run.device)
    with torch.no_grad():
        states = run.model.embed_pair(words, None, pixels)
        weights = run.model.backbone.attention_weights(states)
        found = rollout(weights) if layer == "rollout" else weights[layer - 1].mean(dim=1)
    assert states.grid is not None
    patches = states.grid[0] * states.grid[1]
    return Attended(
        words=run.text.pieces(ids.tolist()),
        grid=states.grid,
        weights=found[0, : len(ids), -patches:].float().cpu().numpy(),
        layer=layer,
    )
