"""What the server answers when it cannot answer: a status, a code for programs, a message."""

from collections.abc import Mapping
from typing import Any

RETRY_SECONDS = 1
"""What Retry-After of a 503 says."""


class ApiError(Exception):
    """An answer with a status of 400 or more.

    Args:
        code: a short name that stays the same; clients compare it.
        message: for a person: what, the limit, the value found, what to do.
        close: the connection is not used again, because its next bytes are not a request.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        headers: Mapping[str, str] = {},
        close: bool = False,
    ) -> None:
        super().__init__(status, code, message)
        self.status = status
        self.code = code
        self.message = message
        self.headers = dict(headers)
        self.close = close

    def body(self, request_id: str) -> dict[str, Any]:
        """The JSON object of the answer."""
        return {
            "error": {"code": self.code, "message": self.message, "request_id": request_id},
        }


def busy(code: str, message: str, *, close: bool = False) -> ApiError:
    """503: the server cannot do it now; the client may come again."""
    again = {"Retry-After": str(RETRY_SECONDS)}
    return ApiError(503, code, message, headers=again, close=close)
