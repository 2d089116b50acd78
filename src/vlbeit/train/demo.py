"""`vlbeit demo`: draw a small world, pretrain on it, fine-tune on tasks, show what was learned.

vlbeit demo --run-dir runs/demo                         VQA and retrieval
vlbeit demo --run-dir runs/demo --all-tasks             every task of the drawn world
vlbeit demo --run-dir runs/demo --tasks segmentation    one more; what is done stays in the table

    report.html    the page to look at
    metrics.json   the figures; phases.json: seconds of each phase
    scenes/        the drawn world and its text tokenizer
    pretrain/      the run folder, the visual tokenizer included
    tasks/vqa/     the run folder of a task; so for each
    index/         the held-out scenes as the retrieval run sees them, for the page's search

It ends with the command that serves all of them on a page (`vlbeit serve`). On two CPU cores
it takes about 20 minutes with VQA and retrieval (docs/results.md).

The same command on the same folder goes on where it was stopped.
"""

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from vlbeit import __version__
from vlbeit.config import FinetuneConfig, PretrainConfig, digest
from vlbeit.data.dataset import Dataset
from vlbeit.data.loader import open_streams
from vlbeit.data.manifest import write_atomic
from vlbeit.data.scene_world import SIDE
from vlbeit.data.scenes import TASK_SCENES, WORLD_VERSION, prepare_scenes
from vlbeit.errors import ConfigError
from vlbeit.eval.cli import percent, show, table_of
from vlbeit.eval.evaluate import evaluate_run, load_run
from vlbeit.eval.report import write_report
from vlbeit.eval.report_tasks import TaskResult, headline_rows
from vlbeit.eval.report_training import duration
from vlbeit.eval.run_rows import read_rows
from vlbeit.recipes import tiny
from vlbeit.serve.gallery import open_gallery
from vlbeit.serve.predictor import load
from vlbeit.serve.search import build
from vlbeit.serve.served_runs import INDEX_FOLDER, PRETRAIN_FOLDER, SCENES_FOLDER, TASKS_FOLDER
from vlbeit.tasks.retrieval_index import Index
from vlbeit.train.demo_tasks import (
    DEFAULT_TASKS,
    DRAWN_TASKS,
    finished_tasks,
    in_demo,
    measure_task,
    parse_tasks,
    start_of,
    task_configs,
    task_metrics,
    train_task,
)
from vlbeit.train.distributed import init_world, set_threads
from vlbeit.train.pretrain import pretrain
from vlbeit.train.runfolder import RunFolder
from vlbeit.train.tokenizers import find_tokenizers, train_missing_tokenizers
from vlbeit.validate import validate, validate_finetune

COUNT = 8_000
"""Scenes of each stream; the recipe's 2,200 steps see every pair 18 times."""
EVALUATIONS = 12
"""Held-out evaluations along the way, for the curves."""
PHASES = {
    "prepare": "draw the scenes, train the text tokenizer",
    "visual_tokenizer": "train the visual tokenizer",
    "pretrain": "pretrain",
    "evaluate": "evaluate on held-out scenes",
    **{f"finetune_{task}": f"fine-tune: {words}" for task, words in DRAWN_TASKS.items()},
    "index": "index the held-out scenes",
    "report": "write the report",
}
"""In their order; what a phase does, in words. Fine-tuning includes the task's evaluation."""


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--run-dir",
        type=Path,
        default=Path("runs/demo"),
        help="folder for all of it (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of scenes and training (default: 0)")
    parser.add_argument(
        "--count", type=int, default=COUNT, help="scenes of each stream (default: %(default)s)"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    parser.add_argument(
        "--precision",
        default="",
        choices=("fp32", "bf16"),
        help="of the products (default: the recipe's, bf16)",
    )
    parser.add_argument("--max-steps", type=int, help="stop pretraining and each task earlier")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--tasks",
        default=",".join(DEFAULT_TASKS),
        metavar="TASK,...",
        help=f"some of {','.join(DRAWN_TASKS)}, or none (default: %(default)s)",
    )
    chosen.add_argument("--all-tasks", action="store_true", help="all of these")
    args = parser.parse_args(argv)
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("the demo is one process; start it without torchrun")
    config = tiny()
    config = replace(
        config,
        seed=args.seed,
        device=args.device,
        precision=args.precision or config.precision,
        max_steps=config.max_steps if args.max_steps is None else args.max_steps,
    )
    names = tuple(DRAWN_TASKS) if args.all_tasks else parse_tasks(args.tasks)
    run_demo(args.run_dir, config, args.count, task_configs(names, args.max_steps))
    return 0


