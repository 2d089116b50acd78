"""Records: samples in tar shards (WebDataset's layout), written, indexed and read at random.

A record is all members of a shard that share a key: `000017.jpg` and `000017.json`. Every read
goes through the shard's manifest (manifest.py) and is checked against its sha256; a record that
cannot be used raises `BadSample`, which names it, and never turns into another record.
"""

import glob
import hashlib
import io
import os
import re
from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from vlbeit.data.manifest import (
    IMAGE_EXTENSIONS,
    Manifest,
    ManifestBuilder,
    manifest_path,
    read_captions,
    read_manifest,
    scan_shard,
    write_manifest,
)
from vlbeit.data.remote import (
    cached_path,
    evicted,
    fetched,
    is_remote,
    open_fetched,
    refuse_secrets,
    remote_manifest,
)
from vlbeit.data.tar import BLOCK, MAX_MEMBER, padding, tar_header
from vlbeit.errors import InputError, SaveError

_OPEN_SHARDS = 64
"""File handles kept open by one source in one process."""
_MANIFEST_BYTES = 256 * 1024 * 1024
"""Manifests kept in memory by one source in one process."""


class BadSample(Exception):
    """A record that cannot be used; the streams write it to skips.jsonl and count it.

    Reasons raised here: unreadable_shard, truncated_shard, damaged_shard, digest_mismatch,
    member_too_large, unsafe_name, unsafe_member, duplicate_member, no_extension, bad_json,
    no_image. The streams add those of `BadImage` and `BadText` (transforms.py), and no_text.
    """

    def __init__(self, shard: str, member: str, reason: str, detail: str = "") -> None:
        super().__init__(shard, member, reason, detail)
        self.shard = shard
        self.member = member
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.shard}: {self.member}: {self.reason}" + (self.detail and f" ({self.detail})")


@dataclass(frozen=True)
class Record:
    """One sample as bytes: extension (lower case, no dot) to content."""

    key: str
    shard: str
    members: dict[str, bytes]

    def image(self) -> bytes:
        """The bytes of the record's picture, still encoded.

        Raises:
            BadSample: no_image.
        """
        for extension in IMAGE_EXTENSIONS:
            if extension in self.members:
                return self.members[extension]
        found = ", ".join(self.members) or "nothing"
        raise BadSample(self.shard, self.key, "no_image", f"it has {found}")

    def captions(self) -> list[str]:
        """The captions as stored, to be cleaned one by one (`transforms.clean_text`).

        From `json` ("captions", else "caption"), else `txt`.

        Raises:
            BadSample: no_text, bad_json.
        """
        try:
            texts = read_captions(self.members)
        except ValueError as error:
            raise BadSample(self.shard, f"{self.key}.json", "bad_json", str(error)[:200]) from None
        if not texts:
            found = ", ".join(self.members) or "nothing"
            raise BadSample(self.shard, self.key, "no_text", f"it has {found}")
        return texts


class ShardWriter:
    """Writes one shard and its manifest; the same records give the same bytes.

    >>> with ShardWriter(folder / "train-00000.tar") as shard:
    ...     shard.add("000017", {"jpg": picture, "json": b'{"captions": ["a dog"]}'})

    The tar file appears under its name only when it is complete (written to `.part`, fsynced,
    renamed); leaving the block by an exception removes the part.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._part = self.path.with_name(self.path.name + ".part")
        self._builder = ManifestBuilder()
        self._keys: set[str] = set()
        self._at = 0
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._part, "wb")
        except OSError as error:
            raise SaveError(f"{self._part}: cannot create it ({error.strerror})") from error
        return self

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a record.

        Raises:
            ValueError: a key with a dot (readers of this layout end keys there), a key used
                before, an unsafe or too long name, or a record without members.
            SaveError: the disk is full.
        """
        if self._file is None:
            raise ValueError("add() outside of the writer's with block")
        if not key or "." in key or key in self._keys or not members:
            raise ValueError(
                f"record {key!r} with members {list(members)}: keys must be new and without "
                "dots, and a record needs at least one member"
            )
        self._keys.add(key)
        for extension, data in members.items():
            if not re.fullmatch(r"[a-z0-9_]+(\.[a-z0-9_]+)*", extension) or len(data) > MAX_MEMBER:
                raise ValueError(
                    f"member {key}.{extension} of {len(data)} bytes: extensions are lower-case "
                    f"letters and digits, members have at most {MAX_MEMBER} bytes"
                )
            header = tar_header(f"{key}.{extension}", len(data))
            self._builder.add_member(key, extension, self._at + BLOCK, data)
            self._write(header + data + bytes(padding(len(data))))

    def _write(self, data: bytes) -> None:
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise SaveError(f"{self._part}: cannot write ({error.strerror})") from error
        self._at += len(data)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._file is not None
        if kind is not None:
            self._file.close()
            self._part.unlink(missing_ok=True)
            return
        self._write(bytes(2 * BLOCK))  # the end of the archive
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            # A manifest of an older shard of this name must not outlive that shard.
            manifest_path(self.path).unlink(missing_ok=True)
            os.replace(self._part, self.path)
        except OSError as failure:
            self._part.unlink(missing_ok=True)
            raise SaveError(f"{self.path}: cannot write ({failure.strerror})") from failure
        manifest = self._builder.build(self._at, "writer")
        write_manifest(manifest, self.path, manifest_path(self.path))


