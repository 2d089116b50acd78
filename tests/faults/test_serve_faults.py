"""W01, W02, W04, W05 and W06 of the reliability contract: `vlbeit serve` as a process of its own.

Memory is what /proc says of the server: the peak since it was last reset.
"""

import asyncio
import base64
import json
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from toy_job import SOURCE, killed_at_the_end

from serving import PICTURE, Client, all_of, as_sent, exchange, form_of
from test_transforms import png, png_chunk
from toy_tasks import toy_finetune, write_start, write_tasks
from untrained_run import noise
from untrained_run import png as png_of

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(240)]

DEADLINE = 10.0
QUESTIONS = ("which colour is here", "say red", "say green")


@dataclass(frozen=True)
class Process:
    job: subprocess.Popen[str]
    port: int
    out: Path

    def client(self) -> Client:
        return Client(self.port)

    def peak(self, *, reset: bool = False) -> int:
        """Largest resident memory in bytes; `reset` starts it anew from now."""
        folder = Path(f"/proc/{self.job.pid}")
        if reset:
            (folder / "clear_refs").write_text("5")
        lines = (folder / "status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    def waited_for_a_core(self) -> float:
        """Seconds in which the event loop's thread could have run, and others did."""
        told = Path(f"/proc/{self.job.pid}/task/{self.job.pid}/schedstat").read_text()
        return int(told.split()[1]) / 1e9

    def worked(self) -> float:
        """CPU seconds of the server."""
        words = Path(f"/proc/{self.job.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")

    @contextmanager
    def grows_by_at_most(self, megabytes: float) -> Iterator[None]:
        before = self.peak(reset=True)
        yield
        grown = (self.peak() - before) / 1e6
        assert grown <= megabytes, f"{grown:.1f} MB"


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQA run of two steps."""
    folder = tmp_path_factory.mktemp("served")
    data = write_tasks(folder / "data")
    start = write_start(folder / "start", data)
    return toy_finetune("vqa", start, data, folder / "vqa", {"max_steps": 2})


@contextmanager
def serving(run_dir: Path, *flags: str) -> Iterator[Process]:
    """`vlbeit serve` on a free port, killed at the end."""
    out = run_dir.with_name(f"serve-{time.monotonic_ns()}.out")
    words = [sys.executable, "-m", "vlbeit", "serve", str(run_dir), "--port", "0", *flags]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    with out.open("w") as file:
        job = subprocess.Popen(
            words, env=environment, stdout=file, stderr=file, text=True, start_new_session=True
        )
    with killed_at_the_end(job):
        until = time.monotonic() + 120
        while "serving on http://127.0.0.1:" not in out.read_text():
            assert job.poll() is None and time.monotonic() < until, out.read_text()
            time.sleep(0.05)
        port = int(out.read_text().partition("127.0.0.1:")[2].partition("/")[0])
        process = Process(job, port, out)
        with process.client() as client:
            # Memory of the first requests belongs to nobody's attack.
            for i in range(40):
                client.ask("answer", question(i))
        yield process
    said = out.read_text()
    assert "Traceback" not in said, said


@pytest.fixture(scope="module")
def attacked(run_dir: Path) -> Iterator[tuple[Process, list[bytes]]]:
    """The one server that all attacks are made on, and its first 50 answers."""
    with serving(run_dir, "--deadline", str(DEADLINE)) as found:
        answers = golden(found)
        assert len(set(answers)) > 10
        yield found, answers


@pytest.fixture
def server(attacked: tuple[Process, list[bytes]]) -> Iterator[Process]:
    """After every test its 50 answers are those of the beginning, byte for byte."""
    process, answers = attacked
    yield process
    assert golden(process) == answers


def question(i: int) -> dict[str, Any]:
    return {"image": png_of(noise(i % 17)), "question": QUESTIONS[i % 3], "top": 1 + i % 2}


def golden(process: Process) -> list[bytes]:
    with process.client() as client:
        return [client.ask("answer", question(i)).body for i in range(50)]


def machine_worked() -> float:
    """CPU seconds of everybody on this machine."""
    words = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    idle, waiting_for_disks = 3, 4
    seconds = sum(int(w) for i, w in enumerate(words) if i not in (idle, waiting_for_disks))
    return seconds / os.sysconf("SC_CLK_TCK")


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


WATCH = """
import http.client, sys, time
while True:
    began = time.monotonic()
    line = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
    line.request("GET", "/live")
    print(line.getresponse().status, time.monotonic() - began, time.process_time(), flush=True)
    line.close()
    time.sleep(0.05)
"""


class Watch:
    """A process that asks for /live again and again, on new connections, until it is left."""

    def __init__(self, port: int) -> None:
        self.words = [sys.executable, "-c", WATCH, str(port)]
        self.seconds: list[float] = []
        self.statuses: set[int] = set()
        self.worked = 0.0
        """CPU seconds of the watch itself."""

    def __enter__(self) -> "Watch":
        self.job = subprocess.Popen(self.words, stdout=subprocess.PIPE, text=True)
        assert self.job.stdout is not None and self.job.stdout.readline()  # it has begun
        return self

    def __exit__(self, *_: object) -> None:
        time.sleep(0.3)  # so that a request which was held up is seen
        self.job.kill()
        for line in self.job.communicate()[0].splitlines():
            if len(found := line.split()) == 3:
                self.statuses.add(int(found[0]))
                self.seconds.append(float(found[1]))
                self.worked = float(found[2])


async def answer_to(port: int, sent: bytes, ready: asyncio.Barrier) -> tuple[int, bytes, float]:
    """Status, the whole answer, and seconds from the last byte sent by all to it."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    await ready.wait()
    began = time.monotonic()
    writer.write(sent)
    got = await reader.read(-1)
    seconds = time.monotonic() - began
    writer.close()
    return int(got.split(b" ")[1]), got, seconds


async def all_at_once(port: int, requests: list[bytes]) -> list[tuple[int, bytes, float]]:
    ready = asyncio.Barrier(len(requests))
    return await asyncio.gather(*(answer_to(port, sent, ready) for sent in requests))


def test_w01_500_requests_at_once_are_answered_or_refused_and_change_nothing(
    server: Process,
) -> None:
    malformed = (b"{", b'{"image": NaN}', b'{"image": "%"}', b"[]", b'{"top": 3}')
    requests = []
    for i in range(500):
        sent = {name: as_sent(value) for name, value in question(i).items()}
        content = malformed[i // 10 % 5] if i % 10 == 0 else json.dumps(sent).encode()
        lines = ("Content-Type: application/json", f"Content-Length: {len(content)}")
        requests.append(post(*lines, "Connection: close") + content)
    waited, began = server.waited_for_a_core(), time.monotonic()
    others = machine_worked() - server.worked() - time.process_time()
    with server.grows_by_at_most(200), Watch(server.port) as live:
        answers = asyncio.run(all_at_once(server.port, requests))
    others = machine_worked() - server.worked() - time.process_time() - live.worked - others
    waited, seconds = server.waited_for_a_core() - waited, time.monotonic() - began
    for i, (status, got, _) in enumerate(answers):
        assert status in ((400, 503) if i % 10 == 0 else (200, 503)), got
        content = json.loads(got.rpartition(b"\r\n\r\n")[2])
        assert status == 200 or content["error"]["message"]
        assert status != 503 or b"retry-after: 1" in got.lower()
    served = [seconds for status, _, seconds in answers if status == 200]
    assert len(served) >= 100 and percentile(served, 0.99) <= DEADLINE
    assert live.statuses == {200} and len(live.seconds) >= 5
    # On a machine that others leave alone the bar is 0.5 s as it stands. Where others work (more
    # than a tenth of a core), what the server then waited for a core is their doing.
    allowance = waited if others > 0.1 * seconds else 0.0
    assert percentile(live.seconds, 0.99) <= 0.5 + allowance, (live.seconds, others, waited)


def post(*lines: str) -> bytes:
    head = "POST /v1/answer HTTP/1.1\r\nHost: localhost\r\n"
    return head.encode() + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n"


def flood(port: int, head: bytes, piece: bytes, pieces: int) -> tuple[bytes, float]:
    """Sends as much as the server takes; what it says, and seconds from its word to its close."""
    with socket.create_connection(("127.0.0.1", port)) as line:
        line.setblocking(False)
        left, rest = pieces, memoryview(head)
        got, spoke, unsent = b"", 0.0, 0
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if not rest and left:
                left, rest = left - 1, memoryview(piece)
            readable, writable, _ = select.select([line], [line] if rest else [], [], 1.0)
            try:
                if readable:
                    if not (more := line.recv(65536)):
                        break
                    if not spoke:
                        spoke, unsent = time.monotonic(), left
                    got += more
                if writable:
                    rest = rest[line.send(rest) :]
            except BlockingIOError:
                continue
            except OSError:  # the server closed while we sent
                break
        # It may take the rest for a moment, to throw it away: a close at once would lose its word.
        assert spoke and unsent, "the server waited for all of it"
        return got, time.monotonic() - spoke


MEGABYTE = b"a" * 1_000_000
FLOODS: dict[str, tuple[bytes, bytes]] = {
    "200 MB of JSON": (
        post("Content-Type: application/json", "Content-Length: 200000000"),
        MEGABYTE,
    ),
    "200 MB of a form": (
        post("Content-Type: multipart/form-data; boundary=b", "Content-Length: 200000000")
        + b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n',
        MEGABYTE,
    ),
    "200 MB in chunks": (
        post("Content-Type: application/json", "Transfer-Encoding: chunked"),
        b"f4240\r\n" + MEGABYTE + b"\r\n",
    ),
}


@pytest.mark.parametrize("name", FLOODS)
def test_w02_a_body_of_200_mb_is_refused_while_it_arrives(server: Process, name: str) -> None:
    with server.grows_by_at_most(16):
        got, seconds = flood(server.port, *FLOODS[name], 200)
    assert got.startswith(b"HTTP/1.1 413 "), got[:200]
    assert b"the limit is 10000000 bytes" in got and seconds <= 2.0


def test_w02_a_gzip_bomb_is_not_unpacked(server: Process) -> None:
    bomb = zlib.compressobj(9, zlib.DEFLATED, 31)
    packed = b"".join(bomb.compress(bytes(1_000_000)) for _ in range(200)) + bomb.flush()
    sent = post(
        "Content-Type: application/json",
        "Content-Encoding: gzip",
        f"Content-Length: {len(packed)}",
    )
    with server.grows_by_at_most(16):
        began = time.monotonic()
        got = exchange(server.port, sent + packed)
    assert got.startswith(b"HTTP/1.1 415 ") and time.monotonic() - began <= 2.0


def test_w06_image_bombs_and_a_hundred_images_are_refused_in_half_a_second(
    server: Process,
) -> None:
    side = 13_300
    squeeze = zlib.compressobj(9)
    start = squeeze.compress(b"") + squeeze.flush(zlib.Z_FULL_FLUSH)
    part = squeeze.compress(bytes((1 + 3 * side) * side // 100)) + squeeze.flush(zlib.Z_FULL_FLUSH)
    rows = start + 100 * part + squeeze.flush()
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", rows) + png_chunk(b"IEND", b"")
    many = {f"image{i}": PICTURE for i in range(100)}
    listed = [base64.b64encode(PICTURE).decode()] * 100
    attacks: dict[str, Callable[[Client], Any]] = {
        "a bomb": lambda c: c.ask("answer", {"image": bomb, "question": "what"}),
        "a bomb in a form": lambda c: c.ask_by_form("answer", {"image": bomb, "question": "what"}),
        "60,000 squared": lambda c: c.ask(
            "answer", {"image": png(60_000, 60_000, 8, 2, b""), "question": "what"}
        ),
        "100 fields": lambda c: c.ask("answer", many),
        "100 files": lambda c: c.send(
            "POST", "/v1/answer", form_of(many)[1], {"Content-Type": form_of(many)[0]}
        ),
        "a list of 100": lambda c: c.ask("answer", {"image": listed, "question": "what"}),
    }
    for name, attack in attacks.items():
        with server.client() as client, server.grows_by_at_most(64):
            began = time.monotonic()
            found = attack(client)
            seconds = time.monotonic() - began
        assert found.status in (400, 413) and found.error(), (name, found.status)
        assert seconds <= 0.5, (name, seconds)


# Without what this process itself waited for a core.
ASK = """
import http.client, sys, time
def awake():
    told = open("/proc/self/schedstat").read()
    return time.monotonic() - int(told.split()[1]) / 1e9
line = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=30)
bodies = sys.stdin.buffer.read().splitlines()
found, until = [], time.monotonic() + float(sys.argv[2])
while time.monotonic() < until:
    began = awake()
    body = bodies[len(found) % len(bodies)]
    line.request("POST", "/v1/answer", body, {"Content-Type": "application/json"})
    answer = line.getresponse()
    answer.read()
    assert answer.status == 200, answer.status
    found.append(awake() - began)
    time.sleep(0.02)
print(*found)
"""


def slowest(port: int, seconds: float) -> float:
    """The 99th percentile of answers to a client in a process of its own."""
    bodies = [{name: as_sent(v) for name, v in question(i).items()} for i in range(17)]
    job = subprocess.run(
        [sys.executable, "-c", ASK, str(port), str(seconds)],
        input="\n".join(map(json.dumps, bodies)),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found = list(map(float, job.stdout.split()))
    assert len(found) >= 30
    return percentile(found, 0.99)


def test_w04_50_trickling_clients_and_25_idle_ones_are_cut_and_others_do_not_notice(
    server: Process,
) -> None:
    def trickle(line: socket.socket, content: bytes) -> float:
        """Seconds until the server closed."""
        began = time.monotonic()
        line.settimeout(0.5)
        place = 0
        while time.monotonic() - began < 20:
            try:
                if content:
                    line.send(content[place : place + 1] or b"a")
                    place += 1
                if not line.recv(4096):
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        return time.monotonic() - began

    head = b"GET /live HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"a" * 60
    sent = post("Content-Type: application/json", "Content-Length: 5000")
    before = slowest(server.port, 5.0)
    lines = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(75)]
    try:
        for line in lines[25:50]:
            line.sendall(sent)
        contents = [head] * 25 + [b"a" * 60] * 25 + [b""] * 25
        with ThreadPoolExecutor(76) as pool, Watch(server.port) as live:
            cut = [pool.submit(trickle, *pair) for pair in zip(lines, contents, strict=True)]
            busy = slowest(server.port, 9.0)
            seconds = [one.result() for one in cut]
    finally:
        for line in lines:
            line.close()
    assert max(seconds) <= 15.0 and min(seconds) > 2.0, seconds
    assert live.statuses == {200}
    after = slowest(server.port, 5.0)  # other work on the machine comes and goes
    assert busy <= 2 * max(before, after), (before, busy, after)


def accepted(server: Process) -> int:
    """Questions that the server has taken up so far: in work, or answered with 200."""
    with server.client() as client:
        text = client.get("/metrics").body.decode()
    lines = ("vlbeit_in_work", r'vlbeit_requests_total\{route="answer",status="200"\}')
    return sum(int(float(re.search(rf"^{line} (\S+)$", text, re.M)[1])) for line in lines)


def test_w05_sigterm_finishes_what_was_accepted_and_leaves(run_dir: Path) -> None:
    with serving(run_dir, "--batch", "1") as server:
        with server.client() as client:
            assert client.get("/ready").status == 200
        stalled = socket.create_connection(("127.0.0.1", server.port))
        stalled.sendall(post("Content-Type: application/json", "Content-Length: 5000"))
        waiting = Client(server.port)
        assert waiting.get("/ready").status == 200
        before = accepted(server)  # the stalled one among them
        with ThreadPoolExecutor(64) as pool:
            asked = threading.Semaphore(0)

            def ask(i: int) -> int:
                with server.client() as client:
                    client.connection.connect()
                    asked.release()
                    return client.ask("answer", question(i)).status

            in_flight = [pool.submit(ask, i) for i in range(64)]
            for _ in in_flight:
                asked.acquire()
            time.sleep(0.1)  # the requests are on their way
            taken = accepted(server) - before
            began = time.monotonic()
            os.kill(server.job.pid, signal.SIGTERM)
            time.sleep(0.1)
            found = waiting.get("/ready")
            assert (found.status, found.error()) == (503, "leaving")
            refused = waiting.ask("answer", question(0))
            assert (refused.status, refused.error()) == (503, "leaving")
            statuses = [one.result() for one in in_flight]
        told = all_of(stalled)
        stalled.close()
        assert server.job.wait(15) == 0, server.out.read_text()
        assert time.monotonic() - began <= 10.0
        # Every one that was accepted before the signal is answered; who came later is refused.
        assert set(statuses) <= {200, 503} and statuses.count(200) >= taken >= 16, (statuses, taken)
        assert b" 503 " in told[:20] and json.loads(told.rpartition(b"\r\n\r\n")[2])
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", server.port))


def test_a_second_signal_does_not_wait(run_dir: Path) -> None:
    with serving(run_dir) as server:
        stalled = socket.create_connection(("127.0.0.1", server.port))
        stalled.sendall(post("Content-Type: application/json", "Content-Length: 5000"))
        time.sleep(0.3)
        began = time.monotonic()
        for _ in range(2):
            os.kill(server.job.pid, signal.SIGTERM)
            time.sleep(0.3)
        assert server.job.wait(10) == 0 and time.monotonic() - began < 5.0
        stalled.close()


def test_answers_after_random_abuse_are_those_of_before(server: Process) -> None:
    """Bytes of a good request, changed at random: nothing breaks, and nothing stays behind."""
    kind, form = form_of({"image": PICTURE, "question": "say red"})
    fields = {"image": base64.b64encode(PICTURE).decode(), "question": "say red"}
    draw = random.Random(0)
    for i in range(200):
        whole = bytearray(form if i % 2 else json.dumps(fields).encode())
        for _ in range(draw.randrange(1, 6)):
            whole[draw.randrange(len(whole))] = draw.randrange(256)
        with server.client() as client:
            headers = {"Content-Type": kind if i % 2 else "application/json"}
            found = client.send("POST", "/v1/answer", bytes(whole), headers)
            assert found.status == 200 or 400 <= found.status < 500 and found.error()
