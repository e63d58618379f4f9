"""The page at /: one HTML document that loads nothing else, with a content security policy that forbids everything else."""

import base64
import hashlib
import re
from dataclasses import dataclass

from starlette.responses import Response

SCRIPT = re.compile(r"<script>(.*?)</script>", re.DOTALL)
STYLE = re.compile(r"<style>(.*?)</style>", re.DOTALL)
NO_TOKEN = 'data-token="no"'


@dataclass(frozen=True, kw_only=True)
class Page:
    html: str
    policy: str

    def response(self, status: int) -> Response:
        """`status`: 401 when the token is missing. The document is sent anyway: it is not secret and has the field for the token."""
        headers = {"Content-Security-Policy": self.policy, "Referrer-Policy": "no-referrer", "Cross-Origin-Resource-Policy": "same-origin"}
        if status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="omnilaunch"'
        return Response(self.html, status, headers=headers, media_type="text/html; charset=utf-8")


def make_page(html: str, *, token: bool) -> Page:
    """Only the script and the style of the document are allowed, by their hashes."""
    if token:
        html = html.replace(NO_TOKEN, 'data-token="yes"')
    policy = (
        f"default-src 'none'; script-src {hash_of(SCRIPT, html)}; style-src {hash_of(STYLE, html)}; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return Page(html=html, policy=policy)


def hash_of(part: re.Pattern[str], html: str) -> str:
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in part.findall(html))
