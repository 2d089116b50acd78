"""Small files of every kind that `vlbeit prepare` reads, and what came out of it."""

import io
import json
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from vlbeit.data.dataset import Dataset, open_sources
from vlbeit.data.prepare import main
from vlbeit.data.records import Record
from vlbeit.draws import Draws


def drawn(number: int, kind: str = "PNG", size: tuple[int, int] = (24, 16)) -> bytes:
    """A picture with something in it; numbers give different ones."""
    draws = Draws("picture", number)
    picture = Image.new("RGB", size, tuple(draws.integers(0, 256, 3).tolist()))
    pen = ImageDraw.Draw(picture)
    for _ in range(6):
        x, y = draws.integer(0, size[0]), draws.integer(0, size[1])
        pen.rectangle(
            (x, y, x + size[0] // 3, y + size[1] // 3),
            fill=tuple(draws.integers(0, 256, 3).tolist()),
        )
    file = io.BytesIO()
    picture.save(file, kind)
    return file.getvalue()


def put(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def put_rows(path: Path, rows: list[Any]) -> Path:
    return put(path, "".join(json.dumps(row) + "\n" for row in rows))


def put_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def prepare(*words: object) -> int:
    return main([str(word) for word in words])


def records(folder: Path, stream: str, split: str) -> list[Record]:
    sources = open_sources([folder], stream, split)
    return [source.read(i) for source in sources for i in range(len(source))]


def fields(record: Record) -> dict[str, Any]:
    return json.loads(record.members["json"])


def by_image(folder: Path, stream: str, split: str) -> dict[str, dict[str, Any]]:
    return {fields(r)["image"]: fields(r) for r in records(folder, stream, split)}


def skips(folder: Path) -> Counter[str]:
    path = folder / "skips.jsonl"
    rows = path.read_text().splitlines() if path.exists() else []
    return Counter(json.loads(row)["reason"] for row in rows)


def facts(folder: Path) -> dict[str, Any]:
    return Dataset.open(folder).facts


def books(folder: Path) -> dict[str, Any]:
    """The report of a folder, after checking that everything seen is accounted for."""
    report = facts(folder)["prepared"]
    used = sum(report["records"].values())
    left = sum(report["skipped"].values()) + report["absent"] + report["dropped"]
    assert used + left == report["seen"]
    shards = {tuple(source.shards): source.records for source in Dataset.open(folder).sources}
    assert sum(shards.values()) == used  # a task's source may share those of another
    return report
