"""Laws of `vlbeit prepare`: every row is either a record or named with its reason, each public
layout comes out as its own documentation says, and a failed command leaves nothing behind."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from prepare_files import (
    books,
    by_image,
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
from vlbeit.data.dataset import Dataset, open_sources
from vlbeit.data.prepare.folder import record_key
from vlbeit.data.prepare.overlap import ALIKE, thumbnail
from vlbeit.data.prepare.plan import split_by_content
from vlbeit.data.prepare.rows import Bad, json_list
from vlbeit.data.prepare.text import MEMBER, PIECE, read_documents
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, DataBudgetError, InputError

# Images -----------------------------------------------------------------------------------


def test_a_class_folder_keeps_bytes_and_numbers_its_classes_in_sorted_order(tmp_path):
    put(tmp_path / "in/dog/deep/a.jpg", drawn(0, "JPEG"))
    put(tmp_path / "in/cat/b.png", drawn(1))
    put(tmp_path / "in/cat/.hidden.png", b"not an image")
    put(tmp_path / "in/notes.txt", "not taken for an image")
    assert prepare("images", tmp_path / "in", "--out", tmp_path / "out") == 0
    found = {fields(r)["image"]: r for r in records(tmp_path / "out", "image", "train")}
    assert set(found) == {"dog/deep/a.jpg", "cat/b.png"}
    assert found["dog/deep/a.jpg"].members["jpg"] == drawn(0, "JPEG")
    assert found["cat/b.png"].members["png"] == drawn(1)
    assert (
        fields(found["cat/b.png"])["label"] == 0 and fields(found["dog/deep/a.jpg"])["label"] == 1
    )
    assert facts(tmp_path / "out")["classes"] == ["cat", "dog"]
    assert any("1 txt" in note for note in facts(tmp_path / "out")["prepared"]["notes"])


def test_top_folders_named_after_splits_are_splits_and_not_classes(tmp_path):
    for split, count in (("train", 3), ("valid", 2), ("test", 1)):
        for number in range(count):
            put(tmp_path / f"in/{split}/c{number % 2}/{number}.png", drawn(hash_of(split, number)))
    assert prepare("images", tmp_path / "in", "--out", tmp_path / "out") == 0
    counts = {s: len(records(tmp_path / "out", "image", s)) for s in ("train", "val", "test")}
    assert counts == {"train": 3, "val": 2, "test": 1}
    assert facts(tmp_path / "out")["classes"] == ["c0", "c1"]


def hash_of(word: str, number: int) -> int:
    return sum(word.encode()) * 100 + number


def test_rows_name_image_label_split_and_archive(tmp_path):
    put_tar(tmp_path / "in/a.tar", {f"{n}.png": drawn(n) for n in range(4)})
    put_rows(
        tmp_path / "in/train.jsonl",
        [{"image": f"{n}.png", "label": n, "class": f"c{n}", "shard": "a.tar"} for n in range(3)]
        + [{"image": "3.png", "label": 3, "split": "dev", "shard": "a.tar"}],
    )
    assert prepare("images", "--jsonl", tmp_path / "in/train.jsonl", "--out", tmp_path / "out") == 0
    train = by_image(tmp_path / "out", "image", "train")
    assert {name: row["label"] for name, row in train.items()} == {f"{n}.png": n for n in range(3)}
    assert "shard" not in train["0.png"]
    assert set(by_image(tmp_path / "out", "image", "val")) == {"3.png"}


def test_the_suffix_of_a_record_follows_its_bytes_not_its_name(tmp_path):
    put(tmp_path / "in/really_png.JPEG", drawn(0, "PNG"))
    prepare("images", tmp_path / "in", "--out", tmp_path / "out")
    (record,) = records(tmp_path / "out", "image", "train")
    assert set(record.members) == {"png", "json"}


def test_max_size_bounds_the_shorter_side_and_leaves_small_images_alone(tmp_path):
    put(tmp_path / "in/wide.jpg", drawn(0, "JPEG", (90, 40)))
    put(tmp_path / "in/small.jpg", drawn(1, "JPEG", (18, 20)))
    prepare("images", tmp_path / "in", "--out", tmp_path / "out", "--max-size", 20)
    found = {fields(r)["image"]: r for r in records(tmp_path / "out", "image", "train")}
    assert Image.open(io.BytesIO(found["wide.jpg"].members["jpg"])).size == (45, 20)
    assert found["small.jpg"].members["jpg"] == drawn(1, "JPEG", (18, 20))


def test_workers_change_the_time_and_not_a_byte(tmp_path):
    for number in range(40):
        put(tmp_path / f"in/{number}.png", drawn(number))
    outs = []
    for workers in (1, 3):
        out = tmp_path / str(workers) / "out"
        prepare("images", tmp_path / "in", "--out", out, "--workers", workers, "--per-shard", 16)
        outs.append({p.name: p.read_bytes() for p in out.iterdir()})
    assert outs[0] == outs[1]
    assert sum(name.endswith(".tar") for name in outs[0]) == 3


def test_a_val_fraction_depends_on_content_alone_so_copies_stay_together(tmp_path):
    for number in range(60):
        put(tmp_path / f"in/a/{number}.png", drawn(number))
        put(tmp_path / f"in/b/copy_{number}.png", drawn(number))
    prepare("images", tmp_path / "in", "--out", tmp_path / "out", "--val-fraction", 0.25)
    train = {r.members["png"] for r in records(tmp_path / "out", "image", "train")}
    val = {r.members["png"] for r in records(tmp_path / "out", "image", "val")}
    assert not train & val and len(train | val) == 60 and 5 <= len(val) <= 25


def test_split_by_content_gives_the_share_that_was_asked_for():
    digests = [Draws("digest", n).raw(2).tobytes() for n in range(4000)]
    share = sum(split_by_content(d, 0.2) == "val" for d in digests) / len(digests)
    assert abs(share - 0.2) < 0.03


# Pairs ------------------------------------------------------------------------------------


def pair_files(folder: Path, count: int) -> None:
    for number in range(count):
        put(folder / f"pics/{number}.png", drawn(number))


def test_jsonl_csv_and_json_lists_of_the_same_pairs_give_the_same_records(tmp_path):
    pair_files(tmp_path, 3)
    said = [(f"pics/{n}.png", text) for n in range(3) for text in (f'a "{n}", red', f"b {n}")]
    put_rows(tmp_path / "a.jsonl", [{"image": i, "caption": c} for i, c in said])
    put(tmp_path / "b.json", json.dumps([{"image": i, "caption": c} for i, c in said]))
    put(tmp_path / "c.json", json.dumps([[i, c] for i, c in said]))
    with (tmp_path / "d.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *said])
    grouped: dict[str, list[str]] = {}
    for image, caption in said:
        grouped.setdefault(image, []).append(caption)
    put_rows(tmp_path / "e.jsonl", [{"image": i, "captions": c} for i, c in grouped.items()])
    found = []
    for name in ("a.jsonl", "b.json", "c.json", "d.csv", "e.jsonl"):
        out = tmp_path / "out" / name.replace(".", "_")
        assert prepare("pairs", tmp_path / name, "--out", out) == 0
        found.append(by_image(out, "pair", "train"))
    assert found[0]["pics/1.png"]["captions"] == ['a "1", red', "b 1"]
    assert all(other == found[0] for other in found)


def test_columns_can_have_other_names(tmp_path):
    pair_files(tmp_path, 1)
    put(tmp_path / "clip.tsv", "filepath\ttitle\npics/0.png\ta cat\n")
    words = ("--image-column", "filepath", "--caption-column", "title")
    prepare("pairs", tmp_path / "clip.tsv", "--out", tmp_path / "out", *words)
    assert by_image(tmp_path / "out", "pair", "train")["pics/0.png"]["captions"] == ["a cat"]


def test_bad_rows_are_named_by_file_line_and_reason(tmp_path, capsys):
    pair_files(tmp_path, 3)
    put(tmp_path / "pics/torn.png", drawn(7)[:-30])
    put(tmp_path / "pics/page.jpg", b"<html>404</html>")
    lines = [
        json.dumps({"image": "pics/0.png", "caption": "fine"}),
        "{broken",
        json.dumps({"image": "pics/missing.png", "caption": "x"}),
        json.dumps({"image": "../outside.png", "caption": "x"}),
        json.dumps({"image": "/etc/passwd", "caption": "x"}),
        json.dumps({"image": "pics/1.png", "captions": ["  ", ""]}),
        json.dumps({"image": "pics/2.png"}),
        json.dumps({"image": "pics/torn.png", "caption": "x"}),
        json.dumps({"image": "pics/page.jpg", "caption": "x"}),
        json.dumps({"image": "pics/1.png", "caption": "x", "split": "tiny"}),
        json.dumps({"caption": "no image"}),
        json.dumps({"image": "pics/0.png", "caption": 7}),
    ]
    table = put(tmp_path / "rows.jsonl", "\n".join(lines) + "\n")
    with pytest.raises(DataBudgetError) as error:
        prepare("pairs", table, "--check")
    assert error.value.exit_code == 65
    told = capsys.readouterr()
    expected = {
        2: "bad_json", 3: "no_image", 4: "unsafe_name", 5: "unsafe_name", 6: "empty_text",
        7: "no_text", 8: "truncated_image", 9: "not_an_image", 10: "bad_split", 11: "no_image",
        12: "bad_caption",
    }  # fmt: skip
    for line, reason in expected.items():
        assert [
            row for row in told.err.splitlines() if f"{table}:{line}: " in row and reason in row
        ], f"line {line}"
    assert f"{table}:1: " not in told.err
    assert "1 records" in told.out and "12 seen" in told.out


def test_half_a_percent_of_bad_samples_goes_on_with_exact_counts(tmp_path):
    rows = []
    for number in range(400):
        bad = number in (17, 250)
        put(tmp_path / f"pics/{number}.png", b"not a picture" if bad else drawn(number))
        rows.append({"image": f"pics/{number}.png", "caption": f"picture {number}"})
    table = put_rows(tmp_path / "rows.jsonl", rows)
    assert prepare("pairs", table, "--out", tmp_path / "out") == 0
    assert len(records(tmp_path / "out", "pair", "train")) == 398
    assert skips(tmp_path / "out") == {"not_an_image": 2}
    wheres = [
        json.loads(r)["where"] for r in (tmp_path / "out/skips.jsonl").read_text().split("\n")[:2]
    ]
    assert set(wheres) == {f"{table}:18", f"{table}:251"}
    report = books(tmp_path / "out")
    assert report["seen"] == 400 and report["skipped"] == {"not_an_image": 2}


def test_five_percent_of_bad_samples_exits_65_and_leaves_nothing_behind(tmp_path):
    rows = []
    for number in range(200):
        put(tmp_path / f"pics/{number}.png", b"" if number % 20 == 0 else drawn(number))
        rows.append({"image": f"pics/{number}.png", "caption": f"picture {number}"})
    table = put_rows(tmp_path / "rows.jsonl", rows)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(DataBudgetError, match="not_an_image") as error:
        prepare("pairs", table, "--out", tmp_path / "out")
    assert error.value.exit_code == 65 and str(table) in str(error.value)
    assert sorted(os.listdir(tmp_path)) == before
    assert prepare("pairs", table, "--out", tmp_path / "out", "--budget", 0.05) == 0
    assert skips(tmp_path / "out") == {"not_an_image": 10}


def test_a_check_reads_everything_and_writes_nothing(tmp_path, capsys):
    pair_files(tmp_path, 4)
    rows = [{"image": f"pics/{n}.png", "caption": "x"} for n in range(4)]
    table = put_rows(tmp_path / "rows.jsonl", rows)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    assert prepare("pairs", table, "--check", "--out", tmp_path / "out", "--json") == 0
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert json.loads(capsys.readouterr().out)["records"] == {"out pair train": 4}


def test_absolute_names_pass_only_when_the_user_vouches_for_the_file(tmp_path):
    picture = put(tmp_path / "far/0.png", drawn(0))
    table = put_rows(tmp_path / "in/rows.jsonl", [{"image": str(picture), "caption": "x"}])
    with pytest.raises(DataBudgetError, match="--allow-absolute"):
        prepare("pairs", table, "--out", tmp_path / "out")
    assert prepare("pairs", table, "--out", tmp_path / "out", "--allow-absolute") == 0


def test_a_row_that_moves_its_image_to_another_split_is_refused(tmp_path, capsys):
    pair_files(tmp_path, 1)
    rows = [{"image": "pics/0.png", "caption": c, "split": s} for c, s in ("at", "bv")]
    rows[0]["split"], rows[1]["split"] = "train", "val"
    put_rows(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataBudgetError):
        prepare("pairs", tmp_path / "rows.jsonl", "--check")
    assert "two_splits" in capsys.readouterr().err


def test_captions_are_cleaned_and_the_same_caption_is_kept_once(tmp_path):
    pair_files(tmp_path, 1)
    row = {"image": "pics/0.png", "captions": ["a  cat\n", "a cat", "", "caf\u0065\u0301"]}
    put_rows(tmp_path / "rows.jsonl", [row])
    prepare("pairs", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    (found,) = by_image(tmp_path / "out", "pair", "train").values()
    assert found["captions"] == ["a cat", "caf\u00e9"]


def test_existing_tars_are_named_and_not_copied(tmp_path):
    for shard in range(3):
        members = {}
        for number in range(5):
            key = f"{shard}{number:08d}"
            members |= {f"{key}.png": drawn(int(key)), f"{key}.txt": f"picture {key}".encode()}
            members |= {f"{key}.json": json.dumps({"caption": f"picture {key}"}).encode()}
        put_tar(tmp_path / f"web/{shard:05d}.tar", members)
    pattern = f"{tmp_path}/web/{{00000..00001}}.tar"
    out = tmp_path / "out"
    assert prepare("pairs", pattern, "--val-shards", tmp_path / "web/00002.tar", "--out", out) == 0
    assert [len(records(out, "pair", split)) for split in ("train", "val")] == [10, 5]
    assert [p.name for p in out.iterdir()] == ["dataset.json"]
    assert records(out, "pair", "val")[0].captions() == ["picture 200000000"]
    copied = tmp_path / "copy"
    assert prepare("pairs", pattern, "--out", copied, "--copy") == 0
    pictures = {r.image() for r in records(copied, "pair", "train")}
    assert pictures == {r.image() for r in records(out, "pair", "train")}


def test_records_of_existing_tars_without_image_or_text_are_counted_against_the_budget(tmp_path):
    members = {f"{n}.png": drawn(n) for n in range(4)} | {f"{n}.txt": b"x" for n in range(1, 5)}
    put_tar(tmp_path / "a.tar", members)
    with pytest.raises(DataBudgetError, match="2 bad records"):
        prepare("pairs", tmp_path / "a.tar", "--out", tmp_path / "out")
    assert prepare("pairs", tmp_path / "a.tar", "--out", tmp_path / "out", "--budget", 0.5) == 0
    assert skips(tmp_path / "out") == {"no_text": 1, "no_image": 1}


# Text -------------------------------------------------------------------------------------


def documents(folder: Path, split: str) -> list[str]:
    found = []
    for record in records(folder, "text", split):
        assert len(record.members["txt"]) <= MEMBER
        found += record.members["txt"].decode().splitlines()
    return found


def test_every_document_comes_out_once_and_in_order(tmp_path):
    said = [f"document {n} " + "word " * (n % 90) for n in range(3000)]
    put(tmp_path / "a.train.txt", "\n".join(said) + "\n\n")
    put(tmp_path / "a.val.txt", "one\r\n\r\ntwo")
    files = (tmp_path / "a.train.txt", tmp_path / "a.val.txt")
    assert prepare("text", *files, "--out", tmp_path / "out") == 0
    assert documents(tmp_path / "out", "train") == [text.strip() for text in said]
    assert documents(tmp_path / "out", "val") == ["one", "two"]
    assert {s.name for s in Dataset.open(tmp_path / "out").sources} == {"a"}


def test_blank_lines_separate_documents_when_paragraphs_are_asked_for(tmp_path):
    path = put(tmp_path / "book.txt", "\n\nfirst line\nsecond line\n\n \nother\n\nlast")
    prepare("text", path, "--documents", "paragraphs", "--out", tmp_path / "out")
    assert documents(tmp_path / "out", "train") == ["first line second line", "other", "last"]


def test_a_long_document_is_cut_at_blanks_and_loses_nothing(tmp_path):
    words = [f"word{n}" for n in range(40_000)]
    path = put(tmp_path / "long.txt", " ".join(words))
    prepare("text", path, "--out", tmp_path / "out")
    pieces = documents(tmp_path / "out", "train")
    assert " ".join(pieces).split() == words and len(pieces) > 1
    japanese = "\u65e5" * 50_000
    found = list(read_documents(put(tmp_path / "ja.txt", japanese), "lines"))
    texts = [
        doc.data.decode() for doc in found if not isinstance(doc, Bad)
    ]  # strict: whole characters
    assert "".join(texts) == japanese and max(map(len, (t.encode() for t in texts))) <= PIECE


def test_odd_texts_are_kept_clean_or_named_and_their_neighbours_stay_in_order(tmp_path):
    rows = [
        json.dumps({"text": "before"}), json.dumps({"text": ""}), '{"text": "lone \\ud800 half"}',
        json.dumps({"text": "nul \0 inside\nand a line"}), json.dumps({"no": 1}), "{", "[1]",
        json.dumps({"text": "\ufeff\U0001f468\u200d\U0001f469"}), json.dumps({"text": "[MASK]"}),
        json.dumps({"text": "after"}),
    ]  # fmt: skip
    path = put(tmp_path / "odd.jsonl", "\n".join(rows))
    prepare("text", path, "--out", tmp_path / "out", "--budget", 0.5)
    found = documents(tmp_path / "out", "train")
    assert (
        found[0] == "before" and found[-1] == "after" and found[-2] == "[MASK]" and len(found) == 6
    )
    assert all("\0" not in text and "\n" not in text for text in found)
    assert skips(tmp_path / "out") == {"no_text": 1, "bad_json": 2}
    wheres = [
        json.loads(r)["where"] for r in (tmp_path / "out/skips.jsonl").read_text().splitlines()
    ]
    assert wheres == [f"{path}:5", f"{path}:6", f"{path}:7"]


# Public data sets -------------------------------------------------------------------------


def imagenet(root: Path) -> list[str]:
    wnids = ["n01440764", "n02979186", "n03000684"]
    for number in range(4):
        put(root / f"train/{wnids[1]}/{wnids[1]}_{number}.JPEG", drawn(10 + number, "JPEG"))
    put_tar(root / f"train/{wnids[0]}.tar", {f"{wnids[0]}_{n}.JPEG": drawn(n) for n in range(3)})
    put_tar(
        root / f"train/{wnids[2]}.tar", {f"{wnids[2]}_{n}.JPEG": drawn(20 + n) for n in range(2)}
    )
    for number in range(1, 4):
        put(root / f"val/ILSVRC2012_val_0000000{number}.JPEG", drawn(30 + number))
    put(
        root / "LOC_synset_mapping.txt",
        f"{wnids[0]} tench, Tinca tinca\n{wnids[1]} cassette player\n",
    )
    return wnids


def test_imagenet_labels_are_places_among_the_sorted_wnids(tmp_path):
    wnids = imagenet(tmp_path / "in")
    truth = "ImageId,PredictionString\n" + "".join(
        f"ILSVRC2012_val_0000000{n},{wnids[3 - n]} 1 2 3 4\n" for n in range(1, 4)
    )
    put(tmp_path / "in/LOC_val_solution.csv", truth)
    assert prepare("imagenet", tmp_path / "in", "--out", tmp_path / "out") == 0
    train = by_image(tmp_path / "out", "image", "train")
    assert Counter((row["label"], row["wnid"]) for row in train.values()) == {
        (0, wnids[0]): 3, (1, wnids[1]): 4, (2, wnids[2]): 2,
    }  # fmt: skip
    assert train[f"{wnids[0]}/{wnids[0]}_0.JPEG"]["class"] == "tench"
    val = by_image(tmp_path / "out", "image", "val")
    assert [val[f"val/ILSVRC2012_val_0000000{n}.JPEG"]["label"] for n in (1, 2, 3)] == [2, 1, 0]
    assert facts(tmp_path / "out")["classes"] == ["tench", "cassette player", wnids[2]]


def test_the_three_ways_to_label_imagenets_val_agree_and_the_official_one_needs_its_ids(tmp_path):
    wnids = imagenet(tmp_path / "in")
    names = [f"ILSVRC2012_val_0000000{n}" for n in (1, 2, 3)]
    caffe = put(tmp_path / "val.txt", "".join(f"{n}.JPEG {2 - i}\n" for i, n in enumerate(names)))
    official = put(tmp_path / "truth.txt", "1\n3\n2\n")
    ids = put(tmp_path / "ids.txt", f"{wnids[2]}\n{wnids[0]}\n{wnids[1]}\n")
    labels = []
    for number, words in enumerate(
        [("--val-labels", caffe), ("--val-labels", official, "--synsets", ids)]
    ):
        out = tmp_path / f"out{number}"
        prepare("imagenet", tmp_path / "in", "--out", out, *words)
        val = by_image(out, "image", "val")
        labels.append([val[f"val/{name}.JPEG"]["label"] for name in names])
    assert labels == [[2, 1, 0]] * 2
    with pytest.raises(ConfigError, match="--synsets"):
        prepare("imagenet", tmp_path / "in", "--out", tmp_path / "x", "--val-labels", official)


def test_the_full_imagenet_release_is_archives_in_one_folder(tmp_path):
    for wnid in ("n00005787", "n00006484"):
        put_tar(
            tmp_path / f"in/{wnid}.tar",
            {f"{wnid}_{n}.JPEG": drawn(n + hash_of(wnid, 0)) for n in range(5)},
        )
    words = ("--out", tmp_path / "out", "--val-fraction", 0.3)
    assert prepare("imagenet", tmp_path / "in", *words) == 0
    both = [len(records(tmp_path / "out", "image", split)) for split in ("train", "val")]
    assert sum(both) == 10 and both[1] > 0


def coco(root: Path) -> None:
    """Two training, one restval, one val, one test image in 2014's layout."""
    places = [("train2014", 1), ("train2014", 2), ("val2014", 3), ("val2014", 4), ("val2014", 5)]
    names = [f"COCO_{folder}_{number:012d}.jpg" for folder, number in places]
    for (folder, number), name in zip(places, names, strict=True):
        put(root / folder / name, drawn(number, "JPEG"))
    for year in ("train2014", "val2014"):
        mine = [
            (n, name) for (folder, n), name in zip(places, names, strict=True) if folder == year
        ]
        official = {
            "info": {"description": "[{"},
            "images": [{"id": n, "file_name": name, "width": 24} for n, name in mine],
            "annotations": [
                {"id": 10 * n + k, "image_id": n, "caption": f"caption {k} of {n}"}
                for n, _ in mine
                for k in range(2)
            ],
        }
        put(root / f"annotations/captions_{year}.json", json.dumps(official))


