"""`vlbeit serve RUN [RUN ...]`: ask runs over HTTP, and on a page.

vlbeit serve runs/demo                              a demo folder: its pretrained run and its tasks
vlbeit serve runs/mine runs/mine-vqa --port 9000    several runs: each mode by the first that has it
vlbeit serve runs/mine-retrieval --index photos.index

The server listens on this machine only. For others: --host 0.0.0.0 with --token-file FILE, or
--allow-anonymous behind a proxy that decides who may ask. SIGTERM or Ctrl-C: what was accepted is
finished, then it ends with 0.
"""

import argparse
import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import uvicorn

from vlbeit.config import ServeConfig
from vlbeit.errors import ConfigError, InputError, UnsafeError
from vlbeit.serve.app import App
from vlbeit.serve.connection import connection_class
from vlbeit.serve.metrics import Metrics
from vlbeit.serve.modes import MODES
from vlbeit.serve.page_files import PAGE
from vlbeit.serve.served_runs import ServedRuns, open_runs

HEAD_BYTES = 16_384
"""Of a request line and its headers."""
MIN_TOKEN = 16
"""Characters."""


def main(argv: list[str]) -> int:
    """Returns the exit code; errors are raised as VLBeitError."""
    parser = parser_of_flags()
    args = parser.parse_args(argv)
    config = config_of(args)
    check(config)
    if args.threads < 0:
        raise ConfigError(f"--threads must be at least 0, found {args.threads}")
    if args.threads:
        torch.set_num_threads(args.threads)
    listening = listen(config)
    served = open_runs(args.runs, args.index, args.device)
    if not served.probe():
        raise InputError("a run gives numbers that are not finite; see `vlbeit verify`")
    serve(served, config, listening)
    return 0


