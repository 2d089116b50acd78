"""Runs of every task with random weights, ready to be asked, and pictures of noise."""

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from tiny_models import fill_normal
from tiny_tasks import CONFIGS
from toy_tasks import ASK
from vlbeit.config import FINETUNE_CONFIGS, RetrievalConfig
from vlbeit.eval.downstream import TaskRun
from vlbeit.nn.model import VLBeit
from vlbeit.serve.predictor import Predictor
from vlbeit.tasks import build_task
from vlbeit.tokens.text import TextTokenizer

COLOURS = ["red", "green", "blue", "white"]
FACTS: dict[str, dict[str, Any]] = {
    "classification": {"classes": COLOURS, "most_frequent": 0},
    "vqa": {
        "answers": COLOURS,
        "log_odds": [0.0] * len(COLOURS),
        "prior": {},
        "most_frequent": "red",
    },
    "statements": {"prior": {}, "most_frequent": False},
    "retrieval": {},
    "entailment": {"most_frequent": 0},
    "segmentation": {"classes": ["ground", "red", "green"], "most_frequent": 0},
}


def untrained(task: str, data: Path, **own: Any) -> Predictor:
    """A run of the task with random weights."""
    if task in CONFIGS:
        config = replace(CONFIGS[task], **own)
    else:
        shared = {name: value for name, value in vars(ASK).items() if name not in ("task", "vqa")}
        config = FINETUNE_CONFIGS[task](**shared, **own)
    config = replace(config, data=(str(data),))
    model = VLBeit(config.model)
    made = build_task(config, FACTS[task])
    head = made.head(model, 3)
    model.put_on(head)
    fill_normal(model, seed=3, std=0.3)
    run = TaskRun(
        folder=Path("runs") / task,
        step=1,
        config=config,
        model=model.eval(),
        head=head,
        task=made,
        text=TextTokenizer.load(data),
        device=torch.device("cpu"),
    )
    return Predictor(run, "d" * 64)


def retrieval(data: Path, matching: float = 1.0) -> Predictor:
    settings = RetrievalConfig(matching=matching, rerank=3 if matching else 0)
    return untrained("retrieval", data, retrieval=settings)


def noise(seed: int, side: int = 24) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side + 5, 3), dtype=np.uint8)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
