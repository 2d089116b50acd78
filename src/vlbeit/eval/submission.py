"""The answers of a fine-tuned run to a test set, as the file that its server takes."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from vlbeit.data.records import BadSample
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.eval.downstream import Row, TaskRun, held_out_stream, predict_rows
from vlbeit.eval.heldout import visits_of
from vlbeit.tasks import Submitting


def write_submission(
    run: TaskRun, data: Sequence[str], file: Path, *, split: str, batch_size: int = 64
) -> dict[str, Any]:
    """Answers every question of the split once and writes the file; nothing partial is left.

    Args:
        data: prepared folders; empty: those the run was trained on.

    Returns:
        {"checkpoint", "step", "task", "split", "data", "samples", "submission"}

    Raises:
        ConfigError: the task knows no submission.
        InputError: no such split, samples that cannot be submitted, or one that cannot be made.
        SaveError: the file cannot be written.
    """
    if not hasattr(run.task, "for_submission"):
        raise ConfigError(f"--submission: the task {run.config.task} has no file for a test server")
    if not file.parent.is_dir():
        raise SaveError(f"{file}: there is no folder {file.parent}")
    config = replace(run.config, data=tuple(data) or run.config.data)
    task = cast(Submitting, run.task).for_submission()
    stream = held_out_stream(config, task, run.text, split)
    visits = visits_of(stream, 0)
    bad: list[BadSample] = []
    known: list[Row] = []
    for visit in visits:  # first: what cannot be submitted shows before the hours of predicting
        try:
            known.append(stream.about(visit))
        except BadSample as error:
            bad.append(error)
    cast(Submitting, task).check_submission(known)
    rows: list[Row] = []
    if not bad:
        rows = predict_rows(
            task, run.model, run.head, stream, visits, size=batch_size, device=run.device, bad=bad
        )
    if bad:
        raise InputError(
            f"{len(bad)} of {len(visits)} samples ({split}) cannot be read, and a submission "
            f"answers all; the first: {bad[0]}. Prepare them again from whole files"
        )
    text = cast(Submitting, task).submission(rows)
    part = file.with_name(f".{file.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, file)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise SaveError(f"{file}: cannot be written ({error.strerror})") from error
    return {
        "checkpoint": str(run.folder),
        "step": run.step,
        "task": config.task,
        "split": split,
        "data": list(config.data),
        "samples": len(rows),
        "submission": str(file),
    }
