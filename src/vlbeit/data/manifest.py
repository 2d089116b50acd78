"""The manifest beside a shard: where each member lies, how long it is and its sha256.

It is what makes a tar file a random-access table, and what tells a damaged sample from a good
one. In memory it is a few flat arrays (about 60 bytes a member), not a list of objects: lists
of small objects make the memory of forked loader workers creep up.

A shard that comes without one (webdataset, img2dataset) is scanned once.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from vlbeit.data.tar import Entry, scan_tar
from vlbeit.errors import InputError, SaveError

FORMAT = "vlbeit-shard"
VERSION = 1
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Extensions that hold a record's picture, in the order in which they are looked for."""

# webdataset's rule: the key ends at the first dot of the base name.
_KEY = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$", re.DOTALL)
_DIGEST_HEAD = b'{"digest":"'


class Member(NamedTuple):
    """A usable member of a record."""

    extension: str
    offset: int
    size: int
    sha256: bytes


class BadEntry(NamedTuple):
    """A member or a place in the shard that cannot be used."""

    member: str
    offset: int
    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Index of one shard. R records, M members, C captions; entry R + b is the b-th bad one."""

    size: int
    """Bytes of the shard when it was indexed."""
    made_by: Literal["writer", "scan"]
    extensions: tuple[str, ...]
    key_bytes: np.ndarray  # (K,) uint8, all keys end to end in UTF-8
    key_starts: np.ndarray  # (R + 1,) int64
    member_starts: np.ndarray  # (R + 1,) int64
    member_extension: np.ndarray  # (M,) uint16, index into extensions
    member_offset: np.ndarray  # (M,) int64
    member_size: np.ndarray  # (M,) int64
    member_sha256: np.ndarray  # (M, 32) uint8
    caption_starts: np.ndarray  # (R + 1,) int64
    caption_lengths: np.ndarray  # (C,) int32, characters
    bad: tuple[BadEntry, ...]

    @property
    def records(self) -> int:
        """Records with at least one usable member."""
        return len(self.key_starts) - 1

    def __len__(self) -> int:
        """Records and bad entries: everything that must be used or accounted for."""
        return self.records + len(self.bad)

    @property
    def nbytes(self) -> int:
        """Bytes the arrays take in memory."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))

    def key(self, record: int) -> str:
        start, stop = self.key_starts[record : record + 2].tolist()
        return self.key_bytes[start:stop].tobytes().decode()

    def members(self, record: int) -> list[Member]:
        start, stop = self.member_starts[record : record + 2].tolist()
        digests = self.member_sha256[start:stop].tobytes()
        return [
            Member(self.extensions[extension], offset, size, digests[32 * i : 32 * i + 32])
            for i, (extension, offset, size) in enumerate(
                zip(
                    self.member_extension[start:stop].tolist(),
                    self.member_offset[start:stop].tolist(),
                    self.member_size[start:stop].tolist(),
                    strict=True,
                )
            )
        ]

    def pictures_digest(self) -> bytes:
        """sha256 over the keys and, with their record's number, the digests of all pictures."""
        is_picture = np.isin(
            self.member_extension,
            [i for i, name in enumerate(self.extensions) if name in IMAGE_EXTENSIONS],
        )
        record = np.repeat(np.arange(self.records), np.diff(self.member_starts))
        sha = hashlib.sha256(f"{self.records} {len(self.bad)} ".encode())
        for column in (
            self.key_starts,
            self.key_bytes,
            record[is_picture],
            self.member_sha256[is_picture],
        ):
            sha.update(np.ascontiguousarray(column).tobytes())
        return sha.digest()

    def records_digest(self) -> bytes:
        """sha256 over the keys, kinds and digests of all members: equal for equal records."""
        sha = hashlib.sha256(f"{self.records} {len(self.bad)} {self.extensions} ".encode())
        for column in (
            self.key_starts,
            self.key_bytes,
            self.member_starts,
            self.member_extension,
            self.member_sha256,
        ):
            sha.update(np.ascontiguousarray(column).tobytes())
        return sha.digest()

    def text_lengths(self, record: int) -> np.ndarray:
        """(captions of the record,) int32, characters each."""
        start, stop = self.caption_starts[record : record + 2].tolist()
        return self.caption_lengths[start:stop]


