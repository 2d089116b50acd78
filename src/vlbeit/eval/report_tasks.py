"""The downstream part of report.html: a table of tasks beside their baselines, and examples.

Held-out samples are shown with what a fine-tuned run says of them: a question and its answers, the
scenes nearest to a caption, a map of classes. How they are asked is no concern of the page.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from vlbeit.eval.drawing import class_colour
from vlbeit.eval.report_html import (
    paragraph,
    percent,
    picture,
    section,
    table,
    unseen,
    with_interval,
)


class Headline(NamedTuple):
    """A figure by which a task is judged."""

    figures: tuple[str, ...]
    """Its name in `evaluate_task`'s figures; the first of these that is there counts."""
    metric: str
    """Its name in metrics.json."""
    words: str
    baseline: str
    """What is said without looking."""


HEADLINES: dict[str, tuple[Headline, ...]] = {
    "vqa": (
        Headline(
            ("accuracy",),
            "accuracy",
            "VQA, accuracy",
            "most frequent answer of the question's kind",
        ),
    ),
    "retrieval": (
        # text@K asks which text belongs to an image: text retrieval, TR; image@K is IR.
        Headline(("reranked_text@1", "text@1"), "tr_r1", "retrieval, text R@1", "chance"),
        Headline(("reranked_image@1", "image@1"), "ir_r1", "retrieval, image R@1", "chance"),
    ),
    "classification": (
        Headline(("top1",), "top1", "classification, top 1", "most frequent class"),
    ),
    "segmentation": (
        Headline(("mean_iou",), "miou", "segmentation, mean IoU", "most frequent class everywhere"),
    ),
    "statements": (
        Headline(
            ("accuracy",), "accuracy", "statements, accuracy", "most frequent truth of the kind"
        ),
    ),
}
"""By task, the most important figure first."""


class HeadlineRow(NamedTuple):
    """A headline with what was measured."""

    headline: Headline
    found: dict[str, Any]
    """One of `evaluate_task`'s figures: value, low, high, samples, baseline, gain."""


def headline_rows(evaluation: Mapping[str, Any]) -> list[HeadlineRow]:
    """The headlines of an evaluated task."""
    figures = evaluation["figures"]
    return [
        HeadlineRow(line, next(figures[name] for name in line.figures if name in figures))
        for line in HEADLINES[evaluation["task"]]
    ]


# --- examples ------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """An answer with its probability, and whether it is right."""

    name: str
    probability: float
    right: bool


@dataclass(frozen=True, kw_only=True)
class AskedExample:
    """A sample that has an answer. Shapes: pictures (height, width, 3) uint8, one or two."""

    pictures: tuple[np.ndarray, ...]
    text: str
    """The question or statement; empty where a task has no text."""
    candidates: tuple[Candidate, ...]
    """The most probable ones, in their order."""
    truth: str


@dataclass(frozen=True, kw_only=True)
class RankedPicture:
    """One of the pictures nearest to a caption. Shapes: pixels (height, width, 3) uint8."""

    pixels: np.ndarray
    caption: str
    """Its own."""
    similarity: float
    """Cosine of the dual encoder."""
    probability: float | None
    """That both belong together, by the fused pass; None for a run without it."""
    right: bool


@dataclass(frozen=True, kw_only=True)
class RankedExample:
    """A caption and the pictures that are nearest to it, the nearest first."""

    caption: str
    pictures: tuple[RankedPicture, ...]
    among: int
    """Pictures that were compared."""


@dataclass(frozen=True, kw_only=True)
class MapExample:
    """A picture with its classes as they were said and as they are.

    Shapes: pixels (height, width, 3) uint8; said, truth (height, width) uint8 class numbers, of
    which those beyond `classes` stand for none.
    """

    pixels: np.ndarray
    said: np.ndarray
    truth: np.ndarray
    classes: tuple[str, ...]


