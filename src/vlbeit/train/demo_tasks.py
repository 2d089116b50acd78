"""The demo's downstream tasks: which there are, fine-tuning one, its figures for metrics.json.

    tasks/vqa/          a run folder of `vlbeit finetune vqa`, started from the demo's pretraining

Pretraining that went on after a task makes that task's figures old: its folder is then set aside
(tasks/vqa-from-step-0000600) and the task is trained again.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlbeit.checkpoint import Checkpoint, load_newest
from vlbeit.config import FinetuneConfig, PretrainConfig
from vlbeit.errors import ConfigError
from vlbeit.eval.downstream import TaskRun, evaluate_task
from vlbeit.eval.report_tasks import TaskResult, headline_rows
from vlbeit.recipes import FINETUNE
from vlbeit.serve.predictor import load
from vlbeit.serve.task_examples import task_examples
from vlbeit.train.finetune import finetune

Log = Callable[[str], None]

DRAWN_TASKS: dict[str, str] = {
    "vqa": "questions (VQA)",
    "retrieval": "retrieval",
    "statements": "statements about two scenes (NLVR2)",
    "classification": "classification",
    "segmentation": "segmentation",
}
"""The tasks that the drawn world has records for, in words, in the order of the demo."""
DEFAULT_TASKS = ("vqa", "retrieval")
METRICS_NAMES = {"statements": "nlvr2"}
"""Names in metrics.json, where they differ from that of the task."""
EXAMPLES = {"retrieval": 4}
"""Held-out samples on the page, where there are not so many as of the others."""
MOST_EXAMPLES = 6


def parse_tasks(words: str) -> tuple[str, ...]:
    """`--tasks`: names with commas between them, or "none"; returned in the order of the demo.

    Raises:
        ConfigError: a name that is no task of the drawn world, or "none" beside others.
    """
    names = [word.strip() for word in words.split(",")]
    if names == ["none"]:
        return ()
    for name in names:
        if name not in DRAWN_TASKS:
            near = difflib.get_close_matches(name, DRAWN_TASKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(
                f"--tasks {words}: {name!r} is no task of the drawn world{hint} (give some of "
                f"{','.join(DRAWN_TASKS)}, or none alone)"
            )
    return tuple(name for name in DRAWN_TASKS if name in names)


def task_configs(names: Sequence[str], most_steps: int | None = None) -> list[FinetuneConfig]:
    """The recipes of the named tasks.

    Args:
        most_steps: stop each of them earlier.
    """
    found = []
    for name in names:
        config = FINETUNE[name]["tiny"]()
        steps = config.max_steps if most_steps is None else min(config.max_steps, most_steps)
        found.append(replace(config, max_steps=steps))
    return found


def in_demo(config: FinetuneConfig, folder: Path, pretraining: PretrainConfig) -> FinetuneConfig:
    """A task's recipe as a part of the demo in `folder`: its start, data, seed and machine."""
    return replace(
        config,
        run_dir=str(folder / "tasks" / config.task),
        start=str(folder / "pretrain"),
        data=(str(folder / "scenes"),),
        seed=pretraining.seed,
        device=pretraining.device,
        precision=pretraining.precision,
        runtime=pretraining.runtime,
    )


def train_task(config: FinetuneConfig, begin: Checkpoint, log: Log) -> None:
    """Fine-tune, go on, or find it done.

    Args:
        config: as `in_demo` returns it.
        begin: the newest checkpoint of the demo's pretraining.

    Raises:
        VLBeitError: whatever ends a run early; see `finetune`.
    """
    run_dir = Path(config.run_dir)
    newest = load_newest(run_dir, log)
    start = str(begin.folder)
    if newest is not None:
        if starts_from(newest, begin):
            start = newest.config["start"]  # a demo that was moved since is still the same one
        else:
            aside = free_name(run_dir, Path(newest.config["start"]).name)
            run_dir.rename(aside)
            log(
                f"{run_dir} started from {Path(newest.config['start']).name} of pretraining, which "
                f"is at {begin.folder.name} now: kept as {aside}, trained again"
            )
    finetune(replace(config, start=start))


def starts_from(run: Checkpoint, begin: Checkpoint) -> bool:
    """Whether a task's run started from this checkpoint of the demo."""
    return Path(run.config["start"]).name == begin.folder.name


def free_name(run_dir: Path, start: str) -> Path:
    """A folder beside `run_dir` that says where it started and is not there yet."""
    number, path = 1, run_dir.with_name(f"{run_dir.name}-from-{start}")
    while path.exists():
        number += 1
        path = run_dir.with_name(f"{run_dir.name}-from-{start}-{number}")
    return path


def finished_tasks(folder: Path, begin: Checkpoint, log: Log) -> list[str]:
    """Tasks of an earlier command that are done and started from this checkpoint."""
    found = []
    for name in DRAWN_TASKS:
        run = load_newest(folder / "tasks" / name, log)
        if run is not None and starts_from(run, begin) and run.step >= run.config["max_steps"]:
            found.append(name)
    return found


def measure_task(run_dir: Path, device: str, log: Log) -> TaskResult:
    """Held-out figures and examples of a task's run."""
    run = load(run_dir, device, log)
    assert isinstance(run.run, TaskRun)
    data = [str(run_dir.parent.parent / "scenes")]  # where they are, if the demo was moved
    return TaskResult(
        evaluation=evaluate_task(run.run, data),
        examples=task_examples(run, EXAMPLES.get(run.trained_for, MOST_EXAMPLES), data),
    )


def task_metrics(evaluation: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The name of a task in metrics.json and its entry; shares in [0, 1].

    tr_r1 is text retrieval (which text belongs to this image), ir_r1 image retrieval. `baseline` is
    what is reached without looking; of retrieval chance, the same both ways, because a scene has
    one caption. `figures` are those of `vlbeit eval`.
    """
    rows = headline_rows(evaluation)
    first = rows[0].found
    intervals = {
        "baseline": first["baseline"],
        **{line.metric: found for line, found in rows},
        **{f"{line.metric}_minus_baseline": found["gain"] for line, found in rows},
    }
    return METRICS_NAMES.get(evaluation["task"], evaluation["task"]), {
        **{line.metric: found["value"] for line, found in rows},
        "baseline": first["baseline"]["value"],
        "count": first["samples"],
        "intervals": {name: [one["low"], one["high"]] for name, one in intervals.items()},
        "steps": evaluation["step"],
        "figures": evaluation["figures"],
    }
