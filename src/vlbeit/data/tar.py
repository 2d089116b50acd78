"""The tar layer under shards: write one header, scan a whole file. Nothing is ever extracted.

`tarfile` reads an archive from front to back and stops, or guesses, at the first damaged header.
A shard of a training set is worth more than that: `scan_tar` lists every member it can vouch
for, names what it cannot, and goes on at the next header whose checksum is right.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = tarfile.BLOCKSIZE
"""Bytes of a tar block; headers and the data of members begin at multiples of it."""
MAX_NAME = 1024
"""Longest member name in bytes."""
MAX_MEMBER = 256 * 1024 * 1024
"""Largest member in bytes: a record is read into memory whole."""
MAX_EXTENDED_HEADER = 64 * 1024
"""Largest pax or GNU long-name header in bytes."""

_REGULAR = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
_DEVICES = (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
_NAMING = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)
"""Headers that hold the name of the member behind them."""
_EXTENDED = (*_NAMING, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGLINK)
_PAX_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")


class Entry(NamedTuple):
    """One member of a tar file, or one place where it is damaged."""

    name: str
    offset: int
    """First byte of the data (of the damage, where the header is lost)."""
    size: int
    reason: str = ""
    """Why the member cannot be used; empty: it can."""
    detail: str = ""


class _Header(NamedTuple):
    info: tarfile.TarInfo
    hidden: bool
    """The name field goes on after a NUL, where most readers would not look."""


def unsafe_name(name: str) -> str:
    """What is wrong with a member's name; empty when nothing is.

    Names are keys and labels here, never paths. They are checked all the same: shards are handed
    on to tools that do extract, and reports are read in terminals.
    """
    if not name:
        return "no name"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME:
        return f"name longer than {MAX_NAME} bytes"
    if any(ord(char) < 32 or ord(char) == 127 for char in name):
        return "control character in the name"
    if name.startswith("/") or "\\" in name or re.match(r"[A-Za-z]:", name):
        return "absolute path or backslash in the name"
    if ".." in name.split("/"):
        return "'..' in the name"
    return ""


def tar_header(name: str, size: int) -> bytes:
    """The ustar header of a regular member: owner 0, time 0, mode 0644, so bytes repeat.

    Raises:
        ValueError: a name that is unsafe or does not fit a ustar header (100 bytes).
    """
    wrong = unsafe_name(name)
    if wrong or len(name.encode()) > tarfile.LENGTH_NAME:
        raise ValueError(f"member name {name!r}: {wrong or 'longer than 100 bytes'}")
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def padding(size: int) -> int:
    """Bytes from the end of a member's data to the next block."""
    return -size % BLOCK


def scan_tar(path: Path | str) -> Iterator[Entry]:
    """Every member of a tar file in order, and every damaged place, without reading the data.

    Directories are left out, as are hidden files (a base name that begins with a dot: macOS
    writes `._x` beside each `x`). Links, devices, sparse files and unsafe names come with a
    reason. After a header whose checksum is wrong the scan goes on block by block until the next
    one that is right; the member before such a place is not trusted either, because a lost or
    inserted block shows only there. Two or more zero blocks followed by a header (archives laid
    end to end) are no damage.
    """
    handle = os.open(path, os.O_RDONLY)
    try:
        yield from _scan(handle, os.fstat(handle).st_size)
    finally:
        os.close(handle)


