"""Fault tests D01, D02 and the cleaning half of D05: what is damaged is named and never used."""

import hashlib
import io
import json
import shutil
import tarfile
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from vlbeit.data.manifest import manifest_path
from vlbeit.data.records import BadSample, RecordSource, write_shards
from vlbeit.data.tar import BLOCK
from vlbeit.data.transforms import MAX_CHARACTERS, BadText, clean_text
from vlbeit.draws import Draws

RECORDS = 20


def whole_shard(folder: Path) -> tuple[Path, dict[str, dict[str, bytes]]]:
    draws = Draws("damage", "content")
    rows = {
        f"{i:04d}": {
            "jpg": draws.raw(100 + 9 * i).tobytes(),
            "json": json.dumps({"captions": [f"caption {i}"]}).encode(),
        }
        for i in range(RECORDS)
    }
    (path,) = write_shards(rows.items(), folder, "whole")
    return path, rows


def block_of(data: bytearray, draws: Draws) -> slice:
    at = BLOCK * draws.integer(0, len(data) // BLOCK)
    return slice(at, at + BLOCK)


def cut(data: bytearray, draws: Draws) -> None:
    del data[draws.integer(0, len(data)) :]


def change_bytes(data: bytearray, draws: Draws) -> None:
    for _ in range(draws.integer(1, 20)):
        data[draws.integer(0, len(data))] ^= draws.integer(1, 256)


def hit_header(data: bytearray, draws: Draws) -> None:
    headers = [at for at in range(0, len(data), BLOCK) if data[at + 257 : at + 262] == b"ustar"]
    data[draws.choice(headers) + draws.integer(0, BLOCK)] ^= draws.integer(1, 256)


def zero_block(data: bytearray, draws: Draws) -> None:
    data[block_of(data, draws)] = bytes(BLOCK)


def remove_block(data: bytearray, draws: Draws) -> None:
    del data[block_of(data, draws)]


DAMAGES: list[Callable[[bytearray, Draws], None]] = [
    cut,
    change_bytes,
    hit_header,
    zero_block,
    remove_block,
]


def account(shard: Path) -> tuple[dict[str, dict[str, bytes]], Counter[str], int]:
    """What could be used, the reasons for the rest, and how many were listed."""
    used: dict[str, dict[str, bytes]] = {}
    reasons: Counter[str] = Counter()
    source = RecordSource("damaged", [str(shard)])
    for index in range(len(source)):
        try:
            record = source.read(index)
            used[record.key] = record.members
        except BadSample as bad:
            assert bad.shard == str(shard) and bad.member and bad.reason
            reasons[bad.reason] += 1
    return used, reasons, len(source)


@pytest.mark.fault
def test_of_1000_damaged_shards_every_record_is_accounted_for_and_none_is_altered(
    tmp_path: Path,
) -> None:
    """D01: with the manifest, the good records of a damaged shard are exactly the intact ones."""
    whole, rows = whole_shard(tmp_path)
    content = whole.read_bytes()
    target = tmp_path / "damaged.tar"
    shutil.copy(manifest_path(whole), manifest_path(target))
    reasons: Counter[str] = Counter()
    spared = 0
    for trial in range(1000):
        damaged = bytearray(content)
        DAMAGES[trial % len(DAMAGES)](damaged, Draws("damage", trial))
        target.write_bytes(damaged)
        used, why, listed = account(target)
        assert len(used) + why.total() == listed == RECORDS
        assert all(rows[key] == members for key, members in used.items())
        if trial % len(DAMAGES) in (2, 3):  # damage in one place takes one record with it at most
            assert len(used) >= RECORDS - 1
        reasons += why
        spared += len(used)
    assert reasons["truncated_shard"] > 100 and reasons["digest_mismatch"] > 100
    assert spared > 1000 * RECORDS / 2


@pytest.mark.fault
def test_of_1000_damaged_shards_without_manifest_nothing_misplaced_is_used(tmp_path: Path) -> None:
    """D01 for shards of others: the scan can miss changed bytes, never moved or missing ones."""
    whole, rows = whole_shard(tmp_path)
    content = whole.read_bytes()
    contents = {data for row in rows.values() for data in row.values()}
    spared = 0
    for trial in range(1000):
        kind = DAMAGES[trial % len(DAMAGES)]
        damaged = bytearray(content)
        kind(damaged, Draws("damage", trial))
        target = tmp_path / f"{trial}.tar"
        target.write_bytes(damaged)
        used, why, listed = account(target)
        assert len(used) + why.total() == listed
        if kind in (cut, remove_block):
            assert all(data in contents for members in used.values() for data in members.values())
        if kind in (zero_block, remove_block, hit_header):
            assert len(used) >= RECORDS - 2, f"trial {trial}: good records behind the damage lost"
        spared += len(used)
        target.unlink()
        manifest_path(target).unlink()
    assert spared > 1000 * RECORDS / 2


@pytest.mark.fault
@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_damage_to_archives_with_long_names_is_always_accounted_for(
    tmp_path: Path, form: int
) -> None:
    whole = tmp_path / "whole.tar"
    with tarfile.open(whole, "w", format=form) as tar:
        for number in range(8):
            member = info("folder/" * 20 + f"größe-{number}.jpg")
            member.size = 100 * number
            tar.addfile(member, io.BytesIO(bytes([number]) * member.size))
    content = whole.read_bytes()
    assert len(account(whole)[0]) == 8
    for trial in range(300):
        damaged = bytearray(content[: 10_240 * 2])
        DAMAGES[trial % len(DAMAGES)](damaged, Draws("long names", form, trial))
        target = tmp_path / f"{trial}.tar"
        target.write_bytes(damaged)
        used, why, listed = account(target)
        assert len(used) + why.total() == listed
        assert listed or len(damaged) < 2 * BLOCK


def test_a_shard_that_vanishes_or_was_never_a_tar_file_is_named(tmp_path: Path) -> None:
    whole, _ = whole_shard(tmp_path)
    source = RecordSource("x", [str(whole)])
    whole.unlink()
    with pytest.raises(BadSample, match="unreadable_shard"):
        source.read(0)
    page = tmp_path / "page.tar"
    page.write_bytes(b"<html>503 Service Unavailable</html>" * 100)
    used, why, listed = account(page)
    assert (used, dict(why), listed) == ({}, {"damaged_shard": 1}, 1)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    assert account(empty)[2] == 0


def info(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


OUTSIDE = "../outside/canary"
HOSTILE: list[tarfile.TarInfo] = [
    info("../outside/canary.jpg"),
    info("../../outside/canary.jpg"),
    info("a/../../outside/canary.jpg"),
    info("/tmp/canary.jpg"),
    info("//canary.jpg"),
    info("..\\outside\\canary.jpg"),
    info("C:\\canary.jpg"),
    info("C:/canary.jpg"),
    info("..\0.jpg"),
    info("good\0/../../outside/canary.jpg"),
    info("line\nbreak.jpg"),
    info("escape\x1b[2J.jpg"),
    info("d/" * 2000 + "deep.jpg"),
    info("n" * 70_000 + ".jpg"),
    info("link.jpg", tarfile.SYMTYPE, OUTSIDE),
    info("link/canary.jpg", tarfile.SYMTYPE, "/etc/passwd"),
    info("hard.jpg", tarfile.LNKTYPE, OUTSIDE),
    info("fifo.jpg", tarfile.FIFOTYPE),
    info("char.jpg", tarfile.CHRTYPE),
    info("block.jpg", tarfile.BLKTYPE),
]


def folder_digest(folder: Path) -> str:
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        whole.update(str(path.relative_to(folder)).encode() + b"\0")
        whole.update(path.read_bytes() if path.is_file() else b"")
    return whole.hexdigest()


@pytest.mark.parametrize("number", range(len(HOSTILE)))
def test_hostile_names_are_listed_and_never_written(tmp_path: Path, number: int) -> None:
    """D02: the member before and the one behind are used; nothing appears anywhere."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "canary").write_bytes(b"sings")
    inside = tmp_path / "inside"
    inside.mkdir()
    hostile = HOSTILE[number]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        shard = inside / f"{form}.tar"
        with tarfile.open(shard, "w", format=form) as tar:
            for name, data in (("1.jpg", b"one"), ("", b"evil"), ("2.jpg", b"two")):
                member = info(name) if name else hostile
                member.size = len(data) if member.isreg() else 0
                tar.addfile(member, io.BytesIO(data) if member.isreg() else None)
        before = folder_digest(tmp_path / "outside"), sorted(p.name for p in tmp_path.iterdir())
        used, why, listed = account(shard)
        assert {k: m["jpg"] for k, m in used.items()} == {"1": b"one", "2": b"two"}
        assert set(why) <= {"unsafe_name", "unsafe_member"} and listed == 3, why
        after = folder_digest(tmp_path / "outside"), sorted(p.name for p in tmp_path.iterdir())
        assert before == after
        ours = {shard, manifest_path(shard)}
        assert set(inside.iterdir()) == ours
        report = manifest_path(shard).read_text()
        assert report.rstrip("\n").isprintable() and len(report) < 5000
        for path in ours:
            path.unlink()


ODD_PIECES = [
    "",
    " \t\r\n\u3000\u2028\x85",
    "a dog",
    "\x00",
    "a\x00b\x07c",
    "\ufeff",
    "\ud800",
    "\udc00 a",
    "\ud83d\udc15",  # a surrogate pair that came as two characters
    "\U0001f469\u200d\U0001f469\u200d\U0001f467",  # a family: emoji with joiners
    "\U0001f1e9\U0001f1ea",
    "\u200fשלום \u05e2\u05d5\u05dc\u05dd",
    "مرحبا بالعالم",
    "e\u0301\u0327",
    "\u1100\u1161\u11a8",
    "e\x00\u0301 e\ufeff\u0301",  # accents that meet their letter only after cleaning
    "[MASK] [T_CLS] [PAD]",
    "x" * 1_000_000,
    "o" + "\u0301\u0327" * 50_000,
    "\u202eevil\u202c",
    "￾￿",
]


def odd_texts() -> list[bytes | str]:
    """200 texts: each odd piece alone, as bytes, and mixed with others."""
    texts: list[bytes | str] = [*ODD_PIECES]
    texts += [piece.encode("utf-8", "surrogatepass") for piece in ODD_PIECES]
    texts += [
        b"\xef\xbb\xbfa dog",
        "a dog".encode("utf-16"),
        b"\xff\xfe",
        b"\xff" * 50,
        b"\xc3\x28",
    ]
    texts += ["Ein Hund läuft über die Wiese am Fluß".encode("latin-1"), "собака".encode("cp1251")]
    draws = Draws("odd texts")
    short = [piece for piece in ODD_PIECES if len(piece) < 1000]
    while len(texts) < 190:
        mixed = "".join(draws.choice(short) for _ in range(draws.integer(2, 9)))
        texts.append(mixed if draws.uniform() < 0.5 else mixed.encode("utf-8", "surrogatepass"))
    while len(texts) < 200:
        texts.append(draws.raw(draws.integer(1, 40)).tobytes())
    return texts


@pytest.mark.parametrize("number", range(200))
def test_every_odd_text_becomes_clean_or_is_refused_by_reason(number: int) -> None:
    """D05: encodable, one line, bounded, in NFC, and cleaning again changes nothing."""
    text = odd_texts()[number]
    try:
        clean = clean_text(text)
    except BadText as bad:
        assert bad.reason in ("empty_text", "not_utf8") and bad.detail
        return
    assert clean and len(clean) <= MAX_CHARACTERS
    assert clean.encode("utf-8").decode("utf-8") == clean
    assert clean == " ".join(clean.split()) and "\ufeff" not in clean
    assert not any(unicodedata.category(char) in ("Cc", "Cs") for char in clean)
    assert unicodedata.is_normalized("NFC", clean)
    assert clean_text(clean) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  a \n\t dog \u3000", "a dog"),
        (b"\xef\xbb\xbfa dog", "a dog"),
        ("a dog".encode("utf-16"), "a dog"),
        ("a\x00 dog\x07", "a dog"),
        ("cafe\u0301", "caf\u00e9"),
        ("cafe\x00\u0301", "caf\u00e9"),
        ("\ud83d\udc15 runs along the river", "\U0001f415 runs along the river"),
        ("a long caption \ud800 with one bad half", "a long caption \ufffd with one bad half"),
        ("[MASK]", "[MASK]"),
        ("\U0001f469\u200d\U0001f467", "\U0001f469\u200d\U0001f467"),
        ("y" * (MAX_CHARACTERS + 5), "y" * MAX_CHARACTERS),
        ("שלום\u200f", "שלום\u200f"),
    ],
)
def test_texts_are_cleaned_to_the_letter(text: bytes | str, clean: str) -> None:
    assert clean_text(text) == clean


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "empty_text"),
        (b"", "empty_text"),
        (" \n\u00a0", "empty_text"),
        ("\x00\x01", "empty_text"),
        ("\ufeff", "empty_text"),
        ("собака".encode("cp1251"), "not_utf8"),
        (b"\x89PNG\r\n\x1a\n" + bytes(range(128, 200)), "not_utf8"),
    ],
)
def test_texts_with_nothing_in_them_are_refused_by_reason(text: bytes | str, reason: str) -> None:
    with pytest.raises(BadText) as caught:
        clean_text(text)
    assert caught.value.reason == reason


def test_a_pile_of_accents_costs_no_more_than_other_text() -> None:
    pile = "o" + "\u0301\u0327" * (MAX_CHARACTERS // 2)
    start = time.perf_counter()
    assert len(clean_text(pile)) <= 31
    assert time.perf_counter() - start < 1.0  # 7.5 s where nothing limits the run


def test_texts_and_bytes_of_the_same_text_are_cleaned_alike() -> None:
    for piece in ODD_PIECES:
        try:
            data = piece.encode("utf-8")
        except UnicodeEncodeError:
            continue
        outcomes = []
        for form in (piece, data):
            try:
                outcomes.append(clean_text(form))
            except BadText as bad:
                outcomes.append(bad.reason)
        assert outcomes[0] == outcomes[1]
