"""Where the bytes of an image lie: in a file of a folder, or inside a tar archive.

Nothing is ever extracted: a member of an archive is an offset and a size. Names that come out
of a row are checked before they become a path, because rows come from strangers.
"""

import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from vlbeit.data.manifest import IMAGE_EXTENSIONS
from vlbeit.data.prepare.rows import Bad
from vlbeit.data.remote import is_remote, open_fetched
from vlbeit.data.tar import scan_tar
from vlbeit.errors import InputError

MAX_FILE = 256 << 20
"""Bytes of the largest image file that is read."""


class BadPlace(Exception):
    """An image that cannot be found or must not be looked for."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class Place(NamedTuple):
    path: str
    """Of a file, or the URL of a shard."""
    offset: int = 0
    size: int = -1
    """-1: the whole file."""

    def read(self) -> bytes:
        """The bytes. Raises BadPlace when they cannot be read."""
        try:
            with open(self._opened(), "rb") as file:
                file.seek(self.offset)
                data = file.read(self.size if self.size >= 0 else MAX_FILE + 1)
        except OSError as error:
            raise BadPlace("no_image", f"{self.path}: {error.strerror}") from None
        if len(data) > MAX_FILE:
            raise BadPlace("too_large", f"{self.path}: more than {MAX_FILE} bytes")
        if len(data) < self.size:
            raise BadPlace("truncated_image", f"{self.path}: ends inside this member")
        return data

    def _opened(self) -> str | int:
        # Every record of a remote shard has been compared with its manifest when it was planned.
        return open_fetched(self.path, None) if is_remote(self.path) else self.path


class Member(NamedTuple):
    """An image found by walking."""

    name: str
    place: Place


def suffix_of(name: str) -> str:
    """Extension in lower case, without its dot."""
    return os.path.splitext(name)[1].lower().removeprefix(".")


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image when a folder is walked; hidden files never are."""
    base = name.rpartition("/")[2]
    return not base.startswith(".") and suffix_of(base) in IMAGE_EXTENSIONS


def walk_images(root: Path) -> tuple[list[Member], dict[str, int]]:
    """All images below a folder, sorted by name, and a count of the other files by suffix.

    Links are followed (large collections are often laid out with them), each folder once.
    """
    found: list[Member] = []
    others: dict[str, int] = {}
    seen: set[tuple[int, int]] = set()
    waiting = [("", str(root))]
    while waiting:
        prefix, folder = waiting.pop()
        try:
            status = os.stat(folder)
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            name = prefix + entry.name
            if entry.is_dir():
                waiting.append((name + "/", entry.path))
            elif is_image_name(name):
                found.append(Member(name, Place(entry.path)))
            else:
                suffix = suffix_of(name) or "(none)"
                others[suffix] = others.get(suffix, 0) + 1
    found.sort(key=lambda member: member.name)
    return found, others


def safe_name(name: str, *, allow_absolute: bool) -> str:
    """`name` as a relative path below the folder it is looked up in.

    Raises BadPlace("unsafe_name") for an absolute path, a `..` or a NUL; with
    `allow_absolute` the first two pass, because the user vouches for the file of rows.
    """
    if "\0" in name or not name.strip():
        raise BadPlace("unsafe_name", f"{name!r} is no file name")
    path = PurePosixPath(name.replace("\\", "/"))
    if not allow_absolute and (path.is_absolute() or ".." in path.parts):
        raise BadPlace(
            "unsafe_name",
            f"{name!r} leads out of the folder; if you trust this file, pass --allow-absolute",
        )
    return str(path)


class Pictures:
    """Finds images by the name a row gives, in folders and tar archives.

    Args:
        places: folders and archives, looked through in this order.
        shards: folder in which a row's own `shard` (an archive) is looked up.
    """

    def __init__(
        self, places: Sequence[Path], *, shards: Path | None = None, allow_absolute: bool = False
    ) -> None:
        for place in places:
            if not place.exists():
                raise InputError(f"{place}: no such folder or archive; where are the images?")
        self.places = list(places)
        self._shards = shards
        self._allow_absolute = allow_absolute
        self._archives: dict[Path, dict[str, Place]] = {}

    def archive(self, path: Path) -> dict[str, Place]:
        """Members of an archive by name; damaged ones are not among them."""
        if path not in self._archives:
            members, _ = walk_archive(path)
            self._archives[path] = {member.name: member.place for member in members}
        return self._archives[path]

    def has(self, name: str) -> bool:
        """Whether `find` would find it."""
        try:
            self.find(name)
        except BadPlace:
            return False
        return True

    def find(self, name: str, shard: str | None = None) -> Place:
        """Raises BadPlace (`unsafe_name`, `no_image`)."""
        name = safe_name(name, allow_absolute=self._allow_absolute)
        if shard is not None:
            shard = safe_name(shard, allow_absolute=self._allow_absolute)
            archive = (self._shards or Path()) / shard
            if not os.path.isfile(archive):
                raise BadPlace("no_image", f"the archive {archive} does not exist")
            place = self.archive(archive).get(name)
            if place is None:
                raise BadPlace("no_image", f"{archive} has no member {name!r}")
            return place
        for folder in self.places:
            if folder.is_dir():
                path = folder / name
                if os.path.isfile(path):
                    return Place(str(path))
            elif name in (members := self.archive(folder)):
                return members[name]
        raise BadPlace("no_image", f"{name!r} is not in {' or '.join(map(str, self.places))}")


def walk_archive(path: Path) -> tuple[list[Member], list[Bad]]:
    """Regular members of a tar archive in their order, and what cannot be used of it.

    Raises InputError for a compressed archive: its members have no place to be read from.
    """
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    if start.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"PK")):
        raise InputError(f"{path}: is compressed or a zip; unpack it to a folder or a plain tar")
    members: list[Member] = []
    bad: list[Bad] = []
    for entry in scan_tar(path):
        if entry.reason:
            bad.append(Bad(str(path), entry.name, entry.reason, entry.detail))
        else:
            members.append(Member(entry.name, Place(str(path), entry.offset, entry.size)))
    return members, bad