class ManifestBuilder:
    """Collects records in the order in which they come; `build` makes the arrays."""

    def __init__(self) -> None:
        self._members: dict[str, dict[str, Member]] = {}
        self._lengths: dict[str, dict[str, list[int] | None]] = {}
        self._bad: list[BadEntry] = []

    def add_member(self, key: str, extension: str, offset: int, data: bytes) -> None:
        """Note one member. Members of a key need not be neighbours; one seen before is bad."""
        members = self._members.setdefault(key, {})
        if extension in members:
            detail = f"the first one, at byte {members[extension].offset}, is used"
            name = f"{key}.{extension}"
            self._bad.append(BadEntry(name, offset, "duplicate_member", detail))
            return
        members[extension] = Member(extension, offset, len(data), hashlib.sha256(data).digest())
        if extension in ("json", "txt"):
            try:
                lengths = [len(text) for text in read_captions({extension: data})]
            except ValueError:
                lengths = None  # the reader names it when it is its turn
            self._lengths.setdefault(key, {})[extension] = lengths

    def add_bad(self, entry: Entry) -> None:
        """Note what the scan could not vouch for."""
        self._bad.append(BadEntry(entry.name, entry.offset, entry.reason, entry.detail))

    def build(self, size: int, made_by: Literal["writer", "scan"]) -> Manifest:
        """The manifest of a shard of `size` bytes."""
        flat = [member for members in self._members.values() for member in members.values()]
        lengths = [self._caption_lengths(key) for key in self._members]
        return _from_columns(
            {
                "size": size,
                "made_by": made_by,
                "extensions": sorted({member.extension for member in flat}),
                "keys": list(self._members),
                "members": [len(members) for members in self._members.values()],
                "member_extension": [member.extension for member in flat],
                "member_offset": [member.offset for member in flat],
                "member_size": [member.size for member in flat],
                "member_sha256": [member.sha256.hex() for member in flat],
                "captions": [len(row) for row in lengths],
                "caption_lengths": [length for row in lengths for length in row],
                "bad": [list(entry) for entry in self._bad],
            }
        )

    def _caption_lengths(self, key: str) -> list[int]:
        """As `read_captions` would find them in the whole record."""
        found = self._lengths.get(key, {})
        described = found.get("json", [])
        return [] if described is None else described or found.get("txt") or []


def read_captions(members: Mapping[str, bytes]) -> list[str]:
    """The captions of a record as they were stored, not yet cleaned.

    From `json`: the list "captions", else the string "caption"; where there is none, `txt`, which
    is one caption.
    No caption at all gives an empty list.

    Raises:
        ValueError: the JSON cannot be read, or its captions are not strings.
    """
    if "json" in members:
        try:
            fields = json.loads(members["json"])
        except RecursionError:
            raise ValueError("JSON nested too deeply") from None
        if isinstance(fields, dict):
            found = fields.get("captions", fields.get("caption"))
            found = [found] if isinstance(found, str) else found
            found = [] if found is None else found
            if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
                raise ValueError("captions are not a list of strings")
            if found:
                return found
    if "txt" in members:
        return [members["txt"].decode("utf-8", "replace")]
    return []


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension (lower case) of a member's name; None when it has no extension."""
    match = _KEY.match(name)
    return (match[1], match[2].lower()) if match else None


def scan_shard(path: Path) -> Manifest:
    """Index a shard that came without a manifest; reads the whole file once.

    What the digests say is what the file held at the time of the scan.
    """
    builder = ManifestBuilder()
    with open(path, "rb") as file:
        for entry in scan_tar(path):
            parts = split_name(entry.name)
            if entry.reason:
                builder.add_bad(entry)
            elif parts is None:
                builder.add_bad(entry._replace(reason="no_extension", detail="no key.extension"))
            else:
                builder.add_member(
                    *parts, entry.offset, os.pread(file.fileno(), entry.size, entry.offset)
                )
        return builder.build(os.fstat(file.fileno()).st_size, "scan")


