"""What a client is told when its request is not answered, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

TOO_MANY, CLOSING = 429, 503


class ApiError(Exception):
    """A request that ends without an answer.

    Attributes:
        status: HTTP status: 400 and 4xx for what the client can change, 500 and 503 for what it cannot.
        param: The field of the request that is wrong; None where it is none.
        code: A word that programs can tell errors apart by; None where there is none.
    """

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object that is sent."""
        return {"error": {"message": str(self), "type": self._type, "param": self.param, "code": self.code}}

    @property
    def _type(self) -> str:
        if self.status >= 500:
            return "server_error"
        return {401: "authentication_error", TOO_MANY: "rate_limit_error"}.get(self.status, "invalid_request_error")


def closing() -> ApiError:
    """The answer to whoever asks a server that is ending."""
    return ApiError(CLOSING, "the server is shutting down; ask again when it is back", code="shutting_down")
