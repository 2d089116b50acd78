"""`vlbeit eval RUN`: held-out scores of a run, as a table or JSON.

A pretrained run: objectives and the sighted / blind gap. A fine-tuned one: the figures of its task
beside the guess that does not look at the picture.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Column, Table

from vlbeit.checkpoint import find_checkpoint
from vlbeit.errors import ConfigError, SaveError
from vlbeit.eval.confusion import MOST_CLASSES, classes_of
from vlbeit.eval.downstream import TaskRun, evaluate_task, load_task_run
from vlbeit.eval.drawing import draw_confusion
from vlbeit.eval.evaluate import PATCH_CONDITIONS, WORD_CONDITIONS, evaluate_run, load_run
from vlbeit.eval.neighbours import evaluate_neighbours
from vlbeit.eval.submission import write_submission


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(prog="vlbeit eval", description=__doc__)
    parser.add_argument("run", help="a run folder (its newest good checkpoint) or a checkpoint")
    parser.add_argument(
        "--data", nargs="+", default=[], help="prepared folders; default: the run's"
    )
    parser.add_argument(
        "--split",
        default="val",
        choices=("train", "val", "test"),
        help="which records (default: val)",
    )
    parser.add_argument("--samples", type=int, default=0, help="most samples a stream; 0: all")
    parser.add_argument("--batch", type=int, default=64, help="samples at a time (default: 64)")
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="settings of a fine-tuned run's evaluation, as segmentation.flip=true",
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON only")
    parser.add_argument("--out", help="also write the JSON to this file")
    parser.add_argument(
        "--neighbours",
        type=int,
        metavar="K",
        help="classify by the K nearest training pictures instead; nothing is trained",
    )
    parser.add_argument(
        "--scratch", action="store_true", help="with --neighbours: a trunk of fresh weights"
    )
    parser.add_argument(
        "--submission",
        metavar="FILE",
        help="write the answers for the test server instead; the samples need no answer",
    )
    parser.add_argument(
        "--confusion",
        metavar="PNG",
        help="classification, entailment: draw which class is taken for which",
    )
    args = parser.parse_args(argv)
    if args.scratch and args.neighbours is None:
        raise ConfigError("--scratch goes with --neighbours only")
    if args.samples and args.neighbours is not None:
        raise ConfigError("--samples does not go with --neighbours: leave it out")
    if args.submission and (args.samples or args.neighbours is not None):
        raise ConfigError("--submission answers all questions: no --samples, no --neighbours")
    if args.confusion and (args.submission or args.neighbours is not None):
        raise ConfigError("--confusion does not go with --submission and --neighbours")
    quiet: Any = (lambda text: None) if args.json else print
    checkpoint = find_checkpoint(args.run, quiet)
    given = {"split": args.split, "samples": args.samples, "batch_size": args.batch}
    found: dict[str, Any]
    if args.neighbours is not None:
        found = evaluate_neighbours(
            checkpoint,
            args.data,
            k=args.neighbours,
            split=args.split,
            batch_size=args.batch,
            device=args.device,
            scratch=args.scratch,
        )
    elif args.submission:
        if "task" not in checkpoint.config:
            raise ConfigError(f"--submission: {checkpoint.folder} is not fine-tuned for a task")
        found = write_submission(
            load_task_run(checkpoint, args.device, parse_settings(args.settings)),
            args.data,
            Path(args.submission),
            split=args.split,
            batch_size=args.batch,
        )
    elif "task" in checkpoint.config:
        task_run = load_task_run(checkpoint, args.device, parse_settings(args.settings))
        if args.confusion:
            check_confusion(task_run)
        found = evaluate_task(task_run, args.data, **given)
        if args.confusion:
            save_confusion(found, Path(args.confusion))
    elif args.confusion:
        raise ConfigError(f"--confusion: {checkpoint.folder} is not fine-tuned for a task")
    elif args.settings:
        raise ConfigError("--set: a pretrained run has no task whose settings it could change")
    else:
        found = evaluate_run(load_run(checkpoint.folder, args.device, quiet), args.data, **given)
    text = json.dumps(found, indent=1)
    if args.out:
        Path(args.out).write_text(text + "\n")
    # Where nobody set a width (a file, a pipe), figures need not be squeezed into 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120)
    if args.json:
        print(text)
    elif "submission" in found:
        print(f"{found['samples']} answers ({found['split']}) in {found['submission']}")
    elif "task" in found:
        show_task(found, console)
    else:
        show(found, console)
    return 0


def check_confusion(run: TaskRun) -> None:
    """Raise ConfigError where there will be no confusion matrix."""
    classes = len(classes_of(run.task))
    if not 0 < classes <= MOST_CLASSES:
        what = f"{classes} classes, the limit is {MOST_CLASSES}" if classes else "no classes"
        raise ConfigError(
            f"--confusion: {run.config.task} of {run.folder} has {what}; leave it out"
        )


def save_confusion(found: dict[str, Any], file: Path) -> None:
    """Draw the confusion matrix of an evaluation as a PNG."""
    title = f"{found['task']} on {found['split']}, {found['samples']} samples"
    names, counts = found["confusion"]["classes"], found["confusion"]["counts"]
    try:
        draw_confusion(names, np.array(counts), title).save(file, "PNG")
    except OSError as error:
        raise SaveError(f"{file}: cannot be written ({error.strerror or error})") from None


def parse_settings(words: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE with the value as in YAML: true, 0.5, [0.5, 1.0], words.

    Raises:
        ConfigError: no such form, or a name twice.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not value or name in found:
            raise ConfigError(f"--set {word}: expected NAME=VALUE, each name once")
        try:
            found[name.replace("-", "_")] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f"--set {word}: {value!r} cannot be read as a value") from None
    return found


def show_task(found: dict[str, Any], console: Console) -> None:
    """The figures of a fine-tuned run; intervals are 95 % bootstrap over records."""
    console.print(
        f"{found['checkpoint']} (step {found['step']}): {found['task']} on {found['split']}, "
        f"{found['samples']} samples"
    )
    if found["skipped"]:
        console.print(f"{len(found['skipped'])} bad samples left out, first: {found['skipped'][0]}")
    heads = ["figure", "value", "without looking", "samples"]
    roomy = console.width >= 100  # a terminal of 80 columns keeps the names whole instead
    table = table_of(*heads, *["gain"] * roomy)
    for name, row in found["figures"].items():
        guess = percent(row["baseline"]) if "baseline" in row else ""
        gain = percent(row["gain"], True) if "gain" in row else ""
        table.add_row(name, percent(row), guess, str(row["samples"]), *[gain] * roomy)
    console.print(table)
    if found.get("costs"):
        console.print(", ".join(f"{name} {value:.4g}" for name, value in found["costs"].items()))


def percent(estimate: dict[str, float], signed: bool = False) -> str:
    value, low, high = (100 * estimate[key] for key in ("value", "low", "high"))
    sign = "+" if signed else ""
    return f"{value:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]"


def nats(estimate: dict[str, float], signed: bool = False) -> str:
    sign = "+" if signed else ""
    return (
        f"{estimate['value']:{sign}.3f} [{estimate['low']:{sign}.3f}, {estimate['high']:{sign}.3f}]"
    )


def show(found: dict[str, Any], console: Console) -> None:
    """The tables a person reads; intervals are 95 % bootstrap over samples."""
    samples = ", ".join(f"{count} {name}s" for name, count in found["samples"].items())
    console.print(f"{found['checkpoint']} (step {found['step']}) on {found['split']}: {samples}")
    if found["skipped"]:
        console.print(f"{len(found['skipped'])} bad samples left out, first: {found['skipped'][0]}")
    table = table_of("objective", "accuracy", "loss (nats)", "top answer", "predicted")
    for name, row in found["objectives"].items():
        table.add_row(
            name,
            percent(row["accuracy"]),
            nats(row["loss"]),
            f"{100 * row['top_share']:.1f} %",
            str(row["count"]),
        )
    console.print(table)
    for what, conditions, gaps in (
        ("words", WORD_CONDITIONS, "word_gap"),
        ("patches", PATCH_CONDITIONS, "patch_gap"),
    ):
        if what not in found:
            continue
        table = table_of(f"hidden {what} of pairs", "accuracy", "loss (nats)")
        for name, row in found[what].items():
            table.add_row(conditions[name], percent(row["accuracy"]), nats(row["loss"]))
        for name, row in found[gaps].items():
            label = "gain over: " + conditions[name.split("_minus_")[1]]
            table.add_row(label, percent(row["accuracy"], True), nats(row["loss"], True))
        console.print(table)
    if "attributes" in found:
        console.print(attribute_table(found["attributes"]))


def table_of(first: str, *others: str) -> Table:
    """Only the first column may wrap: figures stay in one piece on a narrow terminal."""
    return Table(
        Column(first, overflow="fold"),
        *(Column(name, no_wrap=True) for name in others),
        padding=(0, 0),
    )


def attribute_table(found: dict[str, Any]) -> Table:
    table = table_of("hidden attribute word", "sighted", "blind", "prior", "asked")
    table.caption = f"headline: {', '.join(found['headline'])}"
    rows = {**found["kinds"], "headline": found}
    for name, row in rows.items():
        table.add_row(
            name,
            percent(row["sighted"]),
            percent(row["blind"]),
            f"{100 * row['prior']:.1f} %",
            str(row["count"]),
        )
    return table
