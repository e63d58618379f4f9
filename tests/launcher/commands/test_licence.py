"""`omnilaunch licence` as a person types it."""

import json
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.config.schema import Delivery
from launcher.image.licence import load_licences
from launcher.image.stack import Image

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "omnilaunch/licences.json"


def said(capsys: Capture, *words: str) -> str:
    assert main(["licence", *words]) == 0
    return capsys.readouterr().out


def test_a_licence_is_listed_shown_accepted_once_and_withdrawn(store: Path, capsys: Capture) -> None:
    sha256 = load_licences()["cann"].sha256
    assert "not accepted; to read it: omnilaunch licence show cann" in said(capsys)
    shown = said(capsys, "show", "cann")
    assert sha256 in shown and "https://" in shown and "its text is not part of this project" in shown
    assert "the text itself was not read" in shown and not store.exists()
    assert f"sha256 {sha256}" in said(capsys, "accept", "cann")
    before = store.read_bytes()
    assert "accepted already" in said(capsys, "accept", "cann") and store.read_bytes() == before
    assert f"sha256 {sha256}" in said(capsys, "list")
    assert "is removed" in said(capsys, "withdraw", "cann") and "nothing to remove" in said(capsys, "withdraw", "cann")


def test_a_licence_that_changed_since_says_so(store: Path, capsys: Capture) -> None:
    said(capsys, "accept", "cann")
    data = json.loads(store.read_text(encoding="utf-8"))
    data["accepted"]["cann"]["sha256"] = "ab" * 32
    store.write_text(json.dumps(data), encoding="utf-8")
    assert "as abababababab, and has changed since: omnilaunch licence accept cann" in said(capsys)
    assert "accepted: CANN" in said(capsys, "accept", "cann") and "has changed" not in said(capsys)


@pytest.mark.parametrize(
    "words", [("hardware=ascend910b",), ("hardware=ascend910b", "cluster.runtime=process"), ("cluster=example", "hardware=ascend910b")]
)
def test_an_image_is_built_with_the_acceptance_of_this_user(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    deliveries = []

    def build(image: Image, *, delivery: Delivery, **_: object) -> str:
        deliveries.append(delivery.accept_licence)
        return image.tag

    monkeypatch.setattr("launcher.image.build.build", build)
    assert main(["image", "build", *words]) == 0
    said(capsys, "accept", "cann")
    assert main(["image", "build", *words]) == 0
    assert deliveries == [False, True]


def test_a_bundle_is_rendered_with_the_acceptance_of_this_user(tmp_path: Path, capsys: Capture) -> None:
    words = ("render", "hardware=ascend910b", "--to", str(tmp_path / "bundle"))
    assert main(words) == 2 and "omnilaunch licence accept cann" in capsys.readouterr().err
    said(capsys, "accept", "cann")
    assert main(words) == 0 and (tmp_path / "bundle/README.txt").is_file()


def test_an_unknown_name_and_an_unknown_action(capsys: Capture) -> None:
    assert main(["licence", "accept", "can"]) == 2 and "did you mean 'cann'" in capsys.readouterr().err
    assert main(["licence", "acept", "cann"]) == 2 and "did you mean 'accept'" in capsys.readouterr().err
