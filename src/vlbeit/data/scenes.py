"""The drawn world as data: scenes by number, and a prepared folder that feeds every stream.

A scene is fixed by (seed, split, index) and never stored to be found again. It says everything
the project trains and tests on: captions, questions with answers, a class, a map of the shapes;
`draw_statement` gives a true or false sentence about two pictures. docs/scenes.md describes the
world and what can be reached without looking at the pictures.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Final

import numpy as np
from PIL import Image

from vlbeit.config import TextTokenizerConfig
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards
from vlbeit.data.scene_text import (
    ATTRIBUTE_WORDS,
    KIND_OF,
    Question,
    captions,
    draw_comparison,
    prior_by_kind,
    questions,
)
from vlbeit.data.scene_world import (
    COLOURS,
    COUNTS,
    PLACES,
    SHAPES,
    SIDE,
    SIZES,
    TEXTURES,
    TONES,
    Ground,
    Group,
    World,
    draw_world,
    paint,
    paint_segmentation,
)
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError
from vlbeit.tokens.text import TextTokenizer, train_text_tokenizer

__all__ = [
    "ANSWERS",
    "ATTRIBUTE_WORDS",
    "CLASSES",
    "KIND_OF",
    "SEGMENTATION_CLASSES",
    "Scene",
    "Statement",
    "blind_baselines",
    "draw_scene",
    "draw_statement",
    "prepare_scenes",
    "prior_by_kind",
    "train_scene_tokenizer",
]

WORLD_VERSION: Final = 4
"""Changes whenever the same (seed, split, index) gives another picture or text."""

CLASSES: Final = tuple(f"{texture} {shape}" for shape in SHAPES for texture in TEXTURES)
"""Names of the classification labels."""
SEGMENTATION_CLASSES: Final = ("ground", *SHAPES)
"""Names of the values in a segmentation map."""
ANSWERS: Final = tuple(
    sorted({*COLOURS, *SHAPES, *SIZES, *TEXTURES, *COUNTS, *PLACES, *TONES, "yes", "no"})
)
"""Every answer to a question."""
DOCUMENTS_PER_RECORD: Final = 100
"""Text records are kept short so that small folders still shuffle."""
TASK_SCENES: Final = 3
"""Scenes for the tasks beside one pair: 24,000 beside the demo's 8,000 pairs. Whether fewer would
do was not tried; more scenes alone changed nothing (docs/notebook.md)."""
RETRIEVAL_SCENES: Final = 500
"""Held-out scenes of the retrieval task, no two with the same description."""


_Members = dict[str, bytes]


@dataclass(frozen=True)
class Scene:
    """One picture and all that is said about it. What is not asked for is not computed."""

    seed: int
    split: str
    index: int
    size: int
    world: World

    @property
    def groups(self) -> tuple[Group, ...]:
        """One or two groups of figures."""
        return self.world.groups

    @property
    def ground(self) -> Ground:
        return self.world.ground

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Five captions, the fullest last."""
        return captions(self.world, self._draws("captions"))

    @property
    def description(self) -> str:
        """The caption that names every attribute of every figure."""
        return self.captions[-1]

    @cached_property
    def questions(self) -> tuple[Question, ...]:
        """Six or seven questions (text, answer, kind)."""
        return questions(self.world, self._draws("questions"))

    @cached_property
    def image(self) -> Image.Image:
        """The picture, RGB, size x size."""
        return paint(self.world, self.size)

    @cached_property
    def segmentation(self) -> Image.Image:
        """The map of the picture, mode L, values as in SEGMENTATION_CLASSES."""
        return paint_segmentation(self.world, self.size)

    @property
    def label(self) -> int:
        """Index in CLASSES: texture and shape of the first group in reading order, which is the
        left or the upper one of two."""
        first = min(self.groups, key=lambda group: group.place not in ("left", "top"))
        return CLASSES.index(f"{first.texture} {first.shape}")

    def _draws(self, purpose: str) -> Draws:
        return Draws(self.seed, "scene", self.split, self.index, purpose)


@dataclass(frozen=True)
class Statement:
    """A sentence about two pictures (left, right) and whether it is true."""

    text: str
    truth: bool
    kind: str
    left: Image.Image
    right: Image.Image


def draw_scene(seed: int, split: str, index: int, size: int = SIDE) -> Scene:
    """Scene number `index` of a split (any name), drawn at size x size pixels.

    Raises:
        ConfigError: a size below 16 pixels, where figures cannot be told apart.
    """
    _check_size(size)
    return Scene(seed, split, index, size, draw_world(Draws(seed, "scene", split, index)))


