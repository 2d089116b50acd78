"""Laws of `vlbeit prepare` for downstream tasks: each record is what its task reads, wrong and
mixed files are named by file and row, and baselines are what counting by hand gives."""

import io
import json
import tarfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prepare_files import (
    books,
    drawn,
    facts,
    fields,
    prepare,
    put,
    put_rows,
    put_tar,
    records,
    skips,
)
from vlbeit.data.dataset import Dataset
from vlbeit.data.prepare.blind import _chance
from vlbeit.data.vqa_answers import normalise_answer
from vlbeit.errors import ConfigError, DataBudgetError, InputError


def found(folder: Path, task: str, split: str) -> list[dict[str, Any]]:
    return [fields(record) for record in records(folder, f"task:{task}", split)]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def class_map(values: np.ndarray, mode: str = "L", kind: str = "PNG") -> bytes:
    image = Image.fromarray(values.astype(np.uint8))
    if mode == "P":
        image = Image.frombytes("P", image.size, image.tobytes())
        image.putpalette([v for n in range(256) for v in ((n * 53) % 256, (n * 101) % 256, n)])
    file = io.BytesIO()
    image.convert("RGB").save(file, kind) if mode == "RGB" else image.save(file, kind)
    return file.getvalue()


def checked(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    """What a check that finds too much wrong says on standard error."""
    capsys.readouterr()
    with pytest.raises(DataBudgetError):
        prepare(*words, "--check")
    return capsys.readouterr().err.splitlines()


# Questions --------------------------------------------------------------------------------


def questions(folder: Path, count: int = 4) -> Path:
    for number in range(count):
        put(folder / f"{number}.png", drawn(number))
    return put_rows(
        folder / "questions.jsonl",
        [
            {
                "question_id": 2 * number + which, "image": f"{number}.png",
                "question": f"what is  {'it' if which else 'this'}?",
                "answer": ("Two", "the dog")[which], "kind": "what",
                "split": "val" if number == 0 else "train",
            }
            for number in range(count)
            for which in (0, 1)
        ],
    )  # fmt: skip


def test_questions_are_gathered_by_image_and_answers_counted_once_normalised(tmp_path):
    prepare("vqa", questions(tmp_path / "in"), "--out", tmp_path / "out")
    train = found(tmp_path / "out", "vqa", "train")
    assert len(train) == 3 and all(len(row["questions"]) == 2 for row in train)
    first = next(row for row in train if row["image"] == "1.png")
    assert first["questions"][0] == {
        "question": "what is this?", "answer": "Two", "question_id": 2, "kind": "what",
    }  # fmt: skip
    told = facts(tmp_path / "out")
    assert told["answers"] == ["2", "dog"]
    assert told["counts"]["train"] == {
        "images": 3, "questions": 6, "answered": 6, "answer_listed": 6,
    }  # fmt: skip
    assert told["baselines"]["vqa"]["val"] == {
        "majority": 0.5, "prefix": 1.0, "question": 1.0, "learned_on": "train",
    }  # fmt: skip
    books(tmp_path / "out")


def test_an_answer_list_that_is_given_keeps_its_order_in_every_form(tmp_path):
    table = questions(tmp_path / "in")
    lists = {
        "a.txt": "dog\n2\ncat\n",
        "a.json": '["dog", "2", "cat"]',
        "b.json": '{"cat": 2, "dog": 0, "2": 1}',
        "b.txt": '{"answer": "2", "label": 1}\n{"answer": "dog", "label": 0}\n'
        '{"answer": "cat", "label": 2}\n',
    }
    for name, text in lists.items():
        path, out = put(tmp_path / name, text), tmp_path / f"out-{name[0]}-{name[2:]}"
        prepare("vqa", table, "--answers", path, "--out", out)
        assert facts(out)["answers"] == ["dog", "2", "cat"], name
    twice = put(tmp_path / "twice.txt", "a dog\ndog\n")
    with pytest.raises(InputError, match="twice"):
        prepare("vqa", table, "--answers", twice, "--out", tmp_path / "no")


def test_a_guess_counts_as_much_as_evaluation_gives_it(tmp_path):
    """Of ten people 0 to 4 say what is most frequent in train; then 1 of 2 and 1 of 4."""
    put(tmp_path / "0.png", drawn(0))
    put(tmp_path / "1.png", drawn(1))
    said = [["A red!"] * n + [f"other {i}" for i in range(10 - n)] for n in range(5)]
    said += [["red", "blue"], ["red", "blue", "green", "white"]]
    rows = [{"image": "0.png", "question": "which?", "answer": "Red", "split": "train"}]
    rows += [{"image": "1.png", "question": "which?", "answers": a, "split": "val"} for a in said]
    prepare("vqa", put_rows(tmp_path / "q.jsonl", rows), "--out", tmp_path / "out")
    reached = facts(tmp_path / "out")["baselines"]["vqa"]["val"]["majority"]
    assert reached == pytest.approx((0 + 0.3 + 0.6 + 0.9 + 1 + 1 / 2 + 1 / 3) / 7)


def test_min_answers_leaves_rare_answers_out_of_the_list_and_not_out_of_the_records(tmp_path):
    rows = [{"image": "0.png", "question": f"q {n}?", "answer": "a b c d"[n]} for n in (0, 2)]
    rows += [{"image": "0.png", "question": "q?", "answer": "c"}] * 2
    put(tmp_path / "0.png", drawn(0))
    table = put_rows(tmp_path / "q.jsonl", rows)
    prepare("vqa", table, "--min-answers", 2, "--out", tmp_path / "out")
    assert facts(tmp_path / "out")["answers"] == ["c"]
    assert len(found(tmp_path / "out", "vqa", "train")[0]["questions"]) == 4


def test_columns_of_questions_can_have_other_names_and_people_may_answer(tmp_path):
    put(tmp_path / "0.png", drawn(0))
    table = put_rows(
        tmp_path / "q.jsonl",
        [{"file": "0.png", "q": "how many?", "answers": ["2", "two", {"answer": "3"}]}],
    )
    words = ("--image-column", "file", "--question-column", "q")
    prepare("vqa", table, *words, "--out", tmp_path / "out")
    (row,) = found(tmp_path / "out", "vqa", "train")
    assert row["questions"] == [
        {"question": "how many?", "answers": ["2", "two", "3"], "answer": "2"}
    ]


def test_wrong_rows_of_questions_are_named_by_file_line_and_reason(tmp_path, capsys):
    put(tmp_path / "0.png", drawn(0))
    good = {"image": "0.png", "question": "q?", "answer": "a"}
    table = put_rows(
        tmp_path / "q.jsonl",
        [
            good | {"question_id": 7},
            good | {"question_id": 7},
            good | {"image": "gone.png"},
            {"image": "0.png", "captions": ["a dog"]},
            {"image": "0.png", "question": "q?"},
            good | {"answer": 5},
            good | {"answer": "  "},
            good | {"split": "val"},
            good | {"question": ""},
            {"question": "q?", "answer": "a"},
        ],
    )
    lines = checked(capsys, "vqa", table)
    reasons = [
        "duplicate_id", "no_image", "no_question", "no_answer", "bad_answer", "bad_answer",
        "two_splits", "empty_text", "no_image",
    ]  # fmt: skip
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True), 2):
        assert line.startswith(f"{table}:{number}: ") and f": {reason}: " in line
    assert "(found: captions); is this the right file?" in lines[2]


