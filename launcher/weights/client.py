"""HTTP with a hub: retries, redirects, and errors that say what to do. Standard library only.

The token goes to the hub's own host and never to another one: a file is often redirected to a storage host. Proxies come from the usual
variables (https_proxy, no_proxy), which urllib reads itself.
"""

import http.client
import json
import re
import socket
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.message import Message
from typing import IO, Any, NoReturn
from urllib.parse import urljoin, urlsplit

from launcher.errors import HubFailed
from launcher.redact import mask_credentials
from launcher.weights.endpoint import ADDRESS_VARIABLE, TOKEN_VARIABLE
from launcher.weights.manifest import HubKind

PAUSES_S = (1.0, 2.0, 4.0, 8.0, 16.0)  # before the second and each later attempt
LONGEST_PAUSE_S = 120.0  # that a hub may ask for
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
TIMEOUT_S = 30.0  # without a byte
LISTING_LIMIT_BYTES = 64 * 2**20
SECRET_HEADERS = ("Authorization", "Cookie")
LINK_NEXT = re.compile(r'<([^>]*)>\s*;\s*rel="?next"?')


@dataclass(frozen=True, kw_only=True)
class HubClient:
    """One hub. `endpoint`: scheme and host, without a slash at the end. `secret`: headers with the token, for the endpoint's host only."""

    kind: HubKind
    endpoint: str
    secret: Mapping[str, str] = field(default_factory=dict, repr=False)
    timeout_s: float = TIMEOUT_S
    sleep: Callable[[float], None] = time.sleep

    @property
    def name(self) -> str:
        return str(mask_credentials(self.endpoint))


class RedirectHandler(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to another host without the token, and none from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme == "https" and new.scheme == "http"):
            raise HubFailed(f"{host_of(req.full_url)} redirects to {new.scheme}://{new.hostname}, which is not encrypted: refused")
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None and (old.scheme, old.netloc) != (new.scheme, new.netloc):
            for name in SECRET_HEADERS:
                request.remove_header(name)
        return request


def get_json(client: HubClient, path: str, what: str) -> tuple[Any, Message]:
    """The JSON at `path` of the hub, and the headers of the answer. `what`: for errors. Raises HubFailed."""
    for pause in (*PAUSES_S, None):
        answer = open_path(client, path, what)
        try:
            with answer:
                body = answer.read(LISTING_LIMIT_BYTES)
            expected = answer.headers.get("Content-Length")
            if expected is None or len(body) >= int(expected):
                return parse_json(client, body, what), answer.headers
            problem = f"ended after {len(body):,} of {int(expected):,} bytes"
        except (OSError, http.client.HTTPException) as error:
            problem = describe_error(error)
        if pause is None:
            raise HubFailed(f"{client.name}: the answer for {what} {problem}. Run the command again later")
        client.sleep(pause)
    raise AssertionError


def parse_json(client: HubClient, body: bytes, what: str) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        begin = " ".join(body[:80].decode(errors="replace").split())
        raise HubFailed(
            f"{client.name} did not answer with JSON for {what}, but with {begin!r}: a proxy, a login page, or a host that is no hub. Check the "
            f"address ({ADDRESS_VARIABLE[client.kind]}, --endpoint) and the proxy variables"
        ) from error


def next_page(client: HubClient, headers: Message) -> str:
    """The path of the next page of a list (header Link), or ''. Only path and query are taken: a mirror may name the original host. Raises
    HubFailed for a link without a path from the top, which would change the host that gets the token."""
    found = LINK_NEXT.search(headers.get("Link", ""))
    if not found:
        return ""
    parts = urlsplit(urljoin(client.endpoint, found[1]))
    if not parts.path.startswith("/"):
        raise HubFailed(f"{client.name} names a next page {found[1]!r}, which is no address of a hub. Take another hub or mirror")
    return f"{parts.path}?{parts.query}" if parts.query else parts.path


def open_path(client: HubClient, path: str, what: str, headers: Mapping[str, str] | None = None) -> Any:
    """The open answer. Errors that may pass are retried. Raises HubFailed; HTTPError with code 416 for a range that the file does not have."""
    url = f"{client.endpoint}{path}"
    given = {"User-Agent": "omnilaunch", "Accept-Encoding": "identity", **client.secret, **(headers or {})}
    for pause in (*PAUSES_S, None):
        try:
            return urllib.request.build_opener(RedirectHandler).open(urllib.request.Request(url, headers=given), timeout=client.timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416:
                raise
            if error.code not in RETRIED:
                refuse_answer(client, error, what)
            problem, asked = f"answered {error.code} {error.reason}", seconds_of(error.headers.get("Retry-After"))
        except (OSError, http.client.HTTPException) as error:
            problem, asked = describe_error(error), 0.0
            if pause is None or is_final(error):
                raise HubFailed(f"{client.name} could not be reached: {problem}.{reach_advice(client)}") from error
        if pause is None:
            raise HubFailed(f"{client.name} {problem} for {what}, {len(PAUSES_S) + 1} times. Run the command again later: it continues")
        client.sleep(min(max(pause, asked), LONGEST_PAUSE_S))
    raise AssertionError


def seconds_of(text: str | None) -> float:
    """Of the header Retry-After; a date counts as 0."""
    return float(text) if text and text.strip().isdecimal() else 0.0


def is_final(error: BaseException) -> bool:
    """An unknown name or an invalid certificate does not pass by waiting."""
    reason = getattr(error, "reason", error)
    return isinstance(reason, socket.gaierror | ssl.SSLCertVerificationError)


def describe_error(error: BaseException) -> str:
    reason = getattr(error, "reason", error)
    if isinstance(reason, TimeoutError):
        return "no answer in time"
    return f"{type(reason).__name__}: {reason}" if str(reason) else type(reason).__name__


def reach_advice(client: HubClient) -> str:
    mirrors = " A mirror: export HF_ENDPOINT=https://hf-mirror.com, or --from modelscope." if client.kind == "hub" else ""
    return f"{mirrors} A proxy: export https_proxy=URL. Without a network: fetch on another machine, and copy the folder"


def refuse_answer(client: HubClient, error: urllib.error.HTTPError, what: str) -> NoReturn:
    """Raises HubFailed for an answer that waiting does not change."""
    code, said = error.code, error.headers.get("X-Error-Code", "")
    token = TOKEN_VARIABLE[client.kind]
    have = "the token was not accepted for it" if client.secret else f"no token was sent: export {token}"
    if said == "GatedRepo" or (code == 403 and client.kind == "hub"):
        text = f"is gated ({code}): accept its terms on the model's page; {have}"
    elif code in (401, 403):
        text = f"is not public, or does not exist ({code}); {have}"
    elif said == "RevisionNotFound":
        text = "has no such revision (404): check --revision, a branch, tag or commit"
    elif code == 404:
        text = "does not exist there (404): check the id, and the revision"
    else:
        text = f"could not be read: {code} {error.reason}"
    raise HubFailed(f"{client.name}: {what} {text}")


def host_of(url: str) -> str:
    return urlsplit(url).hostname or url
