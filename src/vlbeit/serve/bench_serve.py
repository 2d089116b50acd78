"""`vlbeit bench serve RUN`: latency and throughput of the server, with and without micro-batches.

    vlbeit bench serve runs/demo [--mode answer] [--clients 1 8 64] [--seconds 5] [--json]

The server is a process of its own, as `vlbeit serve` starts it, once with its --batch and once with
--batch 1. Clients keep their connections and send the next request when the last is answered; they
are one other process, so on few cores their work counts too. Pictures are noise at the model's
size, texts a few words; every answer's status is looked at.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console

from vlbeit import __version__
from vlbeit.config import ServeConfig
from vlbeit.draws import Draws
from vlbeit.errors import ConfigError, InputError
from vlbeit.eval.cli import table_of
from vlbeit.serve.modes import MODES, Kind, Mode
from vlbeit.tokens.text import MASK

PREFERRED = ("answer", "match", "classify", "encode_pair", "fill_words")
"""Modes that are measured if none is named: the first that the runs have."""
REQUESTS = 32
"""Different requests that clients send in turn."""
START_SECONDS = 300.0


class Load(NamedTuple):
    """What one way of serving did under one number of clients."""

    clients: int
    batch: int
    requests: int
    seconds: float
    p50: float
    """Seconds from sending a request to its answer: half are as fast."""
    p99: float
    refused: int
    """Answers that were not 200."""
    mean_batch: float

    @property
    def per_second(self) -> float:
        return (self.requests - self.refused) / self.seconds


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for vlbeit serve")
    parser.add_argument("--mode", choices=[m.name for m in MODES.values() if m.together])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--batch", type=int, default=ServeConfig().batch)
    parser.add_argument("--batch-window", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as torch chooses")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    for name, low in (("seconds", 0.1), ("batch", 2)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} must be at least {low}, found {getattr(args, name)}")
    if min(args.clients) < 1:
        raise ConfigError(f"--clients must be at least 1, found {min(args.clients)}")
    mode, loads = measure(args)
    report = {
        "version": __version__,
        "runs": args.runs,
        "mode": mode,
        "batch_window": args.batch_window,
        "loads": [{**load._asdict(), "per_second": load.per_second} for load in loads],
        "speedup": {str(clients): speedup(loads, clients) for clients in args.clients},
    }
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(mode, loads, Console())
    return 0


def measure(args: argparse.Namespace) -> tuple[str, list[Load]]:
    """The mode that was asked, and a row for each batch limit and number of clients."""
    loads: list[Load] = []
    name = ""
    for batch in (args.batch, 1):
        flags = ["--batch", str(batch), "--batch-window", str(args.batch_window)]
        flags += ["--threads", str(args.threads), "--device", args.device]
        with served(args.runs, flags) as port:
            info = asyncio.run(get(port, "/info"))
            name = chosen_mode(args.mode, info)
            sent = requests(MODES[name], info["modes"][name]["image"]["size"])
            asyncio.run(load_of(port, name, sent, 8, batch, 1.0))  # to warm up
            loads += [
                asyncio.run(load_of(port, name, sent, clients, batch, args.seconds))
                for clients in args.clients
            ]
    return name, loads


@contextmanager
def served(runs: Sequence[str], flags: Sequence[str]) -> Iterator[int]:
    """`vlbeit serve` on a free port of this machine.

    Raises:
        InputError: it ended, with what it said.
    """
    words = [sys.executable, "-m", "vlbeit", "serve", *runs, "--port", "0", *flags]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert job.stdout is not None
    try:
        said = ""
        for line in job.stdout:
            said += line
            if found := re.search(r"serving on http://\S+:(\d+)/", line):
                yield int(found[1])
                return
        raise InputError(f"vlbeit serve ended with {job.wait()}: {said.strip()[-500:]}")
    finally:
        job.terminate()
        job.wait(START_SECONDS)


def chosen_mode(asked: str | None, info: dict[str, Any]) -> str:
    has = [name for name, facts in info["modes"].items() if facts["available"]]
    for name in [asked] if asked else PREFERRED:
        if name in has:
            return name
    raise ConfigError(
        f"--mode {asked}: the runs have {', '.join(has)}"
        if asked
        else f"none of {', '.join(PREFERRED)} in the runs; --mode names another"
    )


def requests(mode: Mode, size: Sequence[int]) -> list[bytes]:
    """Whole HTTP requests of a mode, different from each other."""
    made = []
    for number in range(REQUESTS):
        draws = Draws(number, "bench serve")
        fields: dict[str, Any] = {}
        for field in mode.fields:
            if field.kind is Kind.PICTURE:
                fields[field.name] = noise_png(draws, size)
            elif field.kind is Kind.TEXT:
                words = ["what", "colour", "is", "the", "large", "figure"][: 3 + number % 4]
                fields[field.name] = " ".join(
                    [*words, MASK] if mode.name == "fill_words" else words
                )
        body = json.dumps(fields).encode()
        head = (
            f"POST /v1/{mode.name} HTTP/1.1\r\nHost: localhost\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        made.append(head.encode() + body)
    return made


def noise_png(draws: Draws, size: Sequence[int]) -> str:
    coarse = np.array([draws.integer(0, 256) for _ in range(8 * 8 * 3)], dtype=np.uint8).reshape(
        8, 8, 3
    )
    file = io.BytesIO()
    Image.fromarray(coarse).resize((size[1], size[0])).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


async def load_of(
    port: int, mode: str, sent: Sequence[bytes], clients: int, batch: int, seconds: float
) -> Load:
    """So many clients for so many seconds."""
    before = await batches(port, mode)
    began = time.perf_counter()
    found: list[tuple[int, float]] = []

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            while (now := time.perf_counter()) - began < seconds:
                writer.write(sent[number % len(sent)])
                status, _ = await response(reader)
                found.append((status, time.perf_counter() - now))
                number += clients
        finally:
            writer.close()

    await asyncio.gather(*map(client, range(clients)))
    took = time.perf_counter() - began
    count, rows = (b - a for a, b in zip(before, await batches(port, mode), strict=True))
    times = np.array([latency for _, latency in found])
    return Load(
        clients=clients,
        batch=batch,
        requests=len(found),
        seconds=took,
        p50=float(np.percentile(times, 50)),
        p99=float(np.percentile(times, 99)),
        refused=sum(status != 200 for status, _ in found),
        mean_batch=rows / max(count, 1),
    )


async def response(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    assert length is not None
    return int(head.split(b" ", 2)[1]), await reader.readexactly(int(length[1]))


async def get(port: int, path: str) -> Any:
    """JSON, or the text of /metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    _, body = await response(reader)
    writer.close()
    return json.loads(body) if path != "/metrics" else body.decode()