def draw_statement(seed: int, split: str, index: int, size: int = SIDE) -> Statement:
    """Statement number `index` of a split with its two pictures; true in half of the cases.

    Raises:
        ConfigError: a size below 16 pixels.
    """
    _check_size(size)
    draws = Draws(seed, "statement", split, index)
    said = draw_comparison(draws)
    left, right = paint(said.left, size), paint(said.right, size)
    return Statement(said.text, said.truth, said.kind, left, right)


def _check_size(size: int) -> None:
    if size < 16:
        raise ConfigError(f"size: {size} is below 16 pixels; figures need at least that many")


# --- what can be reached without looking ---------------------------------------------------------


def blind_baselines(
    scenes: Sequence[Scene], statements: Iterable[Statement] = ()
) -> dict[str, Any]:
    """What a guesser reaches who never sees a picture, measured on these scenes.

    The guesser knows the answers' frequencies on the very scenes it is measured on, so these
    are upper bounds. All values are shares in [0, 1].

    Returns:
        captions: most frequent word per kind (`prior_by_kind`).
        vqa: `by_kind` of question the share of the most frequent answer, `accuracy` of always
            giving it, and `majority`, the share of the answer that is most frequent of all.
        statements: the same for true and false.
        classification: the most frequent class among scenes with one group.
        segmentation: mean IoU and pixel accuracy of a map that is ground everywhere.
        retrieval: recall at 1 by chance among RETRIEVAL_SCENES.
    """
    asked = [question for scene in scenes for question in scene.questions]
    single = Counter(scene.label for scene in scenes if len(scene.groups) == 1)
    ground = float(np.mean([np.mean(np.asarray(scene.segmentation) == 0) for scene in scenes]))
    return {
        "captions": prior_by_kind(line for scene in scenes for line in scene.captions),
        "vqa": _majorities((question.kind, question.answer) for question in asked),
        "statements": _majorities((s.kind, s.truth) for s in statements),
        "classification": {"top1": _top_share(single)},
        "segmentation": {
            "miou": ground / len(SEGMENTATION_CLASSES),
            "pixel_accuracy": ground,
        },
        "retrieval": {"r1": 1 / RETRIEVAL_SCENES},
    }


def _majorities(rows: Iterable[tuple[str, object]]) -> dict[str, Any]:
    counts: dict[str, Counter[object]] = {}
    for kind, answer in rows:
        counts.setdefault(kind, Counter())[answer] += 1
    if not counts:
        return {}
    right = sum(max(c.values()) for c in counts.values())
    return {
        "by_kind": {kind: _top_share(c) for kind, c in sorted(counts.items())},
        "accuracy": right / sum(c.total() for c in counts.values()),
        "majority": _top_share(sum(counts.values(), Counter())),
    }


def _top_share(counts: Mapping[Any, int]) -> float:
    return max(counts.values()) / sum(counts.values()) if counts else 0.0


# --- the prepared folder -------------------------------------------------------------------------