def test_an_empty_file_or_one_of_another_kind_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match="no row found"):
        prepare("vqa", put(tmp_path / "q.jsonl", ""), "--check")
    with pytest.raises(InputError, match="images go to --images"):
        prepare("vqa", put_tar(tmp_path / "q.tar", {"0.png": drawn(0)}), "--check")
    with pytest.raises(InputError, match="q.json"):  # VQA's own file is not a list of rows
        prepare("vqa", put(tmp_path / "q.json", '{"questions": []}'), "--check")


# VQA v2 -----------------------------------------------------------------------------------

PARTS = {"train": ("train2014", 10), "val": ("val2014", 6), "test-dev": ("test-dev2015", 3)}


def vqav2(root: Path) -> dict[str, tuple[Path, Path]]:
    """The official layout, two questions an image; ten people of whom four say "no"."""
    files = {}
    for part, (subtype, count) in PARTS.items():
        base = 1000 * (1 + list(PARTS).index(part))
        folder = subtype.replace("test-dev", "test")
        ids = range(base, base + count)
        for image in ids:
            put(root / folder / f"COCO_{folder}_{image:012d}.jpg", drawn(image, "JPEG"))
        asked = [
            {"image_id": i, "question": f"is it {'red' if n else 'blue'}?",
             "question_id": 10 * i + n}
            for i in ids for n in (0, 1)
        ]  # fmt: skip
        answered = [
            {"question_type": "is it", "answer_type": "yes/no", "multiple_choice_answer": "yes",
             "image_id": q["image_id"], "question_id": q["question_id"],
             "answers": [{"answer": "Yes" if k < 6 else "no", "answer_confidence": "yes",
                          "answer_id": k + 1} for k in range(10)]}
            for q in reversed(asked)
        ]  # fmt: skip
        head = {"info": {"version": "2.0"}, "license": {}, "data_subtype": subtype}
        files[part] = (
            put(
                root / f"v2_OpenEnded_mscoco_{subtype}_questions.json",
                json.dumps(head | {"questions": asked}),
            ),
            root / f"v2_mscoco_{subtype}_annotations.json",
        )
        if part != "test-dev":
            put(files[part][1], json.dumps(head | {"annotations": answered}))
    return files