def parser_of_flags() -> argparse.ArgumentParser:
    default = ServeConfig()
    parser = argparse.ArgumentParser(
        prog="vlbeit serve",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run, checkpoint or demo folder")
    parser.add_argument(
        "--index",
        help="a folder written by vlbeit index, to be searched (default: that of a demo folder)",
    )
    parser.add_argument("--host", default=default.host, help="address (default: %(default)s)")
    parser.add_argument("--port", type=int, default=default.port, help="0: a free one")
    parser.add_argument(
        "--token-file", type=Path, help="a file whose first line every client must show"
    )
    parser.add_argument(
        "--allow-anonymous", action="store_true", help="reachable from outside without a token"
    )
    parser.add_argument(
        "--allowed-host", action="append", default=[], help="a name clients use; may be repeated"
    )
    parser.add_argument(
        "--device",
        default="auto",
        choices=("auto", "cpu", "cuda"),
        help="auto: a GPU if there is one (default)",
    )
    parser.add_argument("--threads", type=int, default=0, help="torch's; 0: as torch chooses")
    limits = parser.add_argument_group("limits (docs/serve.md)")
    for name, help in LIMITS.items():
        value = getattr(default, name)
        flag = "--" + name.replace("_", "-")
        limits.add_argument(
            flag, type=type(value), default=value, help=f"{help} (default: %(default)s)"
        )
    return parser


LIMITS = {
    "batch": "most requests that go through the model together; 1: one at a time",
    "batch_window": "seconds a batch that is not full waits for more",
    "queue": "requests that may wait for the model",
    "deadline": "seconds from a request's body to its answer",
    "receive_seconds": "for the head of a request, its body, an idle connection",
    "send_seconds": "in which a client must take an answer",
    "drain_seconds": "for accepted requests after SIGTERM",
    "max_body": "bytes of a request",
    "max_held": "bytes of all requests at one time",
    "max_pixels": "of a picture",
    "max_characters": "of a text",
    "max_top": "candidates of one answer",
    "decoders": "threads that decode pictures",
}
"""Fields of ServeConfig that are flags of the same name."""


def config_of(args: argparse.Namespace) -> ServeConfig:
    token = "" if args.token_file is None else read_token(args.token_file)
    return ServeConfig(
        host=args.host,
        port=args.port,
        allowed_hosts=tuple(args.allowed_host),
        token=token,
        allow_anonymous=args.allow_anonymous,
        **{name: getattr(args, name) for name in LIMITS},
    )


def read_token(file: Path) -> str:
    """The first line of a file.

    Raises:
        InputError: it cannot be read.
        ConfigError: the line is too short to be a secret.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--token-file {file}: cannot be read: {error}") from None
    token = lines[0].strip() if lines else ""
    if len(token) < MIN_TOKEN:
        raise ConfigError(
            f"--token-file {file}: its first line has {len(token)} characters, at least "
            f"{MIN_TOKEN} are wanted; `python -c 'import secrets; print(secrets.token_urlsafe())'`"
        )
    return token


def check(config: ServeConfig) -> None:
    """Raises ConfigError for a limit out of range, UnsafeError for a server open to strangers."""
    for name in LIMITS:
        low = 0 if name == "batch_window" else 1
        value = getattr(config, name)
        if value < low:
            flag = name.replace("_", "-")
            raise ConfigError(f"--{flag} must be at least {low}, found {value}")
    if not 0 <= config.port < 65536:
        raise ConfigError(f"--port must be in 0..65535, found {config.port}")
    if not is_loopback(config.host) and not config.token and not config.allow_anonymous:
        raise UnsafeError(
            f"--host {config.host} can be reached by other machines, and nothing says who may ask: "
            "give --token-file FILE, or --allow-anonymous if a proxy or a closed network decides"
        )


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def listen(config: ServeConfig) -> socket.socket:
    """The listening socket, taken before anything is loaded.

    Raises:
        ConfigError: the address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
    except OSError as error:
        raise ConfigError(
            f"--host {config.host} --port {config.port}: {error.strerror or error}; choose another "
            "port (0: any)"
        ) from None
    return listening


class Server(uvicorn.Server):
    """uvicorn's server that drains: after a signal it stays until accepted requests are answered,
    not ready and refusing new ones, and then ends without an error."""

    def __init__(self, config: uvicorn.Config, app: App) -> None:
        super().__init__(config)
        self.vlbeit = app

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if sockets:  # they answer from now on
            print("\n".join(greeting(self.vlbeit, sockets[0].getsockname())), flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # uvicorn's own raises the signal again after the end, which would be the exit code.
        if not self.started:
            self.should_exit = True
            return
        again = self.vlbeit.leaving  # somebody does not want to wait
        seconds = 0.0 if again else self.vlbeit.config.drain_seconds
        asyncio.get_running_loop().call_soon_threadsafe(self.vlbeit.leave, seconds)

    async def on_tick(self, counter: int) -> bool:
        until = self.vlbeit.leaving_until
        if until is not None:
            late = asyncio.get_running_loop().time() >= until
            self.should_exit = self.should_exit or late or self.vlbeit.in_work == 0
        return await super().on_tick(counter)


def server_of(app: App) -> Server:
    """uvicorn around the app, with our limits and connections."""
    config = app.config
    return Server(
        uvicorn.Config(
            app,
            http=connection_class(config, app.metrics),
            ws="none",
            loop="asyncio",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            h11_max_incomplete_event_size=HEAD_BYTES,
            timeout_keep_alive=max(1, round(config.receive_seconds)),
            timeout_graceful_shutdown=1,
        ),
        app,
    )


def serve(served: ServedRuns, config: ServeConfig, listening: socket.socket) -> None:
    """Answer until a signal."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    app = App(served, config, metrics=Metrics())
    server_of(app).run(sockets=[listening])
    if not app.batcher.stop(1.0):
        # Its thread is inside a forward pass that nobody waits for any more.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def greeting(app: App, address: Sequence[Any]) -> list[str]:
    """What is served and where."""
    host = f"[{address[0]}]" if ":" in str(address[0]) else address[0]
    has = [mode for mode in MODES if mode in app.served.answering]
    said = [f"{fact['name']} ({fact['task']}, step {fact['step']})" for fact in app.served.facts()]
    return [
        f"runs: {', '.join(said)}",
        f"modes: {', '.join(has)}",
        f"serving on http://{host}:{address[1]}/{'' if PAGE in app.files else 'info'}",
    ]
