"""`vlbeit report RUN`: one page about a run, what it learned and how that was measured."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlbeit import __version__
from vlbeit.config import digest, to_dict
from vlbeit.data.manifest import write_atomic
from vlbeit.eval.curves import Line, interval_chart, line_chart, share_chart
from vlbeit.eval.evaluate import (
    PATCH_CONDITIONS,
    WORD_CONDITIONS,
    LoadedRun,
    evaluate_run,
    load_run,
)
from vlbeit.eval.examples import Example, Word, pair_examples
from vlbeit.eval.fill import FilledPatches, panels
from vlbeit.eval.heldout import batches_of, held_out_streams, visits_of
from vlbeit.eval.report_html import (
    key,
    page,
    paragraph,
    percent,
    picture,
    section,
    table,
    unseen,
    with_interval,
)
from vlbeit.eval.report_tasks import TaskResult, headline_rows, tasks_part
from vlbeit.eval.report_tokenizer import is_tokenizer_run, write_tokenizer_report
from vlbeit.eval.run_rows import read_rows

EXAMPLES = 12
"""Held-out pairs whose hidden words are shown."""
STRIPS = 8
"""Held-out pairs whose hidden patches are shown."""
DECODED = 12
"""Held-out pictures shown beside what their codes decode to."""
COUNTED = 512
"""Held-out pictures on which the use of codes is counted."""

OBJECTIVE_NAMES = {
    "mlm": "MLM: hidden words of texts",
    "mim": "MIM: hidden patches of images",
    "mvlm_text": "MVLM: hidden words of pairs, image seen",
    "mvlm_image": "MVLM: hidden patches of pairs, text seen",
}


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(prog="vlbeit report", description=__doc__)
    parser.add_argument("run", help="a run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument(
        "--data", nargs="+", default=[], help="prepared folders; default: the run's"
    )
    parser.add_argument("--out", type=Path, help="the page; default: report.html in the run")
    parser.add_argument("--samples", type=int, default=0, help="most samples a stream; 0: all")
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (default: 64)")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    args = parser.parse_args(argv)
    folder = run_folder_of(Path(args.run))
    out = args.out or folder / "report.html"
    if is_tokenizer_run(folder):
        write_tokenizer_report(folder, out, data=args.data, samples=args.samples)
    else:
        run = load_run(args.run, args.device)
        evaluation = evaluate_run(run, args.data, samples=args.samples, batch_size=args.batch)
        write_report(folder, evaluation, out, run=run)
    print(f"report in {out}")
    return 0


def run_folder_of(place: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints."""
    if (place / "manifest.json").is_file() and place.absolute().parent.name == "checkpoints":
        return place.absolute().parent.parent
    return place


def write_report(
    run_dir: Path,
    evaluation: Mapping[str, Any],
    out: Path,
    *,
    run: LoadedRun,
    seconds: Mapping[str, float] | None = None,
    tasks: Sequence[TaskResult] = (),
    title: str = "",
) -> Path:
    """Write the page.

    Args:
        run_dir: its metrics.jsonl and eval.jsonl are drawn, its env.json is shown.
        evaluation: what `evaluate_run` gave for `run`.
        seconds: wall time by phase, where the caller knows it.
        tasks: runs that were fine-tuned from this one, in the order of the page.

    Raises:
        SaveError: the page cannot be written.
    """
    metrics, evals = read_rows(run_dir / "metrics.jsonl"), read_rows(run_dir / "eval.jsonl")
    config = replace(run.config, data=tuple(evaluation["data"]))
    streams = held_out_streams(config, run.text, evaluation["split"])
    pairs = streams.get("pair")
    examples = [] if pairs is None else pair_examples(run, pairs, EXAMPLES)
    parts = [
        header_part(
            title or f"Pretraining run: {run.config.recipe}", run, evaluation, metrics, tasks
        ),
        *gap_part(evaluation),
        *words_part(examples),
        *patches_part(examples, evaluation),
        *tasks_part(tasks),
        *curves_part(metrics, evals, evaluation),
        *tokenizer_part(run, streams),
        settings_part(run, run_dir, evaluation, metrics, seconds or {}),
    ]
    write_atomic(out, page(title or f"vlbeit: {run.config.recipe}", parts).encode())
    return out


# --- words and numbers ---------------------------------------------------------------------------


