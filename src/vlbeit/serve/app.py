"""The server's routes: pictures and texts in, the Predictor's answers out.

    request -> guard (Host, origin, token) -> body (capped, timed) -> fields (in a decoder thread)
            -> queue -> model (one thread, in batches) -> JSON

The event loop only moves bytes; whatever takes time is in a thread. Every limit is in ServeConfig.
"""

import asyncio
import base64
import contextlib
import hmac
import ipaddress
import json
import time
import uuid
from collections.abc import AsyncIterator, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from vlbeit import __version__
from vlbeit.config import ServeConfig
from vlbeit.errors import InputError
from vlbeit.serve.api_errors import ApiError, busy
from vlbeit.serve.batching import Batcher, late, refused
from vlbeit.serve.metrics import Metrics
from vlbeit.serve.modes import MODES, Mode, Row
from vlbeit.serve.openapi import GET_ROUTES, OPEN_ROUTES, document
from vlbeit.serve.page_files import PAGE, PageFile, examples, package_files
from vlbeit.serve.predictor import Predictor
from vlbeit.serve.request_body import (
    Account,
    HeldBytes,
    check_head,
    nearest,
    parse_body,
    read_fields,
    too_long,
)
from vlbeit.serve.served_runs import ServedRuns, picture_facts
from vlbeit.tokens.text import MASK

LINGER_SECONDS = 1.0
"""After an answer to a body that was not read: closing at once would reset the connection, and the
client, still sending, would never see the answer."""
PROBE = "probe"
PROBE_SECONDS = 5.0
"""In which a tiny forward pass must succeed for the server to be ready."""
PROBE_EVERY = 1.0
"""Seconds for which the outcome of a probe stands."""
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
        "img-src 'self' data: blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}
"""Of every answer."""