def run_demo(
    folder: Path, config: PretrainConfig, count: int = COUNT, tasks: Sequence[FinetuneConfig] = ()
) -> dict[str, Any]:
    """Run, or go on with, the demo in `folder`; returns what metrics.json holds.

    Args:
        config: a pretraining recipe; folder, data and logging are set here.
        tasks: a recipe for each task; folder, start, data, seed, device, precision and threads
            are set here. Tasks that an earlier command finished are shown too.

    Raises:
        ConfigError: the folder holds a demo with another count or seed.
        VLBeitError: whatever ends a phase early; see `pretrain` and `finetune`.
    """
    every = evaluation_steps(config.max_steps)
    config = replace(
        config,
        run_dir=str(folder / PRETRAIN_FOLDER),
        data=(str(folder / SCENES_FOLDER),),
        log=replace(config.log, eval_every=every),
    )
    validate(config)
    asked = {task.task: in_demo(task, folder, config) for task in tasks}
    for task in asked.values():
        validate_finetune(task)
    with RunFolder(folder) as demo:
        planned = {name for name in PHASES if not name.startswith("finetune_")}
        planned |= {f"finetune_{name}" for name in asked}
        if "retrieval" not in asked:
            planned.discard("index")
        clock = PhaseClock(folder / "phases.json", planned, demo.log)
        console = Console(width=None if sys.stdout.isatty() else 120)
        with clock.phase("prepare"):
            prepare(folder / SCENES_FOLDER, count, config.seed, demo)
        with clock.phase("visual_tokenizer"):
            train_tokenizers(config, demo)
        with clock.phase("pretrain"), own_signals():
            pretrain(config)
        with clock.phase("evaluate"):
            run = load_run(folder / PRETRAIN_FOLDER, config.device, demo.log)
            evaluation = evaluate_run(run, config.data)
            show(evaluation, console)
        results = fine_tune(folder, config, asked, clock, demo)
        if any(result.evaluation["task"] == "retrieval" for result in results):
            with clock.phase("index"):
                index_scenes(folder, config.device, demo.log)
        with clock.phase("report"):
            write_report(
                folder / PRETRAIN_FOLDER,
                evaluation,
                folder / "report.html",
                run=run,
                seconds=clock.in_words(),
                tasks=results,
                title="VL-BEiT in a drawn world",
            )
        evals = read_rows(folder / PRETRAIN_FOLDER / "eval.jsonl")
        env = json.loads((folder / PRETRAIN_FOLDER / "env.json").read_text())
        metrics = metrics_of(evaluation, results, evals, run.config, clock.seconds, env)
        write_atomic(folder / "metrics.json", json.dumps(metrics, indent=1).encode() + b"\n")
        console.print(result_table(evaluation, results, console.width))
        for words, seconds in clock.in_words().items():
            demo.log(f"{duration(seconds):>12}  {words}")
        demo.log(f"{duration(sum(clock.seconds.values())):>12}  together")
        demo.log(f"figures: {folder / 'metrics.json'}")
        demo.log(f"report:  {(folder / 'report.html').absolute()}")
        demo.log(f"page:    {page_command(folder)}")
    return metrics


def page_command(folder: Path) -> str:
    """The command that opens the page on a demo folder, as it can be typed where we are."""
    beside = Path(sys.executable).with_name("vlbeit")
    if shutil.which("vlbeit") == str(beside):
        words = ["vlbeit"]
    else:  # the environment is not the active one, as after `make run`
        here = Path.cwd()
        python = Path(sys.executable)
        inside = python.is_relative_to(here)
        words = [str(python.relative_to(here) if inside else python), "-m", "vlbeit"]
    return shlex.join([*words, "serve", str(folder)])


