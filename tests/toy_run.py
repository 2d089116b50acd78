"""Runs of a few steps, in this process: a prepared data folder with both tokenizers, and a config.

The visual tokenizer was never trained. What it answers is arbitrary but fixed, which is all that
a training loop asks of it.
"""

import json
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tiny_models import fill_normal
from toy_records import CONFIG, toy_sources, toy_tokenizer
from vlbeit.config import (
    BatchConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    VisualTokenizerConfig,
    from_dict,
)
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import RecordSource
from vlbeit.tokens.vqkd import VQKD, VQKDTokenizer
from vlbeit.train.pretrain import pretrain

CODES = 16


@contextmanager
def training_here() -> Iterator[None]:
    """For runs in this process: they do not measure the machine at their start, for half a second,
    and what they take over for good, signals and kernels, is given back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("pretrain", "finetune"):
            patch.setattr(f"vlbeit.train.{module}.matrix_limit", lambda *_: 1e11)
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            torch.use_deterministic_algorithms(False)


TOY = replace(
    CONFIG,
    device="cpu",
    precision="fp32",
    max_steps=10,
    save_every=5,
    model=ModelConfig(
        width=32,
        layers=2,
        heads=2,
        ffn=48,
        vl_layers=1,
        image_size=(32, 32),
        patch=8,
        vocab=120,
        codes=CODES,
        text_positions=16,
        drop_path=0.1,
        init_std=0.1,
    ),
    batch=BatchConfig(images=6, texts=5, pairs=8, micro=8),
    optim=OptimConfig(lr=2e-3, warmup_steps=2, total_steps=50),
    log=LogConfig(print_every=1000, eval_every=0, keep=0),
    runtime=RuntimeConfig(threads=1),
)


def toy_codes() -> VQKDTokenizer:
    config = VisualTokenizerConfig(
        codes=CODES,
        code_width=8,
        image_size=(32, 32),
        patch=8,
        width=16,
        layers=1,
        heads=2,
        ffn=32,
        decoder_layers=1,
    )
    model = VQKD(config)
    fill_normal(model, seed=7, std=0.3)
    generator = torch.Generator().manual_seed(7)
    model.codebook.weight.copy_(F.normalize(torch.randn(CODES, 8, generator=generator), dim=-1))
    return VQKDTokenizer(model)


def write_dataset(folder: Path, sources: Mapping[str, Sequence[RecordSource]]) -> Path:
    """dataset.json over sources whose shards lie in the folder; all of them for training."""
    rows = [
        SourceInfo(source.name, stream, "train", list(source.shards), len(source))
        for stream, group in sources.items()
        for source in group
    ]
    Dataset.write(folder, "toy", rows)
    return folder


def write_toy_data(folder: Path, sources: Mapping[str, Sequence[RecordSource]] = {}) -> Path:
    """A prepared folder with `sources` (default: the toy world) and both tokenizers in it."""
    folder.mkdir(parents=True, exist_ok=True)
    write_dataset(folder, sources or toy_sources(folder))
    toy_tokenizer().save(folder)
    toy_codes().save(folder / "visual")
    return folder


def changed(config: PretrainConfig, settings: Mapping[str, Any]) -> PretrainConfig:
    """The config with settings given by their full names, as on the command line."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return from_dict(PretrainConfig, tree, start=config)


def toy_run(data: Path, run_dir: Path, settings: Mapping[str, Any] = {}) -> Path:
    """`vlbeit pretrain` on the toy config, with some settings changed."""
    start = replace(TOY, data=(str(data),), run_dir=str(run_dir))
    return pretrain(changed(start, settings))


def copied(run_dir: Path, to: Path) -> Path:
    """The same run in another folder."""
    return Path(shutil.copytree(run_dir, to))


def rows(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    path = run_dir / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def losses(run_dir: Path) -> list[float]:
    return [float.fromhex(row["loss"]) for row in rows(run_dir)]
