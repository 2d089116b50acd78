"""`vlbeit bench serve RUN`: latency and throughput of the server, with and without micro-batches.

    vlbeit bench serve runs/demo [--mode answer] [--clients 1 8 64] [--seconds 5] [--json]

Two servers, as `vlbeit serve` starts them, one with its --batch and one with --batch 1, are asked
in turn, in rounds, so that what else the machine does touches both. Clients keep their connections
and send the next request when the last is answered; they are one other process, so on few cores
their work counts too. Pictures are coarse noise at the model's size, texts a few words.
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
from contextlib import ExitStack, contextmanager
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

PREFERRED = ("answer", "match", "classify", "encode_pair")
"""Modes that are measured if none is named: the first that the runs have."""
REQUESTS = 32
"""Different requests that clients send in turn."""
START_SECONDS = 300.0


class Load(NamedTuple):
    """What one way of serving did under one number of clients."""

    clients: int
    batch: int
    seconds: float
    """In which the requests were sent and answered."""
    latencies: tuple[float, ...]
    """Seconds from sending each request to its answer."""
    refused: int
    """Answers that were not 200."""
    batches: float
    """That the model was asked for."""
    cpu_seconds: float
    """Of the server."""

    @property
    def per_second(self) -> float:
        return (len(self.latencies) - self.refused) / self.seconds

    def __add__(self, other: Any) -> "Load":
        """Two rounds of the same."""
        assert isinstance(other, Load) and self[:2] == other[:2]
        return Load(
            clients=self.clients,
            batch=self.batch,
            seconds=self.seconds + other.seconds,
            latencies=self.latencies + other.latencies,
            refused=self.refused + other.refused,
            batches=self.batches + other.batches,
            cpu_seconds=self.cpu_seconds + other.cpu_seconds,
        )

    def to_dict(self) -> dict[str, float]:
        requests = len(self.latencies)
        return {
            "clients": self.clients,
            "batch": self.batch,
            "requests": requests,
            "refused": self.refused,
            "per_second": self.per_second,
            "p50": float(np.percentile(self.latencies, 50)),
            "p99": float(np.percentile(self.latencies, 99)),
            "mean_batch": requests / max(self.batches, 1.0),
            "server_cpu_seconds": self.cpu_seconds / requests,
        }


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = argparse.ArgumentParser(
        prog="vlbeit bench serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="as for vlbeit serve")
    parser.add_argument(
        "--mode",
        choices=[m.name for m in MODES.values() if m.together],
        help="what is asked; default: the first of these that the runs have",
    )
    parser.add_argument(
        "--clients",
        type=int,
        nargs="+",
        default=[1, 8, 64],
        help="clients at a time, one load each (default: 1 8 64)",
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="of each load in a round")
    parser.add_argument("--rounds", type=int, default=3, help="of all loads (default: 3)")
    parser.add_argument(
        "--batch",
        type=int,
        default=ServeConfig().batch,
        help="of the batching server, as for vlbeit serve (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-window", type=float, default=0.0, help="its seconds, as for vlbeit serve"
    )
    parser.add_argument(
        "--deadline",
        type=float,
        default=ServeConfig().deadline,
        help="of both servers, as for vlbeit serve (default: %(default)g s)",
    )
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as torch chooses")
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    args = parser.parse_args(argv)
    for name, low in (("seconds", 0.1), ("batch", 2)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} must be at least {low}, found {getattr(args, name)}")
    for name, least in (("clients", min(args.clients)), ("rounds", args.rounds)):
        if least < 1:
            raise ConfigError(f"--{name} must be at least 1, found {least}")
    mode, loads = measure(args)
    report = {
        "version": __version__,
        "runs": args.runs,
        "mode": mode,
        "batch_window": args.batch_window,
        "deadline": args.deadline,
        "loads": [load.to_dict() for load in loads],
        "speedup": {str(clients): speedup(loads, clients) for clients in args.clients},
    }
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        show(mode, loads, Console())
    return 0


def measure(args: argparse.Namespace) -> tuple[str, list[Load]]:
    """The mode that was asked, and a row for each number of clients and batch limit."""
    shared = ["--batch-window", str(args.batch_window), "--deadline", str(args.deadline)]
    shared += ["--threads", str(args.threads), "--device", args.device]
    found: dict[tuple[int, int], Load] = {}
    with ExitStack() as stack:
        ports = {
            batch: stack.enter_context(served(args.runs, ["--batch", str(batch), *shared]))
            for batch in (args.batch, 1)
        }
        info = asyncio.run(get(ports[1], "/info"))
        name = chosen_mode(args.mode, info)
        sent = requests(MODES[name], info["modes"][name]["image"]["size"])
        for batch, port in ports.items():
            asyncio.run(load_of(port, name, sent, 8, batch, 1.0))  # to warm up
        for _ in range(args.rounds):
            for clients in args.clients:
                for batch, port in ports.items():
                    load = asyncio.run(load_of(port, name, sent, clients, batch, args.seconds))
                    before = found.get((clients, batch))
                    found[clients, batch] = load if before is None else before + load
    return name, list(found.values())


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
                fields[field.name] = " ".join(["what", "is", "this", "here"][: 1 + number % 4])
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
    before = await counted(port, mode)
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
    after = await counted(port, mode)
    return Load(
        clients=clients,
        batch=batch,
        seconds=took,
        latencies=tuple(latency for _, latency in found),
        refused=sum(status != 200 for status, _ in found),
        batches=after[0] - before[0],
        cpu_seconds=after[1] - before[1],
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


async def counted(port: int, mode: str) -> tuple[float, float]:
    """Batches of a mode since the start, and CPU seconds of the server."""
    text = await get(port, "/metrics")
    found = []
    for name in (f'vlbeit_batch_size_count{{mode="{mode}"}}', "process_cpu_seconds_total"):
        line = re.search(rf"^{re.escape(name)} (\S+)", text, re.MULTILINE)
        found.append(float(line[1]) if line else 0.0)
    return found[0], found[1]


def speedup(loads: Sequence[Load], clients: int) -> float:
    """Throughput with micro-batches over that of one at a time."""
    of = {load.batch: load.per_second for load in loads if load.clients == clients}
    return of[max(of)] / of[1]


def show(mode: str, loads: Sequence[Load], console: Console) -> None:
    """What a person reads."""
    names = ("batch limit", "mean batch", "requests/s", "p50 ms", "p99 ms", "CPU ms", "refused")
    table = table_of(f"{mode}: clients", *names)
    for load in sorted(loads, key=lambda one: (one.clients, one.batch)):
        row = load.to_dict()
        milliseconds = (row["p50"], row["p99"], row["server_cpu_seconds"])
        table.add_row(
            str(load.clients),
            str(load.batch),
            f"{row['mean_batch']:.1f}",
            f"{row['per_second']:.1f}",
            *(f"{1e3 * value:.1f}" for value in milliseconds),
            str(load.refused),
        )
    console.print(table)
    for clients in sorted({load.clients for load in loads}):
        print(f"{clients} clients: micro-batches give {speedup(loads, clients):.2f} times")
    print(f"{os.cpu_count()} cores; the clients ran on them too. CPU ms: the server's, a request.")
