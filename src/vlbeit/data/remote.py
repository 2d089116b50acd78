"""Shards that lie elsewhere: fetched whole into a bounded cache on disk, shared by all processes.

A shard is named by a URL that fsspec opens. It is fetched when its first record is read, written
aside, compared with its manifest, and renamed into place; a read finds it there until it is the
least recently used one and others need the room. Failures of the network are tried again with
growing pauses until a deadline; what stays wrong ends the run with the shard, the last failure
and the number of tries, and the same command goes on once the server is back.

    VLBEIT_CACHE           the cache folder (default: XDG_CACHE_HOME/vlbeit, ~/.cache/vlbeit)
    VLBEIT_CACHE_GB        most bytes of fetched shards in it, in 10^9 (default 50)
    VLBEIT_FETCH_SECONDS   how long a failing fetch is tried again (default 30)

Layout of the cache, per URL in a folder named by its digest: the shard, `lock` (held while it is
being fetched; its text is the number of bytes the fetch was given), and `*.part`. Manifests are
kept beside them and never evicted (about 100 bytes a record).
"""

import contextlib
import errno
import fcntl
import hashlib
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

from vlbeit.data.manifest import Manifest, read_manifest
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError, SaveError

T = TypeVar("T")

_STALL = 10.0
"""Seconds without a connection or a byte after which a try over http has failed."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 8.0
"""Seconds between tries: doubled each time, then multiplied by a random 0.5 to 1, so that the
processes of a host do not come back all at once."""
_GONE = 5
"""Times in a row that a shard may be evicted between its fetch and its read."""
_SHARDS, _LOCK = "shards", "lock"
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class _NoRetryError(Exception):
    """A failure that another try would not change."""


def is_remote(shard: str) -> bool:
    """Whether a shard is a URL."""
    return "://" in shard


def refuse_secrets(url: str) -> str:
    """The URL, if it holds no credentials: it will be in dataset.json, skips.jsonl and messages.

    Raises:
        ConfigError: a user, a password or a query (signed URLs carry their key there).
    """
    parts = urlsplit(url)
    if parts.username is not None or parts.password is not None or parts.query:
        what = "a query" if parts.query else "a user name"
        bare = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
        raise ConfigError(
            f"{bare}: the URL has {what} in it, and URLs are written to dataset.json and to logs; "
            "leave it out and give credentials to fsspec (~/.netrc, FSSPEC_HTTPS, AWS_*: see "
            "docs/data.md, Data that is not on this machine)"
        )
    return url


def cache_folder() -> Path:
    """Where fetched shards, the manifests of read-only shards and packed texts are kept.

    `VLBEIT_CACHE`, else `XDG_CACHE_HOME/vlbeit`, else `~/.cache/vlbeit`. It may be deleted when
    no run is using it.
    """
    base = os.environ.get("VLBEIT_CACHE")
    if base:
        return Path(base)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vlbeit"


def cached_path(name: str, *identity: object) -> Path:
    """A place in the cache that depends on what the file is, not only on its name."""
    return cache_folder() / _digest(*identity) / _file_name(name)


def _digest(*identity: object) -> str:
    return hashlib.sha256("\n".join(map(str, identity)).encode()).hexdigest()[:24]


def _file_name(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]", "_", name.rsplit("/", 1)[-1])


def _number(name: str, default: float) -> float:
    given = os.environ.get(name)
    try:
        value = default if not given else float(given)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {given!r}; it must be a positive number")
    return value


def cache_limit() -> int:
    """Bytes of fetched shards that may lie in the cache (`VLBEIT_CACHE_GB`)."""
    return int(_number("VLBEIT_CACHE_GB", 50.0) * 1e9)


def remote_manifest(url: str) -> tuple[Manifest | None, Path]:
    """The manifest beside a remote shard, fetched once, and where it lies in the cache.

    None: there is none at its place, so the shard must be scanned; its manifest then belongs at
    that path.

    Raises:
        InputError: it cannot be fetched, or is damaged each time.
    """
    refuse_secrets(url)
    path = cached_path(url + ".manifest.json", url)
    if path.exists():
        return read_manifest(path), path

    def fetch_once() -> Manifest:
        with _part_beside(path) as part:
            _get(url + ".manifest.json", part, lambda size: None)
            manifest = read_manifest(part)
            _sync(part)
            os.replace(part, path)
        return manifest

    try:
        return _tried_again(url + ".manifest.json", fetch_once), path
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return None, path


def fetched_bytes(url: str) -> bytes:
    """A small file, which is not kept.

    Raises:
        InputError: it cannot be fetched, or is not there.
    """
    refuse_secrets(url)

    def fetch_once() -> bytes:
        with _part_beside(cached_path(url, url)) as part:
            _get(url, part, lambda size: None)
            return part.read_bytes()

    try:
        return _tried_again(url, fetch_once)
    except FileNotFoundError:
        raise InputError(f"{url}: there is no such file") from None


def fetched(url: str, manifest: Manifest | None) -> Path:
    """The shard as a local file, which another process may evict at any time: see `open_fetched`.

    Args:
        manifest: what it must agree with; None: nothing is known of it yet.

    Raises:
        InputError: it cannot be fetched, or is larger than the whole cache.
        SaveError: the cache cannot be written.
    """
    refuse_secrets(url)
    folder = cache_folder() / _SHARDS / _digest(url)
    path = folder / _file_name(url)
    if _touched(path):
        return path
    with _locked(folder / _LOCK) as lock:
        if not _touched(path):  # else another process has fetched it meanwhile
            _Fetch(url, path, manifest, lock).run()
    return path


def open_fetched(url: str, manifest: Manifest | None) -> int:
    """A handle to read the shard from; the caller closes it, so that an evicted shard's room is
    free at once.

    Raises:
        InputError, SaveError: as `fetched`; and when others evict it time and again.
    """
    for _ in range(_GONE):
        try:
            return os.open(fetched(url, manifest), os.O_RDONLY)
        except FileNotFoundError:
            continue
    raise evicted(url)


def evicted(url: str) -> InputError:
    """The error for a shard that was gone again before it could be read."""
    return InputError(
        f"{url}: was evicted between its fetch and its read; VLBEIT_CACHE_GB is "
        f"{cache_limit() / 1e9:g}, too little for the shards that are in use at once"
    )


class _Fetch:
    """One shard on its way into the cache; the caller holds its lock."""

    def __init__(self, url: str, path: Path, manifest: Manifest | None, lock: int) -> None:
        self._url, self._path, self._manifest, self._lock = url, path, manifest, lock
        self._seen: set[str] = set()

    def run(self) -> None:
        try:
            _tried_again(self._url, self._once)
        except FileNotFoundError:
            raise InputError(f"{self._url}: there is no such shard") from None
        finally:
            os.ftruncate(self._lock, 0)

    def _once(self) -> None:
        if self._manifest is not None:
            self._reserve(self._manifest.size)
        with _part_beside(self._path) as part:
            _get(self._url, part, self._reserve)
            found, wrong = self._compare(part)
            # The same wrong bytes twice: the shard is damaged where it lies, and its damaged
            # records are skipped by name as those of a local one. Otherwise it was the way here.
            if wrong and found not in self._seen:
                self._seen.add(found)
                raise OSError(wrong)
            self._reserve(part.stat().st_size)
            _sync(part)
            os.replace(part, self._path)

    def _compare(self, part: Path) -> tuple[str, str]:
        """The file's digest, and how it differs from the manifest; empty: it does not."""
        with open(part, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            manifest = self._manifest
            if manifest is None:
                return digest, ""
            size = os.fstat(file.fileno()).st_size
            if size != manifest.size:
                return digest, f"{size} bytes came, the manifest says {manifest.size}"
            for record in range(manifest.records):
                for extension, offset, length, wanted in manifest.members(record):
                    data = os.pread(file.fileno(), length, offset)
                    if hashlib.sha256(data).digest() != wanted:
                        name = f"{manifest.key(record)}.{extension}"
                        return digest, f"the bytes of {name} are not those of the manifest"
        return digest, ""

    def _reserve(self, size: int | None) -> None:
        """Evict the least recently used shards until `size` bytes fit beside what is in use."""
        if size is None:
            return
        limit = cache_limit()
        if size > limit:
            raise _NoRetryError(
                f"it has {size} bytes, and VLBEIT_CACHE_GB allows {limit} for all shards together"
            )
        root = self._path.parent.parent
        deadline = time.monotonic() + _number("VLBEIT_FETCH_SECONDS", 30.0)
        while True:
            with _locked(root / _LOCK):
                kept, promised = _contents(root, self._path.parent)
                kept.sort()
                room = limit - promised - sum(entry.size for entry in kept)
                while room < size and kept:
                    oldest = kept.pop(0)
                    oldest.path.unlink(missing_ok=True)
                    room += oldest.size
                if room >= size:
                    os.ftruncate(self._lock, 0)
                    os.pwrite(self._lock, str(size).encode(), 0)
                    return
            if time.monotonic() > deadline:
                raise _NoRetryError(
                    f"it has {size} bytes; {promised} of the {limit} that VLBEIT_CACHE_GB allows "
                    "are promised to other fetches of this host"
                )
            time.sleep(0.1)


class _Entry(NamedTuple):
    used: int
    """When it was last read: nanoseconds."""
    size: int
    path: Path


def _contents(root: Path, own: Path) -> tuple[list[_Entry], int]:
    """The shards in the cache, and the bytes promised to fetches of others that are under way.

    What a killed process left behind (a promise, a part) is removed.
    """
    kept: list[_Entry] = []
    promised = 0
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        for path in folder.iterdir():
            if path.name != _LOCK and not path.name.endswith(".part"):
                with contextlib.suppress(FileNotFoundError):
                    state = path.stat()
                    kept.append(_Entry(state.st_mtime_ns, state.st_size, path))
        if folder == own:
            continue
        handle = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(handle, 0)
            for part in folder.glob("*.part"):
                part.unlink(missing_ok=True)
        except BlockingIOError:
            promised += int(os.pread(handle, 32, 0) or b"0")
        finally:
            os.close(handle)
    return kept, promised


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Hold a lock file; the kernel releases it when the process ends, however it ends."""
    with _of_the_cache(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


@contextlib.contextmanager
def _part_beside(path: Path) -> Iterator[Path]:
    """A new file beside `path`, which vanishes unless it is renamed."""
    with _of_the_cache(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(".part", path.name + ".", path.parent)
        os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


@contextlib.contextmanager
def _of_the_cache(path: Path) -> Iterator[None]:
    """Failures here are the cache's and not the network's: no other try helps."""
    try:
        yield
    except OSError as error:
        raise _unwritable(path, error) from None


def _unwritable(path: Path, error: OSError) -> SaveError:
    return SaveError(
        f"{path}: cannot write the cache ({error.strerror}); make room, or name another place with "
        "VLBEIT_CACHE"
    )


def _touched(path: Path) -> bool:
    """Whether the file is there; if so it is now the most recently used one."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _tried_again(url: str, once: Callable[[], T]) -> T:
    """`once()`, again after a pause as long as it fails in a way that may pass.

    Raises:
        FileNotFoundError: there is nothing at the URL.
        InputError: the deadline has passed, or another try is of no use.
    """
    patience = _number("VLBEIT_FETCH_SECONDS", 30.0)
    failures = 0
    given_up_at = math.inf
    while True:
        try:
            return once()
        except (FileNotFoundError, SaveError):
            raise
        except (_NoRetryError, ImportError, ValueError) as error:
            raise InputError(f"{url}: cannot fetch it: {error}") from None
        except Exception as error:  # each file system and HTTP library has its own
            reason = f"{type(error).__name__}: {error}".rstrip(": ")
            if _is_final(error):
                raise InputError(f"{url}: the server refuses it: {reason}") from None
        failures += 1
        given_up_at = min(given_up_at, time.monotonic() + patience)
        left = given_up_at - time.monotonic()
        if left <= 0:
            raise InputError(
                f"{url}: cannot fetch it; {failures} tries in {patience:g} s "
                f"(VLBEIT_FETCH_SECONDS), the last: {reason}; run the same command again to go on"
            ) from None
        pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2.0 ** (failures - 1))
        pause *= Draws("pause", os.getpid(), url, failures).uniform(0.5, 1.0)
        time.sleep(min(pause, left))  # the last try is made at the deadline


def _is_final(error: Exception) -> bool:
    """Whether a server has said no, as opposed to not now (408, 429 and everything from 500)."""
    status = getattr(error, "status", 0)  # of aiohttp's ClientResponseError
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, PermissionError)


def _get(url: str, target: Path, told_size: Callable[[int | None], None]) -> None:
    """Copy what is at `url` to a file.

    Args:
        told_size: gets the size as soon as the server has told it.
    """
    from fsspec.callbacks import Callback  # only remote shards need fsspec and aiohttp
    from fsspec.core import url_to_fs

    class Told(Callback):  # type: ignore[misc]
        def set_size(self, size: int | None) -> None:
            told_size(size)

    options: dict[str, Any] = {}
    if url.startswith(("http://", "https://")):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_STALL, sock_read=_STALL)
        options["client_kwargs"] = {"timeout": timeout, "trust_env": True}
    system, path = url_to_fs(url, **options)
    try:
        system.get_file(path, str(target), callback=Told())
    except OSError as error:
        if error.errno in _DISK_FULL:
            raise _unwritable(target, error) from None
        raise
