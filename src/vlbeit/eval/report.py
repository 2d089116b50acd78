"""`vlbeit report RUN ...`: one page about a run, what it learned and how that was measured; or
about several runs of one kind, side by side."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlbeit.data.manifest import write_atomic
from vlbeit.errors import ConfigError
from vlbeit.eval.curves import share_chart
from vlbeit.eval.evaluate import (
    LoadedRun,
    evaluate_run,
    load_run,
)
from vlbeit.eval.examples import pair_examples
from vlbeit.eval.heldout import batches_of, held_out_streams, visits_of
from vlbeit.eval.report_comparison import write_comparison
from vlbeit.eval.report_html import (
    key,
    page,
    paragraph,
    percent,
    picture,
    section,
)
from vlbeit.eval.report_looking import gap_part, patches_part, words_part
from vlbeit.eval.report_tasks import TaskResult, headline_rows, tasks_part
from vlbeit.eval.report_tokenizer import is_tokenizer_run, write_tokenizer_report
from vlbeit.eval.report_training import (
    OBJECTIVE_NAMES,
    curves_part,
    duration,
    settings_part,
    trained_seconds,
)
from vlbeit.eval.run_rows import read_rows
from vlbeit.jsonfile import read_json

EXAMPLES = 12
"""Held-out pairs whose hidden words are shown."""
DECODED = 12
"""Held-out pictures shown beside what their codes decode to."""
COUNTED = 512
"""Held-out pictures on which the use of codes is counted."""


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(prog="vlbeit report", description=__doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run folder (its newest good checkpoint) or a checkpoint; a fine-tuned run is shown "
        "from its log, and so are several runs of one kind, side by side",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the page; default: report.html in the run, of several runs comparison.html beside "
        "the first",
    )
    alone = parser.add_argument_group("of a single pretrained run")
    alone.add_argument("--data", nargs="+", help="prepared folders; default: the run's")
    alone.add_argument("--samples", type=int, help="most samples a stream; 0: all (the default)")
    alone.add_argument("--batch", type=int, help="samples in one forward pass (default 64)")
    alone.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="where it is asked (default auto)"
    )
    args = parser.parse_args(argv)
    folders = [run_folder_of(Path(run)) for run in args.runs]
    if len(folders) > 1 or is_task_run(folders[0]):
        given = [n for n in ("data", "samples", "batch", "device") if getattr(args, n) is not None]
        if given:
            found = f"{len(folders)} runs" if len(folders) > 1 else "a fine-tuned run"
            raise ConfigError(
                f"--{given[0]} is of a single pretrained run: {found} is shown by what was logged, "
                "and nothing is evaluated; leave it out"
            )
        out = args.out or (None if len(folders) > 1 else folders[0] / "report.html")
        print(f"report in {write_comparison(folders, out)}")
        return 0
    folder = folders[0]
    out = args.out or folder / "report.html"
    data, samples = args.data or [], args.samples or 0
    if is_tokenizer_run(folder):
        write_tokenizer_report(folder, out, data=data, samples=samples)
    else:
        run = load_run(args.runs[0], args.device or "auto")
        batch = 64 if args.batch is None else args.batch
        evaluation = evaluate_run(run, data, samples=samples, batch_size=batch)
        write_report(folder, evaluation, out, run=run)
    print(f"report in {out}")
    return 0


def run_folder_of(place: Path) -> Path:
    """The run folder of a run folder or of one of its checkpoints."""
    if (place / "manifest.json").is_file() and place.absolute().parent.name == "checkpoints":
        return place.absolute().parent.parent
    return place


def is_task_run(folder: Path) -> bool:
    """Whether a run folder is of `vlbeit finetune`."""
    file = folder / "config.json"
    return file.is_file() and "task" in read_json(file)


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