def karpathy() -> dict[str, Any]:
    splits = ("train", "train", "restval", "val", "test")
    return {
        "dataset": "coco",
        "images": [
            {
                "filepath": "train2014" if n < 3 else "val2014",
                "filename": f"COCO_{'train' if n < 3 else 'val'}2014_{n:012d}.jpg",
                "cocoid": n,
                "split": split,
                "sentences": [{"raw": f"said {k} of {n}", "tokens": []} for k in range(2)],
            }
            for n, split in enumerate(splits, 1)
        ],
    }


def test_coco_is_split_officially_or_by_karpathy_whose_restval_is_training(tmp_path):
    coco(tmp_path / "in")
    prepare("coco", tmp_path / "in", "--out", tmp_path / "official")
    counts = [len(records(tmp_path / "official", "pair", s)) for s in ("train", "val", "test")]
    assert counts == [2, 3, 0]
    split = put(tmp_path / "dataset_coco.json", json.dumps(karpathy()))
    prepare("coco", tmp_path / "in", "--karpathy", split, "--out", tmp_path / "k")
    counts = [len(records(tmp_path / "k", "pair", s)) for s in ("train", "val", "test")]
    assert counts == [3, 1, 1]
    (test,) = by_image(tmp_path / "k", "pair", "test").values()
    assert test["captions"] == ["said 0 of 5", "said 1 of 5"] and test["coco_id"] == 5