async def batches(port: int, mode: str) -> tuple[float, float]:
    """Batches of a mode since the start, and requests in them."""
    text = await get(port, "/metrics")
    found = []
    for name in ("count", "sum"):
        line = re.search(rf'^vlbeit_batch_size_{name}{{mode="{mode}"}} (\S+)', text, re.MULTILINE)
        found.append(float(line[1]) if line else 0.0)
    return found[0], found[1]


def speedup(loads: Sequence[Load], clients: int) -> float:
    """Throughput with micro-batches over that of one at a time."""
    of = {load.batch: load.per_second for load in loads if load.clients == clients}
    return of[max(of)] / of[1]


def show(mode: str, loads: Sequence[Load], console: Console) -> None:
    """What a person reads."""
    table = table_of(
        f"{mode}: clients", "batch limit", "mean batch", "requests/s", "p50 ms", "p99 ms", "refused"
    )
    for load in sorted(loads, key=lambda one: (one.clients, one.batch)):
        table.add_row(
            str(load.clients),
            str(load.batch),
            f"{load.mean_batch:.1f}",
            f"{load.per_second:.1f}",
            f"{1e3 * load.p50:.1f}",
            f"{1e3 * load.p99:.1f}",
            str(load.refused),
        )
    console.print(table)
    for clients in sorted({load.clients for load in loads}):
        print(f"{clients} clients: micro-batches give {speedup(loads, clients):.2f} times")
    print(f"{os.cpu_count()} cores; the clients ran on them too")