TaskExample: TypeAlias = AskedExample | RankedExample | MapExample


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """A fine-tuned task for the page."""

    evaluation: Mapping[str, Any]
    """What `evaluate_task` gave."""
    examples: Sequence[TaskExample]


# --- the section ---------------------------------------------------------------------------------

TITLES = {
    "vqa": "Questions about a scene",
    "retrieval": "Scenes for a caption",
    "classification": "Classes",
    "segmentation": "A class for every pixel",
    "statements": "Statements about two scenes",
}


def tasks_part(results: Sequence[TaskResult]) -> list[str]:
    """The section; nothing without results."""
    if not results:
        return []
    parts = [
        paragraph(
            "Each task starts from the pretrained trunk of this run, gets a head of its own and "
            "trains both on the task's scenes. Beside every figure stands what is reached without "
            "looking at a picture; the gain over it has a paired interval. Intervals are 95 % "
            "bootstrap intervals over held-out scenes."
        ),
        table(
            "Fine-tuned tasks on held-out samples.",
            ("task", "held out", "without looking", "gain", "samples", "steps"),
            [
                row_cells(row, result.evaluation)
                for result in results
                for row in headline_rows(result.evaluation)
            ],
        ),
        *(
            f"<details><summary>{escape(summary)}</summary>{content}</details>"
            for summary, content in map(all_figures, results)
        ),
    ]
    for result in results:
        parts += examples_part(result)
    return [section("What it was fine-tuned for", *parts)]


def row_cells(row: HeadlineRow, evaluation: Mapping[str, Any]) -> list[str]:
    line, found = row
    return [
        escape(line.words),
        with_interval(found),
        f"{percent(found['baseline']['value'])}<br><small>{escape(line.baseline)}</small>",
        with_interval(found["gain"], signed=True),
        f"{found['samples']:,}",
        f"{evaluation['step']:,}",
    ]


def all_figures(result: TaskResult) -> tuple[str, str]:
    """Every figure of a task: a line and the table below it."""
    evaluation = result.evaluation
    rows = [
        [
            escape(name),
            with_interval(found),
            with_interval(found["baseline"]) if "baseline" in found else "",
            f"{found['samples']:,}",
        ]
        for name, found in evaluation["figures"].items()
    ]
    title = f"All figures of {evaluation['task']}"
    return title, table(
        f"{evaluation['samples']:,} held-out samples.",
        ("figure", "held out", "without looking", "samples"),
        rows,
    )


def examples_part(result: TaskResult) -> list[str]:
    """The heading of a task, what is shown, and the examples."""
    asked = [e for e in result.examples if isinstance(e, AskedExample)]
    ranked = [e for e in result.examples if isinstance(e, RankedExample)]
    maps = [e for e in result.examples if isinstance(e, MapExample)]
    parts = []
    if asked:
        right = sum(example.candidates[0].right for example in asked)
        parts += [
            paragraph(
                f"{len(asked)} held-out samples, spread evenly over the set and not chosen, with "
                f"the most probable answers. The first of these is right in {right}."
            ),
            f'<div class="grid">{"".join(map(asked_panel, asked))}</div>',
        ]
    if ranked:
        first = sum(example.pictures[0].right for example in ranked)
        also = ""
        if ranked[0].pictures[0].probability is not None:
            also = (
                ", and the probability, by the fused pass over both, that caption and scene "
                "belong together"
            )
        parts += [
            paragraph(
                f"The nearest of {ranked[0].among:,} held-out scenes to {len(ranked)} captions, "
                "spread evenly over the set and not chosen, by the dual encoder: below each the "
                f"cosine{also}. The caption's own scene is marked \u2713, first in {first}."
            ),
            f'<div class="stack">{"".join(map(ranked_panel, ranked))}</div>',
        ]
    if maps:
        parts += [
            paragraph(
                f"{len(maps)} held-out scenes, spread evenly over the set and not chosen: the "
                "scene, the classes that were said, and the true ones."
            ),
            legend(maps),
            f'<div class="grid">{"".join(map(map_panel, maps))}</div>',
        ]
    task = result.evaluation["task"]
    return [f"<h3>{escape(TITLES.get(task, task))}</h3>", *parts] if parts else []