def _scan(handle: int, end: int) -> Iterator[Entry]:
    at, waiting = 0, None
    long_name: str | None = None
    long_size: int | None = None
    while at < end:
        header, zeros = _header_at(handle, at), 0
        while header is None and _is_zero(handle, at + zeros * BLOCK):
            zeros += 1
        if header is None and at + zeros * BLOCK >= end:
            # The usual end: zero blocks to the end of the file. Writers end with two or with none;
            # a single one was the second, and a block before it is lost.
            if waiting is not None and not waiting.reason and zeros == 1:
                detail = "one zero block at the end, there should be two"
                waiting = waiting._replace(reason="damaged_shard", detail=detail)
            break
        if zeros >= 2 and _header_at(handle, at + zeros * BLOCK) is not None:
            at += zeros * BLOCK
            continue
        if header is None:
            if waiting is not None and not waiting.reason:
                waiting = waiting._replace(
                    reason="damaged_shard", detail=f"no header follows its data, at byte {at}"
                )
            start, at = at, _next_header(handle, at + max(1, zeros) * BLOCK, end)
            if waiting is not None:
                yield waiting
            waiting, long_name, long_size = None, None, None
            yield Entry(f"(byte {start})", start, at - start, "damaged_shard", "no valid header")
            continue
        info = header.info
        data, size = at + BLOCK, info.size if long_size is None else long_size
        if waiting is not None:
            yield waiting
            waiting = None
        if info.type in _EXTENDED:
            if data + info.size > end:
                missing = f"{data + info.size - end} bytes of an extended header missing at the end"
                yield Entry(_shown(info.name), data, info.size, "truncated_shard", missing)
                at = _next_header(handle, data, end)
                continue
            if info.type in _NAMING and info.size > MAX_EXTENDED_HEADER:
                # Read so much of it that the member behind it is refused for its name.
                long_name = _text(os.pread(handle, MAX_NAME + 1, data))
            elif info.type == tarfile.GNUTYPE_LONGNAME:
                long_name = _text(os.pread(handle, info.size, data).rstrip(b"\0"))
            elif info.type in _NAMING:
                long_name, long_size = _pax(os.pread(handle, info.size, data), long_name)
            at = data + info.size + padding(info.size)
            continue
        name = info.name if long_name is None else long_name
        hidden = header.hidden and long_name is None
        long_name, long_size = None, None
        at = data + size + padding(size)
        if info.type in _REGULAR:
            waiting = _judge(name, hidden, data, size, end)
            if waiting is not None and waiting.reason == "truncated_shard":
                # Its size may reach over the end because blocks before it are missing.
                at = _next_header(handle, data, end)
        elif info.type != tarfile.DIRTYPE:
            what = "link" if info.type in _LINKS else "device"
            what = what if info.type in _LINKS + _DEVICES else "member of an unknown type"
            yield Entry(_shown(name), data, 0, "unsafe_member", f"{what}, type {info.type!r}")
            at = data if info.type in _LINKS + _DEVICES else at
    if waiting is not None:
        yield waiting


def _judge(name: str, hidden: bool, data: int, size: int, end: int) -> Entry | None:
    """The entry of a regular member; None for a file that is hidden by its name."""
    shown, wrong = _shown(name), "NUL inside the name" if hidden else unsafe_name(name)
    if wrong:
        return Entry(shown, data, size, "unsafe_name", wrong)
    if data + size > end:
        missing = data + size - end
        return Entry(shown, data, size, "truncated_shard", f"{missing} bytes missing at the end")
    if size > MAX_MEMBER:
        detail = f"{size} bytes; the limit is {MAX_MEMBER}"
        return Entry(shown, data, size, "member_too_large", detail)
    if name.rsplit("/", 1)[-1].startswith("."):
        return None
    return Entry(name, data, size)


def _header_at(handle: int, at: int) -> _Header | None:
    block = os.pread(handle, BLOCK, at)
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "backslashreplace")
    except tarfile.HeaderError:
        return None
    if info.size < 0:
        return None
    field = block[: tarfile.LENGTH_NAME]
    return _Header(info, hidden=field.rstrip(b"\0").count(b"\0") > 0)


def _next_header(handle: int, at: int, end: int) -> int:
    """The first block from `at` on that is a header; `end` if there is none."""
    while at < end and _header_at(handle, at) is None:
        at += BLOCK
    return min(at, end)


def _is_zero(handle: int, at: int) -> bool:
    block = os.pread(handle, BLOCK, at)
    return bool(block) and block.count(0) == len(block)


def _pax(data: bytes, name: str | None) -> tuple[str | None, int | None]:
    """Path and size of the next member out of a pax header; what is not there stays as it was."""
    size, at = None, 0
    while (match := _PAX_RECORD.match(data, at)) is not None:
        stop = at + int(match[1])
        value = data[match.end() : stop - 1]
        if stop <= at or stop > len(data):
            break
        if match[2] == b"path":
            name = _text(value)
        elif match[2] == b"size" and value.isdigit() and len(value) < 20:
            size = int(value)
        at = stop
    return name, size


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")


def _shown(name: str) -> str:
    """A name that is safe to print and to store: short, without control characters."""
    name = name or "(no name)"
    plain = "".join(char if 32 <= ord(char) != 127 else f"\\x{ord(char):02x}" for char in name)
    return plain if len(plain) <= 120 else plain[:100] + f"... ({len(name)} characters)"