def nats(estimate: Mapping[str, float], *, signed: bool = False) -> str:
    """HTML: a loss and its interval."""
    value, low, high = (estimate[name] for name in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.3f} <small>[{low:{sign}.3f}, {high:{sign}.3f}]</small>"


def duration(seconds: float) -> str:
    """Such as "8 min 05 s"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def trained_seconds(metrics: Sequence[Mapping[str, Any]]) -> float:
    return sum(float(row.get("seconds", 0.0)) + float(row.get("waited", 0.0)) for row in metrics)


# --- the parts of the page -----------------------------------------------------------------------


def header_part(
    title: str,
    run: LoadedRun,
    evaluation: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    tasks: Sequence[TaskResult],
) -> str:
    """Title, what this is, the summary and the key figures."""
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    trained = trained_seconds([row for row in metrics if row["step"] <= evaluation["step"]])
    took = f" in {duration(trained)}" if trained else ""
    what = (
        f"A vision-language Transformer ({parameters:.1f} M parameters) pretrained from scratch by "
        f"masked prediction on images, texts and image-text pairs: {evaluation['step']:,} "
        f"steps{took}. Everything below was measured on held-out samples that it never saw."
    )
    return "\n".join(
        [
            "<header>",
            f"<h1>{escape(title)}</h1>",
            paragraph(what, "soft"),
            paragraph(summary(evaluation), "lead"),
            figures(evaluation, tasks),
            "</header>",
        ]
    )


def summary(evaluation: Mapping[str, Any]) -> str:
    """The result in one paragraph. It says no more than the intervals allow."""
    words = evaluation.get("attributes") or evaluation.get("words")
    if words is None:
        parts = [
            f"{OBJECTIVE_NAMES[name]}: {percent(row['accuracy']['value'])} right"
            for name, row in evaluation["objectives"].items()
        ]
        return "; ".join(parts) + "."
    in_attributes = "attributes" in evaluation
    if "blind" not in words:
        return "There is a single held-out pair: nothing to compare."
    sighted, blind = (
        words[name] if in_attributes else words[name]["accuracy"] for name in ("sighted", "blind")
    )
    named = ", ".join(words["headline"]) if in_attributes else ""
    kind = f"hidden attribute words ({named})" if in_attributes else "hidden words"
    text = (
        f"With the picture that a caption describes, the model names {percent(sighted['value'])} "
        f"of its {kind}. With the picture of another caption it names {percent(blind['value'])}"
    )
    if in_attributes:
        text += f", and always saying the most frequent word would reach {percent(words['prior'])}"
    prior = words["prior"] if in_attributes else 0.0
    gap = (
        words["sighted_minus_blind"]
        if in_attributes
        else evaluation["word_gap"]["sighted_minus_blind"]["accuracy"]
    )
    if gap["low"] > 0 and sighted["low"] > prior and sighted["value"] > 2 * blind["value"]:
        text += ". So it reads the answers off the picture."
    elif gap["low"] > 0 and sighted["low"] > prior:
        text += f". So it looks: the picture is worth {100 * gap['value']:.1f} points."
    elif gap["low"] > 0:
        text += ". So it uses the picture, but is not clearly better than such a guess yet."
    else:
        text += ". The two do not differ clearly: it has not learned to look, or not yet."
    mim = evaluation["objectives"].get("mim")
    if mim is not None:
        text += (
            f" Of the hidden patches of images it names {percent(mim['accuracy']['value'])} of the "
            f"codes exactly; the most frequent code would be right in {percent(mim['top_share'])}."
        )
    return text


def figures(evaluation: Mapping[str, Any], tasks: Sequence[TaskResult]) -> str:
    """The key figures as cards."""
    cards: list[tuple[str, str, str, str]] = []

    def card(kind: str, name: str, estimate: Mapping[str, float]) -> None:
        small = f"95 % interval {100 * estimate['low']:.1f} to {100 * estimate['high']:.1f}"
        cards.append((kind, name, percent(estimate["value"]), small))

    attributes, words = evaluation.get("attributes"), evaluation.get("words")
    if attributes is not None:
        card("sighted", "attribute words, sighted", attributes["sighted"])
        card("blind", "attribute words, blind", attributes["blind"])
        cards.append(("", "prior", percent(attributes["prior"]), "the most frequent word"))
    elif words is not None:
        for name in ("sighted", "blind"):
            if name in words:
                card(name, f"hidden words, {name}", words[name]["accuracy"])
    mim = evaluation["objectives"].get("mim")
    if mim is not None:
        small = f"most frequent code {percent(mim['top_share'])}"
        cards.append(("", "image codes right", percent(mim["accuracy"]["value"]), small))
    for task in tasks:
        for line, found in headline_rows(task.evaluation):
            small = f"without looking {percent(found['baseline']['value'])}"
            cards.append(("", line.words, percent(found["value"]), small))
    items = "".join(
        f'<div class="figure {kind}"><dt>{escape(name)}</dt><dd>{escape(value)}</dd>'
        f'<dd class="small">{escape(small)}</dd></div>'
        for kind, name, value, small in cards
    )
    return f'<dl class="figures">{items}</dl>'


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


def curves_part(
    metrics: Sequence[Mapping[str, Any]],
    evals: Sequence[Mapping[str, Any]],
    evaluation: Mapping[str, Any],
) -> list[str]:
    """Loss and accuracy of each objective over the steps."""
    charts = []
    for name, words in OBJECTIVE_NAMES.items():
        train = [(r["step"], r["objectives"][name]) for r in metrics if name in r["objectives"]]
        # A run stopped before its first checkpoint evaluates step 0 once more at its next start.
        held = sorted({r["step"]: r["objectives"].get(name) for r in evals}.items())
        held = [(step, found) for step, found in held if found is not None]
        if not train and not held:
            continue
        last = float(max(step for step, _ in [*train, *held]))
        cells = []
        for what, title in (("loss", "loss (nats)"), ("accuracy", "accuracy")):
            lines = [
                Line.smoothed(
                    "training", "train", [(s, number(r[what]), r["count"]) for s, r in train]
                ),
                Line(
                    name="held out",
                    kind="held",
                    steps=np.array([s for s, _ in held], dtype=np.float64),
                    values=np.array([number(r[what]) for _, r in held]),
                ),
            ]
            if what == "accuracy" and name in evaluation["objectives"]:
                share = evaluation["objectives"][name]["top_share"]
                level = Line(
                    name="most frequent answer",
                    kind="level",
                    steps=np.array([0.0, last]),
                    values=np.array([share, share]),
                )
                lines.insert(0, level)
            label = f"{words}, {title} over steps. " + " ".join(
                f"{line.name} from {line.values[0]:.3g} to {line.values[-1]:.3g}."
                for line in lines
                if len(line.values)
            )
            cells.append(
                f'<figure class="panel"><h3>{escape(words)}</h3><figcaption>{title}</figcaption>'
                f"{line_chart(label, lines, last, percent=what == 'accuracy')}</figure>"
            )
        charts.append(f'<div class="grid">{"".join(cells)}</div>')
    if not charts:
        return []
    return [
        section(
            "Training",
            paragraph(
                "Training steps (means of neighbouring steps) and the same held-out samples each "
                "time. In training one hidden word in ten is left readable and one is replaced by "
                "a random word (BERT's 80 / 10 / 10); held-out words are all really hidden, so "
                "the held-out line of words may lie a little above or below."
            ),
            key(
                [
                    ("train", "training"),
                    ("held line", "held out"),
                    ("level", "the most frequent answer"),
                ]
            ),
            *charts,
        )
    ]


def number(value: Any) -> float:
    """A number of a row: "nan" and hexadecimal floats are strings there."""
    return float.fromhex(value) if isinstance(value, str) else float(value)


def tokenizer_part(run: LoadedRun, streams: Mapping[Any, Any]) -> list[str]:
    """How the codes are used, and what pictures look like through them."""
    stream = streams.get("image") or streams.get("pair")
    if run.visual is None or stream is None:
        return []
    pixels = [
        batch.pixels
        for batch in batches_of(stream, visits_of(stream, COUNTED), 64)
        if batch.pixels is not None
    ]
    if not pixels:
        return []
    shown = torch.cat(pixels).to(run.device)
    codes = run.visual.encode(shown)
    counts = torch.bincount(codes.flatten().cpu(), minlength=run.visual.codes).double().numpy()
    shares = counts / counts.sum()
    used = int((counts > 0).sum())
    perplexity = float(np.exp(-(shares[shares > 0] * np.log(shares[shares > 0])).sum()))
    height, width = shown.shape[-2] // run.visual.patch, shown.shape[-1] // run.visual.patch
    places = torch.linspace(0, len(shown) - 1, min(DECODED, len(shown))).long()

    def hwc(images: torch.Tensor) -> list[np.ndarray]:
        return list(images.permute(0, 2, 3, 1).contiguous().cpu().numpy())

    decoded = ""
    if run.visual.draws:
        drawn = hwc(run.visual.decode(codes[places].view(len(places), height, width)))
        pairs = "".join(
            f"<figure>{picture(original, f'held-out picture {i + 1}')}"
            f"{picture(again, f'picture {i + 1} decoded from its {height * width} codes')}</figure>"
            for i, (original, again) in enumerate(zip(hwc(shown[places]), drawn, strict=True))
        )
        decoded = (
            '<figure class="panel"><h3>Pictures and what their codes decode to</h3>'
            f'<div class="codes">{pairs}</div></figure>'
        )
    text = (
        f"The visual tokenizer turns a picture into {height} x {width} codes out of "
        f"{run.visual.codes}; they are what the model predicts for hidden patches. On "
        f"{len(shown)} held-out pictures {used} codes occur ({percent(used / run.visual.codes)}), "
        f"as many different ones as {perplexity:.1f} equally frequent codes would be (perplexity); "
        f"the most frequent has a share of {percent(float(shares.max()))}."
    )
    label = f"Shares of {run.visual.codes} codes in falling order, from {shares.max():.3f}."
    return [
        section(
            "Visual tokenizer",
            paragraph(text),
            '<div class="grid">'
            f'<figure class="panel"><h3>How often each code is used</h3>'
            f"{share_chart(label, shares)}{key([('level', 'equal use of all codes')])}</figure>"
            f"{decoded}</div>",
        )
    ]


def settings_part(
    run: LoadedRun,
    run_dir: Path,
    evaluation: Mapping[str, Any],
    metrics: Sequence[Mapping[str, Any]],
    seconds: Mapping[str, float],
) -> str:
    """How long it took, on what, from which data, with which settings."""
    times = [(name, duration(s)) for name, s in seconds.items()]
    if seconds:
        times.append(("together", duration(sum(seconds.values()))))
    elif metrics:
        times.append((f"{len(metrics):,} steps", duration(trained_seconds(metrics))))
    samples = ", ".join(f"{count:,} {name}s" for name, count in evaluation["samples"].items())
    if evaluation["skipped"]:
        samples += f"; {len(evaluation['skipped'])} bad ones left out"
    environment = machine(run_dir / "env.json")
    rows = [
        ("recipe", escape(run.config.recipe)),
        ("checkpoint", escape(Path(evaluation["checkpoint"]).name)),
        ("data", escape(", ".join(evaluation["data"]))),
        (f"evaluated on ({escape(evaluation['split'])})", escape(samples)),
        ("config digest", f"{digest(run.config)[:16]}\u2026"),
        ("text tokenizer", f"{run.text.size} pieces, {run.text.digest[:16]}\u2026"),
        *([] if run.visual is None else [visual_row(run)]),
        ("vlbeit", escape(__version__)),
        *environment,
    ]
    parts = []
    if times:
        parts.append(table("Wall time.", (), [[escape(n), t] for n, t in times]))
    parts.append(table("Run and machine.", (), rows))
    config = json.dumps(to_dict(run.config), indent=2)
    parts.append(
        f"<details><summary>Every setting of the run</summary><pre>{escape(config)}</pre></details>"
    )
    shown = json.dumps(dict(evaluation), indent=1)
    parts.append(
        f"<details><summary>The evaluation as JSON</summary><pre>{escape(shown)}</pre></details>"
    )
    parts.append(
        '<footer class="soft"><p>Written by vlbeit. Method: VL-BEiT (Bao et al., 2022), '
        "arXiv 2206.01127. The page is one file: no script, nothing is loaded from "
        "elsewhere.</p></footer>"
    )
    return section("How it was made", *parts)


def visual_row(run: LoadedRun) -> tuple[str, str]:
    assert run.visual is not None
    return "visual tokenizer", f"{run.visual.codes} codes, {run.visual.digest[:16]}\u2026"


def machine(path: Path) -> list[tuple[str, str]]:
    """Rows about where it ran, from env.json; none without that file."""
    if not path.is_file():
        return []
    found = json.loads(path.read_text())
    versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v and k != "vlbeit")
    device = found["gpu"] or found["device"]
    processes = f"{found['world_size']} process(es) x {found['threads']} thread(s)"
    return [
        ("device", escape(f"{device}, {found['cores']} cores, {processes}")),
        ("platform", escape(f"{found['platform']}, Python {found['python']}")),
        ("packages", escape(versions)),
    ]