def fine_tune(
    folder: Path,
    config: PretrainConfig,
    asked: Mapping[str, FinetuneConfig],
    clock: "PhaseClock",
    demo: RunFolder,
) -> list[TaskResult]:
    """Train what is asked for and is not done, measure it, and what was done before."""
    done = finished_tasks(folder, demo.log)
    results = []
    for name in DRAWN_TASKS:
        if name not in asked and name not in done:
            continue
        with clock.phase(f"finetune_{name}"):
            if name in asked:
                with own_signals():
                    train_task(asked[name], start_of(name, folder, demo.log), demo.log)
            else:
                demo.log(f"done by an earlier command: {folder / TASKS_FOLDER / name}")
            results.append(measure_task(folder / TASKS_FOLDER / name, config.device, demo.log))
            for line, found in headline_rows(results[-1].evaluation):
                demo.log(
                    f"{line.words} {percent(found)}, without looking {percent(found['baseline'])}"
                )
    return results


def index_scenes(folder: Path, device: str, log: Callable[[str], None]) -> None:
    """What the page searches: the held-out scenes, by the demo's retrieval run as it is now."""
    run = load(folder / TASKS_FOLDER / "retrieval", device, log)
    place = folder / INDEX_FOLDER
    if place.is_dir():
        if Index.load(place).model == run.digest:
            return
        shutil.rmtree(place)
    index, skipped = build(run, open_gallery("image", folder / SCENES_FOLDER), log)
    index.save(place)
    left_out = f"; left out {len(skipped)}, the first: {skipped[0]}" if skipped else ""
    log(f"{len(index.ids)} pictures: {place}{left_out}")


def result_table(evaluation: Mapping[str, Any], results: Sequence[TaskResult], width: int) -> Table:
    """Every headline figure beside what is reached without looking; the terminal's last word.

    Args:
        width: columns of the terminal; a narrow one is not told how the baseline is made.
    """
    roomy = ["which is"] if width >= 100 else []
    table = table_of("on held-out scenes", "figure", "without looking", *roomy)
    words, mim = evaluation["attributes"], evaluation["objectives"]["mim"]
    rows = [
        ("hidden attribute words", words["sighted"], percent(words["blind"]), "another picture"),
        (
            "hidden image codes (MIM)",
            mim["accuracy"],
            f"{100 * mim['top_share']:.1f} %",
            "most frequent code",
        ),
    ]
    for result in results:
        for line, found in headline_rows(result.evaluation):
            rows.append((line.words, found, percent(found["baseline"]), line.baseline))
    for name, found, baseline, how in rows:
        table.add_row(name, percent(found), baseline, *([how] if roomy else []))
    return table


@contextlib.contextmanager
def own_signals() -> Iterator[None]:
    """A run takes SIGTERM and SIGINT over, to save before it stops; what comes after it has
    nothing to save and stops at once again."""
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


