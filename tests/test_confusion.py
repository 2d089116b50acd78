"""Confusion matrices: every sample once, its class the row, what was said the column."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tiny_tasks import CONFIGS
from toy_run import training_here
from toy_tasks import TOYS, VAL, toy_finetune, write_start, write_tasks
from vlbeit.cli import main
from vlbeit.errors import ConfigError, SaveError
from vlbeit.eval.confusion import MOST_CLASSES, confusion_of
from vlbeit.tasks import Task, build_task


def named(count: int) -> Task:
    facts = {"classes": [f"class {n}" for n in range(count)], "most_frequent": 0}
    return build_task(TOYS["classification"], facts)


def test_rows_are_the_classes_and_columns_what_was_said() -> None:
    rows: list[dict[str, Any]] = [
        {"label": 0, "top": [0, 1, 2]},
        {"label": 0, "top": [2, 0, 1]},
        {"label": 1, "top": [1, 0, 2]},
        {"label": 0, "top": [2, 1, 0]},
    ]
    found = confusion_of(named(3), rows)
    assert found == {
        "classes": ["class 0", "class 1", "class 2"],
        "counts": [[1, 0, 2], [0, 1, 0], [0, 0, 0]],
    }
    entailment = build_task(CONFIGS["entailment"], {"most_frequent": 0})
    found = confusion_of(entailment, [{"label": 2, "answer": 1}])
    assert found is not None and found["classes"][2] == "contradiction"
    assert np.argwhere(np.array(found["counts"])).tolist() == [[2, 1]]


def test_tasks_without_classes_and_too_many_classes_have_none() -> None:
    assert (
        confusion_of(build_task(CONFIGS["statements"], {"prior": {}, "most_frequent": False}), [])
        is None
    )
    assert confusion_of(named(MOST_CLASSES + 1), []) is None
    assert confusion_of(named(MOST_CLASSES), []) is not None


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with runs: start, vqa, classification."""
    folder = tmp_path_factory.mktemp("runs")
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        data = write_tasks(folder / "data")
        start = write_start(folder / "start", data)
        for task in ("vqa", "classification"):
            toy_finetune(task, start, data, folder / task, {"max_steps": 1, "save_every": 1})
    yield folder


def test_the_command_draws_it_and_prints_its_counts(runs, tmp_path, capsys) -> None:
    drawn = tmp_path / "matrix.png"
    words = ["eval", str(runs / "classification"), "--json", "--confusion"]
    assert main([*words, str(drawn)]) == 0
    found = json.loads(capsys.readouterr().out)
    counts = np.array(found["confusion"]["counts"])
    assert counts.shape == (4, 4) and counts.sum() == VAL
    top1 = found["figures"]["top1"]["value"]
    assert counts.trace() / VAL == pytest.approx(top1)
    with Image.open(drawn) as sheet:
        assert sheet.format == "PNG" and sheet.width >= 380
    assert main([*words, str(tmp_path / "no" / "matrix.png")]) == SaveError.exit_code
    assert "matrix.png: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("run", "more", "message"),
    [
        ("vqa", [], r"vqa of .* has no classes"),
        ("start", [], "not fine-tuned for a task"),
        ("classification", ["--neighbours", "3"], "does not go with"),
    ],
)
def test_where_there_is_none_it_is_refused_before_the_evaluation(
    run, more, message, runs, tmp_path, capsys
) -> None:
    words = ["eval", str(runs / run), "--confusion", str(tmp_path / "m.png"), *more]
    assert main(words) == ConfigError.exit_code
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "m.png").exists()
