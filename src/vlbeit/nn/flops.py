"""How much arithmetic a model needs, counted from its shapes (matrix products only)."""

from collections.abc import Mapping, Sequence

from vlbeit.config import ModelConfig, VisualTokenizerConfig
from vlbeit.types import Batch, TaskBatch


def encoder_flops(config: ModelConfig | VisualTokenizerConfig, tokens: int) -> int:
    """Forward FLOPs of one sequence: 2 per multiply-add, projections, experts and attention."""
    width, hidden = config.width, config.ffn
    per_token = 8 * width * width + 4 * width * hidden
    return config.layers * (tokens * per_token + 4 * tokens * tokens * width)


def patch_flops(config: ModelConfig | VisualTokenizerConfig, patches: int) -> int:
    """Forward FLOPs of the projection of a picture's patches."""
    return 2 * patches * 3 * config.patch**2 * config.width


def sample_flops(config: ModelConfig, patches: int, words: int) -> int:
    """Forward and backward of one sample without its head: 3 x forward.

    Args:
        patches: of the picture, [I_CLS] not counted; 0: no picture.
        words: tokens of the text, [T_CLS] and [T_SEP] counted; 0: no text.
    """
    tokens = words + (patches + 1 if patches else 0)
    # The pixels need no gradient: the patch projection has two products, not three.
    return 3 * encoder_flops(config, tokens) + 2 * patch_flops(config, patches)


def head_flops(config: ModelConfig, targets: Mapping[str, float]) -> float:
    """Forward and backward of the heads, which run at the positions to predict only.

    Args:
        targets: how many, by objective.
    """
    return sum(
        6 * config.width * (config.vocab if name in ("mlm", "mvlm_text") else config.codes) * count
        for name, count in targets.items()
    )


def training_flops(config: ModelConfig, batch: Batch, passes: int, targets: dict[str, int]) -> int:
    """Useful FLOPs of forward and backward on one micro-batch, padding not counted.

    Args:
        passes: forward passes of each sample (2 for a pair in two views).
        targets: positions to predict by objective.
    """
    patches = 0 if batch.patch_masked is None else batch.patch_masked.shape[1]
    lengths = [0] * len(batch) if batch.word_valid is None else batch.word_valid.sum(1).tolist()
    body = passes * sum(sample_flops(config, patches, length) for length in lengths)
    return body + int(head_flops(config, targets))


def task_flops(config: ModelConfig, batch: TaskBatch, paths: Sequence[str], frozen: bool) -> int:
    """Useful FLOPs of forward and backward of a downstream task; its head is not counted.

    Args:
        paths: "image", "text" or "pair", one for each forward pass of a sample; a task with
            several images gives each of its image or pair passes the next one.
        frozen: the trunk has no backward pass.
    """
    patches = 0
    if batch.pixels is not None:
        patches = batch.pixels.shape[-2] * batch.pixels.shape[-1] // config.patch**2 + 1
    lengths = [0] * len(batch) if batch.word_valid is None else batch.word_valid.sum(1).tolist()
    total = 0
    for path in paths:
        for words in lengths:
            tokens = (path != "text") * patches + (path != "image") * words
            total += encoder_flops(config, tokens)
    return total if frozen else 3 * total
