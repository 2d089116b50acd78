"""Laws of shards, manifests and prepared folders."""

import hashlib
import io
import json
import os
import pickle
import tarfile
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlbeit.data.dataset import Dataset, SourceInfo, open_sources
from vlbeit.data.manifest import Manifest, manifest_path, read_manifest
from vlbeit.data.records import (
    BadSample,
    RecordSource,
    ShardWriter,
    expand_shards,
    open_manifest,
    verify_shards,
    write_shards,
)
from vlbeit.data.verify import verify_data
from vlbeit.errors import InputError


def pairs(count: int, start: int = 0) -> list[tuple[str, dict[str, bytes]]]:
    """Records with contents of many lengths, the block size of tar among them."""
    rows = []
    for i in range(start, start + count):
        picture = bytes((i * 7 + j) % 251 for j in range((i * 173) % 1500 + 512 * (i % 2)))
        captions = [f"caption {i}" + "x" * k for k in range(i % 4 + 1)]
        rows.append(
            (f"{i:05d}", {"jpg": picture, "json": json.dumps({"captions": captions}).encode()})
        )
    return rows


def tar_of(
    path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT
) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def same_index(left: Manifest, right: Manifest) -> bool:
    arrays = [name for name, value in vars(left).items() if isinstance(value, np.ndarray)]
    return left.extensions == right.extensions and all(
        np.array_equal(getattr(left, name), getattr(right, name)) for name in arrays
    )


def test_what_was_written_is_what_is_read(tmp_path: Path) -> None:
    rows = pairs(25)
    shards = write_shards(rows, tmp_path, "train", per_shard=10)
    assert [shard.name for shard in shards] == [f"train-0000{i}.tar" for i in range(3)]
    source = RecordSource("train", [str(shard) for shard in shards])
    assert source.sizes.tolist() == [10, 10, 5] and len(source) == 25
    read = [source.read(i) for i in range(25)]
    assert [(record.key, record.members) for record in read] == rows


