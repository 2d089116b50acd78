"""`vlbeit eval RUN --submission FILE`: the official results file of VQA v2."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tiny_run import SHADES, grey_png
from toy_run import training_here
from toy_tasks import questions_of, shade_of, toy_finetune, write_start, write_tasks
from vlbeit.cli import main
from vlbeit.data.dataset import Dataset, SourceInfo
from vlbeit.data.records import write_shards

FIRST, COUNT = 100, 9
Ask = Callable[[int, dict[str, Any]], dict[str, Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of the VQA task on shades of grey."""
    folder = tmp_path_factory.mktemp("runs")
    with training_here(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        data = write_tasks(folder / "shades")
        start = write_start(folder / "start", data)
        yield toy_finetune("vqa", start, data, folder / "vqa", {"max_steps": 24, "save_every": 24})


def number_them(place: int, question: dict[str, Any]) -> dict[str, Any]:
    """From high to low, so that the file's order is its own."""
    return {"question": question["question"], "question_id": 900 - place}


def with_answers(place: int, question: dict[str, Any]) -> dict[str, Any]:
    ten = [question["answer"]] * 7 + ["the RED", "red", "blue"]
    answer_type = {"answer_type": "other", "question_type": question["kind"]}
    known = {"answer": question["answer"], "answers": ten, **answer_type}
    return number_them(place, question) | known


def write_test(folder: Path, ask: Ask, pictures: Mapping[int, bytes] = {}) -> Path:
    """A folder with a test split, two questions a picture, each passed through `ask`."""

    def rows() -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in range(FIRST, FIRST + COUNT):
            asked = [ask(2 * (i - FIRST) + n, q) for n, q in enumerate(questions_of(i))]
            picture = pictures.get(i, grey_png(SHADES[shade_of(i)]))
            yield f"{i}", {"png": picture, "json": json.dumps({"questions": asked}).encode()}

    shards = [str(path) for path in write_shards(rows(), folder, "test", 4)]
    Dataset.write(folder, "shades", [SourceInfo("vqa", "task:vqa", "test", shards, COUNT)], {})
    return folder


def submit(run: Path, data: Path, out: Path, *words: str) -> int:
    given = ["--data", str(data), "--split", "test", "--submission", str(out), "--device", "cpu"]
    return main(["eval", str(run), *given, *words])


def test_every_question_is_answered_once_whatever_the_batch_size(run, tmp_path, capsys):
    data = write_test(tmp_path / "test", number_them)
    for size in ("1", "7"):
        assert submit(run, data, tmp_path / f"{size}.json", "--batch", size) == 0
    assert "18 answers (test) in" in capsys.readouterr().out
    found = json.loads((tmp_path / "1.json").read_text())
    assert [row["question_id"] for row in found] == list(range(883, 901))
    assert all(set(row) == {"question_id", "answer"} for row in found)
    assert {row["answer"] for row in found} <= {"red", "green", "blue", "white"}
    assert len({row["answer"] for row in found}) > 1
    assert (tmp_path / "7.json").read_text() == (tmp_path / "1.json").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "7.json", "test"]


def test_a_server_that_scores_the_file_finds_what_eval_finds(run, tmp_path, capsys):
    """Two ways: the file against the answers by the rule's description, and `vlbeit eval`."""
    data = write_test(tmp_path / "test", with_answers)
    assert submit(run, data, tmp_path / "file.json", "--json") == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--data", str(data), "--split", "test", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    said = {
        row["question_id"]: row["answer"]
        for row in json.loads((tmp_path / "file.json").read_text())
    }
    scores = []
    for place in range(2 * COUNT):
        question = questions_of(FIRST + place // 2)[place % 2]
        ten = [question["answer"]] * 7 + ["red", "red", "blue"]
        matches = [sum(a == said[900 - place] for a in ten[:i] + ten[i + 1 :]) for i in range(10)]
        scores.append(sum(min(1.0, m / 3) for m in matches) / 10)
    assert figures["accuracy"]["value"] == pytest.approx(sum(scores) / len(scores))
    assert set(figures) == {"accuracy", "answer_type/other"} | {
        f"question_type/{kind}" for kind in ("look", "read")
    }


def test_without_answers_eval_points_to_the_submission(run, tmp_path, capsys):
    data = write_test(tmp_path / "test", number_them)
    assert main(["eval", str(run), "--data", str(data), "--split", "test"]) == 66
    assert "no_answer" in (said := capsys.readouterr().err) and "--submission FILE" in said


@pytest.mark.parametrize(
    ("ask", "named"),
    [
        (lambda p, q: {"question": q["question"]}, "has no question_id that is an integer"),
        (lambda p, q: {**number_them(p, q), "question_id": "17"}, "found '17'"),
        (lambda p, q: {**number_them(p, q), "question_id": p // 2}, "question_id 0 is that of"),
        (lambda p, q: {"question_id": p}, "9 of 9 samples (test) cannot be read"),
    ],
    ids=["none", "no integer", "twice", "no question"],
)
def test_questions_that_cannot_be_submitted_are_refused(ask, named, run, tmp_path, capsys):
    data = write_test(tmp_path / "test", ask)
    assert submit(run, data, tmp_path / "file.json") == 66
    assert named in capsys.readouterr().err
    assert not (tmp_path / "file.json").exists()


def test_a_picture_that_cannot_be_read_leaves_no_file(run, tmp_path, capsys):
    data = write_test(tmp_path / "test", number_them, {FIRST + 3: b"<html>"})
    assert submit(run, data, tmp_path / "file.json") == 66
    said = capsys.readouterr().err
    assert "2 of 18 samples" in said and "not_an_image" in said and "103" in said
    assert [path.name for path in tmp_path.iterdir()] == ["test"]


def test_what_a_submission_does_not_go_with_is_refused(run, tmp_path, capsys):
    data = write_test(tmp_path / "test", number_them)
    assert submit(run, data, tmp_path / "a.json", "--samples", "3") == 78
    assert submit(run.parent / "start", data, tmp_path / "a.json") == 78
    assert "not fine-tuned" in capsys.readouterr().err
    assert submit(run, data, tmp_path / "nowhere" / "a.json") == 73
    assert not (tmp_path / "a.json").exists()
