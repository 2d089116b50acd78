"""A stand-in for the hub on this machine: as much of its HTTP interface as huggingface-hub uses to
make a repository, take one commit, list it and hand files out."""

import base64
import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class StandIn(ThreadingHTTPServer):
    """repositories: files by name, by repository; asked: "METHOD path" of every request."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: StandIn
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer()

    def do_HEAD(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.answer()

    def answer(self) -> None:
        path = self.path.partition("?")[0]
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.asked.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization"))
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            made = json.loads(body)
            name = "/".join(filter(None, (made.get("organization"), made["name"])))
            self.server.repositories.setdefault(name, {})
            return self.send_json({"url": f"{self.server.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.send_json({"errors": [], "warnings": []})
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.repositories.get(name)
        if files is None:
            return self.send_error_code(404, "RepoNotFound")
        if parts[0] != "api":  # NAMESPACE/NAME/resolve/REVISION/FILE
            return self.send_file(files.get("/".join(parts[4:])))
        what = parts[4] if len(parts) > 4 else "revision"
        if what == "revision":
            if len(parts) > 5 and parts[5] not in ("main", COMMIT):
                return self.send_error_code(404, "RevisionNotFound")
            siblings = [{"rfilename": file} for file in files]
            return self.send_json({"id": name, "sha": COMMIT, "siblings": siblings})
        if what == "tree":
            rows = [
                {"type": "file", "path": file, "size": len(data), "oid": digest(data)}
                for file, data in files.items()
            ]
            return self.send_json(rows)
        if what == "preupload":
            asked = json.loads(body)["files"]
            rows = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                    for f in asked]  # fmt: skip
            return self.send_json({"files": rows})
        if what == "commit":
            for line in body.splitlines():
                row = json.loads(line)
                if row["key"] == "file":
                    files[row["value"]["path"]] = base64.b64decode(row["value"]["content"])
            found = {"commitUrl": f"{self.server.address}/{name}/commit/{COMMIT}"}
            return self.send_json({**found, "commitOid": COMMIT})
        return self.send_error_code(404, "EntryNotFound")

    def send_json(self, tree: object) -> None:
        self.send_bytes(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def send_file(self, data: bytes | None) -> None:
        if data is None:
            return self.send_error_code(404, "EntryNotFound")
        return self.send_bytes(200, data, {"ETag": f'"{digest(data)}"', "X-Repo-Commit": COMMIT})

    def send_error_code(self, status: int, code: str) -> None:
        self.send_bytes(status, b"{}", {"X-Error-Code": code, "X-Repo-Commit": COMMIT})

    def send_bytes(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Silent."""


def digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def hub_standin() -> Iterator[StandIn]:
    server = StandIn()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