def manifest_path(shard: Path) -> Path:
    """Where the manifest of a shard lies: beside it."""
    return shard.with_name(shard.name + ".manifest.json")


def write_manifest(manifest: Manifest, shard: Path, path: Path) -> None:
    """Write atomically. The file opens with the sha256 of all that follows its first comma."""
    columns = _to_columns(manifest)
    body = {"format": FORMAT, "version": VERSION, "shard": shard.name, **columns}
    rest = json.dumps(body, ensure_ascii=True, separators=(",", ":"))[1:].encode()
    head = _DIGEST_HEAD + hashlib.sha256(rest).hexdigest().encode() + b'",'
    write_atomic(path, head + rest + b"\n")


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        InputError: it is missing, damaged, of another format or of a newer version.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the manifest ({error.strerror})") from None
    start = len(_DIGEST_HEAD)
    expected, rest = raw[start : start + 64], raw[start + 66 :].removesuffix(b"\n")
    found = hashlib.sha256(rest).hexdigest().encode()
    if raw[:start] + raw[start + 64 : start + 66] != _DIGEST_HEAD + b'",' or found != expected:
        raise InputError(
            f"{path}: damaged manifest: sha256 {found.decode()[:16]}... found, "
            f"{expected.decode('ascii', 'replace')[:16]}... expected; fetch it again, or delete "
            "it to have the shard scanned (damage done to the shard before then goes unseen)"
        )
    body = json.loads(b"{" + rest)
    if body.get("format") != FORMAT or body.get("version") != VERSION:
        raise InputError(
            f"{path}: format {body.get('format')!r} version {body.get('version')!r}; "
            f"this release reads {FORMAT!r} version {VERSION}"
        )
    return _from_columns(body)


def write_atomic(path: Path, data: bytes) -> None:
    """All of the file or none of it: written aside, fsynced, renamed.

    Raises:
        SaveError: the place cannot be written.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(".part", path.name + ".", path.parent)
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), 0o644)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)
        raise SaveError(f"{path}: cannot write {len(data)} bytes ({error.strerror})") from error


def _starts(counts: Iterable[int]) -> np.ndarray:
    return np.concatenate(([0], np.cumsum(np.asarray(list(counts), np.int64)))).astype(np.int64)


def _from_columns(columns: Mapping[str, Any]) -> Manifest:
    keys = [key.encode() for key in columns["keys"]]
    number = {extension: i for i, extension in enumerate(columns["extensions"])}
    digests = bytes.fromhex("".join(columns["member_sha256"]))
    return Manifest(
        size=columns["size"],
        made_by=columns["made_by"],
        extensions=tuple(columns["extensions"]),
        key_bytes=np.frombuffer(b"".join(keys), np.uint8),
        key_starts=_starts(map(len, keys)),
        member_starts=_starts(columns["members"]),
        member_extension=np.asarray([number[e] for e in columns["member_extension"]], np.uint16),
        member_offset=np.asarray(columns["member_offset"], np.int64),
        member_size=np.asarray(columns["member_size"], np.int64),
        member_sha256=np.frombuffer(digests, np.uint8).reshape(-1, 32),
        caption_starts=_starts(columns["captions"]),
        caption_lengths=np.asarray(columns["caption_lengths"], np.int32),
        bad=tuple(BadEntry(*entry) for entry in columns["bad"]),
    )


def _to_columns(manifest: Manifest) -> dict[str, Any]:
    return {
        "size": manifest.size,
        "made_by": manifest.made_by,
        "extensions": list(manifest.extensions),
        "keys": [manifest.key(record) for record in range(manifest.records)],
        "members": np.diff(manifest.member_starts).tolist(),
        "member_extension": [manifest.extensions[i] for i in manifest.member_extension],
        "member_offset": manifest.member_offset.tolist(),
        "member_size": manifest.member_size.tolist(),
        "member_sha256": [row.tobytes().hex() for row in manifest.member_sha256],
        "captions": np.diff(manifest.caption_starts).tolist(),
        "caption_lengths": manifest.caption_lengths.tolist(),
        "bad": [list(entry) for entry in manifest.bad],
    }
