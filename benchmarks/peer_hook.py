"""Our training step for the peer benchmark: its `--ours` hook.

    PYTHONPATH=src python PEERS.py --threads 1 --clock cpu --ours benchmarks/peer_hook.py

The package's own model, objectives and step (vlbeit.train.bench_step.Step) run on the batch that
every peer gets, with the optimizer every peer gets. A pair is one pass with both modalities masked,
because that is the work the benchmark counts.
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


def to_batch(stream: Stream, part: dict[str, Any]) -> Batch:
    """The benchmark's tensors as our masked micro-batch, without columns that are padding in every
    row."""
    parts: dict[str, torch.Tensor] = {}
    if stream != "text":
        parts |= {
            "pixels": part["pixels"],
            "patch_masked": part["mask"],
            "patch_codes": part["codes"],
        }
    if stream != "image":
        words = {
            "words": part["clean"],
            "words_given": part["ids"],
            "word_masked": part["labels"] != -100,
            "word_valid": part["valid"].bool(),
        }
        longest = max(part["lengths"], default=0)
        parts |= {name: value[:, :longest].contiguous() for name, value in words.items()}
    count = len(next(iter(parts.values())))
    ids = tuple(f"{stream}s:0:{index}" for index in range(count))
    return Batch(stream=stream, sample_ids=ids, **parts)


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
    made = {stream: to_batch(stream, batch[stream]) for stream in STREAMS}
    batches = {stream: part for stream, part in made.items() if len(part)}
    device = torch.device("cpu")
    step = Step(model, list(batches.values()), optimizer, config, device)

    weights = RoundedWeights()  # as an evaluation keeps them from batch to batch

    def encoder(part: Batch) -> Callable[[], None]:
        def encode() -> None:
            with torch.no_grad(), weights, autocast(device, work.dtype):
                model.backbone(embed(model, part))

        return encode

    return {
        "step": step,
        "streams": tuple(batches),
        "encode": {stream: encoder(part) for stream, part in batches.items()},
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
