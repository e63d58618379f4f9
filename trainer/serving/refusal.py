"""Errors that are sent to a client, in the format of OpenAI's API."""

from typing import Any

# https://platform.openai.com/docs/guides/error-codes: the client library makes its exceptions from the status alone.
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestRefused(Exception):
    """`param`: the invalid key of the request. `retry_s`: seconds until a retry makes sense. The message must reveal nothing about this
    machine."""

    def __init__(self, status: int, message: str, *, param: str = "", code: str = "", retry_s: int = 0) -> None:
        super().__init__(message)
        self.status, self.param, self.code, self.retry_s = status, param, code, retry_s

    @property
    def headers(self) -> dict[str, str]:
        found = {"Retry-After": str(self.retry_s)} if self.retry_s else {}
        return found | ({"WWW-Authenticate": 'Bearer realm="omnilaunch"'} if self.status == 401 else {})


def error_body(refusal: RequestRefused) -> dict[str, Any]:
    kind = KINDS.get(refusal.status, "invalid_request_error" if refusal.status < 500 else "server_error")
    return {"error": {"message": str(refusal), "type": kind, "param": refusal.param or None, "code": refusal.code or None}}


def invalid(param: str, message: str, code: str = "invalid_value") -> RequestRefused:
    return RequestRefused(400, f"{param}: {message}", param=param, code=code)


def stopping() -> RequestRefused:
    return RequestRefused(503, "the server is stopping", code="stopping", retry_s=5)


def timed_out(limit_s: float) -> RequestRefused:
    return RequestRefused(504, f"the answer took longer than {limit_s:g} s; ask for fewer tokens, or try again later", code="timeout")


def failed() -> RequestRefused:
    return RequestRefused(500, "the model failed to answer this request; the server's log has the details", code="internal_error")


def too_busy(why: str) -> RequestRefused:
    return RequestRefused(429, f"{why}; try again later", code="busy", retry_s=1)
