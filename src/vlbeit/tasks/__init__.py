"""Downstream tasks: one file a task, and this page, which says what such a file holds.

To add a task NAME:

1. `config.py`: a settings class, a `FinetuneConfig` subclass with `task: Literal["NAME"]` and one
   field of settings called NAME, and its line in FINETUNE_CONFIGS.
2. `tasks/NAME.py`: a class that satisfies `Task`, two functions and a tuple,

       learn_facts(config, sources) -> dict        what the training data fixes: names of classes,
                                                   the answer list, a prior. Plain JSON. Saved as
                                                   task.json in every checkpoint, so that `eval`
                                                   needs nothing but the run folder and the data.
       build(config, facts) -> Task
       FACTS                                       the names in that dict: a run of an older release
                                                   that lacks one is refused by name.

   and its line in TASKS below.
3. `recipes.py`: entries in FINETUNE["NAME"] for tiny, small and base.

docs/tasks.md goes through it with a task that runs.

Loop, loader, resume, checkpoints, `vlbeit finetune NAME` and `vlbeit eval` then work. A task never
has a forward of its own: `score` and `predict` call `model.embed_image / embed_text / embed_pair`,
then `model.backbone.rows / taps / __call__`, then the head.
"""

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from torch import nn

from vlbeit.config import FinetuneConfig
from vlbeit.data.records import RecordSource
from vlbeit.data.task_stream import TaskData
from vlbeit.errors import InputError
from vlbeit.nn.model import VLBeit
from vlbeit.types import Modality, Score, TaskBatch

TASKS: dict[str, str] = {
    "classification": "vlbeit.tasks.classification",
    "vqa": "vlbeit.tasks.vqa",
    "retrieval": "vlbeit.tasks.retrieval",
    "statements": "vlbeit.tasks.statements",
    "entailment": "vlbeit.tasks.entailment",
    "segmentation": "vlbeit.tasks.segmentation",
}
"""The module of each task; imported when the task is used."""

Path = Literal["image", "text", "pair"]
"""A way through the backbone."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a task over S samples, as sums: the driver divides and resamples.

    The value is the mean over columns of sum(numerator) / sum(denominator); columns whose
    denominator is 0 are left out. One column: an ordinary share (accuracy, recall). One column a
    class: mean IoU.

    Shapes: numerator, denominator (S,) or (S, K); baseline: another numerator and denominator,
    of the guess that does not look at the picture, on the same samples.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    baseline: tuple[np.ndarray, np.ndarray] | None = None

    @staticmethod
    def share(right: Sequence[float], guess: Sequence[float] | None = None) -> "Figure":
        """The mean of numbers in [0, 1], one a sample."""
        ones = np.ones(len(right))
        baseline = None if guess is None else (np.asarray(guess, dtype=np.float64), ones)
        return Figure(
            numerator=np.asarray(right, dtype=np.float64), denominator=ones, baseline=baseline
        )


class Task(TaskData, Protocol):
    """A downstream task. Its data side is `TaskData`: stream, items, example, about."""

    @property
    def facts(self) -> dict[str, Any]:
        """What `build` was given: task.json."""

    @property
    def weights(self) -> Mapping[str, float]:
        """The names of the scores and their weights in the loss."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """The ways through the backbone, one for each forward pass of a sample. What none of them
        reaches is frozen; their number is that of `depth_draws`' passes."""

    def head(self, model: VLBeit, seed: int) -> nn.Module:
        """A fresh head for the model, the same for the same seed."""

    def frozen(self, name: str) -> bool:
        """Whether a parameter of the trunk does not learn, beside those no path reaches."""

    def count(self, batch: TaskBatch) -> dict[str, int]:
        """What `score` will count, by name; no forward pass."""

    def score(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> dict[str, Score]:
        """Sums of loss over the micro-batch, by name; never means."""

    def predict(self, model: VLBeit, head: nn.Module, batch: TaskBatch) -> list[dict[str, Any]]:
        """One row a sample, in the order of the batch; it must not depend on the others."""

    def figures(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
        """The task's figures from all rows: a row is `predict`'s with `about`'s and "sample_id".
        The most important one comes first. Rows come sorted by sample id."""


class Gathering(Protocol):
    """What a task may also have: a `score` that gathers from all processes (contrast). Each then
    needs as many micro-batches as the others, or they would wait for one another."""

    gathers: Literal[True]


class Matching(Protocol):
    """What a task may also have: a second look at chosen samples (retrieval's reranking)."""

    def second_look(
        self,
        model: VLBeit,
        head: nn.Module,
        rows: list[dict[str, Any]],
        batch_of: Callable[[Sequence[str]], TaskBatch],
    ) -> list[dict[str, Any]]:
        """New rows, before `figures` sees them. `batch_of` makes a micro-batch of sample ids.

        Not asked while training. What it took is in `costs`, by name, if the task has that."""


class Submitting(Protocol):
    """What a task may also have: a file for the server that holds the answers of a test set."""

    def for_submission(self) -> Task:
        """The same task, with samples that have no answer."""

    def check_submission(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise InputError when these rows (`about`'s) cannot be submitted."""

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> str:
        """The file's text from all rows (`predict`'s with `about`'s)."""


OUTPUT_FACTS = ("classes", "answers")
"""The facts that name a head's outputs, one each, in their order."""


def learn_facts(config: FinetuneConfig, sources: Sequence[RecordSource]) -> dict[str, Any]:
    """What the training data fixes for the task of `config`.

    Raises:
        InputError: the data does not say enough.
    """
    found: dict[str, Any] = importlib.import_module(TASKS[config.task]).learn_facts(config, sources)
    return found


def same_outputs(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether heads with these facts say the same: equal names of classes or answers, in their
    order. What else the data says (how frequent each is) may differ."""
    return all(one.get(name) == other.get(name) for name in OUTPUT_FACTS)


def build_task(
    config: FinetuneConfig, facts: Mapping[str, Any], origin: str = "the training data"
) -> Task:
    """The task of `config` with what its training data fixed.

    Args:
        origin: the folder or repository that the facts were read from, for the error.

    Raises:
        InputError: facts of a release that kept less of them.
    """
    module = importlib.import_module(TASKS[config.task])
    missing = [name for name in module.FACTS if name not in facts]
    if missing:
        raise InputError(
            f"{origin}: its facts of {config.task} have no {', '.join(missing)} (found "
            f"{', '.join(facts) or 'none'}): an older release wrote it. Train it again into "
            f"another --run-dir (`vlbeit finetune {config.task} --start {config.start}`), or use "
            "that release"
        )
    task: Task = module.build(config, dict(facts))
    return task


def reached(model: VLBeit, paths: Sequence[Path]) -> Iterator[str]:
    """Names of the trunk's parameters that some path may give a gradient."""
    for name, _ in model.named_parameters():
        if name.startswith("task.") or any(_reaches(model, path, name) for path in paths):
            yield name


def _reaches(model: VLBeit, path: Path, name: str) -> bool:
    if name == "image.masked_patch" or name.startswith("heads."):
        return False  # nothing is hidden in a task
    if name.startswith("image."):
        return path != "text"
    if name.startswith("text."):
        return path != "image"
    if ".experts." not in name:
        return True
    layer, expert = int(name.split(".")[2]), name.split(".experts.")[1].split(".")[0]
    fused = Modality.FUSED.value in model.backbone.blocks[layer].experts  # type: ignore[operator]
    if path == "image":
        return expert == Modality.IMAGE.value
    if path == "text":
        return expert == Modality.TEXT.value
    return (expert == Modality.FUSED.value) == fused
