"""The part of report.html that says whether a pretrained run looks: hidden words and patches, with
their own other side, with another's and without."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from vlbeit.eval.curves import interval_chart
from vlbeit.eval.evaluate import PATCH_CONDITIONS, WORD_CONDITIONS
from vlbeit.eval.examples import Example, Word
from vlbeit.eval.fill import FilledPatches, panels
from vlbeit.eval.report_html import (
    key,
    paragraph,
    percent,
    picture,
    section,
    table,
    unseen,
    with_interval,
)

STRIPS = 8
"""Held-out pairs whose hidden patches are shown."""

CONDITION_KINDS = {"sighted": "sighted", "blind": "blind", "no_image": "none"}
"""Class of the page by condition."""


def gap_part(evaluation: Mapping[str, Any]) -> list[str]:
    """The sighted / blind comparison, in words, as a chart and as tables."""
    if "words" not in evaluation:
        return []
    parts = [
        paragraph(
            "Half of the words of each held-out caption are hidden, and the model fills them in "
            "three times, from the same remaining words:"
        ),
        '<dl class="words"><dt>sighted</dt><dd>it sees the picture that the caption describes'
        "</dd><dt>blind</dt><dd>it sees the picture of another caption</dd>"
        "<dt>no image</dt><dd>it gets the words alone</dd>"
        + (
            "<dt>prior</dt><dd>no model: the share of the most frequent hidden word of the same "
            "kind, which a guesser reaches who knows the kind and nothing else</dd>"
            if "attributes" in evaluation
            else ""
        )
        + "</dl>",
        paragraph(
            "What is sighted and not blind can only come from looking. Intervals are 95 % "
            "bootstrap intervals over samples; those of differences are paired.",
        ),
    ]
    attributes = evaluation.get("attributes")
    if attributes is not None:
        kinds = attributes["kinds"]
        parts += [
            '<figure class="panel fitting">',
            interval_chart(
                "Accuracy on hidden words by kind: "
                + "; ".join(
                    f"{name} sighted {percent(row['sighted']['value'])}, blind "
                    f"{percent(row['blind']['value'])}, prior {percent(row['prior'])}"
                    for name, row in kinds.items()
                ),
                [(name, row, row["prior"]) for name, row in kinds.items()],
                CONDITION_KINDS,
            ),
            key(
                [
                    ("sighted", "sighted"),
                    ("blind", "blind"),
                    ("none", "no image"),
                    ("bar", "prior"),
                ]
            ),
            "</figure>",
            table(
                "Hidden attribute words named right. The last row, the headline figure, is over "
                f"{', '.join(attributes['headline'])}.",
                ("kind of word", "sighted", "blind", "no image", "prior", "asked"),
                [
                    attribute_cells(name, row)
                    for name, row in [
                        *kinds.items(),
                        ("headline", attributes),
                    ]
                ],
                total=True,
            ),
        ]
    for what, conditions, gaps in (
        ("words", WORD_CONDITIONS, "word_gap"),
        ("patches", PATCH_CONDITIONS, "patch_gap"),
    ):
        if what in evaluation:
            parts.append(conditions_table(what, conditions, evaluation[what], evaluation[gaps]))
    return [section("Does it look?", *parts)]


def attribute_cells(name: str, row: Mapping[str, Any]) -> list[str]:
    asked = [with_interval(row[condition]) for condition in ("sighted", "blind", "no_image")]
    return [escape(name), *asked, percent(row["prior"]), f"{row['count']:,}"]


def conditions_table(
    what: str,
    conditions: Mapping[str, str],
    rows: Mapping[str, Mapping[str, Any]],
    gaps: Mapping[str, Mapping[str, Any]],
) -> str:
    cells = [
        [escape(conditions[name]), with_interval(row["accuracy"]), nats(row["loss"])]
        for name, row in rows.items()
    ]
    for name, row in gaps.items():
        label = "gain over: " + conditions[name.split("_minus_")[1]]
        cells.append(
            [
                escape(label),
                with_interval(row["accuracy"], signed=True),
                nats(row["loss"], signed=True),
            ]
        )
    count = next(iter(rows.values()))["count"]
    return table(
        f"All {count:,} hidden {what} of the held-out pairs. A gain in loss is a loss that is "
        "lower.",
        (f"hidden {what}", "accuracy", "cross-entropy (nats)"),
        cells,
    )


def words_part(examples: Sequence[Example]) -> list[str]:
    """Pictures with their captions, the hidden words filled in."""
    if not examples:
        return []
    hidden = [word for example in examples for word in example.words if word.guess is not None]
    right = sum(word.right for word in hidden)
    scenes = "".join(
        f'<article class="panel scene">{picture(e.picture, f"Held-out picture: {e.caption}")}'
        f'<p class="said">{said(e.words)}</p></article>'
        for e in examples
    )
    return [
        section(
            "Hidden words, filled in",
            paragraph(
                f"{len(examples)} held-out pairs, spread evenly over the set and not chosen. "
                "Coloured words were hidden; the model saw the picture and the plain words. "
                f"Marked \u2713 right, \u2717 wrong (struck through: its answer, then the hidden "
                f"word), with the probability it gave its answer. Here {right} of {len(hidden)} "
                "are right."
            ),
            f'<div class="grid">{scenes}</div>',
        )
    ]


def said(words: Sequence[Word]) -> str:
    """HTML of a caption."""
    parts = []
    for word in words:
        parts.append(" " if word.starts else "")
        if word.guess is None:
            parts.append(escape(word.text))
            continue
        sure = f"<small>{100 * word.probability:.0f} %</small>"
        if word.right:
            mark = unseen("hidden, answered right: ") + "\u2713"
            parts.append(f'<span class="word right">{mark} {escape(word.text)} {sure}</span>')
        else:
            mark = unseen("hidden, answered wrong: ") + "\u2717"
            guess = f"<s>{escape(word.guess)}</s> {sure}"
            truth = unseen("the word was ") + escape(word.text)
            parts.append(f'<span class="word wrong">{mark} {guess} {truth}</span>')
    return "".join(parts).strip()


def patches_part(examples: Sequence[Example], evaluation: Mapping[str, Any]) -> list[str]:
    """Hidden patches filled in with the text and from the image alone."""
    drawn = []
    for example in examples:
        if example.with_text is not None and example.without_text is not None:
            drawn.append((example.caption, example.with_text, example.without_text))
    if not drawn:
        return []
    helps = ""
    if "no_text" in evaluation.get("patches", {}):
        with_text, alone = (
            evaluation["patches"][n]["accuracy"]["value"] for n in ("with_text", "no_text")
        )
        helps = (
            f" Over all held-out pairs {percent(with_text)} of the codes are right with the text "
            f"and {percent(alone)} without."
        )
    strips = "".join(patch_strip(*row) for row in drawn[:STRIPS])
    return [
        section(
            "Hidden patches, filled in",
            paragraph(
                "Grey patches were hidden. The model names the visual code of each, once with the "
                "caption and once from the rest of the image alone; the tokenizer's decoder turns "
                "codes into pixels. The last picture holds the true codes decoded: no model that "
                "predicts these codes can draw it better." + helps
            ),
            f'<div class="grid">{strips}</div>',
        )
    ]


def patch_strip(caption: str, told: FilledPatches, alone: FilledPatches) -> str:
    with_text, without_text = panels(told), panels(alone)
    hidden = int(told.hidden.sum())
    best = np.where(
        (with_text["hidden"] == with_text["picture"]).all(-1, keepdims=True),
        with_text["picture"],
        told.answers_decoded,
    )
    shown = [
        (told.picture, "the picture"),
        (with_text["hidden"], f"{hidden} of {len(told.hidden)} patches hidden"),
        (with_text["filled in"], f"with the text: {told.right} of {hidden} codes right"),
        (without_text["filled in"], f"without: {alone.right} of {hidden}"),
        (best, "true codes"),
    ]
    cells = "".join(
        f"<figure>{picture(pixels, f'{name}; {caption}')}<figcaption>{escape(name)}</figcaption>"
        "</figure>"
        for pixels, name in shown
    )
    return (
        f'<article class="panel"><h3>{escape(caption)}</h3><div class="strip">{cells}</div>'
        "</article>"
    )


def nats(estimate: Mapping[str, float], *, signed: bool = False) -> str:
    """HTML: a loss and its interval."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.3f} <small>[{low:{sign}.3f}, {high:{sign}.3f}]</small>"