def test_vqa_v2_keeps_ten_answers_and_types_and_tests_without_answers(tmp_path):
    vqav2(tmp_path / "in")
    prepare("vqav2", tmp_path / "in", "--out", tmp_path / "out")
    train, val = (found(tmp_path / "out", "vqa", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (10, 6)
    first = next(row for row in train if row["coco_id"] == 1003)
    assert first["image"] == "COCO_train2014_000000001003.jpg"
    assert first["questions"][1] == {
        "question": "is it red?", "question_id": 10031, "answer": "yes",
        "answers": ["Yes"] * 6 + ["no"] * 4, "answer_type": "yes/no", "question_type": "is it",
    }  # fmt: skip
    told = facts(tmp_path / "out")
    assert told["answers"] == ["yes"] and "CC BY 4.0" in told["licence"]
    assert told["baselines"]["vqa"]["val"]["majority"] == 1.0
    prepare("vqav2", tmp_path / "in", "--parts", "test-dev", "--out", tmp_path / "test")
    rows = found(tmp_path / "test", "vqa", "test")
    assert len(rows) == 3
    assert all(set(q) == {"question", "question_id"} for row in rows for q in row["questions"])


def test_the_answer_list_counts_train_and_val_and_only_what_is_often_enough(tmp_path):
    vqav2(tmp_path / "in")
    for least, answers in ((32, ["yes"]), (33, [])):
        out = tmp_path / f"out-{least}"
        prepare("vqav2", tmp_path / "in", "--min-answers", least, "--out", out)
        assert facts(out)["answers"] == answers


def test_trainval_trains_on_all_but_the_val_images_asked_for(tmp_path):
    vqav2(tmp_path / "in")
    words = ("vqav2", tmp_path / "in", "--trainval", "--val-images")
    prepare(*words, 2, "--out", tmp_path / "out")
    train, val = (found(tmp_path / "out", "vqa", split) for split in ("train", "val"))
    assert (len(train), len(val)) == (14, 2)
    images = {row["coco_id"] for row in train} | {row["coco_id"] for row in val}
    assert len(images) == 16 and all(row["coco_id"] >= 2000 for row in val)
    with pytest.raises(ConfigError, match="6 images"):
        prepare(*words, 6, "--out", tmp_path / "no")


def test_mixed_up_files_of_vqa_v2_are_refused_by_name(tmp_path):
    files = vqav2(tmp_path / "in")
    asked, answered = files["train"]
    with pytest.raises(InputError, match=f"{asked.name}: is a file of questions, given as one of"):
        prepare("vqav2", tmp_path / "in", "--annotations", asked, "--check")
    with pytest.raises(InputError, match=f"{answered.name}: is a file of annotations"):
        prepare("vqav2", tmp_path / "in", "--questions", answered, "--check")
    with pytest.raises(InputError, match="annotations.json below it"):
        prepare("vqav2", tmp_path / "in", "--annotations", files["val"][1], "--check")
    answered.rename(tmp_path / "in/v2_mscoco_val2014_annotations.json")
    with pytest.raises(InputError, match="'train2014' in a file that is named after 'val2014'"):
        prepare("vqav2", tmp_path / "in", "--check")
    with pytest.raises(InputError, match="test2015_questions"):
        prepare("vqav2", tmp_path / "in", "--parts", "test", "--check")


def test_rows_of_vqa_v2_that_do_not_fit_each_other_are_named(tmp_path, capsys):
    asked, answered = vqav2(tmp_path / "in")["train"]
    body = json.loads(answered.read_text())
    rows = body["annotations"]  # in the reverse order of the questions
    rows[0]["question_id"] = 5
    rows[1]["image_id"] += 1
    rows[2]["answers"] = "yes"
    del rows[3]
    put(answered, json.dumps(body))
    (tmp_path / "in/train2014/COCO_train2014_000000001000.jpg").unlink()
    lines = checked(capsys, "vqav2", tmp_path / "in", "--parts", "train")
    assert [line.split(": ")[2] for line in lines] == [
        "no_question", "ids_differ", "bad_answer", "no_image", "no_image",
        "no_answer", "no_answer", "no_answer", "no_answer",
    ]  # fmt: skip
    assert lines[0].startswith(f"{answered}:item 0: question 5: ")
    assert lines[1].startswith(f"{answered}:item 1: question 10090: ")
    assert f"({asked}:item 18)" in lines[1]


# Statements -------------------------------------------------------------------------------


def test_two_pictures_of_a_statement_are_stored_byte_for_byte(tmp_path):
    files = {f"{n}.png": drawn(n) for n in range(4)} | {"j.jpg": drawn(9, "JPEG")}
    put_tar(tmp_path / "a.tar", files)
    table = put_rows(
        tmp_path / "s.jsonl",
        [
            {"left": "0.png", "right": "j.jpg", "sentence": "one  is", "label": True,
             "identifier": "x-0", "kind": "one"},
            {"left": "2.png", "right": "3.png", "statement": "two", "truth": "False",
             "split": "dev"},
        ],
    )  # fmt: skip
    prepare("statements", table, "--images", tmp_path / "a.tar", "--out", tmp_path / "out")
    (train,) = records(tmp_path / "out", "task:statements", "train")
    assert train.members["left.png"] == files["0.png"]
    assert train.members["right.jpg"] == files["j.jpg"]
    assert fields(train) == {
        "statement": "one is", "truth": True, "identifier": "x-0", "kind": "one", "image": "0.png",
    }  # fmt: skip
    (val,) = found(tmp_path / "out", "statements", "val")
    assert val["truth"] is False
    assert facts(tmp_path / "out")["baselines"]["statements"]["val"]["majority"] == 0.0


def test_two_boxes_cut_two_pictures_out_of_one(tmp_path):
    whole = drawn(3, size=(40, 10))
    put(tmp_path / "0.png", whole)
    table = put_rows(tmp_path / "s.jsonl", [{"image": "0.png", "sentence": "s", "label": True}])
    boxes = ("--left-box", "0,0,25,10", "--right-box", "30,0,40,10")
    prepare("statements", table, *boxes, "--out", tmp_path / "out")
    (record,) = records(tmp_path / "out", "task:statements", "train")
    assert np.array_equal(pixels(record.members["left.png"]), pixels(whole)[:, :25])
    assert np.array_equal(pixels(record.members["right.png"]), pixels(whole)[:, 30:])
    for words, says in ((boxes[:2], "only together"), (("--left-box", "1,2"), "expected left")):
        with pytest.raises(ConfigError, match=says):
            prepare("statements", table, *words, "--check")


def test_wrong_rows_of_statements_are_named(tmp_path, capsys):
    put(tmp_path / "0.png", drawn(0))
    good = {"left": "0.png", "right": "0.png", "sentence": "s", "label": True}
    table = put_rows(
        tmp_path / "s.jsonl",
        [
            good,
            {"image": "0.png", "sentence": "s", "label": True},
            good | {"label": "maybe"},
            good | {"right": "1.png"},
            {"left": "0.png", "sentence": "s", "label": True},
            good | {"sentence": None},
            {k: v for k, v in good.items() if k != "label"},
        ],
    )
    lines = checked(capsys, "statements", table)
    reasons = ["no_image", "bad_label", "no_image", "no_image", "no_statement", "no_label"]
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True), 2):
        assert line.startswith(f"{table}:{number}: ") and f": {reason}: " in line
    assert "--left-box" in lines[0]
    put_rows(table, [{"image": "0.png", "sentence": "s", "label": True}])
    boxes = ("--left-box", "0,0,25,10", "--right-box", "10,0,20,10")
    assert "bad_box" in checked(capsys, "statements", table, *boxes)[0]  # 24 pixels wide


