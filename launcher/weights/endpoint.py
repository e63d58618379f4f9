"""The address of a hub, and its variables. Without any module of the network: every plan reads HF_ENDPOINT."""

from collections.abc import Mapping

from launcher.errors import ConfigRefused
from launcher.redact import holds_credentials
from launcher.weights.manifest import HubKind

TITLE: dict[HubKind, str] = {"hub": "the Hugging Face hub", "modelscope": "ModelScope"}
DEFAULT: dict[HubKind, str] = {"hub": "https://huggingface.co", "modelscope": "https://www.modelscope.cn"}
ADDRESS_VARIABLE: dict[HubKind, str] = {"hub": "HF_ENDPOINT", "modelscope": "MODELSCOPE_DOMAIN"}
TOKEN_VARIABLE: dict[HubKind, str] = {"hub": "HF_TOKEN", "modelscope": "MODELSCOPE_API_TOKEN"}


def find_endpoint(kind: HubKind, environ: Mapping[str, str]) -> str:
    """The address of a hub; that of MODELSCOPE_DOMAIN has no scheme."""
    given = environ.get(ADDRESS_VARIABLE[kind], "").strip()
    if kind == "modelscope" and given and "://" not in given:
        return f"https://{given}"
    return given or DEFAULT[kind]


def clean_endpoint(text: str) -> str:
    """Without a slash at the end. Raises ConfigRefused unless it is http(s)://HOST, without user and password."""
    scheme, _, rest = text.partition("://")
    host = rest.partition("/")[0].partition(":")[0]
    if scheme not in ("http", "https") or not host or holds_credentials(text) or "?" in text or not text.isprintable() or " " in text:
        raise ConfigRefused(
            "the address of the hub must be https://HOST without user and password (HF_ENDPOINT, MODELSCOPE_DOMAIN, --endpoint, "
            "model.source.endpoint); a token goes into HF_TOKEN or MODELSCOPE_API_TOKEN"
        )
    return text.rstrip("/")
