"""Which class is taken for which: a confusion matrix of a task that names one class a sample."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlbeit.tasks import Task, entailment
from vlbeit.tasks.classification import Classification
from vlbeit.tasks.entailment import Entailment

MOST_CLASSES = 200
"""With more, neither the picture nor the numbers can be read."""


def classes_of(task: Task) -> Sequence[str]:
    """The names of the classes that a task tells apart; none: it does something else."""
    if isinstance(task, Classification):
        return task.classes
    return entailment.CLASSES if isinstance(task, Entailment) else ()


def confusion_of(task: Task, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """{"classes": names, "counts": counts[i][j] samples of class i that were called j}.

    None where the task names no class, or more than MOST_CLASSES are there.

    Args:
        rows: as `figures` gets them.
    """
    names = classes_of(task)
    if not names or len(names) > MOST_CLASSES:
        return None
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for row in rows:
        said = row["top"][0] if isinstance(task, Classification) else row["answer"]
        counts[row["label"], said] += 1
    return {"classes": list(names), "counts": counts.tolist()}