def nlvr2_row(identifier: str, **more: object) -> dict[str, object]:
    return {
        "identifier": identifier, "sentence": f"of {identifier}", "label": "True",
        "left_url": "l", "right_url": "r", "writer": "1", **more,
    }  # fmt: skip


def test_nlvr2_pictures_are_named_after_identifiers_in_its_folders(tmp_path):
    root = tmp_path / "in"
    for part, folder in (("train", "train/7"), ("dev", "dev"), ("test1", "test1")):
        for pair in (0, 1):
            for side in (0, 1):
                name = f"{part}-3-{pair}-img{side}.png"
                put(root / "images" / folder / name, drawn(hash_of(part) + 2 * pair + side))
        more = {"directory": 7} if part == "train" else {}
        rows = [nlvr2_row(f"{part}-3-{pair}-{s}", **more) for pair in (0, 1) for s in (0, 1)]
        rows[0]["label"] = "False"
        put_rows(root / f"data/{part}.json", rows)
    prepare("nlvr2", root, "--out", tmp_path / "out")
    for split, part in (("train", "train"), ("val", "dev"), ("test", "test1")):
        got = {
            fields(r)["identifier"]: r for r in records(tmp_path / "out", "task:statements", split)
        }
        assert set(got) == {f"{part}-3-{p}-{s}" for p in (0, 1) for s in (0, 1)}
        first = got[f"{part}-3-1-0"]
        assert first.members["left.png"] == drawn(hash_of(part) + 2)
        assert first.members["right.png"] == drawn(hash_of(part) + 3)
        assert fields(got[f"{part}-3-0-0"])["truth"] is False
        assert fields(first)["truth"] is True and fields(first)["left_url"] == "l"
    assert facts(tmp_path / "out")["counts"]["test"] == {"false": 1, "true": 3}


def hash_of(part: str) -> int:
    return 10 * ["train", "dev", "test1"].index(part)


def test_wrong_rows_of_nlvr2_are_named(tmp_path, capsys):
    for side in (0, 1):
        put(tmp_path / f"dev/dev-0-0-img{side}.png", drawn(side))
    rows = [
        nlvr2_row("dev-0-0-0"),
        nlvr2_row("dev-0-0-0"),
        nlvr2_row("test1-0-0-0"),
        nlvr2_row("dev-0-1-0"),
        nlvr2_row("0.png"),
        {"image": "0.png", "captions": ["c"]},
    ]
    table = put_rows(tmp_path / "dev.json", rows)
    lines = checked(capsys, "nlvr2", tmp_path)
    reasons = ["duplicate_id", "mixed_parts", "no_image", "bad_identifier", "bad_identifier"]
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True), 2):
        assert line.startswith(f"{table}:{number}: ") and f": {reason}: " in line


# Retrieval and classification -------------------------------------------------------------


def test_retrieval_shares_the_shards_of_the_pairs(tmp_path):
    for number in range(4):
        put(tmp_path / f"{number}.png", drawn(number))
    rows = [
        {"image": f"{n}.png", "captions": [f"c {n} {k}" for k in range(5)],
         "split": "val" if n else "train"}
        for n in range(4)
    ]  # fmt: skip
    prepare("retrieval", put_rows(tmp_path / "c.jsonl", rows), "--out", tmp_path / "out")
    sources = {(s.stream, s.split): s for s in Dataset.open(tmp_path / "out").sources}
    assert sources["pair", "val"].shards == sources["task:retrieval", "val"].shards
    assert sources["task:retrieval", "val"].name == "out-retrieval"
    assert {row["image"] for row in found(tmp_path / "out", "retrieval", "val")} == {
        "1.png", "2.png", "3.png",
    }  # fmt: skip
    assert facts(tmp_path / "out")["counts"]["val"] == {"images": 3, "captions": 15}
    assert len(list((tmp_path / "out").glob("*.tar"))) == 2
    books(tmp_path / "out")


