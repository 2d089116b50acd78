"""The run folder: one writer at a time, rows that are only ever added, cut back at a resume.

run.lock       held by rank 0; who holds it
metrics.jsonl  one row a step; ledger.jsonl the sample ids of each step; skips.jsonl what was
               left out and why; eval.jsonl held-out scores; every row has `step`
tensorboard/   the numbers of metrics.jsonl and eval.jsonl once more, if `log.tensorboard` is on
log.txt        what the terminal showed
config.json    the resolved config; env.json versions and machine of the last start
checkpoints/   see checkpoint.py
"""

from __future__ import annotations

import datetime
import errno
import fcntl
import importlib.metadata
import json
import math
import mmap
import os
import platform
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vlbeit.data.transforms import jpeg_decoder
from vlbeit.errors import SaveError
from vlbeit.train.event_files import EventFiles

LOCK_WAIT = 15.0
"""Seconds a start waits for the lock: the workers of a killed launcher need up to 10 s to leave."""

_PACKAGES = ("vlbeit", "torch", "numpy", "pillow", "safetensors", "tokenizers", "huggingface-hub")


class JsonLines:
    """A file of JSON rows, each written by one system call, in the order of their `step`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = -1

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it is in the file (not yet on the disk) when this returns.

        Floats that are not finite become "nan", "inf" or "-inf", which `float.fromhex` reads as it
        reads the hexadecimal losses; JSON has no such numbers.

        Raises:
            SaveError: the disk is full or the file cannot be written.
        """
        line = (json.dumps(_finite(row), separators=(",", ":"), allow_nan=False) + "\n").encode()
        try:
            if self._file < 0:
                self._file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            written = os.write(self._file, line)
            if written < len(line):  # the disk filled up within the line; a resume cuts it off
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            free = os.statvfs(self.path.parent)
            raise SaveError(
                f"{self.path}: cannot add a row of {len(line)} bytes ({error.strerror}; "
                f"{free.f_bavail * free.f_frsize} bytes free). The checkpoints are untouched; free "
                "space and run the same command again."
            ) from error

    def sync(self) -> None:
        """Puts the rows on the disk; called before a checkpoint claims their step.

        Raises:
            SaveError: the disk refused.
        """
        if self._file >= 0:
            try:
                os.fsync(self._file)
            except OSError as error:
                raise SaveError(f"{self.path}: cannot sync ({error.strerror})") from error

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def truncate_after(self, step: int) -> tuple[int, int]:
        """Cuts what a resume at `step` will write again, and a last line that a kill cut off.

        Reads from the end and stops at the first row that stays, so a long file costs nothing.

        Returns:
            (whole rows cut, bytes of a torn line cut)
        """
        self.close()
        if not self.path.exists() or self.path.stat().st_size == 0:
            return 0, 0
        rows = torn = 0
        with self.path.open("r+b") as file:
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = len(content)
                while end:
                    begin = content.rfind(b"\n", 0, end - 1) + 1
                    found = _step_of(content[begin:end])
                    if found is not None and found <= step:
                        break
                    rows += found is not None
                    torn += end - begin if found is None else 0
                    end = begin
            file.truncate(end)
            os.fsync(file.fileno())
        return rows, torn