def test_karpathys_split_finds_the_photos_under_their_names_of_2017_too(tmp_path):
    for number in range(1, 6):
        put(tmp_path / f"in/train2017/{number:012d}.jpg", drawn(number, "JPEG"))
    put(tmp_path / "in/dataset_coco.json", json.dumps(karpathy()))
    prepare("coco", tmp_path / "in", "--out", tmp_path / "out")
    assert len(records(tmp_path / "out", "pair", "train")) == 3


def test_a_cut_off_annotation_file_is_named(tmp_path):
    coco(tmp_path / "in")
    path = tmp_path / "in/annotations/captions_val2014.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(InputError, match="captions_val2014.json"):
        prepare("coco", tmp_path / "in", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_flickr30k_comes_from_karpathy_or_from_its_own_lists(tmp_path):
    names = [f"{n}.jpg" for n in range(4)]
    for number, name in enumerate(names):
        put(tmp_path / "in/flickr30k-images" / name, drawn(number, "JPEG"))
    rows = [(name, k, f"A man , {k} .") for name in names for k in range(2)]
    put(
        tmp_path / "in/results.csv",
        "image_name| comment_number| comment\n" + "".join(f"{n}| {k}| {c}\n" for n, k, c in rows),
    )
    put(tmp_path / "results.token", "".join(f"{n}#{k}\t{c}\n" for n, k, c in rows))
    prepare("flickr30k", tmp_path / "in", "--out", tmp_path / "csv")
    words = ("--captions", tmp_path / "results.token")
    prepare("flickr30k", tmp_path / "in", "--out", tmp_path / "token", *words)
    found = by_image(tmp_path / "csv", "pair", "train")
    assert found == by_image(tmp_path / "token", "pair", "train")
    assert found["3.jpg"]["captions"] == ["A man , 0 .", "A man , 1 ."]
    images = [
        {"filename": n, "split": s, "sentences": [{"raw": "a"}, {"raw": "b"}]}
        for n, s in zip(names, ("train", "train", "val", "test"), strict=True)
    ]
    put(tmp_path / "in/dataset_flickr30k.json", json.dumps({"images": images}))
    words = ("--karpathy", tmp_path / "in/dataset_flickr30k.json")
    prepare("flickr30k", tmp_path / "in", "--out", tmp_path / "k", *words)
    assert [len(records(tmp_path / "k", "pair", s)) for s in ("train", "val", "test")] == [2, 1, 1]


def test_visual_genomes_phrases_become_captions_and_cocos_test_photos_can_be_left_out(tmp_path):
    data, regions = [], []
    for number, folder in ((1, "VG_100K"), (2, "VG_100K_2"), (3, "VG_100K_2")):
        put(tmp_path / f"in/{folder}/{number}.jpg", drawn(number, "JPEG"))
        url = f"https://cs.stanford.edu/people/rak248/{folder}/{number}.jpg"
        coco_id = {1: None, 2: 4, 3: 1}[number]
        data.append({"image_id": number, "url": url, "coco_id": coco_id})
        phrases = [{"region_id": k, "phrase": f"phrase {k % 2} of {number}"} for k in range(3)]
        regions.append({"id": number, "regions": phrases})
    put(tmp_path / "in/image_data.json", json.dumps(data))
    put(tmp_path / "in/region_descriptions.json", json.dumps(regions))
    prepare("vg", tmp_path / "in", "--out", tmp_path / "all")
    found = by_image(tmp_path / "all", "pair", "train")
    assert set(found) == {"VG_100K/1.jpg", "VG_100K_2/2.jpg", "VG_100K_2/3.jpg"}
    assert found["VG_100K/1.jpg"]["captions"] == ["phrase 0 of 1", "phrase 1 of 1"]
    split = put(tmp_path / "dataset_coco.json", json.dumps(karpathy()))
    prepare("vg", tmp_path / "in", "--karpathy", split, "--out", tmp_path / "clean")
    kept = by_image(tmp_path / "clean", "pair", "train")
    assert set(kept) == {"VG_100K/1.jpg", "VG_100K_2/3.jpg"}  # 2 is COCO 4, Karpathy's val
    report = books(tmp_path / "clean")
    assert report["dropped"] == 1 and report["overlap"] == {"coco_id": 1}


def cc3m_list(root: Path, count: int) -> None:
    rows = "".join(f'a "quoted caption {n}\thttp://x.org/p/{n}.jpg?w=1\n' for n in range(count))
    put(root / "Train_GCC-training.tsv", rows)


def test_cc3m_rows_without_a_file_are_counted_and_are_no_fault(tmp_path):
    cc3m_list(tmp_path / "in", 10)
    for number in range(4):
        put(tmp_path / f"in/files/{number:04d}.jpg", drawn(number, "JPEG"))
    put(
        tmp_path / "in/index.tsv",
        "url\tfile\n"
        + "".join(f"http://x.org/p/{n}.jpg?w=1\tfiles/{n:04d}.jpg\n" for n in range(5)),
    )
    assert prepare("cc3m", tmp_path / "in", "--out", tmp_path / "out") == 0
    found = by_image(tmp_path / "out", "pair", "train")
    assert found["files/0003.jpg"]["captions"] == ['a "quoted caption 3'] and len(found) == 4
    assert skips(tmp_path / "out") == {"no_image": 6}
    report = books(tmp_path / "out")
    assert report["absent"] == 6 and report["seen"] == 10 and report["skipped"] == {}


def test_cc3m_files_of_img2dataset_are_matched_by_the_url_in_their_json(tmp_path):
    cc3m_list(tmp_path / "in", 3)
    for number in range(2):
        key = f"00000/00000000{number}"
        put(tmp_path / f"in/{key}.jpg", drawn(number, "JPEG"))
        put(tmp_path / f"in/{key}.json", json.dumps({"url": f"http://x.org/p/{number}.jpg?w=1"}))
    prepare("cc3m", tmp_path / "in", "--out", tmp_path / "out")
    found = by_image(tmp_path / "out", "pair", "train")
    assert found["00000/000000001.jpg"]["captions"] == ['a "quoted caption 1'] and len(found) == 2


def test_vilts_folder_of_cc3m_is_read_as_it_is(tmp_path):
    put(tmp_path / "in/images_train/0000/0000_1.jpg", drawn(0, "JPEG"))
    put(
        tmp_path / "in/train_annot.json", json.dumps([["0000_1.jpg", "a dog"], ["0000_2.jpg", "x"]])
    )
    prepare("cc3m", tmp_path / "in", "--out", tmp_path / "out")
    (found,) = by_image(tmp_path / "out", "pair", "train").values()
    assert found["captions"] == ["a dog"]
    assert books(tmp_path / "out")["absent"] == 1


def test_both_forms_of_sbus_list_give_the_same_records(tmp_path):
    urls = [f"http://static.flickr.com/1/{n}_abc.jpg" for n in range(4)]
    said = [f"caption {n}" for n in range(4)]
    found = []
    for form in ("txt", "json"):
        root = tmp_path / form
        for number in range(3):
            put(root / f"pics/{number}_abc.jpg", drawn(number, "JPEG"))
        if form == "txt":
            put(root / "SBU_captioned_photo_dataset_urls.txt", "\n".join(urls) + "\n")
            put(root / "SBU_captioned_photo_dataset_captions.txt", "\n".join(said) + "\n")
        else:
            lists = {"user_ids": ["a"] * 4, "captions": said, "image_urls": urls}
            put(root / "sbu-captions-all.json", json.dumps(lists))
        prepare("sbu", root, "--out", tmp_path / f"out_{form}")
        found.append(by_image(tmp_path / f"out_{form}", "pair", "train"))
    assert found[0] == found[1] and len(found[0]) == 3
    assert found[0]["pics/2_abc.jpg"]["captions"] == ["caption 2"]
    put(tmp_path / "txt/SBU_captioned_photo_dataset_captions.txt", "only one\n")
    with pytest.raises(InputError, match="differ in length"):
        prepare("sbu", tmp_path / "txt", "--check")


# Leaks ------------------------------------------------------------------------------------


def test_evaluation_images_are_found_by_file_and_by_look_and_can_be_left_out(tmp_path):
    big = [np.asarray(Image.open(io.BytesIO(drawn(n, size=(96, 64))))) for n in range(12)]

    def saved(number: int, kind: str, size: tuple[int, int]) -> bytes:
        file = io.BytesIO()
        Image.fromarray(big[number]).resize(size, Image.Resampling.BICUBIC).save(file, kind)
        return file.getvalue()

    for number in range(4):
        put(tmp_path / f"eval/test/{number}.png", saved(number, "PNG", (96, 64)))
    prepare("images", tmp_path / "eval", "--out", tmp_path / "held")
    put(tmp_path / "in/same.png", saved(0, "PNG", (96, 64)))
    put(tmp_path / "in/smaller.png", saved(1, "PNG", (72, 48)))
    for number in range(4, 12):
        put(tmp_path / f"in/{number}.png", saved(number, "PNG", (96, 64)))
    words = ("--eval-against", tmp_path / "held")
    prepare("images", tmp_path / "in", "--out", tmp_path / "seen", *words)
    rows = [json.loads(r) for r in (tmp_path / "seen/overlap.jsonl").read_text().splitlines()]
    assert {(row["image"], row["same"]) for row in rows} == {
        ("same.png", "file"),
        ("smaller.png", "look"),
    }
    assert len(records(tmp_path / "seen", "image", "train")) == 10
    prepare("images", tmp_path / "in", "--out", tmp_path / "clean", *words, "--drop-overlap")
    kept = by_image(tmp_path / "clean", "image", "train")
    assert len(kept) == 8 and not {"same.png", "smaller.png"} & set(kept)


def test_a_val_image_that_is_in_train_too_is_reported_without_being_asked(tmp_path):
    put(tmp_path / "in/train/a.png", drawn(0))
    put(tmp_path / "in/train/b.png", drawn(1))
    put(tmp_path / "in/val/c.png", drawn(0))
    prepare("images", tmp_path / "in", "--out", tmp_path / "out")
    assert books(tmp_path / "out")["overlap"] == {"file": 1}


def test_flat_pictures_have_no_look_by_which_they_could_be_mistaken():
    assert thumbnail(np.full((20, 30, 3), 200, np.uint8)) is None


def test_copies_of_photos_look_alike_and_different_photos_do_not(shared_data, tmp_path):
    with tarfile.open(shared_data / "flickr8k/val-000.tar") as archive:
        photos = [archive.extractfile(member).read() for member in archive.getmembers()[:150]]
    looks, copies = [], []
    for number, photo in enumerate(photos):
        picture = Image.open(io.BytesIO(photo))
        looks.append(thumbnail(np.asarray(picture)))
        file = io.BytesIO()
        picture.resize(((224, 180), (96, 96))[number % 2]).save(file, "JPEG", quality=50)
        copies.append(thumbnail(np.asarray(Image.open(file))))
    alike = np.stack(looks) @ np.stack(copies).T
    assert (alike.diagonal() >= ALIKE).all()
    assert (alike[~np.eye(len(photos), dtype=bool)] < ALIKE).all()


# The command ------------------------------------------------------------------------------


def test_an_existing_folder_is_never_written_into(tmp_path):
    put(tmp_path / "in/a.png", drawn(0))
    put(tmp_path / "out/mine.txt", "keep")
    with pytest.raises(ConfigError, match="exists already") as error:
        prepare("images", tmp_path / "in", "--out", tmp_path / "out")
    assert error.value.exit_code == 78
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("images", "nowhere", "--out", "x"), "nowhere"),
        (("images", "--out", "x"), "name a folder"),
        (("pairs", "a.tar", "b.jsonl", "--out", "x"), "tar shards and tables"),
        (("images", "nowhere"), "--out"),
        (("text", "a.txt", "--out", "x", "--val-fraction", "1.5"), "--val-fraction"),
        (("text", "a.txt", "--out", "x", "--max-size", "5"), "not text"),
        (("cifar", "--out", "x"), "cifar"),
        (("images", "nowhere", "--out", "x", "--name", "../up"), "--name"),
    ],
)
def test_wrong_usage_is_an_error_that_says_what_to_do(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, InputError), match=says):
        prepare(*words)
    assert os.listdir(tmp_path) == []