def write_shards(
    records: Iterable[tuple[str, Mapping[str, bytes]]],
    folder: Path,
    stem: str,
    per_shard: int = 1000,
) -> list[Path]:
    """Write records into `folder/stem-00000.tar`, `stem-00001.tar`, ...; returns the paths."""
    paths: list[Path] = []
    source = iter(records)
    waiting = next(source, None)
    while waiting is not None:
        paths.append(Path(folder) / f"{stem}-{len(paths):05d}.tar")
        with ShardWriter(paths[-1]) as shard:
            for _ in range(per_shard):
                if waiting is None:
                    break
                shard.add(*waiting)
                waiting = next(source, None)
    return paths


def expand_shards(pattern: str) -> list[str]:
    """The shards that a pattern names, in order.

    Brace ranges (`train-{00000..00009}.tar`), brace lists (`{train,val}.tar`), globs and plain
    paths; braces and plain names also in URLs that fsspec opens.

    Raises:
        InputError: a local name that does not exist, a glob that matches nothing.
        ConfigError: a URL with credentials in it.
    """
    shards: list[str] = []
    for name in _expand_braces(pattern):
        if is_remote(name):
            shards.append(refuse_secrets(name))
        elif os.path.exists(name):
            shards.append(os.path.abspath(name))
        else:
            found = sorted(path for path in glob.glob(name, recursive=True) if os.path.isfile(path))
            if not found:
                raise InputError(
                    f"{name}: no such shard (from the pattern {pattern!r}); give a tar file, a "
                    "brace range such as train-{00000..00009}.tar, or a glob"
                )
            shards.extend(os.path.abspath(path) for path in found)
    return shards


def _expand_braces(pattern: str) -> Iterator[str]:
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if last < first or last - first >= 10_000_000:
            raise InputError(f"{pattern}: the range {match[0]} must rise and stay below 10 million")
        width = len(span[1]) if span[1].startswith("0") else 0
        items: Iterable[str] = (f"{number:0{width}d}" for number in range(first, last + 1))
    else:
        items = match[1].split(",")
    for item in items:
        yield from _expand_braces(pattern[: match.start()] + item + pattern[match.end() :])


def _is_writable(folder: Path) -> bool:
    """Whether files may be added: by permission and by the folder's own mode.

    Root has the permission everywhere; a folder that nobody was given leave to write is still
    meant to stay as it is.
    """
    return os.access(folder, os.W_OK) and folder.stat().st_mode & 0o222 != 0


def open_manifest(shard: str) -> Manifest:
    """The manifest of a shard; a shard without one is scanned and gets one.

    The scan's result is written beside the shard, or into `remote.cache_folder()` where that
    place cannot be written. A remote shard is fetched for it once.

    Raises:
        InputError: no such shard, or its manifest is damaged.
    """
    if is_remote(shard):
        manifest, cached = remote_manifest(shard)
        if manifest is None:  # a foreign shard has none
            try:
                manifest = scan_shard(fetched(shard, None))
            except FileNotFoundError as error:
                raise evicted(shard) from error
            write_manifest(manifest, Path(shard.rsplit("/", 1)[-1]), cached)
        return manifest
    path = Path(shard)
    beside = manifest_path(path)
    if beside.exists():
        return read_manifest(beside)
    try:
        state = path.stat()
        cached = cached_path(path.name + ".manifest.json", path, state.st_size, state.st_mtime_ns)
        if cached.exists():
            return read_manifest(cached)
        manifest = scan_shard(path)
    except OSError as error:
        raise InputError(f"{path}: cannot read the shard ({error.strerror})") from None
    if _is_writable(path.parent):
        try:
            write_manifest(manifest, path, beside)
            return manifest
        except SaveError:
            pass  # a read-only filesystem shows only now; the cache serves it
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"{cached.parent}: cannot create it ({error.strerror})") from error
    write_manifest(manifest, path, cached)
    return manifest