def test_chance_of_retrieval_is_what_drawing_gives():
    drawn_ranks = np.argsort(np.random.rand(20_000, 7), axis=1)
    chance = _chance([1, 2, 4])
    for k in (1, 5):
        hits = [(drawn_ranks[:, :k] < own).any(1).mean() for own in (1, 2, 4)]
        assert chance[f"text_r{k}"] == pytest.approx(np.mean(hits), abs=0.01)
    assert chance["image_r1"] == 1 / 3 and chance["image_r5"] == 1


def labelled(folder: Path, rows: list[dict[str, Any]]) -> Path:
    for row in rows:
        put(folder / row["image"], drawn(int(row["image"][0])))
    return put_rows(folder / "train.jsonl", rows)


def test_classification_shares_the_shards_of_the_images_and_names_its_classes(tmp_path):
    rows = [{"image": f"{n}.png", "label": n % 3, "class": "abc"[n % 3]} for n in range(5)]
    table = labelled(tmp_path, rows)
    prepare("classification", table, "--out", tmp_path / "out")
    sources = {s.stream: s for s in Dataset.open(tmp_path / "out").sources}
    assert sources["image"].shards == sources["task:classification"].shards
    assert facts(tmp_path / "out")["classes"] == ["a", "b", "c"]
    for row in found(tmp_path / "out", "classification", "train"):
        assert row["class"] == "abc"[row["label"]]
    names = put(tmp_path / "names.txt", "a\nb\nc\nd\n")
    prepare("classification", table, "--classes", names, "--out", tmp_path / "four")
    assert facts(tmp_path / "four")["classes"] == ["a", "b", "c", "d"]
    for number in range(4):
        put(tmp_path / f"folders/{'xy'[number % 2]}/{number}.png", drawn(number))
    prepare("classification", tmp_path / "folders", "--out", tmp_path / "walked")
    assert facts(tmp_path / "walked")["classes"] == ["x", "y"]
    assert len(found(tmp_path / "walked", "classification", "train")) == 4


def test_wrong_labels_are_named(tmp_path, capsys):
    table = labelled(
        tmp_path,
        [
            {"image": "0.png", "label": 0, "class": "a"},
            {"image": "1.png", "label": 0, "class": "b"},
            {"image": "2.png", "label": 2},
            {"image": "3.png"},
            {"image": "4.png", "label": -1},
            {"image": "5.png", "label": "a"},
        ],
    )
    names = put(tmp_path / "names.json", '{"classes": ["a", "b"]}')
    lines = checked(capsys, "classification", table, "--classes", names)
    said = {line.split(": ")[0].rpartition(":")[2]: line.split(": ")[2] for line in lines}
    assert said == {
        "2": "bad_label", "3": "bad_label", "4": "no_label", "5": "bad_label", "6": "bad_label",
    }  # fmt: skip
    lines = checked(capsys, "classification", table)
    assert f"label 0 is 'b' here and 'a' in {table}:1" in "\n".join(lines)
    put_rows(table, [{"image": "0.png", "caption": "c"}])
    with pytest.raises(InputError, match="no image has a label"):
        prepare("classification", table, "--check")


def test_images_without_labels_are_no_classification_source(tmp_path):
    root = tmp_path / "in"
    for number, wnid in enumerate(("n00000001", "n00000002")):
        put(root / f"train/{wnid}/{number}.JPEG", drawn(number, "JPEG"))
    put(root / "val/ILSVRC2012_val_00000001.JPEG", drawn(7, "JPEG"))
    prepare("imagenet", root, "--out", tmp_path / "out")
    places = {(s.stream, s.split) for s in Dataset.open(tmp_path / "out").sources}
    assert places == {("image", "train"), ("image", "val"), ("task:classification", "train")}


# Segmentation -----------------------------------------------------------------------------


def segmentation(folder: Path, maps: list[bytes], size: tuple[int, int] = (24, 16)) -> Path:
    rows = []
    for number, data in enumerate(maps):
        put(folder / f"{number}.png", drawn(number, size=size))
        put(folder / f"{number}-map.png", data)
        rows.append({"image": f"{number}.png", "label": f"{number}-map.png"})
    return put_rows(folder / "train.jsonl", rows)


def test_class_maps_are_stored_as_they_are_and_counted(tmp_path):
    values = np.random.randint(0, 3, (16, 24))
    values[0, :5] = 255
    data = class_map(values)
    table = segmentation(tmp_path, [data, class_map(values, "P")])
    prepare("segmentation", table, "--out", tmp_path / "out")
    got = {fields(r)["image"]: r for r in records(tmp_path / "out", "task:segmentation", "train")}
    assert got["0.png"].members["seg.png"] == data
    palette = Image.open(io.BytesIO(got["1.png"].members["seg.png"]))
    assert palette.mode == "L" and np.array_equal(np.asarray(palette), values)
    told = facts(tmp_path / "out")
    assert told["segmentation_classes"] == ["0", "1", "2"]
    counts = told["counts"]["train"]
    assert counts["pixels"] == [2 * int((values == c).sum()) for c in range(3)]
    assert counts["ignored"] == 10
    best = max(counts["pixels"])
    baseline = told["baselines"]["segmentation"]["train"]
    assert baseline["pixel_accuracy"] == best / sum(counts["pixels"])
    assert baseline["miou"] == baseline["pixel_accuracy"] / 3