def asked_panel(example: AskedExample) -> str:
    sides = ("",) if len(example.pictures) == 1 else ("left", "right")
    shown = "".join(
        picture(pixels, f"Held-out scene {side}".strip() + f", the truth: {example.truth}")
        for side, pixels in zip(sides, example.pictures, strict=True)
    )
    text = f'<p class="asked">{escape(example.text)}</p>' if example.text else ""
    bars = "".join(
        f'<li{right_class(c.right)}><span class="name">{mark(c.right)}{escape(c.name)}</span>'
        f'<span class="track"><span style="width:{100 * c.probability:.1f}%"></span></span>'
        f"<small>{100 * c.probability:.0f} %</small></li>"
        for c in example.candidates
    )
    truth = ""
    if not any(candidate.right for candidate in example.candidates):
        truth = f'<p class="soft">right would be: {escape(example.truth)}</p>'
    kind = "scene" if len(example.pictures) == 1 else "scene two"
    return (
        f'<article class="panel {kind}"><div class="shown">{shown}</div>'
        f'<div class="answered">{text}<ul class="bars">{bars}</ul>{truth}</div></article>'
    )


def ranked_panel(example: RankedExample) -> str:
    cells = []
    for found in example.pictures:
        sure = "" if found.probability is None else f" \u00b7 {100 * found.probability:.0f} %"
        cells.append(
            f"<figure{right_class(found.right)}>"
            f"{picture(found.pixels, f'Held-out scene: {found.caption}')}"
            f"<figcaption>{mark(found.right)}{found.similarity:.3f}{sure}</figcaption></figure>"
        )
    missed = "" if any(f.right for f in example.pictures) else '<p class="soft">not among these</p>'
    return (
        f'<article class="panel"><p class="asked">{escape(example.caption)}</p>'
        f'<div class="strip">{"".join(cells)}</div>{missed}</article>'
    )


def map_panel(example: MapExample) -> str:
    right = float((example.said == example.truth)[example.truth < len(example.classes)].mean())
    shown = (
        (example.pixels, "scene"),
        (coloured(example.said, example.classes), f"said: {percent(right)} of the pixels right"),
        (coloured(example.truth, example.classes), "true"),
    )
    cells = "".join(
        f"<figure>{picture(pixels, f'{words}; {named(example)}')}"
        f"<figcaption>{escape(words)}</figcaption></figure>"
        for pixels, words in shown
    )
    return f'<article class="panel"><div class="strip three">{cells}</div></article>'


def named(example: MapExample) -> str:
    """What is in the scene, in words."""
    there = [name for number, name in enumerate(example.classes) if (example.truth == number).any()]
    return "it shows " + ", ".join(there)


def legend(examples: Sequence[MapExample]) -> str:
    """The colours of the classes that occur in some map."""
    classes = examples[0].classes
    there = [
        number
        for number in range(len(classes))
        if any((e.said == number).any() or (e.truth == number).any() for e in examples)
    ]
    items = "".join(
        f'<li><span style="background:rgb{class_colour(number)}"></span>'
        f"{escape(classes[number])}</li>"
        for number in there
    )
    return f'<ul class="swatches">{items}</ul>'


def coloured(classes: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """(height, width) class numbers to (height, width, 3) uint8; black where there is none."""
    colours = np.zeros((256, 3), dtype=np.uint8)
    colours[: len(names)] = [class_colour(number) for number in range(len(names))]
    found: np.ndarray = colours[classes]
    return found


def right_class(right: bool) -> str:
    return ' class="right"' if right else ""


def mark(right: bool) -> str:
    """A tick in front of what is right; HTML."""
    return unseen("right: ") + "\u2713 " if right else ""