def test_a_folder_without_a_usable_image_is_refused_by_name(tmp_path):
    put(tmp_path / "in/readme.md", "nothing here")
    with pytest.raises(InputError, match=str(tmp_path / "in")):
        prepare("images", tmp_path / "in", "--out", tmp_path / "out")


@pytest.mark.fault
def test_a_stopped_command_leaves_nothing_behind(tmp_path):
    put(tmp_path / "in/0.png", drawn(0, size=(1500, 1500)))
    rows = [{"image": "0.png", "caption": f"c {n}"} for n in range(3)]
    for number in range(1, 400):
        os.link(tmp_path / "in/0.png", tmp_path / f"in/{number}.png")
        rows.append({"image": f"{number}.png", "caption": "c"})
    put_rows(tmp_path / "in/rows.jsonl", rows)
    words = ["prepare", "pairs", str(tmp_path / "in/rows.jsonl"), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "vlbeit", *words], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.part-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, "too fast to be stopped: give it more images"
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=30)
    assert process.returncode == 75, told
    assert sorted(os.listdir(tmp_path)) == ["in"]


def test_hostile_archives_give_names_and_no_files(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name, kind in (("../up.png", b"0"), ("/abs.png", b"0"), ("link.png", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd" if kind == tarfile.SYMTYPE else ""
            info.size = len(drawn(0)) if kind == b"0" else 0
            archive.addfile(info, io.BytesIO(drawn(0)) if kind == b"0" else None)
        info = tarfile.TarInfo("good.png")
        info.size = len(drawn(1))
        archive.addfile(info, io.BytesIO(drawn(1)))
    with pytest.raises(DataBudgetError, match="unsafe"):
        prepare("images", path, "--out", tmp_path / "out")
    prepare("images", path, "--out", tmp_path / "out", "--budget", 0.9)
    assert set(by_image(tmp_path / "out", "image", "train")) == {"good.png"}
    assert sum(skips(tmp_path / "out").values()) == 3


def test_record_keys_are_plain_short_and_distinct():
    names = ["a.jpg", "n01/n01_2.JPEG", "a b.jpg", "a_b.jpg", "v1.2/x.png", "v1_2/x.png"]
    names += ["\u00e9.png", "\udce9.png", "/abs/x.jpg", "x" * 300 + ".jpg", "x" * 301 + ".jpg"]
    keys = [record_key(name) for name in names]
    assert keys[:2] == ["a", "n01/n01_2"] and len(set(keys)) == len(keys)
    assert all(len(key) <= 90 and "." not in key and key.isascii() for key in keys)


def test_images_that_differ_in_suffix_alone_are_two_records(tmp_path):
    put(tmp_path / "in/a.png", drawn(0))
    put(tmp_path / "in/a.jpg", drawn(1, "JPEG"))
    prepare("images", tmp_path / "in", "--out", tmp_path / "out")
    assert len(records(tmp_path / "out", "image", "train")) == 2


def test_a_json_list_is_read_in_pieces_as_json_reads_it_whole(tmp_path):
    value = {
        "info": {"images": [1, 2]},
        "images": [
            {"id": n, "text": 'a "b" [c] \\ ' * (n % 7), "deep": [[n]]} for n in range(9000)
        ],
        "numbers": [1, 2.5, -3e4, True, None, "x" * 3_000_000],
    }
    path = put(tmp_path / "a.json", json.dumps(value, indent=1))
    assert path.stat().st_size > 3 << 20  # several pieces
    for key in ("images", "numbers"):
        assert [element for _, element in json_list(path, key)] == value[key]
    with pytest.raises(InputError, match="annotations"):
        list(json_list(path, "annotations"))


# Real data --------------------------------------------------------------------------------


@pytest.mark.slow
def test_flickr8ks_seven_thousand_photos_come_out_as_its_readme_counts_them(shared_data, tmp_path):
    prepare("pairs", shared_data / "flickr8k/captions.jsonl", "--out", tmp_path / "out")
    sizes = {
        split: sum(map(len, open_sources([tmp_path / "out"], "pair", split)))
        for split in ("train", "val")
    }
    assert sizes == {"train": 6000, "val": 1000}
    said = {}
    for line in (shared_data / "flickr8k/captions.jsonl").open():
        row = json.loads(line)
        said[row["image"]] = row["captions"]
    val = by_image(tmp_path / "out", "pair", "val")
    assert all(row["captions"] == list(dict.fromkeys(said[name])) for name, row in val.items())


@pytest.mark.slow
def test_imagenette_and_the_text_folder_come_out_as_their_readmes_count_them(shared_data, tmp_path):
    tables = [shared_data / f"imagenette/{split}.jsonl" for split in ("train", "val")]
    prepare("images", *tables, "--out", tmp_path / "imagenette")
    for split, per_class in (("train", 400), ("val", 100)):
        found = by_image(tmp_path / "imagenette", "image", split)
        assert Counter(row["label"] for row in found.values()) == dict.fromkeys(
            range(10), per_class
        )
    files = sorted((shared_data / "text").glob("w*.txt"))
    prepare("text", *files, "--out", tmp_path / "text")
    counts = facts(tmp_path / "text")["documents"]
    assert counts == {
        "wikitext train": 3437, "wikitext val": 150,
        "wordnet_glosses train": 80615, "wordnet_glosses val": 1500,
    }  # fmt: skip


def test_the_tiny_coco_is_read_in_the_official_format_and_as_jsonl_alike(shared_data, tmp_path):
    root = shared_data / "coco_tiny"
    words = ("--images", root / "images-000.tar", "--split", "val")
    prepare("coco", root, *words, "--out", tmp_path / "official")
    prepare("pairs", root / "captions.jsonl", "--split", "val", "--out", tmp_path / "rows")
    official = by_image(tmp_path / "official", "pair", "val")
    rows = by_image(tmp_path / "rows", "pair", "val")
    assert len(official) == 100
    assert {n: set(r["captions"]) for n, r in official.items()} == {
        n: set(r["captions"]) for n, r in rows.items()
    }
