"""What a client is told when a request fails, in the shape of OpenAI's API."""

from __future__ import annotations

from typing import Any

_TYPES = {404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """A request that ends with an HTTP status of 400 or above.

    `param` is the field at fault, `code` a word for machines. `retry_after_s` asks the client to come back.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        kind = _TYPES.get(self.status) or ("server_error" if self.status >= 500 else "invalid_request_error")
        message = self.message.encode("utf-8", "replace").decode()  # it may quote half a surrogate pair
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        return {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}


def refuse(param: str, message: str, code: str | None = None) -> ApiError:
    """A 400 that names the field at fault."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)
