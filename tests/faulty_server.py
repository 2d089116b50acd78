"""A web server in a thread that serves a folder and goes wrong on request."""

import http.server
import socket
import struct
import threading
import time
from collections import Counter, deque
from pathlib import Path
from types import TracebackType
from typing import Self


class FaultyServer:
    """Serves `folder` at `url`; `faults` holds, per file name, what its next answers are like.

    Faults: 404, 403, 429, 500, 503 (that status); "reset" (the connection breaks half-way),
    "cut" (it closes half-way, politely), "short" (half of it, and a header that says so), "long"
    (a header that promises more than comes), "flip" (one byte is another), "stall" (nothing after
    the first half), "trickle" (slow, but all of it). A file without a fault left is served whole.
    """

    def __init__(self, folder: Path, *, token: str = "") -> None:
        self.folder = folder
        self.token = token
        self.faults: dict[str, deque[int | str]] = {}
        self.asked: Counter[str] = Counter()
        """Requests by file name."""
        self._port = 0
        self._back: threading.Timer | None = None
        self._start()

    def _start(self) -> None:
        owner = self

        class Handler(http.server.BaseHTTPRequestHandler):
            # HTTP/1.0, the default: one answer a connection, so none outlives the server.

            def do_GET(self) -> None:
                owner.answer(self)

            def log_message(self, *words: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self._port), Handler)
        self._server.daemon_threads = True
        self._port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def fail(self, name: str, *faults: int | str) -> None:
        """The next answers for a file."""
        self.faults[name] = deque(faults)

    def away(self, seconds: float) -> None:
        """Refuse connections for a while, starting now."""
        self.close()
        self._back = threading.Timer(seconds, self._start)
        self._back.start()

    def close(self) -> None:
        if self._back is not None:
            self._back.join()  # or it would start a server that nobody ends
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        name = request.path.lstrip("/")
        self.asked[name] += 1
        faults = self.faults.get(name)
        fault = faults.popleft() if faults else ""
        if self.token and request.headers.get("Authorization") != f"Bearer {self.token}":
            fault = 403
        path = self.folder / name
        if fault == "" and not path.is_file():
            fault = 404
        if isinstance(fault, int):
            request.send_response(fault)
            request.send_header("Content-Length", "0")
            request.end_headers()
            return
        body = path.read_bytes()
        half = len(body) // 2
        if fault == "flip":
            body = body[:half] + bytes([body[half] ^ 1]) + body[half + 1 :]
        if fault == "short":
            body = body[:half]
        request.send_response(200)
        request.send_header("Content-Length", str(len(body) + 1000 * (fault == "long")))
        request.end_headers()
        stops_half_way = fault in ("reset", "cut", "stall")
        sent = body[:half] if stops_half_way else body
        if fault == "trickle":
            for at in range(0, len(sent), len(sent) // 20 + 1):
                request.wfile.write(sent[at : at + len(sent) // 20 + 1])
                time.sleep(0.02)
        else:
            request.wfile.write(sent)
        request.wfile.flush()
        if fault == "stall":
            time.sleep(3.0)
        if fault == "reset":  # closing with this option sends RST instead of FIN
            linger = struct.pack("ii", 1, 0)
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        if stops_half_way or fault == "long":
            request.close_connection = True
