"""Small worlds for statements, entailment and segmentation, and a start for runs on them.

Statements and entailment: a picture is dark or light, and a sentence says which. Segmentation:
pictures of many shapes with one block in them, red (class 1) or green (class 2), and a strip of
class 255. Everything that can be learned is known.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tiny_run import grey_png
from vlbeit.config import (
    BatchConfig,
    CropConfig,
    EntailmentRun,
    FinetuneConfig,
    FinetuneOptimConfig,
    InputConfig,
    LogConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
    PretrainConfig,
    RuntimeConfig,
    SegmentationConfig,
    SegmentationRun,
    StatementsRun,
    TaskBatchConfig,
    TaskInputConfig,
    TextTokenizerConfig,
    from_dict,
)
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.order import Visit
from vlbeit.data.records import write_shards
from vlbeit.data.task_stream import TaskStream, open_task
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import Task, build_task, learn_facts
from vlbeit.tokens.text import TextTokenizer, train_text_tokenizer
from vlbeit.train.finetune import finetune
from vlbeit.train.pretrain import pretrain
from vlbeit.types import TaskBatch

TRAIN, VAL = 96, 40
WORDS = ("dark", "light")
CLASSES = ("ground", "red", "green")
MODEL = ModelConfig(
    width=32,
    layers=3,
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
COMMON: dict[str, Any] = {
    "recipe": "toy",
    "device": "cpu",
    "precision": "fp32",
    "max_steps": 4,
    "save_every": 100,
    "model": MODEL,
    "batch": TaskBatchConfig(size=16, micro=16),
    "optim": FinetuneOptimConfig(lr=3e-3, warmup_steps=5, total_steps=200),
    "log": LogConfig(print_every=1000, eval_every=0, keep=0),
    "runtime": RuntimeConfig(threads=1),
}
TEXT = TaskInputConfig(text_length=12)
CONFIGS: dict[str, FinetuneConfig] = {
    "statements": StatementsRun(**COMMON, input=TEXT),
    "entailment": EntailmentRun(**COMMON, input=TEXT),
    "segmentation": SegmentationRun(
        **COMMON,
        input=TaskInputConfig(crop=CropConfig(scale=(1.0, 1.0), flip=0.5, jitter=0.2)),
        segmentation=SegmentationConfig(channels=16, auxiliary_channels=16, scale=(0.7, 1.4)),
    ),
}


def shade(rng: np.random.Generator, light: bool) -> bytes:
    return grey_png(int(rng.integers(0, 80)) + 170 * light)


def statement_members(i: int) -> dict[str, bytes]:
    """Four records a sentence, named as NLVR2 does; the kind is the side it speaks of."""
    rng = np.random.default_rng(i)
    lights = rng.random(2) < 0.5
    side, said = i // 4 % 2, i // 8 % 2
    body = {
        "statement": f"{('left', 'right')[side]} {WORDS[said]}",
        "truth": bool(lights[side] == said),
        "kind": ("left", "right")[side],
        "identifier": f"toy-{i // 8}-{i % 4}-{i // 4 % 2}",
    }
    left, right = (shade(rng, light) for light in lights)
    return {"left.png": left, "right.png": right, "json": json.dumps(body).encode()}


def entailment_members(i: int) -> dict[str, bytes]:
    rng = np.random.default_rng(1000 + i)
    light, label = bool(rng.random() < 0.5), int(rng.integers(0, 3))
    said = WORDS[light if label == 0 else not light] if label != 1 else "left right"
    body = {"hypothesis": said, "label": label, "id": i}
    return {"png": shade(rng, light), "json": json.dumps(body).encode()}


def png(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def block_picture(i: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) and its map (H, W), both uint8; sides of 24 to 56 pixels."""
    rng = np.random.default_rng(2000 + i)
    height, width = (int(side) for side in rng.integers(24, 57, 2))
    image = rng.integers(60, 120, (height, width, 3)).astype(np.uint8)
    classes = np.zeros((height, width), dtype=np.uint8)
    label = 1 + i % 2
    top, left = int(rng.integers(0, height // 2)), int(rng.integers(0, width // 2))
    part = (slice(top, top + height // 2), slice(left, left + width // 2))
    image[part] = (230, 20, 20) if label == 1 else (20, 230, 20)
    classes[part] = label
    classes[:2] = 255
    return image, classes


def segmentation_members(i: int) -> dict[str, bytes]:
    image, classes = block_picture(i)
    return {"png": png(image), "seg.png": png(classes)}


MAKERS = {
    "statements": statement_members,
    "entailment": entailment_members,
    "segmentation": segmentation_members,
}


def write_tasks(folder: Path, changes: Mapping[tuple[str, int], dict[str, bytes]] = {}) -> Path:
    """A prepared folder with the three tasks and a tokenizer. `changes`: members of a training
    record that replace its own, by task and number."""
    sources = []
    for task, make in MAKERS.items():
        for split, first, count in (("train", 0, TRAIN), ("val", TRAIN, VAL)):
            rows = (
                (f"{i:04d}", changes.get((task, i)) or make(i)) for i in range(first, first + count)
            )
            shards = [str(p) for p in write_shards(rows, folder, f"{task}-{split}", 40)]
            sources.append(SourceInfo(task, f"task:{task}", split, shards, count))
    lines = ["left right dark light"] * 200
    text = "".join(f"{line}\n" for line in lines).encode()
    shards = [str(p) for p in write_shards([("0000", {"txt": text})], folder, "words", 1)]
    sources.append(SourceInfo("words", "text", "train", shards, 1))
    Dataset.write(folder, "toy", sources, {"segmentation_classes": list(CLASSES)})
    train_text_tokenizer(lines, TextTokenizerConfig(kind="wordpiece", vocab=80)).save(folder)
    return folder


def write_start(folder: Path, data: Path, model: ModelConfig = MODEL) -> Path:
    """A run of one step of `vlbeit pretrain` on the words, as something to start from."""
    length = min(12, model.text_positions)
    return pretrain(
        PretrainConfig(
            recipe="toy",
            run_dir=str(folder),
            data=(str(data),),
            max_steps=1,
            save_every=1,
            device="cpu",
            precision="fp32",
            model=model,
            input=InputConfig(text_length=length, pair_text_length=length),
            batch=BatchConfig(images=0, texts=2, pairs=0, micro=2),
            objective=ObjectiveConfig(mim=0.0, mvlm_image=0.0, mvlm_text=0.0),
            optim=OptimConfig(lr=1e-3, warmup_steps=1, total_steps=10),
            log=LogConfig(eval_every=0),
            runtime=RuntimeConfig(threads=1),
        )
    )


def toy_config(
    task: str, data: Path, settings: Mapping[str, Any] = {}, start: FinetuneConfig | None = None
) -> FinetuneConfig:
    """The task's config with settings given by their full names."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *path, leaf = name.split(".")
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[leaf] = value
    found = replace(start or CONFIGS[task], data=(str(data),))
    return from_dict(type(found), tree, start=found)


def toy_finetune(
    task: str, start: Path, data: Path, run_dir: Path, settings: Mapping[str, Any] = {}
) -> Path:
    config = toy_config(task, data, settings)
    return finetune(replace(config, start=str(start), run_dir=str(run_dir)))


def toy_task(
    task: str, data: Path, settings: Mapping[str, Any] = {}, *, training: bool = True
) -> tuple[Task, TaskStream, VLBeit]:
    """The task, its stream and a model with its head, all fresh."""
    config = toy_config(task, data, settings)
    sources = open_task(config.data, f"task:{task}", "train")
    made = build_task(config, learn_facts(config, sources))
    text = TextTokenizer.load(data)
    stream = TaskStream(made, sources, text, config, training=training, passes=len(made.paths))
    model = VLBeit(config.model)
    model.put_on(made.head(model, config.seed))
    return made, stream, model


def batch_of(stream: TaskStream, task: str, places: list[int], epoch: int = 0) -> TaskBatch:
    """A micro-batch of the samples at these places of the source that has the task's name."""
    samples = [stream.sample(Visit(task, epoch, place)) for place in places]
    return stream.batch(stream.stack(samples))
