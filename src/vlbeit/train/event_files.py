"""Event files for TensorBoard: the numbers of metrics.jsonl and eval.jsonl as curves.

    tensorboard --logdir runs          compares all runs below it

A tag is `train/` or `held_out/`, then the row's own names: train/mim/loss, held_out/figures/top1.
The rows in JSON stay the record of a run: resume, report and model card read those alone.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vlbeit.errors import ConfigError, SaveError

FOLDER = "tensorboard"
"""Of the event files, in the run folder."""


class EventFiles:
    """The event files of one run, open for writing.

    A resume adds a file, and says in it that what earlier ones hold from `step` on is void.
    """

    def __init__(self, run_dir: Path, step: int) -> None:
        """
        Args:
            step: the first one that is to be written.

        Raises:
            ConfigError: the tensorboard package is not installed.
            SaveError: the folder cannot be written.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"log.tensorboard needs {error.name}, which is not installed; run: pip install "
                "'vlbeit[train]', or leave the setting off"
            ) from None
        self.path = run_dir / FOLDER
        with self._saving():
            self._writer = SummaryWriter(str(self.path), purge_step=step)

    def add(self, group: str, row: Mapping[str, Any]) -> None:
        """The row's numbers under `group`; its `step` says where.

        Raises:
            SaveError: the disk is full or the file cannot be written.
        """
        with self._saving():
            for tag, value in scalars(row):
                self._writer.add_scalar(f"{group}/{tag}", value, row["step"])

    def sync(self) -> None:
        """Hands what was added to the operating system.

        Raises:
            SaveError: the disk is full or the file cannot be written.
        """
        with self._saving():
            self._writer.flush()

    def close(self) -> None:
        """Closes the file. What cannot be written any more is left out: `sync` was the place to
        complain, and the rows in JSON have it."""
        with contextlib.suppress(OSError):
            self._writer.close()

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SaveError(
                f"{self.path}: cannot be written ({error.strerror or error}). The checkpoints are "
                "untouched; make room and run the same command again, or leave log.tensorboard off"
            ) from error


def scalars(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in a row, `step` and `objectives/` left out of the names.

    >>> list(scalars({"step": 7, "loss": (0.5).hex(), "objectives": {"mim": {"count": 3}}}))
    [('loss', 0.5), ('mim/count', 3.0)]
    """
    for name, value in row.items():
        if name == "step":
            continue
        if isinstance(value, Mapping):
            yield from scalars(value, prefix if name == "objectives" else f"{prefix}{name}/")
        elif name == "loss" and isinstance(value, str):  # hexadecimal in metrics.jsonl
            yield prefix + name, float.fromhex(value)
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield prefix + name, float(value)
