"""`vlbeit index` and `vlbeit search`: what is built once is found again, by its own model only."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from tiny_run import grey_png
from toy_tasks import VAL, write_tasks
from untrained_run import noise, png, retrieval, untrained
from vlbeit.cli import main
from vlbeit.data.dataset import Dataset, SourceInfo, open_sources
from vlbeit.data.records import write_shards
from vlbeit.errors import ConfigError, InputError, SaveError
from vlbeit.serve.gallery import open_gallery
from vlbeit.serve.predictor import Predictor, read_picture
from vlbeit.serve.search import build
from vlbeit.tasks.retrieval_index import Index


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data") / "shades")


@pytest.fixture
def run(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """What the commands load, whatever they are told to; the working folder is tmp_path."""
    made = retrieval(data)
    made.run.folder = tmp_path / "checkpoint"
    made.run.folder.mkdir()
    monkeypatch.setattr("vlbeit.serve.search.load", lambda *_: made)
    monkeypatch.chdir(tmp_path)
    return made


def write_photos(folder: Path, count: int) -> list[str]:
    (folder / "sub").mkdir(parents=True)
    names = [f"{'sub/' if i % 2 else ''}p{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png(noise(i)))
    return names


def test_a_folder_is_indexed_once_and_searched_like_its_pictures_in_python(run, capsys):
    names = write_photos(Path("photos"), 40)  # more than one forward pass takes
    (Path("photos") / "bad.jpg").write_bytes(b"<html>")
    (Path("photos") / "notes.txt").write_text("no picture")
    assert main(["index", "RUN", "--images", "photos", "--out", "made"]) == 0
    told = capsys.readouterr().out
    assert "40 images in" in told and "1 left out, the first: " in told and "bad.jpg" in told
    made = Index.load("made")
    assert sorted(made.ids) == sorted(names) and made.model == run.digest
    assert main(["search", "made", "--text", "say red", "--top", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    pictures = [noise(i) for i in range(40)]
    expected = run.search(run.index(images=pictures, ids=names), text="say red", top=3)
    assert [row["id"] for row in found["found"]] == [one.id for one in expected]
    assert [row["similarity"] for row in found["found"]] == pytest.approx(
        [one.similarity for one in expected], abs=1e-5
    )
    assert found["entries"] == 40 and "rerank_pairs" not in found["costs"]


def test_reranking_says_what_it_cost_and_leaves_the_rest_behind(run, capsys):
    names = write_photos(Path("photos"), 8)
    assert main(["index", "RUN", "--images", "photos", "--out", "made"]) == 0
    words = ["search", "made", "--text", "say red", "--top", "6", "--rerank", "4"]
    assert main([*words, "--json", "--out", "found.png"]) == 0
    found = json.loads(capsys.readouterr().out.split("MB\n", 1)[1])
    assert found["costs"]["rerank_pairs"] == 4 and found["costs"]["rerank_seconds"] > 0
    rows = found["found"]
    assert [row["probability"] is None for row in rows] == [False] * 4 + [True] * 2
    index = run.index(images=[noise(i) for i in range(8)], ids=names)
    near = run.search(index, text="say red", top=6)
    assert {row["id"] for row in rows[:4]} == {one.id for one in near[:4]}
    assert [row["id"] for row in rows[4:]] == [one.id for one in near[4:]]
    with Image.open("found.png") as sheet:
        assert sheet.width > 900  # five in a row
    assert main(words) == 0
    assert "looked at 4 again in" in capsys.readouterr().out


def test_texts_are_found_for_a_picture_equal_ones_once(run, tmp_path, capsys):
    Path("said.txt").write_text("say red\nsay blue\n\nwhich colour is here\nsay red\n")
    Path("a.png").write_bytes(png(noise(3)))
    assert main(["index", "RUN", "--texts", "said.txt", "--out", "made"]) == 0
    words = ["search", "made", "--image", "a.png", "--rerank", "3", "--out", "found.png"]
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "searched 3 texts" in told and "drawn in found.png" in told
    with Image.open("found.png") as sheet:
        assert sheet.height > 320


def test_records_of_a_prepared_folder_are_pictures_and_texts(data, run, tmp_path):
    # Sources of a task are no gallery; pairs, images and retrieval are.
    with pytest.raises(InputError, match=r"no image in it \(val\)"):
        open_gallery("image", data)
    body = json.loads((data / "dataset.json").read_text())
    for row in body["sources"]:
        if row["stream"] == "task:vqa":
            row["stream"] = "image"
            row["shards"] = [str(data / shard) for shard in row["shards"]]
    body["sources"] = [row for row in body["sources"] if row["stream"] == "image"]
    (tmp_path / "dataset.json").write_text(json.dumps(body))
    found = open_gallery("image", tmp_path)
    assert found.ids == tuple(f"vqa:{i}" for i in range(VAL)) and found.split == "val"
    source = open_sources([tmp_path], "image", "val")[0]
    assert (found.read("vqa:3") == read_picture(source.read(3).image())).all()


def test_an_index_of_another_checkpoint_is_refused_by_name(run, data, monkeypatch, capsys):
    write_photos(Path("photos"), 2)
    assert main(["index", "RUN", "--images", "photos", "--out", "made"]) == 0
    other = Predictor(replace(run.run, folder=Path("runs/other")), "e" * 64)
    monkeypatch.setattr("vlbeit.serve.search.load", lambda *_: other)
    words = ["search", "made", "--text", "say red", "--run", "runs/other"]
    assert main(words) == InputError.exit_code
    told = capsys.readouterr().err
    assert str(run.run.folder) in told and "runs/other" in told and "dddd" in told
    run.run.folder.rmdir()
    assert main(words[:4]) == InputError.exit_code
    assert "is not there; say with --run" in capsys.readouterr().err


def test_what_cannot_be_indexed_or_searched_is_named(run, data, monkeypatch, capsys):
    write_photos(Path("photos"), 2)
    Path("empty").mkdir()
    Path("bad").mkdir()
    (Path("bad") / "a.png").write_bytes(b"<html>")
    for words, code, message in (
        (["--images", "nowhere"], 66, "expected a folder of pictures"),
        (["--images", "empty"], 66, "no image in it"),
        (["--images", "bad"], 66, "nothing can be read, the first: .*not_an_image"),
        (["--texts", "photos"], 66, "expected a file with one text a line"),
        ([], 78, "one of the arguments --images --texts is required"),
    ):
        assert main(["index", "RUN", *words, "--out", "made"]) == code
        assert re.search(message, capsys.readouterr().err)
    assert not Path("made").exists()
    assert main(["index", "RUN", "--images", "photos", "--out", "made"]) == 0
    assert main(["index", "RUN", "--images", "photos", "--out", "made"]) == SaveError.exit_code
    Path("a.png").write_bytes(png(noise(0)))
    assert main(["search", "made", "--image", "a.png"]) == ConfigError.exit_code
    assert "searched with one text" in capsys.readouterr().err
    assert main(["search", "made", "--text", "a", "--top", "0"]) == ConfigError.exit_code
    monkeypatch.setattr("vlbeit.serve.search.load", lambda *_: untrained("vqa", data))
    assert main(["index", "RUN", "--images", "photos", "--out", "new"]) == ConfigError.exit_code
    assert "vlbeit finetune retrieval" in capsys.readouterr().err


def test_a_record_without_a_caption_is_named_and_not_left_out_in_silence(run, tmp_path):
    members = [{"png": grey_png(9), "txt": b"a red one"}, {"png": grey_png(20)}]
    shards = write_shards([(f"{i}", row) for i, row in enumerate(members)], tmp_path, "pairs")
    folder = tmp_path / "prepared"
    info = SourceInfo("pairs", "pair", "val", [str(path) for path in shards], 2)
    Dataset.write(folder, "drawn", [info])
    made, skipped = build(run, open_gallery("text", folder), print)
    assert made.ids == ("a red one",)
    assert len(skipped) == 1 and "pairs:1" in skipped[0]
