"""Event files hold what the rows hold, once a step, and never end a run in silence."""

import errno
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from toy_run import rows, training_here
from toy_tasks import toy_finetune, write_start, write_tasks
from vlbeit.checkpoint import list_checkpoints
from vlbeit.errors import ConfigError, SaveError
from vlbeit.train.event_files import FOLDER, EventFiles

ON = {"log.tensorboard": True, "log.eval_every": 2, "save_every": 4}


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture(scope="module")
def start(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    with training_here():
        return write_start(tmp_path_factory.mktemp("runs") / "start", data)


def curves(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value) as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run_dir / FOLDER), size_guidance={"scalars": 0})
    found.Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def expected(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Some of the tags, from the rows. Event files hold 32 bits of a number."""
    steps, evals = rows(run_dir), rows(run_dir, "eval.jsonl")

    def line(values: list[tuple[int, float]]) -> list[tuple[int, float]]:
        return [(step, float(np.float32(value))) for step, value in values]

    return {
        "train/loss": line([(r["step"], float.fromhex(r["loss"])) for r in steps]),
        "train/vqa/accuracy": line(
            [(r["step"], r["objectives"]["vqa"]["accuracy"]) for r in steps]
        ),
        "train/lr": line([(r["step"], r["lr"]) for r in steps]),
        "held_out/vqa/loss": line([(r["step"], r["objectives"]["vqa"]["loss"]) for r in evals]),
        "held_out/figures/accuracy": line([(r["step"], r["figures"]["accuracy"]) for r in evals]),
    }


def test_the_curves_are_the_rows(start, data, tmp_path):
    run = toy_finetune("vqa", start, data, tmp_path / "run", ON | {"max_steps": 4})
    found, wanted = curves(run), expected(run)
    assert [len(wanted[tag]) for tag in ("train/loss", "held_out/vqa/loss")] == [4, 3]
    assert {tag: found[tag] for tag in wanted} == wanted
    assert {"train/grad_norm", "train/samples_per_second", "train/memory_mb"} <= set(found)


@pytest.mark.parametrize("told", [True, False])
def test_steps_that_are_trained_again_stand_there_once(told, start, data, tmp_path, monkeypatch):
    """After a kill two steps behind the newest checkpoint. A writer that is not told where the run
    goes on leaves both versions of a step in the curve."""
    run = toy_finetune("vqa", start, data, tmp_path / "run", ON | {"max_steps": 6})
    shutil.rmtree(list_checkpoints(run)[-1][1])
    if not told:
        writer = EventFiles.__init__
        monkeypatch.setattr(EventFiles, "__init__", lambda self, at, step: writer(self, at, 10**6))
    toy_finetune("vqa", start, data, run, ON | {"max_steps": 8})
    found, wanted = curves(run), expected(run)
    assert [step for step, _ in wanted["train/loss"]] == list(range(1, 9))
    assert ({tag: found[tag] for tag in wanted} == wanted) is told


def test_without_the_package_the_setting_is_refused_with_what_to_install(
    start, data, tmp_path, monkeypatch
):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ConfigError, match=r"log\.tensorboard needs tensorboard.*vlbeit\[train\]"):
        toy_finetune("vqa", start, data, tmp_path / "run", ON | {"max_steps": 1})
    assert not list_checkpoints(tmp_path / "run")


def test_files_that_cannot_be_written_end_the_run_by_name(start, data, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FOLDER).write_text("in the way")
    with pytest.raises(SaveError, match=FOLDER):
        toy_finetune("vqa", start, data, tmp_path / "run", ON | {"max_steps": 1})

    from tensorboard.summary.writer.record_writer import RecordWriter

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    events = EventFiles(tmp_path / "full", 0)
    monkeypatch.setattr(RecordWriter, "write", full)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)  # its thread dies of it, too
    with pytest.raises(SaveError, match="No space left.*log.tensorboard off"):
        events.add("train", {"step": 1, "loss": 0.5})
        events.sync()
    events.close()  # says nothing more
