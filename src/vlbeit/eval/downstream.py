"""Held-out figures of a downstream task: while it trains, and for `vlbeit eval`.

Every sample is predicted on its own picture and text in fp32, and the rows are sorted by sample
before anything is added up: batch size and order change nothing but rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from vlbeit.checkpoint import TASK_FILE, Checkpoint
from vlbeit.config import FinetuneConfig, finetune_config, from_dict
from vlbeit.data.order import Visit
from vlbeit.data.records import BadSample
from vlbeit.data.task_stream import TaskStream, open_task
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.bootstrap import BLOCK, RESAMPLES, Estimate, resample_counts
from vlbeit.eval.confusion import confusion_of
from vlbeit.eval.heldout import EVAL_SEED, batches_of, visits_of
from vlbeit.jsonfile import read_json
from vlbeit.nn.model import VLBeit
from vlbeit.tasks import Figure, Task, build_task
from vlbeit.tokens.text import TextTokenizer
from vlbeit.types import Score, TaskBatch

Row = dict[str, Any]


@dataclass(kw_only=True)
class TaskRun:
    """A fine-tuned checkpoint ready to be asked."""

    folder: Path
    step: int
    config: FinetuneConfig
    model: VLBeit
    head: nn.Module
    task: Task
    text: TextTokenizer
    device: torch.device


def load_task_run(
    checkpoint: Checkpoint, device: str = "auto", settings: Mapping[str, Any] = {}
) -> TaskRun:
    """The model, head and task of a checkpoint of `vlbeit finetune`.

    Args:
        settings: by full name ("segmentation.flip"), in place of the run's: those that the task
            says do not touch what was learned (its `eval_settings`).

    Raises:
        InputError: its tensors or task.json are missing or do not fit, or are of a release that
            kept less.
        ConfigError: a setting of another kind, or a value out of range.
    """
    facts = read_json(checkpoint.folder / TASK_FILE)
    config = finetune_config(checkpoint.config)
    task = build_task(config, facts, str(checkpoint.folder))
    if settings:
        config = with_settings(config, settings, getattr(task, "eval_settings", ()))
        task = build_task(config, facts)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = VLBeit(config.model, seed=None)
    head = task.head(model, config.seed)
    model.put_on(head)
    model.load_tensors(checkpoint.model_tensors(), str(checkpoint.folder))
    return TaskRun(
        folder=checkpoint.folder,
        step=checkpoint.step,
        config=config,
        model=model.to(device).eval(),
        head=head,
        task=task,
        text=TextTokenizer.load(checkpoint.text_tokenizer),
        device=torch.device(device),
    )


def with_settings(
    config: FinetuneConfig, settings: Mapping[str, Any], allowed: Sequence[str]
) -> FinetuneConfig:
    """The config with some of its task's own settings changed.

    Raises:
        ConfigError: one that is not allowed; names those that are.
    """
    known = [f"{config.task}.{name}" for name in allowed]
    for name in settings:
        if name not in known:
            raise ConfigError(
                f"--set {name}: evaluation of {config.task} may change "
                f"{', '.join(known) or 'no setting'}"
            )
    own = {name.split(".", 1)[1]: value for name, value in settings.items()}
    return from_dict(type(config), {config.task: own}, start=config)


def held_out_stream(
    config: FinetuneConfig, task: Task, text: TextTokenizer, split: str
) -> TaskStream:
    """The split's samples as evaluation sees them: whole pictures, nothing random.

    Raises:
        InputError: no such source.
    """
    sources = open_task(config.data, task.stream, split)
    plain = replace(config, seed=EVAL_SEED)
    return TaskStream(task, sources, text, plain, training=False, passes=len(task.paths))


def predict_rows(
    task: Task,
    model: VLBeit,
    head: nn.Module,
    stream: TaskStream,
    visits: list[Visit],
    *,
    size: int,
    device: torch.device,
    bad: list[BadSample],
    batches: list[TaskBatch] | None = None,
    again: bool = True,
) -> list[Row]:
    """The rows of all good samples, sorted by sample id.

    Args:
        bad: gets those that could not be made.
        batches: those of the visits, if they are at hand.
        again: whether a task that looks twice (`second_look`) does so.
    """
    by_id = {visit.sample_id: visit for visit in visits}
    rows: list[Row] = []
    with torch.no_grad():
        for batch in batches or batches_of(stream, visits, size, bad):
            found = task.predict(model, head, batch.to(device))
            for sample_id, row in zip(batch.sample_ids, found, strict=True):
                about = stream.about(by_id[sample_id])
                rows.append({"sample_id": sample_id, **about, **row})
        rows.sort(key=lambda row: str(row["sample_id"]))
        second_look: Callable[..., list[Row]] | None = getattr(task, "second_look", None)
        if again and second_look is not None:

            def batch_of(sample_ids: Sequence[str]) -> TaskBatch:
                samples = [stream.sample(by_id[name]) for name in sample_ids]
                return stream.batch(stream.stack(samples)).to(device)

            rows = second_look(model, head, rows, batch_of)
    return rows


class TaskHeldOut:
    """A task's figures on the same held-out samples each time, while it trains."""

    def __init__(self, config: FinetuneConfig, task: Task, text: TextTokenizer) -> None:
        self._config, self._task, self._text = config, task, text
        self._stream: TaskStream | None = None
        self._visits: list[Visit] = []
        self._batches: list[TaskBatch] = []

    def measure(self, model: VLBeit, device: torch.device) -> Mapping[str, Any]:
        """{"objectives": {name: {"loss", "count", "accuracy"}}, "figures": {name: value}}; empty
        when the data has no val split."""
        if self._stream is None:
            try:
                self._stream = held_out_stream(self._config, self._task, self._text, "val")
            except InputError:
                return {}
            self._visits = visits_of(self._stream, self._config.log.eval_samples)
            self._batches = list(batches_of(self._stream, self._visits, self._config.batch.micro))
        model.eval()
        head = model.task
        assert head is not None
        totals: dict[str, Score] = {}
        with torch.no_grad():
            for batch in self._batches:
                for name, score in self._task.score(model, head, batch.to(device)).items():
                    totals[name] = totals[name] + score if name in totals else score
        rows = predict_rows(
            self._task,
            model,
            head,
            self._stream,
            self._visits,
            size=self._config.batch.micro,
            device=device,
            bad=[],
            batches=self._batches,
            again=False,  # it costs many forward passes a sample
        )
        return {
            "objectives": {
                name: {
                    "loss": float(score.mean_loss()),
                    "count": int(score.count),
                    "accuracy": float(score.accuracy()),
                }
                for name, score in totals.items()
            },
            "figures": {
                name: value_of(figure.numerator, figure.denominator)
                for name, figure in self._task.figures(rows).items()
            },
        }