def test_the_same_records_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_shards(pairs(9), tmp_path / name, "x")
        time.sleep(0.01)  # a clock in the headers would show
    for file in ("x-00000.tar", "x-00000.tar.manifest.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_tarfile_reads_our_shards_and_we_read_its(tmp_path: Path) -> None:
    rows = pairs(6)
    (ours,) = write_shards(rows, tmp_path, "ours")
    with tarfile.open(ours) as tar:
        listed = [(m.name, tar.extractfile(m).read()) for m in tar]  # type: ignore[union-attr]
    assert listed == [(f"{key}.{ext}", data) for key, row in rows for ext, data in row.items()]
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        theirs = tar_of(tmp_path / f"theirs-{form}.tar", listed, form)
        source = RecordSource("theirs", [str(theirs)])
        assert [(r.key, r.members) for r in map(source.read, range(6))] == rows


def test_a_scan_finds_what_the_writer_noted(tmp_path: Path) -> None:
    (shard,) = write_shards(pairs(12), tmp_path, "x")
    written = open_manifest(str(shard))
    manifest_path(shard).unlink()
    scanned = open_manifest(str(shard))
    assert (written.made_by, scanned.made_by) == ("writer", "scan")
    assert same_index(written, scanned)
    assert same_index(scanned, read_manifest(manifest_path(shard)))


def test_long_and_foreign_names_keep_their_keys(tmp_path: Path) -> None:
    long = "folder/" + "n" * 150
    names = [f"{long}.jpg", f"{long}.txt", "größe.JPG", "a/b.seg.png"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar_of(tmp_path / f"{form}.tar", [(name, name.encode()) for name in names], form)
        source = RecordSource("x", [str(path)])
        found = {r.key: sorted(r.members) for r in map(source.read, range(len(source)))}
        assert found == {long: ["jpg", "txt"], "größe": ["jpg"], "a/b": ["seg.png"]}


def test_members_of_a_key_need_not_be_neighbours(tmp_path: Path) -> None:
    rows = [("1.jpg", b"one"), ("2.jpg", b"two"), ("1.txt", b"a dog"), ("2.txt", b"a cat")]
    source = RecordSource("x", [str(tar_of(tmp_path / "x.tar", rows))])
    assert [source.read(i).members["txt"] for i in range(len(source))] == [b"a dog", b"a cat"]


def test_a_member_that_comes_twice_is_named_and_the_first_is_used(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", [("1.jpg", b"one"), ("1.txt", b"dog"), ("1.jpg", b"two")])
    source = RecordSource("x", [str(path)])
    assert len(source) == 2 and source.read(0).members["jpg"] == b"one"
    with pytest.raises(BadSample) as caught:
        source.read(1)
    assert (caught.value.reason, caught.value.member) == ("duplicate_member", "1.jpg")


def test_archives_laid_end_to_end_are_one_shard(tmp_path: Path) -> None:
    first, second = pairs(3), pairs(3, start=3)
    (a,), (b,) = write_shards(first, tmp_path, "a"), write_shards(second, tmp_path, "b")
    both = tmp_path / "both.tar"
    both.write_bytes(a.read_bytes() + b.read_bytes())
    source = RecordSource("both", [str(both)])
    assert [source.read(i).key for i in range(len(source))] == [key for key, _ in first + second]


def test_macos_droppings_and_folders_are_no_samples(tmp_path: Path) -> None:
    rows = [("._1.jpg", b"x"), ("__MACOSX/._1.jpg", b"x"), (".DS_Store", b"x"), ("d/1.jpg", b"y")]
    path = tar_of(tmp_path / "x.tar", rows)
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    source = RecordSource("x", [str(path)])
    assert [source.read(i).key for i in range(len(source))] == ["d/1"]


@pytest.mark.parametrize(
    "fields", [{"captions": ["ab", "c"]}, {"caption": "abc"}, {"label": 3}, None]
)
def test_caption_lengths_are_those_of_the_captions(tmp_path: Path, fields: dict | None) -> None:
    members = {"png": b"p"} if fields is None else {"json": json.dumps(fields).encode()}
    members |= {"txt": b"seven l"} if fields in (None, {"label": 3}) else {}
    (shard,) = write_shards([("1", members)], tmp_path, "x")
    source = RecordSource("x", [str(shard)])
    lengths = [len(text) for text in source.read(0).captions()]
    assert source.text_lengths(0).tolist() == lengths and lengths


def test_broken_json_is_found_when_it_is_read(tmp_path: Path) -> None:
    rows = [
        ("1", {"json": b"{nonsense"}),
        ("2", {"json": b'{"captions": 7}'}),
        ("3", {"jpg": b"x"}),
    ]
    (shard,) = write_shards(rows, tmp_path, "x")
    source = RecordSource("x", [str(shard)])
    assert [len(source.text_lengths(i)) for i in range(3)] == [0, 0, 0]
    for index, reason in enumerate(["bad_json", "bad_json", "no_text"]):
        with pytest.raises(BadSample, match=reason):
            source.read(index).captions()
    with pytest.raises(BadSample, match="no_image"):
        source.read(0).image()


@pytest.mark.parametrize(
    ("key", "members"),
    [
        ("a.b", {"jpg": b""}),
        ("", {"jpg": b""}),
        ("../a", {"jpg": b""}),
        ("/a", {"jpg": b""}),
        ("a\0b", {"jpg": b""}),
        ("k" * 120, {"jpg": b""}),
        ("a", {}),
        ("a", {"JPG": b""}),
        ("a", {"../x": b""}),
        ("taken", {"jpg": b""}),
    ],
)
def test_the_writer_refuses_what_readers_could_not_use(
    tmp_path: Path, key: str, members: dict[str, bytes]
) -> None:
    with pytest.raises(ValueError), ShardWriter(tmp_path / "x.tar") as shard:
        shard.add("taken", {"jpg": b""})
        shard.add(key, members)
    assert not list(tmp_path.iterdir()), "a shard that failed leaves nothing behind"


def test_a_newer_shard_never_lies_beside_the_older_manifest(tmp_path: Path) -> None:
    write_shards(pairs(3), tmp_path, "x")
    (shard,) = write_shards(pairs(2, start=7), tmp_path, "x")
    assert verify_shards([shard])["ok"] and len(RecordSource("x", [str(shard)])) == 2


def test_one_flipped_bit_in_a_manifest_is_refused(tmp_path: Path) -> None:
    (shard,) = write_shards(pairs(4), tmp_path, "x")
    path = manifest_path(shard)
    good = path.read_bytes()
    for at in np.random.default_rng(0).choice(len(good) - 1, 60, replace=False):
        damaged = bytearray(good)
        damaged[at] ^= 1 << int(at) % 8
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="manifest"):
            RecordSource("x", [str(shard)])
    path.write_bytes(good)
    assert len(RecordSource("x", [str(shard)])) == 4


def test_a_copy_of_a_source_reads_the_same_in_another_process(tmp_path: Path) -> None:
    (shard,) = write_shards(pairs(8), tmp_path, "x")
    source = RecordSource("x", [str(shard)])
    source.read(0)
    copy = pickle.loads(pickle.dumps(source))
    assert [copy.read(i) for i in range(8)] == [source.read(i) for i in range(8)]
    child = os.fork()
    if child == 0:  # the child shares the open file; pread keeps no position
        os._exit(0 if [source.read(i).key for i in range(8)] == [k for k, _ in pairs(8)] else 1)
    assert [source.read(i).key for i in range(8)] == [key for key, _ in pairs(8)]
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_many_shards_need_few_open_files(tmp_path: Path) -> None:
    shards = write_shards(pairs(150), tmp_path, "x", per_shard=1)
    source = RecordSource("x", [str(shard) for shard in shards])
    before = len(os.listdir("/proc/self/fd"))
    assert [source.read(i).key for i in range(150)] == [key for key, _ in pairs(150)]
    assert len(os.listdir("/proc/self/fd")) - before <= 64
    del source
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_shard_on_a_read_only_place_is_indexed_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for root, who may write there all the same."""
    place = tmp_path / "place"
    place.mkdir()
    shard = tar_of(place / "x.tar", [("1.jpg", b"one")])
    monkeypatch.setenv("VLBEIT_CACHE", str(tmp_path / "cache"))
    place.chmod(0o555)
    try:
        assert RecordSource("x", [str(shard)]).read(0).members == {"jpg": b"one"}
        assert [path.name for path in place.iterdir()] == ["x.tar"]
        shard.write_bytes(tar_of(tmp_path / "y.tar", [("2.jpg", b"two, longer")]).read_bytes())
        assert RecordSource("x", [str(shard)]).read(0).key == "2", "another file, another index"
    finally:
        place.chmod(0o755)


def test_a_remote_shard_is_fetched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (shard,) = write_shards(pairs(5), tmp_path / "far", "x")
    monkeypatch.setenv("VLBEIT_CACHE", str(tmp_path / "cache"))
    url = f"file://{shard}"
    first = RecordSource("x", [url])
    assert [first.read(i).key for i in range(5)] == [key for key, _ in pairs(5)]
    shard.unlink()
    manifest_path(shard).unlink()
    assert RecordSource("x", [url]).read(4).key == "00004"
    with pytest.raises(InputError, match="nowhere"):
        RecordSource("x", [f"file://{tmp_path}/nowhere.tar"])


def test_patterns_name_shards_in_order(tmp_path: Path) -> None:
    write_shards(pairs(12), tmp_path, "train", per_shard=1)
    pattern = f"{tmp_path}/train-{{00000..00011}}.tar"
    assert expand_shards(pattern) == [f"{tmp_path}/train-{i:05d}.tar" for i in range(12)]
    assert expand_shards(f"{tmp_path}/train-*.tar") == expand_shards(pattern)
    assert expand_shards(f"{tmp_path}/{{train-00003,train-00001}}.tar") == [
        f"{tmp_path}/train-00003.tar",
        f"{tmp_path}/train-00001.tar",
    ]
    assert expand_shards("https://host/{a..b}/x-{9..11}.tar") == [
        f"https://host/a..b/x-{i}.tar" for i in (9, 10, 11)
    ]
    for wrong in (f"{tmp_path}/val-{{0..3}}.tar", f"{tmp_path}/none-*.tar", f"{tmp_path}/{{3..1}}"):
        with pytest.raises(InputError):
            expand_shards(wrong)


def test_a_prepared_folder_can_be_moved(tmp_path: Path) -> None:
    shards = write_shards(pairs(4), tmp_path / "old" / "shards", "x")
    info = SourceInfo("photos", "pair", "train", [str(shard) for shard in shards], 4)
    Dataset.write(tmp_path / "old", "mine", [info], {"licence": "CC0"})
    (tmp_path / "old").rename(tmp_path / "new")
    dataset = Dataset.open(tmp_path / "new")
    assert (dataset.name, dataset.facts) == ("mine", {"licence": "CC0"})
    assert verify_data(str(tmp_path / "new"))["ok"]
    (source,) = open_sources([tmp_path / "new"], "pair", "train")
    assert (source.name, len(source)) == ("photos", 4)


def test_sources_have_one_name_each_whatever_stream_is_asked_for(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        shards = [str(s) for s in write_shards(pairs(2), tmp_path / folder, "x")]
        rows = [SourceInfo(n, s, "train", shards, 2) for n, s in (("p", "pair"), ("i", "image"))]
        rows += [
            SourceInfo("p", "pair", "val", shards, 2),
            SourceInfo(folder, "text", "train", shards, 2),
        ]
        Dataset.write(tmp_path / folder, "twin", rows)
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    names = {
        stream: [s.name for s in open_sources(folders, stream, "train", images_from_pairs=True)]
        for stream in ("image", "text", "pair")
    }
    assert names["pair"] == ["twin/p", "twin/p-2"] and names["text"] == ["a", "b"]
    assert sorted(names["image"]) == ["twin/i", "twin/i-2", "twin/p-2-images", "twin/p-images"]
    everything = sum(names.values(), [])
    assert len(set(everything)) == len(everything)
    assert [s.name for s in open_sources(folders[:1], "pair", "val")] == ["p"]


def test_what_is_no_prepared_folder_is_refused_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vlbeit prepare"):
        Dataset.open(tmp_path / "nothing")
    file = tmp_path / "dataset.json"
    row = {"name": "x", "stream": "smell", "split": "train", "shards": ["x.tar"], "records": 1}
    for body in (
        b"{",
        b"[]",
        b'{"format": "other"}',
        b'{"format": "vlbeit-dataset", "version": 99}',
        b'{"format": "vlbeit-dataset", "version": 1}',
        json.dumps(
            {"format": "vlbeit-dataset", "version": 1, "name": "x", "sources": [row]}
        ).encode(),
    ):
        file.write_bytes(body)
        with pytest.raises(InputError, match=r"dataset\.json"):
            Dataset.open(tmp_path)


def test_verify_names_each_damaged_record_and_no_other(tmp_path: Path) -> None:
    rows = pairs(10)
    (shard,) = write_shards(rows, tmp_path, "x")
    Dataset.write(tmp_path, "x", [SourceInfo("x", "pair", "train", [str(shard)], 10)])
    assert verify_data(str(tmp_path))["ok"] and verify_data(f"{tmp_path}/*.tar")["used"] == 10
    member = open_manifest(str(shard)).members(3)[0]
    with open(shard, "r+b") as file:
        file.seek(member.offset)
        byte = file.read(1)[0]
        file.seek(member.offset)
        file.write(bytes([byte ^ 4]))
    report = verify_data(str(tmp_path))
    json.dumps(report)
    assert (report["ok"], report["used"], report["skipped"]) == (False, 9, 1)
    (bad,) = report["sources"][0]["shards"][0]["bad"]
    assert (bad["member"], bad["reason"]) == (f"00003.{member.extension}", "digest_mismatch")


def test_an_index_costs_less_memory_than_lists_would(tmp_path: Path) -> None:
    (shard,) = write_shards([(f"{i:06d}", {"a": b"", "b": b""}) for i in range(999)], tmp_path, "x")
    manifest = open_manifest(str(shard))
    assert manifest.nbytes / (2 * 999) < 70, "bytes a member"


def small_records(folder: Path, count: int) -> RecordSource:
    """64 px JPEGs with a JSON each, as the reader's speed is stated for."""
    noise = np.random.default_rng(0)

    def rows() -> Iterable[tuple[str, dict[str, bytes]]]:
        for i in range(count):
            file = io.BytesIO()
            Image.fromarray(noise.integers(0, 255, (64, 64, 3), np.uint8)).save(file, "JPEG")
            yield f"{i:06d}", {"jpg": file.getvalue(), "json": b'{"captions": ["a red dog"]}'}

    return RecordSource("small", [str(s) for s in write_shards(rows(), folder, "small")])


def records_per_second(source: RecordSource, rounds: int = 3) -> float:
    """Best of some rounds of random reads, warm, every digest checked."""
    order = np.random.default_rng(1).permutation(len(source)).tolist()
    best = 0.0
    for _ in range(rounds):
        start = time.perf_counter()
        for index in order:
            source.read(index)
        best = max(best, len(order) / (time.perf_counter() - start))
    return best


def test_small_records_are_read_at_random_at_8000_a_second(tmp_path: Path) -> None:
    source = small_records(tmp_path, 2000)
    rate = records_per_second(source)
    print(f"{rate:,.0f} records/s")
    assert rate >= 8000  # the figure for one core; about 60,000 on an idle one


def test_real_tars_of_a_published_layout_are_read_as_they_are(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLBEIT_CACHE", str(tmp_path))
    path = shared_data / "emoji" / "images-000.tar"
    before = sorted(path.parent.iterdir())
    source = RecordSource("emoji", [str(path)])
    assert sorted(path.parent.iterdir()) == before, "shared data is read-only"
    with tarfile.open(path) as tar:
        expected = {
            hashlib.sha256(tar.extractfile(m).read()).digest()  # type: ignore[union-attr]
            for m in tar
            if m.isreg()
        }
    found = set()
    for index in range(len(source)):
        found |= {hashlib.sha256(d).digest() for d in source.read(index).members.values()}
    assert found == expected
