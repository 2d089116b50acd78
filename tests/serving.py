"""A server in this process, and clients that send whatever a test wants to send."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tiny_run import tiny_run, write_world
from untrained_run import noise, png, retrieval, untrained
from vlbeit.config import ServeConfig
from vlbeit.serve.app import App
from vlbeit.serve.page_files import PageFile
from vlbeit.serve.predictor import Predictor
from vlbeit.serve.served_runs import ServedRuns
from vlbeit.serve.server import listen, server_of

TASKS = ("vqa", "classification", "statements", "entailment", "segmentation")
JSON = {"Content-Type": "application/json"}
PICTURE = png(noise(0))


def served_of_all_tasks(data: Path, world: Path) -> ServedRuns:
    """A pretrained run and one of each task, untrained, with an index of six pictures."""
    searcher = retrieval(data)
    index = searcher.index(images=[noise(i) for i in range(6)], ids=[f"p{i}" for i in range(6)])
    runs = [Predictor(tiny_run(write_world(world)), "e" * 64), searcher]
    return ServedRuns(runs=(*runs, *(untrained(task, data) for task in TASKS)), index=index)


@dataclass(frozen=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> str:
        """The code of an error, which has the form that every error has."""
        found = self.json()
        assert set(found) == {"error"} and set(found["error"]) == {"code", "message", "request_id"}
        assert all(isinstance(value, str) for value in found["error"].values())
        assert self.status >= 400 and found["error"]["message"]
        code: str = found["error"]["code"]
        return code


class Client:
    """One keep-alive connection."""

    def __init__(self, port: int, timeout: float = 30.0) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def send(
        self, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] = {}
    ) -> Answer:
        self.connection.request(method, path, body, dict(headers))
        got = self.connection.getresponse()
        return Answer(got.status, {k.lower(): v for k, v in got.getheaders()}, got.read())

    def get(self, path: str, **headers: str) -> Answer:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.send("GET", path, headers=named)

    def ask(self, mode: str, fields: Mapping[str, Any]) -> Answer:
        """As JSON; bytes are sent as base64, arrays as the base64 of a PNG."""
        body = json.dumps({name: as_sent(value) for name, value in fields.items()}).encode()
        return self.send("POST", f"/v1/{mode}", body, JSON)

    def ask_by_form(self, mode: str, fields: Mapping[str, Any]) -> Answer:
        kind, body = form_of(fields)
        return self.send("POST", f"/v1/{mode}", body, {"Content-Type": kind})


def as_sent(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        value = png(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def form_of(fields: Mapping[str, Any]) -> tuple[str, bytes]:
    """Content type and body of multipart/form-data."""
    parts = []
    for name, value in fields.items():
        file = isinstance(value, bytes | np.ndarray)
        content = png(value) if isinstance(value, np.ndarray) else value
        if not file:
            content = (value if isinstance(value, str) else json.dumps(value)).encode()
        head = f'Content-Disposition: form-data; name="{name}"'
        head += '; filename="../../etc/a.png"' if file else ""
        parts.append(b"--bound\r\n" + head.encode() + b"\r\n\r\n" + content + b"\r\n")
    return "multipart/form-data; boundary=bound", b"".join(parts) + b"--bound--\r\n"


def exchange(port: int, sent: bytes, *, half_close: bool = False, timeout: float = 15.0) -> bytes:
    """All that comes back on a connection of its own until the server closes it."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout) as line:
        try:
            line.sendall(sent)
        except (BrokenPipeError, ConnectionResetError):
            pass
        if half_close:
            line.shutdown(socket.SHUT_WR)
        return all_of(line)


def all_of(line: socket.socket) -> bytes:
    got = b""
    try:
        while more := line.recv(65536):
            got += more
    except ConnectionResetError:
        pass
    return got


@dataclass(frozen=True)
class Running:
    app: App
    port: int

    def client(self) -> Client:
        return Client(self.port)

    def batches(self, mode: str) -> tuple[int, int]:
        """How many batches of a mode there were, and of how many requests together."""
        value = self.app.metrics.registry.get_sample_value
        count = value("vlbeit_batch_size_count", {"mode": mode}) or 0
        return int(count), int(value("vlbeit_batch_size_sum", {"mode": mode}) or 0)


@contextmanager
def running(
    served: ServedRuns,
    *,
    files: dict[str, PageFile] | None = None,
    http: type | None = None,
    **limits: Any,
) -> Iterator[Running]:
    """A server in a thread; `http`: another protocol than ours, to compare with."""
    config = ServeConfig(port=0, **limits)
    app = App(served, config, files)
    listening = listen(config)
    server = server_of(app)
    if http is not None:
        server.config.http = http
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Running(app, listening.getsockname()[1])
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive() and app.batcher.stop(20)
