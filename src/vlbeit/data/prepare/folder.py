"""The dataset folder while it is written: beside its place until it is complete."""

import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from vlbeit.data.dataset import SourceInfo
from vlbeit.data.prepare.account import Report
from vlbeit.data.records import ShardWriter
from vlbeit.draws import key_of
from vlbeit.errors import ConfigError, SaveError, StopRequested


def refuse_existing(out: Path) -> None:
    """Raises ConfigError when there is something at `out` already."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out}: exists already; remove it or choose another folder")


class Stop:
    """Set by SIGTERM; looked at between two records.

    Raising from the signal handler would be shorter, but what it interrupts may swallow it: a
    decoder takes any exception for a damaged picture.
    """

    def __init__(self) -> None:
        self._asked = False

    def ask(self, *signal_and_frame: object) -> None:
        self._asked = True

    def check(self) -> None:
        """Raises StopRequested once it was asked for."""
        if self._asked:
            raise StopRequested("stopped; nothing was written, and the same command starts again")


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, Stop]]:
    """A folder beside `out` that takes its place when the block ends well, else vanishes."""
    refuse_existing(out)
    stop = Stop()
    main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop.ask) if main_thread else None
    temporary = out.with_name(f".{out.name}.part-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        for old in out.parent.glob(f".{out.name}.part-*"):
            if old != temporary:
                print(f"{old}: of another prepare, or of one that was killed", file=sys.stderr)
        yield temporary, stop
        if out.exists():
            out.rmdir()
        os.replace(temporary, out)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaveError(f"{out}: cannot be written ({error})") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        if main_thread:
            signal.signal(signal.SIGTERM, before)


class Sink:
    """Shards of one dataset folder, by source, stream and split; without a folder it counts."""

    def __init__(
        self, folder: Path | None, per_shard: int, report: Report, stop: Stop | None = None
    ) -> None:
        self._folder = folder
        self._stop = stop or Stop()
        self._per_shard = per_shard
        self._report = report
        self._shards: dict[tuple[str, str, str], list[str]] = {}
        self._open: dict[tuple[str, str, str], tuple[ShardWriter, set[str]]] = {}

    def add(
        self, source: str, stream: str, split: str, name: str, members: Mapping[str, bytes]
    ) -> None:
        """A record; its key is made from its name."""
        self._stop.check()
        place = (source, stream, split)
        self._report.records[" ".join(place)] += 1
        if self._folder is None:
            return
        if place in self._open and len(self._open[place][1]) >= self._per_shard:
            self._open.pop(place)[0].__exit__(None, None, None)
        if place not in self._open:
            shards = self._shards.setdefault(place, [])
            shards.append(f"{source}-{split}-{len(shards):05d}.tar")
            self._open[place] = (ShardWriter(self._folder / shards[-1]).__enter__(), set())
        writer, keys = self._open[place]
        key = plain = record_key(name)
        while key in keys:  # a.jpg beside a.png
            key = f"{plain}-{len(keys)}"
        keys.add(key)
        writer.add(key, members)

    def close(self) -> list[SourceInfo]:
        """Completes the last shards. (When a command fails, its whole folder is removed.)"""
        for writer, _ in self._open.values():
            writer.__exit__(None, None, None)
        return [
            SourceInfo(
                source, stream, split, shards, self._report.records[f"{source} {stream} {split}"]
            )
            for (source, stream, split), shards in sorted(self._shards.items())
        ]


def record_key(name: str) -> str:
    """A tar key from a file name: ASCII, no dots, short; a changed name gets part of its hash."""
    name = name.encode("utf-8", "backslashreplace").decode()
    stem = name.rpartition(".")[0] or name
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "-_/") else "_" for c in stem)
    if plain == stem and len(plain) <= 80 and "//" not in "/" + plain:
        return plain
    plain = plain.replace("/", "_")
    return f"{plain[-60:]}-{key_of('record', name) % 2**64:016x}"
