"""Runs of a few fine-tuning steps, in this process: a start checkpoint, and tasks on shades.

Each picture is one shade of grey. Its class is the shade; of its two questions one asks for the
shade, which only the picture tells, and one names its own answer, which needs no picture.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from tiny_run import COLOURS, SHADES, grey_png
from vlbeit.config import (
    BatchConfig,
    ClassificationRun,
    CropConfig,
    FinetuneConfig,
    FinetuneOptimConfig,
    InputConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    TaskBatchConfig,
    TaskInputConfig,
    TextTokenizerConfig,
    VqaConfig,
    VqaRun,
    from_dict,
)
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.tokens.text import train_text_tokenizer
from vlbeit.train.finetune import finetune
from vlbeit.train.pretrain import pretrain

TRAIN, VAL = 60, 23
MODEL = ModelConfig(
    width=32,
    layers=2,
    heads=2,
    ffn=48,
    vl_layers=1,
    image_size=(32, 32),
    patch=8,
    vocab=80,
    codes=16,
    text_positions=16,
    drop_path=0.0,
    layer_scale=0.0,
    init_std=0.1,
)
CLASSIFY = ClassificationRun(
    recipe="toy",
    device="cpu",
    precision="fp32",
    max_steps=8,
    save_every=4,
    model=MODEL,
    input=TaskInputConfig(crop=CropConfig(scale=(0.5, 1.0), flip=0.5, jitter=0.0)),
    batch=TaskBatchConfig(size=10, micro=10),
    optim=FinetuneOptimConfig(lr=3e-3, warmup_steps=2, total_steps=60, layer_decay=0.9),
    log=LogConfig(print_every=1000, eval_every=0, keep=0),
    runtime=RuntimeConfig(threads=1),
)
ASK = VqaRun(
    recipe="toy",
    device="cpu",
    precision="fp32",
    max_steps=8,
    save_every=4,
    model=MODEL,
    input=TaskInputConfig(text_length=12),
    batch=TaskBatchConfig(size=10, micro=10),
    optim=FinetuneOptimConfig(lr=3e-3, warmup_steps=2, total_steps=60, head_lr=2.0),
    log=LogConfig(print_every=1000, eval_every=0, keep=0),
    runtime=RuntimeConfig(threads=1),
    vqa=VqaConfig(min_count=1),
)
TOYS: dict[str, FinetuneConfig] = {"classification": CLASSIFY, "vqa": ASK}


def shade_of(index: int) -> str:
    return COLOURS[(index * 7 + index // 4) % 4]


def questions_of(index: int) -> list[dict[str, Any]]:
    shade, named = shade_of(index), COLOURS[index % 4]
    return [
        {"question": "which colour is here", "answer": shade, "kind": "look"},
        {"question": f"say {named}", "answer": named, "kind": "read", "question_id": index},
    ]


def write_tasks(folder: Path, members: Mapping[int, dict[str, Any]] = {}) -> Path:
    """A prepared folder with both tasks and a tokenizer; `members` overwrites JSON of training
    records."""

    def rows(first: int, count: int):
        for i in range(first, first + count):
            label = COLOURS.index(shade_of(i))
            body = {"label": label, "class": COLOURS[label], "questions": questions_of(i)}
            body |= members.get(i, {})
            yield (
                f"{i:04d}",
                {
                    "png": grey_png(SHADES[shade_of(i)] + i % 5),
                    "json": json.dumps(body).encode(),
                },
            )

    shards = {
        "train": [str(p) for p in write_shards(rows(0, TRAIN), folder, "train", 16)],
        "val": [str(p) for p in write_shards(rows(TRAIN, VAL), folder, "val", 16)],
    }
    sources = [
        SourceInfo(task, f"task:{task}", split, shards[split], TRAIN if split == "train" else VAL)
        for split in shards
        for task in TOYS
    ]
    sources.append(SourceInfo("words", "text", "train", _texts(folder), 1))
    Dataset.write(folder, "shades", sources, {"classes": list(COLOURS)})
    lines = [q["question"] + " " + q["answer"] for i in range(TRAIN) for q in questions_of(i)]
    train_text_tokenizer(lines, TextTokenizerConfig(kind="wordpiece", vocab=80)).save(folder)
    return folder


def _texts(folder: Path) -> list[str]:
    text = "".join(f"which colour is here {shade_of(i)}\n" for i in range(200)).encode()
    return [str(p) for p in write_shards([("0000", {"txt": text})], folder, "words", 1)]


def write_start(folder: Path, data: Path, **model: Any) -> Path:
    """A run of one step of `vlbeit pretrain` on the words, as something to start from."""
    config = PretrainConfig(
        recipe="toy",
        run_dir=str(folder),
        data=(str(data),),
        max_steps=1,
        save_every=1,
        device="cpu",
        precision="fp32",
        seed=5,
        model=replace(MODEL, **model),
        input=InputConfig(text_length=12, pair_text_length=12),
        batch=BatchConfig(images=0, texts=2, pairs=0, micro=2),
        objective=ObjectiveConfig(mim=0.0, mvlm_image=0.0, mvlm_text=0.0),
        optim=OptimConfig(lr=1e-3, warmup_steps=1, total_steps=10),
        log=LogConfig(eval_every=0),
        runtime=RuntimeConfig(threads=1),
    )
    return pretrain(config)


def toy_config(task: str, settings: Mapping[str, Any] = {}) -> FinetuneConfig:
    """The task's toy config with settings given by their full names."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    return from_dict(type(TOYS[task]), tree, start=TOYS[task])


def toy_finetune(
    task: str, start: Path, data: Path, run_dir: Path, settings: Mapping[str, Any] = {}
) -> Path:
    """`vlbeit finetune` on the toy config, with some settings changed."""
    config = toy_config(task, settings)
    return finetune(replace(config, start=str(start), data=(str(data),), run_dir=str(run_dir)))
