"""Our training step for the peer benchmark: its `--ours` hook.

    PYTHONPATH=src python PEERS.py --threads 1 --clock cpu --ours benchmarks/peer_hook.py

The package's own model, objectives and step (vlbeit.train.bench_step.Step) run on the batch that
every peer gets, with the optimizer every peer gets. A pair is one pass with both modalities masked,
because that is the work the benchmark counts. Padding is cut: texts of like length share a
forward pass, as the package's own length buckets make them.
"""

from collections.abc import Callable
from typing import Any

import torch

from vlbeit import __version__
from vlbeit.config import ModelConfig, ObjectiveConfig, OptimConfig, PretrainConfig
from vlbeit.nn.linear import RoundedWeights, autocast
from vlbeit.nn.model import VLBeit
from vlbeit.train.bench_step import Step
from vlbeit.types import STREAMS, Batch, Stream

MOST_PADDING = 0.1
"""Largest share of padding in a pass before the texts are split over two."""


def by_length(lengths: list[int], patches: int) -> list[list[int]]:
    """Places of the samples, grouped so that little of each group is padding."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        group = [*groups[-1], place] if groups else [place]
        longest = lengths[group[0]] + patches
        real = sum(lengths[i] + patches for i in group)
        if groups and real >= (1 - MOST_PADDING) * longest * len(group):
            groups[-1] = group
        else:
            groups.append([place])
    return groups


def to_batches(stream: Stream, part: dict[str, Any]) -> list[Batch]:
    """The benchmark's tensors as our masked micro-batches."""
    parts: dict[str, torch.Tensor] = {}
    if stream != "text":
        parts |= {
            "pixels": part["pixels"],
            "patch_masked": part["mask"],
            "patch_codes": part["codes"],
        }
    if stream != "image":
        parts |= {
            "words": part["clean"],
            "words_given": part["ids"],
            "word_masked": part["labels"] != -100,
            "word_valid": part["valid"].bool(),
        }
    count = len(next(iter(parts.values())))
    if count == 0:
        return []
    ids = tuple(f"{stream}s:0:{index}" for index in range(count))
    whole = Batch(stream=stream, sample_ids=ids, **parts)
    if stream == "image":
        return [whole]
    patches = 0 if stream == "text" else part["mask"].shape[1] + 1
    return [
        trimmed(whole.pick(places), max(part["lengths"][i] for i in places))
        for places in by_length(part["lengths"], patches)
    ]


def trimmed(batch: Batch, length: int) -> Batch:
    """The batch without the columns that are padding in every row."""
    names = ("words", "words_given", "word_masked", "word_valid")
    cut = {name: getattr(batch, name)[:, :length].contiguous() for name in names}
    return Batch(**{**vars(batch), **cut})


def make_bench(work: Any, batch: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What the peer benchmark asks for; `work` holds the sizes, `batch` the shared tensors."""
    config = PretrainConfig(
        recipe="peers",
        precision=work.dtype,
        model=ModelConfig(
            width=work.width,
            layers=work.layers,
            heads=work.heads,
            ffn=work.ffn,
            vl_layers=work.vl_layers,
            image_size=(work.image_size, work.image_size),
            patch=work.patch,
            vocab=work.vocab,
            codes=work.codes,
            text_positions=max(work.text_len, work.pair_text_len),
            drop_path=0.0,
        ),
        objective=ObjectiveConfig(mvlm="joint"),
        optim=OptimConfig(clip=0.0),
    )
    model = VLBeit(config.model, work.seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    batches = {stream: to_batches(stream, batch[stream]) for stream in STREAMS}
    batches = {stream: parts for stream, parts in batches.items() if parts}
    device = torch.device("cpu")
    every = [part for parts in batches.values() for part in parts]
    step = Step(model, every, optimizer, config, device)

    weights = RoundedWeights()  # as an evaluation keeps them from batch to batch

    def encoder(parts: list[Batch]) -> Callable[[], None]:
        def encode() -> None:
            with torch.no_grad(), weights, autocast(device, work.dtype):
                for part in parts:
                    model.backbone(embed(model, part))

        return encode

    return {
        "step": step,
        "streams": tuple(batches),
        "encode": {stream: encoder(parts) for stream, parts in batches.items()},
        "params": sum(p.numel() for p in model.parameters()),
        "version": f"vlbeit {__version__}",
    }


def embed(model: VLBeit, batch: Batch) -> Any:
    """Nothing masked, as the peers encode."""
    if batch.stream == "image":
        return model.embed_image(batch.pixels)
    if batch.stream == "text":
        return model.embed_text(batch.words, batch.word_valid)
    return model.embed_pair(batch.words, batch.word_valid, batch.pixels)