def _step_of(line: bytes) -> int | None:
    """The step of a whole row; None for anything else."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        return int(row["step"])
    except (ValueError, KeyError, TypeError):
        return None


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return value.hex()
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class RunFolder:
    """A run's folder, opened by rank 0. Other ranks do not make one.

    >>> with RunFolder(Path("runs/mine")) as run:   # waits for the lock, or refuses
    ...     run.truncate_after(60)                  # at a resume from step 60
    ...     run.metrics.append({"step": 61, "loss": loss.hex()})
    ...     run.sync()                              # before each checkpoint
    """

    def __init__(self, path: Path | str, *, lock_wait: float = LOCK_WAIT) -> None:
        self.path = Path(path)
        self.metrics = JsonLines(self.path / "metrics.jsonl")
        self.ledger = JsonLines(self.path / "ledger.jsonl")
        self.skips = JsonLines(self.path / "skips.jsonl")
        self.evals = JsonLines(self.path / "eval.jsonl")
        self.events: EventFiles | None = None
        """Set by who wants them; closed with the rest."""
        self._lock_wait = lock_wait
        self._lock = -1
        self._log: int = -1

    def __enter__(self) -> RunFolder:
        self.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def acquire(self) -> None:
        """Takes the lock, waiting `lock_wait` seconds for a holder that may be leaving.

        The lock is the kernel's (flock): it goes with its process, however that ends, so a stale
        file never blocks a start. The file's content only names the holder.

        Raises:
            SaveError: another process keeps the lock, with its pid, start time and host; or the
                folder cannot be written. (73: nothing is wrong with the input or the settings, but
                this process may not write here.)
        """
        path = self.path / "run.lock"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SaveError(f"{path}: cannot be written ({error.strerror})") from error
        deadline = time.monotonic() + self._lock_wait
        said = False
        while not self._try_lock():
            holder = read_holder(path)
            if time.monotonic() >= deadline:
                os.close(self._lock)
                self._lock = -1
                raise SaveError(
                    f"{self.path}: another run writes here: {holder}; waited "
                    f"{self._lock_wait:.0f} s. Wait for it, stop it, or choose another run_dir."
                )
            if not said:
                print(f"{self.path}: waiting for {holder} to leave", file=sys.stderr, flush=True)
                said = True
            time.sleep(0.1)
        content = json.dumps(
            {
                "pid": os.getpid(),
                "started": process_start(os.getpid()),
                "host": socket.gethostname(),
                "since": _now(),
            }
        )
        try:
            os.ftruncate(self._lock, 0)
            os.pwrite(self._lock, (content + "\n").encode(), 0)
        except OSError as error:
            self.release()
            raise SaveError(f"{path}: cannot be written ({error.strerror})") from error

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            self.release()
            raise SaveError(
                f"{self.path}: this file system has no locks ({error.strerror}), so two runs could "
                "write here at once; choose a run_dir on another one"
            ) from error
        return True

    def release(self) -> None:
        """Closes everything and gives the lock back; its file stays (removing it would race)."""
        for rows in (self.metrics, self.ledger, self.skips, self.evals):
            rows.close()
        if self.events is not None:
            self.events.close()
            self.events = None
        for handle in (self._log, self._lock):
            if handle >= 0:
                os.close(handle)
        self._log = self._lock = -1

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl, and of the event files where there are any.

        Raises:
            SaveError: the disk is full or a file cannot be written.
        """
        self.metrics.append(row)
        if self.events is not None:
            self.events.add("train", row)

    def add_evaluation(self, row: Mapping[str, Any]) -> None:
        """The same of eval.jsonl."""
        self.evals.append(row)
        if self.events is not None:
            self.events.add("held_out", row)

    def truncate_after(self, step: int) -> None:
        """Cuts the rows after `step` (-1: all) from the four files, and says so."""
        for rows in (self.metrics, self.ledger, self.skips, self.evals):
            cut, torn = rows.truncate_after(step)
            if cut or torn:
                also = f" and {torn} bytes of a torn line" if torn else ""
                self.log(f"{rows.path.name}: cut {cut} rows after step {step}{also}")

    def sync(self) -> None:
        """Puts all rows on the disk."""
        for rows in (self.metrics, self.ledger, self.skips, self.evals):
            rows.sync()
        if self.events is not None:
            self.events.sync()

    def log(self, text: str) -> None:
        """One line to the terminal and, with the time, to log.txt.

        A log.txt that cannot be written is no reason to end a run: the rows and checkpoints are
        what counts, and they raise SaveError themselves.
        """
        print(text, flush=True)
        try:
            if self._log < 0:
                flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                self._log = os.open(self.path / "log.txt", flags, 0o644)
            os.write(self._log, f"{_now()} {text}\n".encode())
        except OSError as error:
            print(f"{self.path / 'log.txt'}: {error.strerror}", file=sys.stderr, flush=True)

    def write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Replaces config.json or env.json in one step.

        Raises:
            SaveError: it cannot be written.
        """
        path = self.path / name
        temporary = path.with_name(f".tmp-{name}")
        try:
            temporary.write_text(json.dumps(_finite(content), indent=1) + "\n")
            temporary.replace(path)
        except OSError as error:
            raise SaveError(f"{path}: cannot be written ({error.strerror})") from error


def read_holder(path: Path) -> str:
    """Who holds a lock file, in words."""
    try:
        holder = json.loads(path.read_text())
        pid, host = int(holder["pid"]), str(holder["host"])
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has not yet written its name"
    words = f"process {pid} on {host}, since {holder.get('since')}"
    if host == socket.gethostname() and process_start(pid) != holder.get("started"):
        words += " (that process is gone; one that it started still holds the lock)"
    return words


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; with the pid it names it for good."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def environment(*, world_size: int, threads: int, device: torch.device) -> dict[str, Any]:
    """What env.json holds: versions, machine and the counts that bit-equality depends on."""
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "started": _now(),
        "host": socket.gethostname(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
        "jpeg_decoder": jpeg_decoder(),
        "torch_build": torch.__config__.show(),
        "cuda": torch.version.cuda,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "cores": len(os.sched_getaffinity(0)),
        "world_size": world_size,
        "threads": threads,
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