def evaluate_task(
    run: TaskRun,
    data: Sequence[str] = (),
    *,
    split: str = "val",
    samples: int = 0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Everything `vlbeit eval` prints of a fine-tuned run, as plain JSON.

    Args:
        data: prepared folders; empty: those the run was trained on.
        samples: most samples; 0: all.
        batch_size: changes nothing but speed.

    Returns:
        figures: by name value, low, high (95 %, whole records resampled), and where the task has
        one the baseline's and the gain over it, with a paired interval; costs: what a second
        look took, where the task has one (retrieval's reranking, in seconds); confusion: of
        classification and entailment, the samples by their class and the one that was said
        (`confusion_of`), for others None.

    Raises:
        InputError: nothing to evaluate on.
    """
    config = replace(run.config, data=tuple(data) or run.config.data)
    stream = held_out_stream(config, run.task, run.text, split)
    visits = visits_of(stream, samples)
    bad: list[BadSample] = []
    rows = predict_rows(
        run.task,
        run.model,
        run.head,
        stream,
        visits,
        size=batch_size,
        device=run.device,
        bad=bad,
    )
    if not rows:
        raise InputError(
            f"none of the {len(visits)} samples of {run.task.stream} ({split}) is usable, the "
            f"first: {bad[0]}; check the data with `vlbeit verify`"
        )
    return {
        "checkpoint": str(run.folder),
        "step": run.step,
        "task": config.task,
        "split": split,
        "data": list(config.data),
        "samples": len(rows),
        "skipped": [str(sample) for sample in bad],
        "costs": dict(getattr(run.task, "costs", {})),
        "figures": estimates(run.task.figures(rows), [str(row["record"]) for row in rows]),
        "confusion": confusion_of(run.task, rows),
    }


def value_of(numerator: np.ndarray, denominator: np.ndarray) -> float:
    """The mean over columns of the ratio of sums; columns without a denominator are left out."""
    tops, bottoms = (_columns(part).sum(axis=0)[None] for part in (numerator, denominator))
    return float(_means(tops, bottoms)[0])


def estimates(figures: Mapping[str, Figure], records: Sequence[str]) -> dict[str, Any]:
    """Values with 95 % percentile-bootstrap intervals; whole records are resampled, because
    questions about one picture are not independent.

    Args:
        records: the record of each sample.
    """
    names, place = np.unique(np.asarray(records), return_inverse=True)
    counts = resample_counts(len(names), RESAMPLES, len(names))
    found: dict[str, Any] = {}
    for name, figure in figures.items():
        own = _resampled(figure.numerator, figure.denominator, place, counts)
        row: dict[str, Any] = {
            **_estimate(own).to_dict(),
            "samples": int(np.any(_columns(figure.denominator) > 0, axis=1).sum()),
        }
        if figure.baseline is not None:
            guess = _resampled(*figure.baseline, place, counts)
            row["baseline"] = _estimate(guess).to_dict()
            row["gain"] = _estimate(own - guess).to_dict()
        found[name] = row
    return found


def _columns(values: np.ndarray) -> np.ndarray:
    """(S,) or (S, K) to (S, K) float64."""
    return np.asarray(values, dtype=np.float64).reshape(len(values), -1)


def _means(tops: np.ndarray, bottoms: np.ndarray) -> np.ndarray:
    """(R, K) both to (R,): the mean ratio of the columns that have a denominator; 0 if none."""
    there = bottoms > 0
    ratios = np.where(there, tops / np.where(there, bottoms, 1.0), 0.0)
    means: np.ndarray = ratios.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
    return means


def _resampled(
    numerator: np.ndarray, denominator: np.ndarray, place: np.ndarray, counts: np.ndarray
) -> np.ndarray:
    """(1 + resamples,): the value, then that of every resample of the records.

    Shapes: place (S,) the record of each sample, counts (resamples, records).
    """
    sums = []
    for values in (_columns(numerator), _columns(denominator)):
        by_record = np.zeros((counts.shape[1], values.shape[1]))
        np.add.at(by_record, place, values)
        blocks = [
            counts[i : i + BLOCK].astype(np.float64) @ by_record
            for i in range(0, len(counts), BLOCK)
        ]
        sums.append(np.concatenate([by_record.sum(axis=0)[None], *blocks]))
    return _means(*sums)


def _estimate(values: np.ndarray) -> Estimate:
    low, high = np.percentile(values[1:], (2.5, 97.5))
    return Estimate(value=float(values[0]), low=float(low), high=float(high))
