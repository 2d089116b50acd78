"""A demo folder that learns in a minute: one large figure in one of six colours on white or brown.

What `vlbeit demo` makes in a quarter of an hour, made small enough for a test: a pretrained run and
a run of questions, both accurate on scenes that they never saw.
"""

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from vlbeit.config import BatchConfig, LogConfig, RuntimeConfig
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.data.scene_world import COLOURS, PLACES, Ground, draw_world, paint
from vlbeit.draws import Draws
from vlbeit.recipes import FINETUNE, tiny
from vlbeit.tokens.text import train_text_tokenizer
from vlbeit.train.finetune import finetune
from vlbeit.train.pretrain import pretrain

SCENES = 600
SHAPES = ("square", "cross")
PRETRAIN_STEPS, VISUAL_STEPS, VQA_STEPS = 280, 150, 60


class ColourScene(NamedTuple):
    image: Image.Image
    colour: str
    shape: str
    place: str

    @property
    def caption(self) -> str:
        return f"one large {self.colour} {self.shape} {self.place}"

    @property
    def question(self) -> str:
        return f"what colour is the {self.shape} ?"

    def png(self) -> bytes:
        file = io.BytesIO()
        self.image.save(file, "PNG")
        return file.getvalue()


def draw_colour_scene(split: str, index: int) -> ColourScene:
    """The same split and index give the same scene; no two splits share one."""
    draws = Draws(0, "colour world", split, index)
    shape = draws.choice(SHAPES)
    wanted = {"size": "large", "texture": "plain", "count": "one", "shape": shape}
    world = draw_world(draws, wanted.items())
    group = world.groups[0]
    scene = replace(world, groups=(group,), ground=Ground(draws.choice(("white", "brown")), "flat"))
    return ColourScene(paint(scene), group.colour, shape, group.place)


def train_colour_world(folder: Path) -> Path:
    """`folder` with pretrain/ and tasks/vqa/, as `vlbeit demo` leaves it."""
    data = _write_data(folder / "scenes")
    config = tiny()
    visual = config.tokenizers.train_visual
    config = replace(
        config,
        run_dir=str(folder / "pretrain"),
        data=(str(data),),
        device="cpu",
        precision="fp32",
        max_steps=PRETRAIN_STEPS,
        save_every=PRETRAIN_STEPS,
        batch=BatchConfig(images=16, texts=0, pairs=32, micro=32),
        model=replace(config.model, width=96, ffn=288, layers=3, codes=32),
        optim=replace(config.optim, lr=1.5e-3, warmup_steps=20, total_steps=PRETRAIN_STEPS),
        objective=replace(config.objective, mlm=0.0, mim=1.0, mvlm_image=1.0),
        log=LogConfig(print_every=1000, eval_every=0),
        runtime=RuntimeConfig(threads=1),
        tokenizers=replace(
            config.tokenizers,
            train_visual=replace(
                visual, codes=32, decay=0.9, total_steps=VISUAL_STEPS, warmup_steps=20
            ),
        ),
    )
    start = pretrain(config)
    task = FINETUNE["vqa"]["tiny"]()
    finetune(
        replace(
            task,
            start=str(start),
            run_dir=str(folder / "tasks" / "vqa"),
            data=(str(data),),
            device="cpu",
            precision="fp32",
            max_steps=VQA_STEPS,
            save_every=VQA_STEPS,
            model=config.model,
            batch=replace(task.batch, size=32, micro=32),
            optim=replace(task.optim, lr=1e-3, warmup_steps=10, total_steps=VQA_STEPS),
            log=LogConfig(print_every=1000, eval_every=0),
            runtime=RuntimeConfig(threads=1),
        )
    )
    return folder


def _write_data(folder: Path) -> Path:
    def rows() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(SCENES):
            scene = draw_colour_scene("train", i)
            asked = {"question": scene.question, "answer": scene.colour, "kind": "colour"}
            body: dict[str, Any] = {"captions": [scene.caption], "questions": [asked]}
            yield f"{i:05d}", {"png": scene.png(), "json": json.dumps(body).encode()}

    shards = [str(path) for path in write_shards(rows(), folder, "train", 200)]
    streams = ("pair", "image", "task:vqa")
    sources = [SourceInfo(s.replace(":", "-"), s, "train", shards, SCENES) for s in streams]
    Dataset.write(folder, "colour world", sources, {"attribute_words": {"colour": list(COLOURS)}})
    lines = [draw_colour_scene("train", i).caption for i in range(200)]
    lines += [f"what colour is the {shape} ? {' '.join(COLOURS + PLACES)}" for shape in SHAPES]
    train_text_tokenizer(lines * 5, tiny().tokenizers.train_text).save(folder)
    return folder