class App:
    """The server's state and routes; an ASGI application.

    Args:
        files: of the page, by name; default: the package's.
    """

    def __init__(
        self,
        served: ServedRuns,
        config: ServeConfig,
        files: dict[str, PageFile] | None = None,
        metrics: Metrics | None = None,
    ) -> None:
        self.served = served
        self.config = config
        self.files = package_files() if files is None else files
        self.metrics = Metrics() if metrics is None else metrics
        self.batcher = Batcher(
            self._ask_model,
            self.metrics,
            queue=config.queue,
            batch=config.batch,
            window=config.batch_window,
        )
        self.decoders = ThreadPoolExecutor(config.decoders, thread_name_prefix="vlbeit-decoder")
        self.held = HeldBytes(config.max_held)
        self.metrics.bytes_held.set_function(lambda: self.held.held)
        self.metrics.in_work.set_function(lambda: self.in_work)
        self.in_work = 0
        """Requests to a mode, from their head to their answer."""
        self.leaving_until: float | None = None
        """When the server leaves at the latest, on the event loop's clock; None: it stays."""
        self._receiving: set[asyncio.Timeout] = set()
        self._probe: asyncio.Task[bool] | None = None
        self._probed_at = 0.0
        self._document = document(config)
        inner = Starlette(
            routes=self._routes(),
            exception_handlers={
                ApiError: _raise,
                HTTPException: _raise,
                Exception: _raise,
            },
            lifespan=self._lifespan,
        )
        self._guarded = Guard(inner, self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._guarded(scope, receive, send)

    def leave(self, seconds: float) -> None:
        """Stop being ready and refuse new work; what was begun has so long to be finished. Called
        in the event loop's thread."""
        self.leaving_until = asyncio.get_running_loop().time() + seconds
        for timeout in self._receiving:
            # Half of the time for who still sends, half for the model.
            timeout.reschedule(min(timeout.when() or 0.0, self.leaving_until - seconds / 2))

    @property
    def leaving(self) -> bool:
        return self.leaving_until is not None

    # ---- routes

    def _routes(self) -> list[Route]:
        gets = {
            "/": self.page,
            "/static/{name}": self.static,
            "/examples": self.examples,
            "/indexed/{number}": self.indexed,
            "/live": self.live,
            "/ready": self.ready,
            "/info": self.info,
            "/metrics": self.counters,
            "/openapi.json": self.openapi,
        }
        assert set(gets) == set(GET_ROUTES)
        return [
            Route("/v1/{mode}", self.ask, methods=["POST"]),
            *(
                # A name of a page file may have slashes.
                Route(path.replace("{name}", "{name:path}"), handler, methods=["GET"])
                for path, handler in gets.items()
            ),
        ]

    async def page(self, request: Request) -> Response:
        return self._file(PAGE)

    async def static(self, request: Request) -> Response:
        return self._file(request.path_params["name"])

    def _file(self, name: str) -> Response:
        if name not in self.files:
            raise ApiError(404, "not_found", f"no page file {name[:80]!r}")
        content, media_type = self.files[name]
        return Response(content, media_type=media_type, headers={"cache-control": "no-cache"})

    async def examples(self, request: Request) -> Response:
        return json_response({"examples": examples(self.files)})

    async def indexed(self, request: Request) -> Response:
        number = request.path_params["number"]
        if not number.isdecimal() or len(number) > 12:
            raise ApiError(404, "not_found", f"{number[:80]!r} is no number of an entry")
        loop = asyncio.get_running_loop()
        try:
            small = await loop.run_in_executor(self.decoders, self.served.thumbnail, int(number))
        except InputError:  # its message names a path of the server's
            raise ApiError(404, "not_found", f"no picture number {number} in the index") from None
        return Response(small, media_type="image/jpeg", headers={"cache-control": "no-cache"})

    async def live(self, request: Request) -> Response:
        return json_response({"live": True})

    async def ready(self, request: Request) -> Response:
        if self.leaving:
            raise busy("leaving", "the server is leaving")
        now = time.monotonic()
        if self._probe is None or (self._probe.done() and now - self._probed_at > PROBE_EVERY):
            self._probed_at = now
            self._probe = asyncio.create_task(self._probe_model())
        # One probe for all who ask meanwhile; whoever leaves must not end it.
        if not await asyncio.shield(self._probe):
            raise busy("not_ready", f"the model did not answer well within {PROBE_SECONDS:g} s")
        return json_response({"ready": True})

    async def _probe_model(self) -> bool:
        try:
            return bool(await self.batcher.ahead(PROBE, seconds=PROBE_SECONDS))
        except ApiError:
            return False

    async def info(self, request: Request) -> Response:
        config = self.config
        first = self.served.answering.get("fill_patches", self.served.runs[0])
        return json_response(
            {
                "version": __version__,
                "runs": self.served.facts(),
                "modes": {mode: self.served.mode_facts(mode) for mode in MODES},
                "image": picture_facts(first),
                "mask_word": MASK,
                "classes": self.served.classes(),
                "index": self.served.index_facts(),
                "limits": {
                    "body_bytes": config.max_body,
                    "pixels": config.max_pixels,
                    "text_characters": config.max_characters,
                    "top": config.max_top,
                    "queue": config.queue,
                    "batch": config.batch,
                    "deadline_seconds": config.deadline,
                    "receive_seconds": config.receive_seconds,
                },
            }
        )

    async def counters(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        return json_response(self._document)

    async def ask(self, request: Request) -> Response:
        """POST /v1/MODE."""
        name = request.path_params["mode"]
        if name not in MODES:
            raise ApiError(
                404, "not_found", f"no mode {name[:80]!r}{nearest(name, MODES)}", close=True
            )
        mode = MODES[name]
        run = self.served.answering.get(name)
        if run is None:
            raise ApiError(
                409,
                "mode_lacking",
                f"no run served here has {name}; it comes from `{self.served.command(name)}`",
                close=True,
            )
        if self.leaving:
            raise busy("leaving", "the server is leaving; ask another one", close=True)
        check_head(request.headers, self.config)
        self.in_work += 1
        try:
            with self.held.account() as account:
                return await self._answer(mode, run, request, account)
        finally:
            self.in_work -= 1

    async def _answer(
        self, mode: Mode, run: Predictor, request: Request, account: Account
    ) -> Response:
        body = await self._body(request, account)
        began = time.monotonic()
        self.batcher.check_room()
        loop = asyncio.get_running_loop()
        kind = request.headers["content-type"]
        try:
            async with asyncio.timeout(self.config.deadline):
                row = await loop.run_in_executor(
                    self.decoders, prepare, mode, run, body, kind, self.config
                )
        except TimeoutError:
            raise late(self.config.deadline) from None
        answer = await self.batcher.answer(
            mode.key(row),
            row,
            label=mode.name,
            seconds=began + self.config.deadline - time.monotonic(),
            together=mode.together,
        )
        return json_response(answer)

    async def _body(self, request: Request, account: Account) -> bytes:
        """The whole body: counted while it arrives, and in time."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.receive_seconds) as timeout:
                self._receiving.add(timeout)
                try:
                    async for chunk in request.stream():
                        if len(body) + len(chunk) > self.config.max_body:
                            raise too_long("more", self.config)
                        account.take(len(chunk))
                        body += chunk
                finally:
                    self._receiving.discard(timeout)
        except TimeoutError:
            if self.leaving:
                raise busy("leaving", "the server is leaving", close=True) from None
            self.metrics.cut.labels("body").inc()
            limit = f"{self.config.receive_seconds:g} s"
            raise ApiError(
                408, "body_timeout", f"no complete body within {limit}", close=True
            ) from None
        return bytes(body)

    # ---- the model's thread

    def _ask_model(self, key: Hashable, rows: Sequence[Row]) -> Sequence[Any]:
        if key == PROBE:
            return [self.served.probe()]
        assert isinstance(key, tuple)
        return MODES[key[0]].ask(self.served, rows)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.batcher.start()
        yield
        self.decoders.shutdown(wait=False, cancel_futures=True)


def prepare(
    mode: Mode, run: Predictor, body: bytes, content_type: str, config: ServeConfig
) -> dict[str, Any]:
    """From bytes to the fields of a mode; runs in a decoder thread."""
    return read_fields(mode, parse_body(mode, body, content_type), run, config)


def json_response(value: Any) -> Response:
    """Floats as they are: the shortest text that reads back to the same number."""
    text = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))
    headers = {"cache-control": "no-store"}
    return Response(text.encode(), media_type="application/json", headers=headers)


async def _raise(request: Request, error: Exception) -> Response:
    """Errors are answered in one place, the guard."""
    raise error


class Guard:
    """Around every route: who may ask, what every answer carries, and how errors are told."""

    def __init__(self, app: ASGIApp, server: App) -> None:
        self.app = app
        self.server = server
        config = server.config
        self.hosts = {"localhost", config.host.lower(), *map(str.lower, config.allowed_hosts)}
        self.token = config.token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = uuid.uuid4().hex[:16]
        status = 0

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = {**HEADERS, "x-request-id": request_id}
                message["headers"] = [
                    *message.get("headers", ()),
                    *((name.encode(), value.encode()) for name, value in extra.items()),
                ]
            await send(message)

        try:
            self.check(Headers(scope=scope), scope["path"])
            await self.app(scope, receive, send_guarded)
        except asyncio.CancelledError:
            # Only the end of a drain cancels requests.
            if status or not self.server.leaving:
                raise
            error = busy("leaving", "the server left before the answer was there", close=True)
            await self.tell(error, request_id, receive, send_guarded)
        except ClientDisconnect:
            status = status or 499  # nobody to tell; the name is nginx's
        except Exception as error:
            if status:  # an answer has begun: all that is left is to break it off
                raise
            await self.tell(as_api_error(error), request_id, receive, send_guarded)
        finally:
            route = route_name(scope["path"])
            self.server.metrics.requests.labels(route, str(status)).inc()
            self.server.metrics.seconds.labels(route).observe(time.perf_counter() - began)

    def check(self, headers: Headers, path: str) -> None:
        """Whether this client may ask this server.

        Raises:
            ApiError: 421 for another host's name (a name that an attacker points at this address
                must not make a browser talk to it), 403 for a page of another origin, 401.
        """
        host = headers.get("host", "")
        if not self.known_host(host):
            raise ApiError(
                421,
                "wrong_host",
                f"the Host {host[:80]!r} is not this server's; --allowed-host adds a name",
                close=True,
            )
        origin = headers.get("origin")
        if origin is not None and urlsplit_or_none(origin) != host.lower():
            raise ApiError(
                403, "cross_origin", f"a page of {origin[:80]!r} may not ask here", close=True
            )
        if self.token and path not in OPEN_ROUTES:
            shown = shown_token(headers.get("authorization", ""))
            if not hmac.compare_digest(shown, self.token):
                raise ApiError(
                    401,
                    "token_wanted",
                    "send the server's token: Authorization: Bearer TOKEN",
                    # A browser asks its user for a password and sends it with every request.
                    headers={"WWW-Authenticate": 'Bearer, Basic realm="vlbeit: token as password"'},
                    close=True,
                )

    def known_host(self, host: str) -> bool:
        """A name of ours, or an address: only names can be pointed elsewhere by others."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.hosts or "*" in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    async def tell(self, error: ApiError, request_id: str, receive: Receive, send: Send) -> None:
        body = json.dumps(error.body(request_id)).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "cache-control": "no-store",
            **error.headers,
            **({"connection": "close"} if error.close else {}),
        }
        raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": error.status, "headers": raw})
        await send({"type": "http.response.body", "body": body, "more_body": error.close})
        if not error.close:
            return
        if not self.server.leaving:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LINGER_SECONDS):
                    while (await receive()).get("more_body"):
                        pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def as_api_error(error: Exception) -> ApiError:
    if isinstance(error, HTTPException):
        code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "refused")
        return ApiError(
            error.status_code, code, str(error.detail), headers=error.headers or {}, close=True
        )
    return refused(error)


def shown_token(authorization: str) -> bytes:
    """The token of a Bearer header, or the password of a Basic one."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip().encode("utf-8", "replace")
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value.strip(), validate=True).partition(b":")[2]
        except ValueError:
            return b""
    return b""


def urlsplit_or_none(origin: str) -> str | None:
    """host:port of an origin, in small letters."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return None


def route_name(path: str) -> str:
    """A label out of a fixed set, whatever strangers ask for."""
    if path.startswith("/v1/"):
        mode = path.removeprefix("/v1/")
        return mode if mode in MODES else "other"
    for prefix in ("/static/", "/indexed/"):
        if path.startswith(prefix):
            return prefix.rstrip("/")
    return path if path in GET_ROUTES else "other"
