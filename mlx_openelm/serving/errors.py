"""Errors that a client receives, in OpenAI's form."""

from typing import Any


class RequestError(Exception):
    """A request that is not answered.

    Attributes:
        status: the HTTP status.
        code: OpenAI's name for the error, or ours.
        param: the field that is wrong.
    """

    def __init__(
        self, message: str, *, status: int = 400, code: str = "", param: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    @property
    def headers(self) -> dict[str, str]:
        """The headers of the response that belong to the status."""
        known = {401: {"WWW-Authenticate": "Bearer"}, 503: {"Retry-After": "1"}}
        return known.get(self.status, {})

    def as_json(self) -> dict[str, Any]:
        """Return the body of the response."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": self.param or None,
                "code": self.code or None,
            }
        }