class PhaseClock:
    """Seconds by phase, kept in a file so that an interrupted demo adds up."""

    def __init__(
        self,
        path: Path,
        planned: Collection[str] = (),
        log: Callable[[str], None] = lambda text: None,
    ) -> None:
        """
        Args:
            planned: phases of this command.
            log: is told what begins and what of the plan is still to come.
        """
        self._path, self._planned, self._log = path, planned, log
        self.seconds: dict[str, float] = {}
        if path.is_file():
            self.seconds = {str(k): float(v) for k, v in json.loads(path.read_text()).items()}

    def in_words(self) -> dict[str, float]:
        """The same with the names a person reads."""
        return {words: self.seconds[name] for name, words in PHASES.items() if name in self.seconds}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time inside to the phase, one of PHASES, also when it ends by an error."""
        order = list(PHASES)
        later = [
            words
            for other, words in PHASES.items()
            if other in self._planned and order.index(other) > order.index(name)
        ]
        self._log(f"--- {PHASES[name]}" + (f"   (then: {'; '.join(later)})" if later else ""))
        began = time.monotonic()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - began
            write_atomic(self._path, json.dumps(self.seconds, indent=1).encode() + b"\n")


def evaluation_steps(steps: int) -> int:
    """Steps between evaluations: at most EVALUATIONS of them, the last one after the last step."""
    first = max(1, -(-steps // EVALUATIONS))
    return next((n for n in range(first, steps + 1) if steps % n == 0), 1)


def prepare(out: Path, count: int, seed: int, demo: RunFolder) -> None:
    """Draw the scenes, unless they are there.

    Raises:
        ConfigError: the scenes that are there are others.
    """
    wanted = {"world": WORLD_VERSION, "seed": seed, "count": count, "size": SIDE}
    if not (out / "dataset.json").is_file():
        demo.log(f"drawing {count} scenes for each stream, {TASK_SCENES * count} for the tasks")
        prepare_scenes(out, count, seed)
        demo.log(f"scenes and text tokenizer in {out}")
        return
    facts = Dataset.open(out).facts
    differ = [
        f"{name} was {facts.get(name)!r} and is {value!r}"
        for name, value in wanted.items()
        if facts.get(name) != value
    ]
    if differ:
        raise ConfigError(
            f"{out} holds the scenes of another demo: {'; '.join(differ)}. Give the same "
            "settings, or another --run-dir"
        )
    demo.log(f"scenes are there: {out}")


def train_tokenizers(config: PretrainConfig, demo: RunFolder) -> None:
    """What `pretrain` would do first; done here so that its time is shown by itself."""
    paths = find_tokenizers(config, None)
    if paths.missing():
        world = init_world(config.device, config.runtime.step_timeout)
        set_threads(config.runtime.threads, world.local_size)
        train_missing_tokenizers(
            config, paths, open_streams(config, "train"), world.device, demo.log
        )


def metrics_of(
    evaluation: Mapping[str, Any],
    results: Sequence[TaskResult],
    evals: list[dict[str, Any]],
    config: PretrainConfig,
    seconds: Mapping[str, float],
    env: Mapping[str, Any],
) -> dict[str, Any]:
    """metrics.json: shares in [0, 1], losses in nats, times in seconds.

    `mvlm_word_accuracy` is the headline figure over hidden attribute words; `blind` is with
    another picture, `prior` the share of the most frequent word of the same kind. `tasks` holds
    an entry for each task, see `task_metrics`.
    """
    attributes, mim = evaluation["attributes"], evaluation["objectives"]["mim"]

    def flat(row: Mapping[str, Any]) -> dict[str, Any]:
        conditions = [name for name in ("sighted", "blind", "no_image") if name in row]
        return {
            **{name: row[name]["value"] for name in conditions},
            "prior": row["prior"],
            "count": row["count"],
            "intervals": {
                name: [row[name]["low"], row[name]["high"]]
                for name in (*conditions, "sighted_minus_blind")
            },
        }

    def losses(row: Mapping[str, Any]) -> dict[str, float]:
        return {name: found["loss"] for name, found in row["objectives"].items()}

    return {
        "pretrain": {
            "mvlm_word_accuracy": {**flat(attributes), "kinds_counted": attributes["headline"]},
            "mvlm_word_accuracy_by_kind": {k: flat(r) for k, r in attributes["kinds"].items()},
            "mim_accuracy": mim["accuracy"]["value"],
            "mim_accuracy_interval": [mim["accuracy"]["low"], mim["accuracy"]["high"]],
            "mim_top_code_share": mim["top_share"],
            "held_out_loss": {"start": losses(evals[0]), "end": losses(evals[-1])},
            "steps": evaluation["step"],
            "samples": evaluation["samples"],
        },
        "tasks": dict(task_metrics(result.evaluation) for result in results),
        "seconds": {**seconds, "together": sum(seconds.values())},
        "config_digest": digest(config),
        "versions": {"vlbeit": __version__, **{k: v for k, v in env["versions"].items() if v}},
        "device": env["device"],
    }
