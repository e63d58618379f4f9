"""What a client is told instead of an answer, in the shape of OpenAI's errors."""

from typing import Any

# https://platform.openai.com/docs/guides/error-codes: the client library makes its exceptions from the status alone.
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class RequestRefused(Exception):
    """`param`: the key of the request that is wrong. `retry_s`: when to ask again. The text is for the client: nothing of this machine."""

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


def wrong(param: str, message: str, code: str = "invalid_value") -> RequestRefused:
    return RequestRefused(400, f"{param}: {message}", param=param, code=code)


def stopping() -> RequestRefused:
    return RequestRefused(503, "the server is stopping", code="stopping", retry_s=5)


def timed_out(limit_s: float) -> RequestRefused:
    return RequestRefused(504, f"no whole answer within {limit_s:g} s; ask for fewer tokens, or again later", code="timeout")


def failed() -> RequestRefused:
    return RequestRefused(500, "the model could not answer this; the server's log says more", code="internal_error")


def busy(why: str) -> RequestRefused:
    return RequestRefused(429, f"{why}; ask again later", code="busy", retry_s=1)