@pytest.mark.parametrize("ignore", [0, 1, 3])
def test_the_ignored_value_becomes_255_and_those_above_it_move_down(tmp_path, ignore):
    values = np.arange(16 * 24).reshape(16, 24) % 4
    names = put(tmp_path / "c.json", json.dumps({"classes": list("abcd"), "ignore_index": ignore}))
    table = segmentation(tmp_path / "in", [class_map(values)])
    prepare("segmentation", table, "--classes", names, "--out", tmp_path / "out")
    (record,) = records(tmp_path / "out", "task:segmentation", "train")
    stored = pixels(record.members["seg.png"])
    left = facts(tmp_path / "out")["segmentation_classes"]
    assert len(left) == 3
    for value, name in enumerate("abcd"):
        assert set(stored[values == value]) == {255 if value == ignore else left.index(name)}


def test_a_smaller_picture_gets_a_map_of_its_size_without_new_values(tmp_path):
    values = np.kron(np.array([[0, 7], [3, 255]]), np.ones((16, 24)))
    table = segmentation(tmp_path, [class_map(values)], size=(48, 32))
    prepare("segmentation", table, "--max-size", 16, "--out", tmp_path / "out")
    (record,) = records(tmp_path / "out", "task:segmentation", "train")
    assert pixels(record.members["png"]).shape[:2] == (16, 24)
    stored = pixels(record.members["seg.png"])
    assert np.array_equal(stored, np.kron([[0, 7], [3, 255]], np.ones((8, 12))))


def test_wrong_class_maps_are_named(tmp_path, capsys):
    good = np.zeros((16, 24))
    wrong = good.copy()
    wrong[2, 5] = 3
    names = put(tmp_path / "names.txt", "a\nb\nc\n")
    table = segmentation(
        tmp_path,
        [
            class_map(good),
            class_map(wrong),
            class_map(np.zeros((24, 16))),
            class_map(good, "RGB"),
            class_map(good, "L", "JPEG"),
            b"no picture",
            class_map(good),
        ],
    )
    (tmp_path / "6-map.png").unlink()
    lines = checked(capsys, "segmentation", table, "--classes", names)
    said = {line.split(": ")[0].rpartition(":")[2]: line.split(": ", 2)[2] for line in lines}
    reasons = {number: text.split(": ")[0] for number, text in said.items()}
    assert reasons == {
        "2": "bad_class", "3": "map_size", "4": "bad_map", "5": "bad_map", "6": "bad_map",
        "7": "no_image",
    }  # fmt: skip
    assert "value 3 at row 2, column 5; there are 3 classes" in said["2"]
    assert "the map is 16 x 24 pixels, its picture 24 x 16" in said["3"]


def ade20k(root: Path) -> dict[str, np.ndarray]:
    maps = {}
    for part, count in (("training", 3), ("validation", 2)):
        for number in range(count):
            name = f"ADE_{part[:5]}_{number:08d}"
            maps[name] = np.random.randint(0, 151, (16, 24))
            put(root / f"images/{part}/{name}.jpg", drawn(number + count, "JPEG"))
            put(root / f"annotations/{part}/{name}.png", class_map(maps[name]))
    rows = [f"{n}\t0.1\t10\t2\t0\tname {n}, other name" for n in range(1, 151)]
    put(root / "objectInfo150.txt", "\n".join(["Idx\tRatio\tTrain\tVal\tStuff\tName", *rows]))
    return maps


def test_ade20ks_zero_is_ignored_and_its_classes_count_from_zero(tmp_path):
    maps = ade20k(tmp_path / "in")
    prepare("ade20k", tmp_path / "in", "--out", tmp_path / "out")
    for split, count in (("train", 3), ("val", 2)):
        got = records(tmp_path / "out", "task:segmentation", split)
        assert len(got) == count
        for record in got:
            values = maps[fields(record)["image"].removesuffix(".jpg")]
            expected = np.where(values == 0, 255, values - 1)
            assert np.array_equal(pixels(record.members["seg.png"]), expected)
    told = facts(tmp_path / "out")
    assert len(told["segmentation_classes"]) == 150
    assert told["segmentation_classes"][0] == "name 1" and "BSD" in told["licence"]


def test_what_ade20k_lacks_or_has_too_much_is_named(tmp_path, capsys):
    ade20k(tmp_path)
    (tmp_path / "annotations/training/ADE_train_00000001.png").unlink()
    (tmp_path / "images/validation/ADE_valid_00000000.jpg").unlink()
    put(tmp_path / "annotations/training/ADE_train_00000002.png", class_map(np.full((16, 24), 151)))
    lines = checked(capsys, "ade20k", tmp_path)
    assert sorted(line.split(": ")[2] for line in lines) == ["bad_class", "no_image", "no_map"]
    assert all(line.startswith(str(tmp_path)) for line in lines)
    put(tmp_path / "objectInfo150.txt", "Idx\tName\n1\twall\n")
    with pytest.raises(InputError, match="has 1 classes"):
        prepare("ade20k", tmp_path, "--check")


# Entailment -------------------------------------------------------------------------------