def prepare_scenes(out: Path, count: int, seed: int, size: int = SIDE) -> None:
    """Write a dataset folder for every stream and task.

    `count` pairs, `count` other pictures, documents about `count` other scenes, `TASK_SCENES`
    times as many scenes and statements for the tasks; held-out splits of a tenth of `count`, at
    least 200 and at most 1,000. The same arguments give the same bytes. dataset.json is written
    last: a folder without it is unfinished, and the same command finishes it.

    Raises:
        ConfigError: `count` below 1, a size below 16, or a folder that is prepared already.
        SaveError: the folder cannot be written.
    """
    if count < 1:
        raise ConfigError(f"count: {count} is below 1; 20000 is what the demo uses")
    _check_size(size)
    # Absolute, as Dataset.write reads relative shards as lying in the folder.
    out = Path(out).absolute()
    if (out / "dataset.json").exists():
        raise ConfigError(f"{out}: a prepared folder already; remove it or choose another folder")
    held_out = min(1000, max(200, count // 10))
    # The first one to touch the disk: an unwritable folder shows at once.
    train_scene_tokenizer(seed).save(out)
    sources = _write_split(out, "train", seed, size, count, TASK_SCENES * count)
    sources += _write_split(out, "val", seed, size, held_out, held_out)
    measured = [draw_scene(seed, "task-val", i, size) for i in range(held_out)]
    statements = [draw_statement(seed, "task-val", i, size) for i in range(held_out)]
    facts = {
        "world": WORLD_VERSION,
        "seed": seed,
        "count": count,
        "size": size,
        "licence": "drawn by this program; free to use without conditions",
        "attribute_words": {kind: list(words) for kind, words in ATTRIBUTE_WORDS.items()},
        "classes": list(CLASSES),
        "segmentation_classes": list(SEGMENTATION_CLASSES),
        "answers": list(ANSWERS),
        "baselines": blind_baselines(measured, statements),
    }
    Dataset.write(out, "scenes", sources, facts)


def train_scene_tokenizer(seed: int) -> TextTokenizer:
    """A word vocabulary for all that is said about the world; every word is one piece."""
    scenes = [draw_scene(seed, "tokenizer", i) for i in range(500)]
    statements = (draw_comparison(Draws(seed, "tokenizer", i)) for i in range(200))
    lines = [" ".join(KIND_OF)]
    lines += [line for scene in scenes for line in scene.captions]
    lines += [question.text for scene in scenes for question in scene.questions]
    lines += [statement.text for statement in statements]
    lines += ["yes no"]
    config = TextTokenizerConfig(kind="wordpiece", vocab=512, lowercase=True)
    return train_text_tokenizer(lines, config)


def _write_split(
    out: Path, split: str, seed: int, size: int, count: int, task_count: int
) -> list[SourceInfo]:
    """The sources of one split. Streams and tasks see different scenes; several tasks read the
    same shards."""
    sources: list[SourceInfo] = []

    def scenes(stream: str, indices: Iterable[int]) -> Iterator[Scene]:
        return (draw_scene(seed, f"{stream}-{split}", i, size) for i in indices)

    def write(stem: str, records: Iterable[_Members]) -> list[str]:
        keyed = ((f"{i:08d}", members) for i, members in enumerate(records))
        return [str(path) for path in write_shards(keyed, out, f"{stem}-{split}")]

    def add(name: str, stream: str, shards: list[str], records: int) -> None:
        if shards:  # a folder of a few scenes may have none with one group
            sources.append(SourceInfo(name, stream, split, shards, records))

    pairs = write("pairs", (_pair_members(scene) for scene in scenes("pair", range(count))))
    add("pairs", "pair", pairs, count)
    images = write("images", ({"png": _png(s.image)} for s in scenes("image", range(count))))
    add("images", "image", images, count)
    texts = write("texts", _text_members(scenes("text", range(count))))
    add("texts", "text", texts, -(-count // DOCUMENTS_PER_RECORD))

    indices: dict[int, list[int]] = {1: [], 2: []}
    for scene in scenes("task", range(task_count)):
        indices[len(scene.groups)].append(scene.index)
    tasks = ["vqa", "segmentation"] + ["retrieval"] * (split == "train")
    for groups, name in ((1, "one"), (2, "two")):
        members = (_task_members(scene) for scene in scenes("task", indices[groups]))
        shards = write(f"tasks-{name}", members)
        # Two sources of each: sources are mixed exactly, shards of one source by lot.
        for task in tasks + ["classification"] * (groups == 1):
            add(f"{task}-{name}", f"task:{task}", shards, len(indices[groups]))
    if split != "train":
        unlike = write(
            "retrieval", map(_task_members, _unlike_scenes(scenes("retrieval", itertools.count())))
        )
        add("retrieval", "task:retrieval", unlike, RETRIEVAL_SCENES)
    drawn = (draw_statement(seed, f"task-{split}", i, size) for i in range(task_count))
    add(
        "statements",
        "task:statements",
        write("statements", map(_statement_members, drawn)),
        task_count,
    )
    return sources


def _unlike_scenes(scenes: Iterable[Scene]) -> Iterator[Scene]:
    """The first RETRIEVAL_SCENES of which no two have the same description."""
    seen: set[str] = set()
    for scene in scenes:
        if scene.description not in seen:
            seen.add(scene.description)
            yield scene
        if len(seen) == RETRIEVAL_SCENES:
            return


def _pair_members(scene: Scene) -> _Members:
    return {"png": _png(scene.image), "json": _json({"captions": scene.captions})}


def _text_members(scenes: Iterator[Scene]) -> Iterator[_Members]:
    """A document is all captions of a scene in random order, one document a line."""
    while documents := [
        _document(scene) for scene in itertools.islice(scenes, DOCUMENTS_PER_RECORD)
    ]:
        yield {"txt": "".join(f"{document}\n" for document in documents).encode()}


def _document(scene: Scene) -> str:
    order = Draws(scene.seed, "document", scene.split, scene.index).permutation(len(scene.captions))
    return " . ".join(scene.captions[i] for i in order.tolist())


def _task_members(scene: Scene) -> _Members:
    said = {
        "captions": [scene.description],
        "questions": [
            {"question": q.text, "answer": q.answer, "kind": q.kind} for q in scene.questions
        ],
        "label": scene.label,
        "class": CLASSES[scene.label],
    }
    return {"png": _png(scene.image), "seg.png": _png(scene.segmentation), "json": _json(said)}


def _statement_members(statement: Statement) -> _Members:
    said = {"statement": statement.text, "truth": statement.truth, "kind": statement.kind}
    return {
        "left.png": _png(statement.left),
        "right.png": _png(statement.right),
        "json": _json(said),
    }


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
