"""Codes on disk: the same training as with codes made on the way, and a refusal of stale ones."""

import hashlib
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from toy_records import image_source, pair_source, toy_tokenizer
from toy_run import TOY, losses, rows, toy_codes, toy_run, training_here, write_toy_data
from vlbeit.config import CropConfig
from vlbeit.data.loader import build_streams, open_streams
from vlbeit.data.order import Visit
from vlbeit.data.stored_codes import CodeFolder, code_dtype, write_codes
from vlbeit.errors import ConfigError, DataBudgetError, InputError, SaveError
from vlbeit.train.tokenizer_cli import main
from vlbeit.train.tokenizers import find_stored_codes

SIZE = (32, 32)
WHOLE = {"scale": (1.0, 1.0), "flip": 0.0, "jitter": 0.0}
BOTH_WHOLE = {f"input.{stream}": WHOLE for stream in ("images", "pairs")}


@pytest.fixture(autouse=True)
def process_as_before() -> Iterator[None]:
    with training_here():
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLBEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield write_toy_data(tmp_path_factory.mktemp("data") / "toy")


@pytest.fixture(scope="module")
def stored(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("codes") / "out"
    assert main(["encode", str(data / "visual"), "--data", str(data), "--out", str(out)]) == 0
    return out


def test_stored_codes_train_the_model_of_codes_made_on_the_way(
    data: Path, stored: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    online = toy_run(data, tmp_path / "online", BOTH_WHOLE | {"max_steps": 6})
    asked: list[int] = []
    encode = type(toy_codes()).encode
    monkeypatch.setattr(
        "vlbeit.tokens.vqkd.VQKDTokenizer.encode",
        lambda self, pixels: asked.append(len(pixels)) or encode(self, pixels),
    )
    settings = BOTH_WHOLE | {"max_steps": 6, "tokenizers.codes": str(stored)}
    offline = toy_run(data, tmp_path / "offline", settings)
    assert losses(offline) == losses(online)
    assert asked == [], "the tokenizer was asked all the same"
    assert rows(offline, "ledger.jsonl") == rows(online, "ledger.jsonl")

    # The negative check: codes of each other's records are another training.
    wrong = tmp_path / "wrong"
    wrong.mkdir()
    for file in stored.iterdir():
        (wrong / file.name).write_bytes(file.read_bytes())
    body = json.loads((wrong / "codes.json").read_text())
    for row in body["sources"]:
        path = wrong / row["file"]
        np.save(path, np.load(path)[::-1])
        row["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (wrong / "codes.json").write_text(json.dumps(body))
    other = toy_run(data, tmp_path / "other", settings | {"tokenizers.codes": str(wrong)})
    assert losses(other) != losses(online)


def test_loader_processes_read_the_same_codes(data: Path, stored: Path, tmp_path: Path) -> None:
    settings = BOTH_WHOLE | {"max_steps": 3, "tokenizers.codes": str(stored)}
    alone = toy_run(data, tmp_path / "alone", settings)
    two = toy_run(data, tmp_path / "two", settings | {"input.workers": 2})
    assert losses(two) == losses(alone)


def test_a_stream_with_random_crops_is_left_to_the_tokenizer(
    data: Path, stored: Path, tmp_path: Path
) -> None:
    pairs_whole = {"input.pairs": WHOLE, "max_steps": 3}
    online = toy_run(data, tmp_path / "online", pairs_whole)
    mixed = toy_run(data, tmp_path / "mixed", pairs_whole | {"tokenizers.codes": str(stored)})
    assert losses(mixed) == losses(online)
    log = (mixed / "log.txt").read_text()
    assert "codes of the pair stream: stored in" in log
    assert "codes of the image stream: by the tokenizer, as its crops are random" in log


def test_a_recipe_whose_crops_are_all_random_cannot_take_stored_codes(
    data: Path, stored: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"tokenizers\.codes: found .*input\.images or input\.pairs"
    ):
        toy_run(data, tmp_path / "run", {"tokenizers.codes": str(stored)})
    for change in ({"scale": (0.9, 1.0)}, {"flip": 0.5}, {"jitter": 0.1}):
        assert not CropConfig(**(WHOLE | change)).fixed
    assert CropConfig(**WHOLE).fixed


def test_codes_of_another_tokenizer_are_refused_with_both_digests(
    data: Path, stored: Path, tmp_path: Path
) -> None:
    other = toy_codes()
    other._model.codebook.weight.mul_(-1)
    type(other).__init__(other, other._model)  # a new digest
    other.save(tmp_path / "visual")
    settings = BOTH_WHOLE | {
        "tokenizers.codes": str(stored),
        "tokenizers.visual": str(tmp_path / "visual"),
    }
    with pytest.raises(InputError) as refused:
        toy_run(data, tmp_path / "run", settings)
    message = str(refused.value)
    assert toy_codes().digest in message and other.digest in message
    assert toy_codes().digest != other.digest
    assert "vlbeit tokenizer encode" in message


def test_codes_of_other_pictures_or_sizes_are_refused(tmp_path: Path) -> None:
    tokenizer = toy_codes()
    photos = image_source(tmp_path / "a", records=12)
    folder = write_codes(tmp_path / "codes", tokenizer, [photos], SIZE)
    assert set(folder.find([photos], tokenizer.digest, SIZE)) == {"photos"}
    fewer = image_source(tmp_path / "b", records=11)
    with pytest.raises(InputError, match=r"photos has pictures of digest .* encoded were those of"):
        folder.find([fewer], tokenizer.digest, SIZE)
    strange = image_source(tmp_path / "c", name="strange", records=3)
    with pytest.raises(InputError, match=r"strange was not encoded \(there are: photos\)"):
        folder.find([strange], tokenizer.digest, SIZE)
    with pytest.raises(InputError, match="32 x 32.*32 x 40.*--image-size 32 40"):
        folder.find([photos], tokenizer.digest, (32, 40))


def test_one_changed_byte_of_a_picture_makes_codes_stale_and_a_caption_does_not(
    tmp_path: Path,
) -> None:
    from vlbeit.data.records import RecordSource, write_shards

    def source(name: str, picture: bytes, caption: bytes, key: str = "b") -> RecordSource:
        rows = [("a", {"png": b"1", "txt": b"x"}), (key, {"png": picture, "txt": caption})]
        paths = write_shards(rows, tmp_path / name, name)
        return RecordSource(name, [str(path) for path in paths])

    first = source("first", b"22", b"one").pictures_digest()
    assert source("caption", b"22", b"another").pictures_digest() == first
    assert source("picture", b"23", b"one").pictures_digest() != first
    assert source("key", b"22", b"one", key="c").pictures_digest() != first


def test_a_damaged_file_of_codes_is_named(stored: Path, data: Path, tmp_path: Path) -> None:
    folder = tmp_path / "codes"
    shutil.copytree(stored, folder)
    path = folder / "00000.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    config = replace(
        TOY,
        data=(str(data),),
        tokenizers=replace(TOY.tokenizers, codes=str(folder)),
        input=replace(TOY.input, images=CropConfig(**WHOLE), pairs=CropConfig(**WHOLE)),
    )
    sources = open_streams(config, "train")
    with pytest.raises(InputError, match=r"00000\.npy: damaged: sha256"):
        find_stored_codes(config, sources, toy_codes(), lambda text: None)
    path.unlink()
    with pytest.raises(InputError, match=r"00000\.npy: cannot be read"):
        find_stored_codes(config, sources, toy_codes(), lambda text: None)
    (folder / "codes.json").write_text("{")
    with pytest.raises(InputError, match=r"codes\.json: cannot be read"):
        CodeFolder.open(folder)
    body = json.loads((stored / "codes.json").read_text())
    elsewhere = body["sources"][0] | {"file": "../00000.npy"}
    for change, message in (
        ({"format": "x"}, "not a"),
        ({"version": 2}, "version 2"),
        ({"sources": [{"name": "photos"}]}, "'records'"),
        ({"sources": [elsewhere]}, "not in the folder"),
    ):
        (folder / "codes.json").write_text(json.dumps(body | change))
        with pytest.raises(InputError, match=message):
            CodeFolder.open(folder)


def test_rows_are_the_codes_of_whole_pictures_and_missing_where_there_is_none(
    tmp_path: Path,
) -> None:
    from vlbeit.data.transforms import decode_image, plain

    tokenizer = toy_codes()
    source = image_source(tmp_path, records=20, bad={4})
    said: list[str] = []
    folder = write_codes(
        tmp_path / "codes", tokenizer, [source], SIZE, batch=7, skip_budget=0.1, log=said.append
    )
    codes = folder.find([source], tokenizer.digest, SIZE)["photos"]
    assert any("0004" in line and "not_an_image" in line for line in said)
    assert len(codes) == 20 and codes.row(4) is None
    for index in (0, 3, 5, 19):
        pixels = torch.from_numpy(plain(decode_image(source.read(index).image()), SIZE))
        assert codes.row(index).tolist() == tokenizer.encode(pixels[None])[0].tolist()
    # What a loader worker gets is a path, not the rows.
    sent = pickle.dumps(codes)
    assert len(sent) < 1000
    assert pickle.loads(sent).row(5).tolist() == codes.row(5).tolist()


def test_a_folder_of_codes_is_whole_or_not_there(tmp_path: Path) -> None:
    tokenizer = toy_codes()
    source = image_source(tmp_path, records=20, bad={1, 2, 3})
    with pytest.raises(DataBudgetError, match="3 of 20"):
        write_codes(tmp_path / "codes", tokenizer, [source], SIZE)
    left = [path.name for path in tmp_path.iterdir() if "codes" in path.name]
    assert left == []
    (tmp_path / "codes").mkdir()
    with pytest.raises(SaveError, match="exists already"):
        write_codes(tmp_path / "codes", tokenizer, [source], SIZE)
    with pytest.raises(InputError, match="no source"):
        write_codes(tmp_path / "none", tokenizer, [], SIZE)
    with pytest.raises(InputError, match="30 x 32"):
        write_codes(tmp_path / "none", tokenizer, [source], (30, 32))


def test_sources_with_the_same_pictures_share_their_codes(tmp_path: Path) -> None:
    from vlbeit.data.records import RecordSource

    tokenizer = toy_codes()
    pairs = pair_source(tmp_path)
    images = RecordSource("captioned-images", pairs.shards)
    folder = write_codes(tmp_path / "codes", tokenizer, [images, pairs], SIZE)
    assert len(list(folder.folder.glob("*.npy"))) == 1
    found = folder.find([pairs], tokenizer.digest, SIZE)
    assert len(found["captioned"]) == len(pairs)


def test_a_record_without_codes_is_a_named_bad_sample(tmp_path: Path) -> None:
    from vlbeit.data.records import BadSample

    tokenizer = toy_codes()
    source = image_source(tmp_path, records=4)
    folder = write_codes(tmp_path / "codes", tokenizer, [source], SIZE)
    codes = folder.find([source], tokenizer.digest, SIZE)
    codes["photos"]._rows = np.full((4, 16), 65535, np.uint16)
    config = replace(TOY, batch=replace(TOY.batch, texts=0, pairs=0))
    (stream,) = build_streams(config, {"image": [source]}, toy_tokenizer(), codes={"image": codes})
    with pytest.raises(BadSample) as bad:
        stream.sample(Visit("photos", 0, 2))
    assert (bad.value.reason, bad.value.member) == ("no_codes", "0002")


def test_the_type_of_the_file_holds_every_code_and_one_number_more() -> None:
    assert code_dtype(8192) == code_dtype(65534) == "uint16"
    assert code_dtype(65535) == code_dtype(1 << 20) == "uint32"
