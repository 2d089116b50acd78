"""A prepared folder: shards, and a dataset.json that says which of them feed which stream."""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vlbeit.data.manifest import write_atomic
from vlbeit.data.records import RecordSource
from vlbeit.data.remote import fetched_bytes, is_remote, refuse_secrets
from vlbeit.errors import InputError, SaveError

FORMAT = "vlbeit-dataset"
VERSION = 1
SPLITS = ("train", "val", "test")

Split = Literal["train", "val", "test"]


@dataclass(frozen=True)
class SourceInfo:
    """Shards that belong together: one kind of record, one split."""

    name: str
    stream: str
    """"image", "text", "pair" or "task:NAME"."""
    split: str
    shards: list[str]
    """Absolute paths (or URLs), in order."""
    records: int


@dataclass(frozen=True)
class Dataset:
    """What dataset.json says about a prepared folder."""

    folder: Path
    name: str
    sources: list[SourceInfo]
    facts: dict[str, Any]
    """Free: what `prepare` wants to tell (licence, counts, baselines)."""

    @classmethod
    def open(cls, path: Path | str) -> "Dataset":
        """Read `path/dataset.json` (`path` may also be that file).

        Raises:
            InputError: not a prepared folder, or one of another format.
        """
        given = Path(path)
        file = given if given.name == "dataset.json" else given / "dataset.json"
        if not file.is_file():
            raise InputError(
                f"{given}: not a prepared data folder (no dataset.json in it); make one with "
                f"`vlbeit prepare NAME --out {given}`, for example "
                f"`vlbeit prepare scenes --out {given} --count 2000 --seed 0`"
            )
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InputError(f"{file}: cannot read it ({error}); prepare it again") from None
        folder = file.parent.absolute()
        return cls._read(str(file), content, folder, lambda name: str(folder / name))

    @classmethod
    def copy_of_remote(cls, url: str, folder: Path) -> "Dataset":
        """Write a dataset.json into `folder` that names the shards of the one at a URL.

        Args:
            url: of a prepared folder, or of the dataset.json in it.

        Raises:
            InputError: it cannot be fetched, or is no dataset.json.
            ConfigError: the URL has credentials in it.
            SaveError: `folder` cannot be written.
        """
        root = url.removesuffix("/dataset.json").rstrip("/")
        content = fetched_bytes(f"{root}/dataset.json")
        there = cls._read(f"{root}/dataset.json", content, folder, lambda name: f"{root}/{name}")
        return cls.write(folder, there.name, there.sources, there.facts)

    @classmethod
    def _read(
        cls, file: str, content: bytes, folder: Path, place: Callable[[str], str]
    ) -> "Dataset":
        """What a dataset.json says; `place` makes a shard's name absolute."""
        try:
            body = json.loads(content)
        except ValueError as error:
            raise InputError(f"{file}: cannot read it ({error}); prepare it again") from None
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            raise InputError(f"{file}: not a {FORMAT} file; prepare the folder again")
        if body.get("version") != VERSION:
            raise InputError(
                f"{file}: version {body.get('version')!r}; this release reads version {VERSION}"
            )
        try:
            sources = [_source_of(row, place) for row in body["sources"]]
            return cls(folder, str(body["name"]), sources, dict(body.get("facts", {})))
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: entry missing or wrong: {error}") from None

    @classmethod
    def write(
        cls,
        folder: Path | str,
        name: str,
        sources: Sequence[SourceInfo],
        facts: Mapping[str, Any] | None = None,
    ) -> "Dataset":
        """Write dataset.json atomically; shards inside the folder are stored relative to it.

        Raises:
            ValueError: a split or stream that does not exist, or a source without shards.
            SaveError: the folder cannot be written.
            ConfigError: the URL of a shard has credentials in it.
        """
        root = Path(folder).absolute()
        rows = []
        for source in sources:
            _check(source)
            shards = [
                refuse_secrets(s) if is_remote(s) else _relative(Path(s), root)
                for s in source.shards
            ]
            rows.append(
                {
                    "name": source.name,
                    "stream": source.stream,
                    "split": source.split,
                    "records": source.records,
                    "shards": shards,
                }
            )
        body = {
            "format": FORMAT,
            "version": VERSION,
            "name": name,
            "sources": rows,
            "facts": dict(facts or {}),
        }
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SaveError(f"{root}: cannot create it ({error.strerror})") from error
        write_atomic(root / "dataset.json", json.dumps(body, indent=1).encode() + b"\n")
        return cls.open(root)


def _source_of(row: Mapping[str, Any], place: Callable[[str], str]) -> SourceInfo:
    shards = [str(s) if is_remote(str(s)) else place(str(s)) for s in row["shards"]]
    source = SourceInfo(
        str(row["name"]), str(row["stream"]), str(row["split"]), shards, int(row["records"])
    )
    _check(source)
    return source


def _check(source: SourceInfo) -> None:
    if source.stream not in ("image", "text", "pair") and not source.stream.startswith("task:"):
        raise ValueError(f"source {source.name}: no stream {source.stream!r}")
    if source.split not in SPLITS:
        raise ValueError(f"source {source.name}: split {source.split!r} is none of {SPLITS}")
    if not source.shards or not source.name:
        raise ValueError(f"source {source.name!r}: it needs a name and at least one shard")


def _relative(shard: Path, root: Path) -> str:
    """Inside the folder: relative, so that the folder can be moved."""
    absolute = Path(os.path.abspath(root / shard))
    return str(absolute.relative_to(root) if absolute.is_relative_to(root) else absolute)


def open_sources(
    folders: Sequence[Path | str],
    stream: str,
    split: str,
    *,
    images_from_pairs: bool = False,
) -> list[RecordSource]:
    """The sources of one stream and split in some prepared folders, in order.

    Names: a source keeps its own name; where several sources of the split (of any stream) share
    it, they are called DATASET/NAME, and further ones DATASET/NAME-2, ... Names key the random
    draws, so they depend on the folders and the split only, not on the stream asked for.

    Args:
        images_from_pairs: for the image stream, add every pair source as NAME-images.

    Raises:
        InputError: a folder is not prepared, or a shard is missing.
    """
    found: list[tuple[str, SourceInfo]] = []
    for folder in folders:
        dataset = Dataset.open(folder)
        found += [(dataset.name, source) for source in dataset.sources if source.split == split]
    often = Counter(source.name for _, source in found)
    taken: Counter[str] = Counter()
    opened: list[RecordSource] = []
    for dataset_name, source in found:
        name = source.name if often[source.name] == 1 else f"{dataset_name}/{source.name}"
        taken[name] += 1
        name = name if taken[name] == 1 else f"{name}-{taken[name]}"
        if source.stream == stream:
            opened.append(RecordSource(name, source.shards))
        elif images_from_pairs and stream == "image" and source.stream == "pair":
            opened.append(RecordSource(f"{name}-images", source.shards))
    return opened
