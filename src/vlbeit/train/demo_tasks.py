"""The demo's downstream tasks: which there are, fine-tuning one, its figures for metrics.json.

    tasks/vqa/          a run folder of `vlbeit finetune vqa`, started from the demo's pretraining
    tasks/statements/   the same, started from tasks/vqa (GOES_ON_FROM)

Pretraining that went on after a task makes that task's figures old: its folder is then set aside
(tasks/vqa-from-step-0000600) with those of the tasks that go on from it, and all are trained again.
"""

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from vlbeit.checkpoint import Checkpoint, find_checkpoint, load_newest
from vlbeit.config import FinetuneConfig, PretrainConfig
from vlbeit.errors import ConfigError
from vlbeit.eval.downstream import TaskRun, evaluate_task
from vlbeit.eval.report_tasks import TaskResult, headline_rows
from vlbeit.recipes import FINETUNE
from vlbeit.serve.predictor import load
from vlbeit.serve.served_runs import PRETRAIN_FOLDER, SCENES_FOLDER, TASKS_FOLDER
from vlbeit.serve.task_examples import task_examples
from vlbeit.train.finetune import finetune

Log = Callable[[str], None]

DRAWN_TASKS: dict[str, str] = {
    "vqa": "questions (VQA)",
    "retrieval": "retrieval",
    "statements": "statements about two scenes (NLVR2), after VQA",
    "classification": "classification",
    "segmentation": "segmentation",
}
"""The tasks that the drawn world has records for, in words, in the order of the demo."""
DEFAULT_TASKS = ("vqa", "retrieval")
GOES_ON_FROM = {"statements": "vqa"}
"""Tasks that start from another one's run. Statements ask of two pictures what VQA asks of one,
whether something is there; from pretraining, 64 % were right after 1,200 steps ("more figures"
100 %, the other kinds at chance; docs/notebook.md)."""
METRICS_NAMES = {"statements": "nlvr2"}
"""Names in metrics.json, where they differ from that of the task."""
EXAMPLES = {"retrieval": 4}
"""Held-out samples on the page, where there are not so many as of the others."""
MOST_EXAMPLES = 6


def parse_tasks(words: str) -> tuple[str, ...]:
    """`--tasks`: names with commas between them, or "none"; returned in the order of the demo, with
    those that they go on from.

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
    names += [GOES_ON_FROM[name] for name in names if name in GOES_ON_FROM]
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
        run_dir=str(folder / TASKS_FOLDER / config.task),
        start=str(folder / PRETRAIN_FOLDER),
        data=(str(folder / SCENES_FOLDER),),
        seed=pretraining.seed,
        device=pretraining.device,
        precision=pretraining.precision,
        runtime=pretraining.runtime,
    )


def train_task(config: FinetuneConfig, begin: Checkpoint, log: Log) -> None:
    """Fine-tune, go on, or find it done.

    Args:
        config: as `in_demo` returns it.
        begin: where it starts (`start_of`).

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
            # Those that go on from it first: stopped in between, they would seem to be up to date.
            after = [
                run_dir.with_name(name) for name, on in GOES_ON_FROM.items() if on == config.task
            ]
            for old in (*filter(Path.exists, after), run_dir):
                aside = free_name(old, Path(newest.config["start"]).name)
                old.rename(aside)
                log(
                    f"{run_dir} started from {of_demo(newest.config['start'])}, and the demo is at "
                    f"{of_demo(begin.folder)} now: {old} is kept as {aside}"
                )
    finetune(replace(config, start=start))


def start_of(task: str, folder: Path, log: Log) -> Checkpoint:
    """The newest checkpoint of the run in this demo that a task starts from.

    Raises:
        InputError: there is none yet.
    """
    on = GOES_ON_FROM.get(task)
    return find_checkpoint(folder / TASKS_FOLDER / on if on else folder / PRETRAIN_FOLDER, log)


def starts_from(run: Checkpoint, begin: Checkpoint) -> bool:
    """Whether a task's run started from this checkpoint of the demo, wherever the demo lies."""
    return of_demo(run.config["start"]) == of_demo(begin.folder)


def of_demo(checkpoint: str | Path) -> str:
    """A checkpoint without the folder of its demo: pretrain/checkpoints/step-0002200."""
    return "/".join(Path(checkpoint).parts[-3:])


def free_name(run_dir: Path, start: str) -> Path:
    """A folder beside `run_dir` that says where it started and is not there yet."""
    number, path = 1, run_dir.with_name(f"{run_dir.name}-from-{start}")
    while path.exists():
        number += 1
        path = run_dir.with_name(f"{run_dir.name}-from-{start}-{number}")
    return path


def finished_tasks(folder: Path, log: Log) -> list[str]:
    """Tasks of an earlier command that are done and started from where the demo is now."""
    found: list[str] = []
    for name in DRAWN_TASKS:
        run = load_newest(folder / TASKS_FOLDER / name, log)
        if (
            run is not None
            and GOES_ON_FROM.get(name, name) in (*found, name)
            and run.step >= run.config["max_steps"]
            and starts_from(run, start_of(name, folder, log))
        ):
            found.append(name)
    return found


def measure_task(run_dir: Path, device: str, log: Log) -> TaskResult:
    """Held-out figures and examples of a task's run."""
    run = load(run_dir, device, log)
    assert isinstance(run.run, TaskRun)
    data = [str(run_dir.parent.parent / SCENES_FOLDER)]  # where they are, if the demo was moved
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