def test_entailment_takes_labels_by_name_or_number_and_copies_no_statement(tmp_path):
    put(tmp_path / "0.png", drawn(0))
    table = put_rows(
        tmp_path / "e.jsonl",
        [
            {"image": "0.png", "statement": "s 0", "label": "Entailment", "pair_id": "p"},
            {"image": "0.png", "hypothesis": "s 1", "label": 1, "id": 7},
            {"image": "0.png", "sentence2": "s 2", "gold_label": "contradiction"},
        ],
    )
    prepare("entailment", table, "--out", tmp_path / "out")
    got = sorted(found(tmp_path / "out", "entailment", "train"), key=lambda row: row["hypothesis"])
    assert [(row["hypothesis"], row["label"], row.get("id")) for row in got] == [
        ("s 0", 0, "p"), ("s 1", 1, 7), ("s 2", 2, None),
    ]  # fmt: skip
    assert facts(tmp_path / "out")["classes"] == ["entailment", "neutral", "contradiction"]


def test_snli_ve_finds_flickrs_photos_and_names_wrong_rows(tmp_path, capsys):
    root, photos = tmp_path / "in", tmp_path / "photos"
    for number in (11, 12):
        put(photos / f"{number}.jpg", drawn(number, "JPEG"))
    for part, number in (("train", 11), ("dev", 12)):
        rows = [
            {"Flickr30K_ID": str(number) if k else number, "gold_label": label, "pairID": f"p{k}",
             "sentence1": "a caption", "sentence2": f"{part} {k}"}
            for k, label in enumerate(("entailment", "neutral", "contradiction"))
        ]  # fmt: skip
        put_rows(root / f"snli_ve_{part}.jsonl", rows)
    prepare("snli-ve", root, "--images", photos, "--out", tmp_path / "out")
    val = found(tmp_path / "out", "entailment", "val")
    assert {(row["hypothesis"], row["label"]) for row in val} == {(f"dev {k}", k) for k in range(3)}
    bad = put_rows(
        root / "snli_ve_dev.jsonl",
        [
            {"Flickr30K_ID": 12, "gold_label": "-", "sentence2": "s"},
            {"Flickr30K_ID": 13, "gold_label": "neutral", "sentence2": "s"},
            {"image": "12.jpg", "label": "neutral", "statement": "s"},
        ],
    )
    lines = checked(capsys, "snli-ve", root, "--images", photos, "--annotations", bad)
    reasons = ["bad_label", "no_image", "no_image"]
    for number, (line, reason) in enumerate(zip(lines, reasons, strict=True), 1):
        assert line.startswith(f"{bad}:{number}: ") and f": {reason}: " in line


# All tasks --------------------------------------------------------------------------------


def test_a_few_bad_rows_are_left_out_by_name_within_the_budget(tmp_path):
    table = questions(tmp_path / "in", 60)
    with table.open("a") as file:
        file.write(json.dumps({"image": "gone.png", "question": "q?", "answer": "a"}) + "\n")
    prepare("vqa", table, "--budget", 0.05, "--out", tmp_path / "out")
    assert skips(tmp_path / "out") == {"no_image": 1}
    assert books(tmp_path / "out")["skipped"] == {"no_image": 1}
    with pytest.raises(DataBudgetError):
        prepare("vqa", table, "--out", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_workers_change_no_byte_of_a_task(tmp_path):
    table = questions(tmp_path / "in", 12)
    outs = []
    for workers in (1, 3):
        out = tmp_path / str(workers) / "out"
        prepare("vqa", table, "--workers", workers, "--out", out)
        outs.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert outs[0] == outs[1] and len(outs[0]) == 5


# Real data --------------------------------------------------------------------------------


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.open()]


def blind(rows: list[dict[str, Any]], words: int, split: str) -> float:
    """Share right of the most frequent training answer per first words, counted here."""
    seen: dict[str, Counter[str]] = defaultdict(Counter)
    everything: Counter[str] = Counter()
    for row in rows:
        if row["split"] == "train":
            seen[" ".join(row["question"].split()[:words])][row["answer"]] += 1
            everything[row["answer"]] += 1
    asked = [row for row in rows if row["split"] == split]
    right = 0
    for row in asked:
        known = seen.get(" ".join(row["question"].split()[:words]), everything)
        right += known.most_common(1)[0][0] == row["answer"]
    return right / len(asked)


@pytest.mark.slow
def test_the_vqa_sets_come_out_as_their_readmes_count_them(shared_data, tmp_path):
    easy, daquar = shared_data / "easy_vqa", shared_data / "daquar"
    prepare(
        "vqa", easy / "questions.jsonl", "--answers", easy / "answers.txt", "--out", tmp_path / "e"
    )
    told = facts(tmp_path / "e")
    assert {s: c["questions"] for s, c in told["counts"].items()} == {"train": 38575, "test": 9673}
    assert told["answers"] == (easy / "answers.txt").read_text().split()
    question = told["baselines"]["vqa"]["test"]["question"]
    assert round(question, 3) == 0.670
    assert question == pytest.approx(blind(rows_of(easy / "questions.jsonl"), 99, "test"))
    prepare("vqa", daquar / "questions.jsonl", "--out", tmp_path / "d")
    told = facts(tmp_path / "d")
    assert {s: c["questions"] for s, c in told["counts"].items()} == {"train": 6795, "val": 2948}
    rows = rows_of(daquar / "questions.jsonl")
    answers = {normalise_answer(row["answer"]) for row in rows if row["split"] == "train"}
    assert set(told["answers"]) == answers and len(told["answers"]) == len(answers)
    # The README's figure takes the answer that comes first in the file among equal ones.
    assert round(blind(rows, 5, "val"), 3) == 0.154
    assert told["baselines"]["vqa"]["val"]["prefix"] == pytest.approx(0.154, abs=3e-3)
    assert round(told["baselines"]["vqa"]["val"]["majority"], 3) == 0.047


