"""The listening address and the token are checked before the model is loaded."""

import socket

import pytest

from trainer.contract import InputRefused, Serving
from trainer.serving.endpoint import is_loopback_host, open_endpoint, tokens_match

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("options", "environ", "said"),
    [
        ({"address": "0.0.0.0"}, {}, "can be reached from other machines, but stage.serving.token is empty"),
        ({"address": "::"}, {}, "can be reached from other machines"),
        ({"address": "127.0.0.2"}, {}, "can be reached from other machines"),
        ({"address": "192.0.2.7", "token": "SERVE"}, {"SERVE": TOKEN}, "this machine does not have this address"),
        ({"address": "localhost"}, {}, "stage.serving.address=localhost is not an IP address"),
        ({"address": ""}, {}, "is not an IP address"),
        ({"token": "SERVE"}, {}, "stage.serving.token=SERVE: this environment variable is not set or empty"),
        ({"token": "SERVE"}, {"SERVE": ""}, "cluster.secrets=[SERVE]"),
        ({"token": "SERVE"}, {"SERVE": "too-short"}, "must have at least 16 characters, all printable ASCII"),
        ({"token": "SERVE"}, {"SERVE": "0123456789 abcdef"}, "must have at least 16 characters, all printable ASCII"),
        ({"port": -1}, {}, "stage.serving.port=-1 is not a port number"),
        ({"port": 65536}, {}, "set one from 1024 to 65535"),
    ],
)
def test_an_unusable_setting_is_refused_with_its_key_and_a_fix(options: dict, environ: dict, said: str) -> None:
    with pytest.raises(InputRefused) as refused:
        open_endpoint(Serving(**{"port": 0, **options}), environ)
    assert said in str(refused.value)
    assert not any(value and value in str(refused.value) for value in environ.values()), "a token is never printed"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_named(address: str) -> None:
    first = open_endpoint(Serving(address=address, port=0), {})
    port = first.listener.getsockname()[1]
    assert first.url == (f"http://[::1]:{port}" if ":" in address else f"http://127.0.0.1:{port}")
    with first.listener, pytest.raises(InputRefused, match=f"stage.serving.port={port}: .* is already in use"):
        open_endpoint(Serving(address=address, port=port), {})


def test_a_public_address_is_allowed_with_a_token() -> None:
    endpoint = open_endpoint(Serving(address="0.0.0.0", port=0, token="SERVE"), {"SERVE": TOKEN})
    with endpoint.listener:
        assert not endpoint.loopback and endpoint.token == TOKEN and socket.gethostname() in endpoint.url


def test_comparison_of_tokens() -> None:
    assert tokens_match(TOKEN, TOKEN)
    assert not any(tokens_match(TOKEN, given) for given in ("", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "é" * 16))


@pytest.mark.parametrize(
    ("host", "ours"), [("LocalHost:80", True), ("[::1]:8000", True), ("127.0.0.1", True), ("localhost:", False), ("::1", False)]
)
def test_loopback_host_headers(host: str, ours: bool) -> None:
    assert is_loopback_host(host) is ours