class RecordSource:
    """The records of several shards as one table, read at random.

    Index i counts through the shards in order; within a shard first its records, then what its
    scan found unusable, so that everything listed is either used or skipped by name. Reading
    keeps no state but caches, so a source may be forked or pickled at any time.

    Raises (when built):
        InputError: a shard is missing or its manifest is damaged.
    """

    def __init__(self, name: str, shards: Sequence[str]) -> None:
        self.name = name
        self.shards = tuple(str(shard) for shard in shards)
        self._forget()
        self.sizes = np.asarray([len(self._manifest(i)) for i in range(len(shards))], np.int64)
        self._stops = np.cumsum(self.sizes)

    def _forget(self) -> None:
        self._handles: OrderedDict[int, int] = OrderedDict()
        self._manifests: OrderedDict[int, Manifest] = OrderedDict()
        self._manifest_bytes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "shards": self.shards, "sizes": self.sizes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._stops = np.cumsum(self.sizes)
        self._forget()

    def __del__(self) -> None:
        for handle in self.__dict__.get("_handles", {}).values():
            os.close(handle)

    def __len__(self) -> int:
        return int(self._stops[-1]) if len(self._stops) else 0

    def locate(self, index: int) -> tuple[int, int]:
        """The shard's number and the position in it.

        Raises:
            IndexError: there is no such record.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name}: record {index} of {len(self)}")
        shard = int(self._stops.searchsorted(index, side="right"))
        return shard, index - int(self._stops[shard]) + int(self.sizes[shard])

    def read(self, index: int, only: Collection[str] | None = None) -> Record:
        """The record, every byte as it was when the manifest was made.

        Args:
            only: extensions of the members that are wanted; None: all.

        Raises:
            BadSample: anything about it is not so.
            InputError: its shard is remote and cannot be fetched. That is the network's fault and
                not the sample's: the run ends, and the same command goes on.
        """
        shard, position = self.locate(index)
        manifest, path = self._manifest(shard), self.shards[shard]
        if position >= manifest.records:
            bad = manifest.bad[position - manifest.records]
            raise BadSample(path, bad.member, bad.reason, bad.detail)
        key = manifest.key(position)
        members = manifest.members(position)
        if only is not None:
            members = [member for member in members if member.extension in only]
            if not members:
                return Record(key, path, {})
        start = members[0].offset
        stop = max(member.offset + member.size for member in members)
        for member in members:
            if member.size > MAX_MEMBER or member.offset < 0:
                detail = f"{member.size} bytes at {member.offset}; the limit is {MAX_MEMBER}"
                raise BadSample(path, f"{key}.{member.extension}", "member_too_large", detail)
        # Neighbouring members cost one system call together.
        near = 0 < stop - start <= sum(member.size + 4 * BLOCK for member in members)
        try:
            handle = self._handle(shard, manifest)
        except OSError as error:
            raise BadSample(path, key, "unreadable_shard", error.strerror or str(error)) from None
        try:
            span = os.pread(handle, stop - start, start) if near else b""
            contents: dict[str, bytes] = {}
            for extension, offset, size, digest in members:
                at = offset - start
                data = span[at : at + size] if near else os.pread(handle, size, offset)
                if hashlib.sha256(data).digest() != digest:
                    self._refuse(manifest, path, f"{key}.{extension}", len(data), size)
                contents[extension] = data
        except OSError as error:
            raise BadSample(path, key, "unreadable_shard", error.strerror or str(error)) from None
        finally:
            if shard not in self._handles:
                os.close(handle)
        return Record(key, path, contents)

    def _refuse(self, manifest: Manifest, path: str, member: str, found: int, size: int) -> None:
        if found < size:
            detail = f"{found} of {size} bytes left; the shard had {manifest.size}"
            raise BadSample(path, member, "truncated_shard", detail)
        detail = f"{size} bytes that are not those of the manifest"
        raise BadSample(path, member, "digest_mismatch", detail)

    def label(self, index: int) -> str:
        """ "shard:key" for messages."""
        shard, position = self.locate(index)
        manifest = self._manifest(shard)
        name = self.shards[shard].rsplit("/", 1)[-1]
        if position >= manifest.records:
            return f"{name}:{manifest.bad[position - manifest.records].member}"
        return f"{name}:{manifest.key(position)}"

    def pictures_digest(self) -> str:
        """sha256 over the records' keys and the digests of their pictures, shard by shard.

        Two sources with the same pictures in the same order have the same one, whatever their
        names, places and captions.
        """
        sha = hashlib.sha256()
        for shard in range(len(self.shards)):
            sha.update(self._manifest(shard).pictures_digest())
        return sha.hexdigest()

    def records_digest(self) -> str:
        """sha256 over everything that the records hold, shard by shard, whatever their places."""
        sha = hashlib.sha256()
        for shard in range(len(self.shards)):
            sha.update(self._manifest(shard).records_digest())
        return sha.hexdigest()

    def text_lengths(self, index: int) -> np.ndarray:
        """(captions,) int32: characters of each caption as stored; empty where there is none."""
        shard, position = self.locate(index)
        manifest = self._manifest(shard)
        if position >= manifest.records:
            return np.zeros(0, np.int32)
        return manifest.text_lengths(position)

    def _manifest(self, shard: int) -> Manifest:
        manifest = self._manifests.get(shard)
        if manifest is not None:
            self._manifests.move_to_end(shard)
            return manifest
        manifest = open_manifest(self.shards[shard])
        self._manifests[shard] = manifest
        self._manifest_bytes += manifest.nbytes
        while self._manifest_bytes > _MANIFEST_BYTES and len(self._manifests) > 1:
            self._manifest_bytes -= self._manifests.popitem(last=False)[1].nbytes
        return manifest

    def _handle(self, shard: int, manifest: Manifest) -> int:
        """To read the shard from; one that is not in `_handles` is for the caller to close."""
        if is_remote(self.shards[shard]):
            return open_fetched(self.shards[shard], manifest)
        handle = self._handles.get(shard)
        if handle is not None:
            self._handles.move_to_end(shard)
            return handle
        handle = os.open(self.shards[shard], os.O_RDONLY)
        self._handles[shard] = handle
        if len(self._handles) > _OPEN_SHARDS:
            os.close(self._handles.popitem(last=False)[1])
        return handle


def verify_shards(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Read every record of some shards; a report that can be written as JSON.

    Per shard: `listed` entries, `used` (every byte right), `skipped`, and `bad`, one row of
    member, reason and detail for each skipped one. `ok` is True when nothing was skipped. A shard
    without a manifest is scanned (`indexed_by` says "scan"): then damage inside a member that
    left the tar structure whole cannot be seen.
    """
    shards: list[dict[str, Any]] = []
    for path in paths:
        report: dict[str, Any] = {"shard": str(path), "indexed_by": "", "listed": 1, "used": 0}
        report["bad"] = []
        shards.append(report)
        try:
            source = RecordSource("verify", [str(path)])
        except InputError as error:
            report["bad"].append({"member": "", "reason": "unreadable_shard", "detail": str(error)})
            report["skipped"] = 1
            continue
        report["listed"] = len(source)
        report["indexed_by"] = open_manifest(str(path)).made_by
        for index in range(len(source)):
            try:
                source.read(index)
                report["used"] += 1
            except BadSample as bad:
                report["bad"].append(
                    {"member": bad.member, "reason": bad.reason, "detail": bad.detail}
                )
            except InputError as error:  # a remote shard: the other records would not come either
                report["bad"] += [
                    {"member": "", "reason": "unreadable_shard", "detail": str(error)}
                ] * (len(source) - index)
                break
        report["skipped"] = len(report["bad"])
    totals = {name: sum(shard[name] for shard in shards) for name in ("listed", "used", "skipped")}
    return {"ok": totals["skipped"] == 0, **totals, "shards": shards}
