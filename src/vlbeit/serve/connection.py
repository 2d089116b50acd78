"""uvicorn's HTTP/1.1 connection with deadlines: a slow or silent client is cut off.

uvicorn closes idle connections only after their first answer, and a byte now and then keeps one
open for ever. Here a request's head must be there in time, counted from the moment the connection
waits for it, whatever arrives meanwhile; and what was sent must be taken in time. The body's
deadline is the app's (it can answer 408 with JSON).
"""

import asyncio
import json
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from vlbeit.config import ServeConfig
from vlbeit.serve.api_errors import ApiError
from vlbeit.serve.metrics import Metrics


def connection_class(config: ServeConfig, metrics: Metrics) -> type[H11Protocol]:
    """The protocol for uvicorn's `http` setting, which takes a class and no arguments."""

    class Connection(H11Protocol):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.head_timer: asyncio.TimerHandle | None = None
            self.send_timer: asyncio.TimerHandle | None = None
            self.heard = False
            """Whether a byte of the awaited head has arrived."""

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            # Any byte that the client does not take pauses writing, so that the deadline sees it.
            transport.set_write_buffer_limits(high=0)
            metrics.connections.inc()
            self.expect_head()

        def connection_lost(self, exc: Exception | None) -> None:
            metrics.connections.dec()
            self.cancel(self.head_timer)
            self.cancel(self.send_timer)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            self.heard = True
            super().data_received(data)

        def handle_events(self) -> None:
            before = self.cycle
            super().handle_events()
            if self.cycle is not before:
                self.cancel(self.head_timer)

        def on_response_complete(self) -> None:
            self.expect_head()
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            self.refuse(ApiError(400, "bad_http", "not a request that HTTP/1.1 allows"))

        def pause_writing(self) -> None:
            super().pause_writing()
            self.cancel(self.send_timer)
            self.send_timer = self.loop.call_later(config.send_seconds, self.cut_reader)

        def resume_writing(self) -> None:
            self.cancel(self.send_timer)
            super().resume_writing()

        def expect_head(self) -> None:
            self.cancel(self.head_timer)
            self.heard = False
            self.head_timer = self.loop.call_later(config.receive_seconds, self.cut_sender)

        def cut_sender(self) -> None:
            """The head did not come in time: 408 to whom began one, silence to the idle."""
            if self.transport.is_closing():
                return
            metrics.cut.labels("head" if self.heard else "idle").inc()
            if not self.heard:
                self.transport.close()
                return
            limit = f"{config.receive_seconds:g} s"
            self.refuse(ApiError(408, "head_timeout", f"no complete request head within {limit}"))

        def cut_reader(self) -> None:
            metrics.cut.labels("unread").inc()
            self.transport.abort()

        def refuse(self, error: ApiError) -> None:
            """An answer outside the app, then close."""
            # Nothing can be said in the middle of another answer.
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                body = json.dumps(error.body("")).encode()
                headers = [
                    (b"content-type", b"application/json"),
                    (b"content-length", str(len(body)).encode()),
                    (b"x-content-type-options", b"nosniff"),
                    (b"connection", b"close"),
                ]
                head = h11.Response(status_code=error.status, headers=headers, reason=b"")
                for event in (head, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            self.transport.close()

        @staticmethod
        def cancel(timer: asyncio.TimerHandle | None) -> None:
            if timer is not None:
                timer.cancel()

    return Connection
