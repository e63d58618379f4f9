"""What is refused before a model is loaded."""

import socket

import pytest

from trainer.contract import InputRefused, Serving
from trainer.serving.door import knows, names_us, open_door

TOKEN = "0123456789abcdef"


@pytest.mark.parametrize(
    ("options", "environ", "said"),
    [
        ({"address": "0.0.0.0"}, {}, "can be reached from other machines, and stage.serving.token is empty"),
        ({"address": "::"}, {}, "can be reached from other machines"),
        ({"address": "127.0.0.2"}, {}, "can be reached from other machines"),
        ({"address": "192.0.2.7", "token": "SERVE"}, {"SERVE": TOKEN}, "this machine has no such address"),
        ({"address": "localhost"}, {}, "stage.serving.address=localhost is no IP address"),
        ({"address": ""}, {}, "is no IP address"),
        ({"token": "SERVE"}, {}, "stage.serving.token=SERVE: there is no such variable here, or it is empty"),
        ({"token": "SERVE"}, {"SERVE": ""}, "cluster.secrets=[SERVE]"),
        ({"token": "SERVE"}, {"SERVE": "too-short"}, "is not 16 or more printable ASCII characters"),
        ({"token": "SERVE"}, {"SERVE": "0123456789 abcdef"}, "is not 16 or more printable ASCII characters"),
        ({"port": -1}, {}, "stage.serving.port=-1 is no port"),
        ({"port": 65536}, {}, "set one from 1024 to 65535"),
    ],
)
def test_it_says_what_where_and_what_next(options: dict, environ: dict, said: str) -> None:
    with pytest.raises(InputRefused) as refused:
        open_door(Serving(**{"port": 0, **options}), environ)
    assert said in str(refused.value)
    assert not any(value and value in str(refused.value) for value in environ.values()), "a token is never said"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_named(address: str) -> None:
    first = open_door(Serving(address=address, port=0), {})
    port = first.listener.getsockname()[1]
    assert first.url == (f"http://[::1]:{port}" if ":" in address else f"http://127.0.0.1:{port}")
    with first.listener, pytest.raises(InputRefused, match=f"stage.serving.port={port}: another program listens on"):
        open_door(Serving(address=address, port=port), {})


def test_other_machines_may_ask_with_a_token() -> None:
    door = open_door(Serving(address="0.0.0.0", port=0, token="SERVE"), {"SERVE": TOKEN})
    with door.listener:
        assert not door.loopback and door.token == TOKEN and socket.gethostname() in door.url


def test_tokens_are_equal_or_not() -> None:
    assert knows(TOKEN, TOKEN)
    assert not any(knows(TOKEN, given) for given in ("", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), "é" * 16))


@pytest.mark.parametrize(
    ("host", "ours"), [("LocalHost:80", True), ("[::1]:8000", True), ("127.0.0.1", True), ("localhost:", False), ("::1", False)]
)
def test_our_own_names(host: str, ours: bool) -> None:
    assert names_us(host) is ours