def sample(source: Path, target: Path, every: int) -> Path:
    """Some val rows of a shared file; the shared archives stay where they are."""
    rows = [row for row in rows_of(source) if row["split"] == "val"][::every]
    for row in rows:
        row.pop("shard", None)  # it would be looked up beside the file
    return put_rows(target, rows)


def test_statements_of_shared_files_are_taken_as_they_are(shared_data, tmp_path):
    nlvr, pairs = shared_data / "nlvr_v1", shared_data / "flickr8k_pairs"
    boxes = ("--left-box", "0,0,250,100", "--right-box", "300,0,400,100")
    table = sample(nlvr / "annotations.jsonl", tmp_path / "nlvr.jsonl", 25)
    words = ("--images", nlvr / "val-000.tar", "--out", tmp_path / "nlvr")
    prepare("statements", table, *boxes, *words)
    got = records(tmp_path / "nlvr", "task:statements", "val")
    rows = {row["identifier"]: row for row in rows_of(table)}
    assert len(got) == len(rows) == 39
    for record in got:
        row = rows[fields(record)["identifier"]]
        assert fields(record)["truth"] is row["label"]
        assert fields(record)["statement"] == " ".join(row["sentence"].split())
        assert pixels(record.members["left.png"]).shape == (100, 250, 3)
        assert pixels(record.members["right.png"]).shape == (100, 100, 3)
    table = sample(pairs / "annotations.jsonl", tmp_path / "pairs.jsonl", 50)
    words = ("--images", shared_data / "flickr8k/val-000.tar", "--out", tmp_path / "pairs")
    prepare("statements", table, *words)
    assert len(found(tmp_path / "pairs", "statements", "val")) == 40


def test_the_micro_vqa_v2_keeps_every_question_with_its_ten_answers(shared_data, tmp_path):
    root = shared_data / "vqa_v2_micro"
    words = ("--images", root / "images-000.tar", "--min-answers", 1)
    prepare("vqav2", root, *words, "--out", tmp_path / "out")
    rows = found(tmp_path / "out", "vqa", "train")
    asked = [q for row in rows for q in row["questions"]]
    assert (len(rows), len(asked)) == (48, 73)
    assert all(len(q["answers"]) == 10 for q in asked)
    official = json.loads((root / "v2_mscoco_train2014_annotations.json").read_text())
    said = {row["question_id"]: row for row in official["annotations"]}
    for question in asked:
        row = said[question["question_id"]]
        assert Counter(question["answers"]) == Counter(a["answer"] for a in row["answers"])
        assert question["answer"] == row["multiple_choice_answer"]
        assert question["answer_type"] == row["answer_type"]
    expected = {normalise_answer(row["multiple_choice_answer"]) for row in said.values()}
    assert set(facts(tmp_path / "out")["answers"]) == expected


def test_the_official_sample_of_nlvr2_is_parsed_row_by_row(shared_data, tmp_path, capsys):
    path = shared_data / "official_formats/nlvr2_dev_sample.json"
    rows = rows_of(path)
    lines = checked(capsys, "nlvr2", path.parent, "--annotations", path)
    assert len(lines) == 200 and all(": no_image: " in line for line in lines)
    picture = drawn(0)
    stems = {row["identifier"].rpartition("-")[0] for row in rows}
    put_tar(tmp_path / "dev.tar", {f"dev/{s}-img{n}.png": picture for s in stems for n in (0, 1)})
    words = ("--annotations", path, "--images", tmp_path / "dev.tar")
    prepare("nlvr2", path.parent, *words, "--out", tmp_path / "out")
    got = {row["identifier"]: row for row in found(tmp_path / "out", "statements", "val")}
    assert len(got) == 200
    for row in rows:
        assert got[row["identifier"]]["truth"] is (row["label"] == "True")


@pytest.mark.slow
def test_camvid_and_entailment_come_out_as_their_readmes_count_them(shared_data, tmp_path):
    camvid = shared_data / "camvid"
    words = ("--classes", camvid / "classes.json", "--out", tmp_path / "c")
    prepare("segmentation", camvid / "train.jsonl", camvid / "val.jsonl", *words)
    told = facts(tmp_path / "c")
    assert {s: c["images"] for s, c in told["counts"].items()} == {"train": 367, "val": 101}
    assert len(told["segmentation_classes"]) == 11
    with tarfile.open(camvid / "val-labels-000.tar") as archive:
        maps = [pixels(archive.extractfile(member).read()) for member in archive]
    counted = np.bincount(np.concatenate(maps, axis=None), minlength=12).tolist()
    val = told["counts"]["val"]
    assert [*val["pixels"], val["ignored"]] == counted
    table = sample(shared_data / "snli_ve_flickr8k/annotations.jsonl", tmp_path / "e.jsonl", 30)
    words = ("--images", shared_data / "flickr8k/val-000.tar")
    prepare("entailment", table, *words, "--out", tmp_path / "e")
    counts = {s: sum(c.values()) for s, c in facts(tmp_path / "e")["counts"].items()}
    assert counts == {"val": len(rows_of(table))}
