"""How much arithmetic a model needs, counted from its shapes (matrix products only)."""

from collections.abc import Sequence

from vlbeit.config import ModelConfig
from vlbeit.types import Batch, TaskBatch


def encoder_flops(config: ModelConfig, tokens: int) -> int:
    """Forward FLOPs of one sequence: 2 per multiply-add, projections, experts and attention."""
    width, hidden = config.width, config.ffn
    per_token = 8 * width * width + 4 * width * hidden
    return config.layers * (tokens * per_token + 4 * tokens * tokens * width)


def training_flops(config: ModelConfig, batch: Batch, passes: int, targets: dict[str, int]) -> int:
    """Useful FLOPs of forward and backward on one micro-batch: 3 x forward, padding not counted.

    Args:
        passes: forward passes of each sample (2 for a pair in two views).
        targets: positions to predict by objective; heads run there only.
    """
    patches = 0 if batch.patch_masked is None else batch.patch_masked.shape[1] + 1
    lengths = [0] * len(batch) if batch.word_valid is None else batch.word_valid.sum(1).tolist()
    body = passes * sum(encoder_flops(config, patches + length) for length in lengths)
    # The pixels need no gradient: the patch projection has two products, not three.
    stem = passes * len(batch) * 2 * max(patches - 1, 0) * 3 * config.patch**2 * config.width
    heads = sum(
        2 * config.width * (config.vocab if name in ("mlm", "mvlm_text") else config.codes) * count
        for name, count in targets.items()
    )
    return 3 * (body + heads) + 2 * stem


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
