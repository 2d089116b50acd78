"""The tiny model and the masked batches that the model tests share.

Weights are random and none of them is zero: biases, gains, tables and mask vectors start at zero
in a fresh model, which would hide a tensor that is wired wrongly.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from vlbeit.config import ModelConfig
from vlbeit.nn.model import VLBeit
from vlbeit.types import Batch, Stream

TINY = ModelConfig(
    width=32,
    layers=4,
    heads=4,
    ffn=48,
    vl_layers=2,
    image_size=(32, 32),
    patch=8,
    vocab=50,
    codes=40,
    text_positions=12,
    drop_path=0.0,
)
MASK_ID = 4


def tiny_config(**changes: object) -> ModelConfig:
    return replace(TINY, **changes)


def fill_normal(module: nn.Module, seed: int = 0, std: float = 0.1) -> None:
    """Every parameter normal; the weight of a LayerNorm around 1, or signals would vanish."""
    generator = torch.Generator().manual_seed(seed)
    scales = {id(part.weight) for part in module.modules() if isinstance(part, nn.LayerNorm)}
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if id(parameter) in scales:
                parameter.add_(1.0)


def tiny_model(seed: int = 0, **changes: object) -> VLBeit:
    model = VLBeit(tiny_config(**changes))
    fill_normal(model, seed)
    return model


def random_pixels(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, *size), generator=generator, dtype=torch.uint8)


def exactly(count: int, rows: int, columns: int, seed: int = 0) -> Tensor:
    """(rows, columns) bool with `count` True in each row."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, columns, generator=generator).argsort(dim=1)
    return torch.zeros(rows, columns, dtype=torch.bool).scatter_(1, order[:, :count], True)


def masked_batch(
    stream: Stream,
    samples: int = 4,
    *,
    lengths: tuple[int, ...] | None = None,
    epoch: int = 0,
    seed: int = 0,
    config: ModelConfig = TINY,
    depth_draws: bool = False,
) -> Batch:
    """One masked micro-batch; texts of several lengths, so that there is padding."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, Tensor] = {}
    if stream != "text":
        rows, columns = (side // config.patch for side in config.image_size)
        patches = rows * columns
        parts["pixels"] = random_pixels(samples, config.image_size, seed)
        parts["patch_masked"] = exactly(round(0.4 * patches), samples, patches, seed)
        parts["patch_codes"] = torch.randint(
            0, config.codes, (samples, patches), generator=generator
        )
    if stream != "image":
        lengths = lengths or tuple(10 - row % 4 for row in range(samples))
        width = max(lengths)
        words = torch.randint(5, config.vocab, (samples, width), generator=generator)
        valid = torch.arange(width)[None, :] < torch.tensor(lengths)[:, None]
        words[:, 0] = 2
        words[torch.arange(samples), torch.tensor(lengths) - 1] = 3
        words = words.masked_fill(~valid, 0)
        maskable = valid & (words >= 5)
        masked = (torch.rand(samples, width, generator=generator) < 0.4) & maskable
        masked[:, 1] = True
        parts |= {"words": words, "word_valid": valid, "word_masked": masked}
        parts["words_given"] = words.masked_fill(masked, MASK_ID)
    if depth_draws:
        draws = torch.rand(samples, 2, 2 * config.layers, generator=generator)
        parts["depth_draws"] = draws
    ids = tuple(f"{stream}s:{epoch}:{index}" for index in range(samples))
    return Batch(stream=stream, sample_ids=ids, **parts)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """The gradients that arrived, by name."""
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
