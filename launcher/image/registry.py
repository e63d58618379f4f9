"""Asks a container registry which digest a tag has now (OCI distribution specification). No Docker engine is needed."""

import json
import re
from http.client import HTTPException, HTTPMessage
from urllib.error import HTTPError
from urllib.parse import urlencode
from urllib.request import Request, urlopen

MANIFESTS = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.v2+json",
)
DOCKER_HUB = {"docker.io": "registry-1.docker.io"}  # its API has a host of its own
LOOPBACK = re.compile(r"(localhost|127\.[\d.]+)(:\d+)?$")  # docker, too, talks to such registries without TLS
TIMEOUT_S = 30


def tag_digest(image: str) -> str:
    """The digest of HOST/NAME:TAG. Raises OSError when the registry cannot be reached, refuses, or has no such tag."""
    host, _, rest = image.partition("/")
    name, _, tag = rest.partition(":")
    scheme = "http" if LOOPBACK.match(host) else "https"
    url = f"{scheme}://{DOCKER_HUB.get(host, host)}/v2/{name}/manifests/{tag or 'latest'}"
    try:
        try:
            found = head(url)
        except HTTPError as error:
            if error.code != 401:
                raise
            found = head(url, anonymous_token(error.headers["WWW-Authenticate"] or ""))
    except (HTTPException, ValueError, KeyError) as error:
        raise OSError(f"the answer of {host} cannot be read: {error}") from error
    if not re.fullmatch(r"sha256:[0-9a-f]{64}", digest := found["Docker-Content-Digest"] or ""):
        raise OSError(f"{host} names no digest of {image}")
    return digest


def head(url: str, token: str = "") -> HTTPMessage:
    headers = {"Accept": ", ".join(MANIFESTS), **({"Authorization": f"Bearer {token}"} if token else {})}
    with urlopen(Request(url, method="HEAD", headers=headers), timeout=TIMEOUT_S) as answer:
        found: HTTPMessage = answer.headers
        return found


def anonymous_token(challenge: str) -> str:
    """A token to pull with, without an account, from the realm that a challenge names (`Bearer realm="...",service="...",scope="..."`)."""
    asked = dict(re.findall(r'(\w+)="([^"]*)"', challenge))
    with urlopen(f"{asked.pop('realm')}?{urlencode(asked)}", timeout=TIMEOUT_S) as answer:
        content = json.load(answer)
    return str(content.get("token") or content["access_token"])
