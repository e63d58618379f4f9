"""What is asked of an engine, and what nothing asks for any more. tests/images does the rest with a real one."""

import gc
import re
from pathlib import Path

import pytest

from launcher.errors import ImageFailed
from launcher.image.docker import BuiltImage, DockerCommand, built_images, choose_client, find_client, surplus, version_of


def script(path: Path, text: str) -> Path:
    """A program that answers as a docker client would."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def client(path: Path, version: str, buildx: bool) -> str:
    plugin = "echo v0.12" if buildx else "exit 1"
    return str(script(path, f'case "$1" in version) echo {version};; buildx) {plugin};; esac'))


# --------------------------------------------------------------------------------------------------- engine and client


def test_a_client_with_buildkit_is_preferred_to_an_earlier_one_without(tmp_path: Path) -> None:
    paths = (client(tmp_path / "a" / "docker", "28.2.2", False), client(tmp_path / "b" / "docker", "20.10.24+dfsg1", False))
    assert choose_client(paths, "20.10.24", "amd64").path == paths[1]


def test_a_newer_client_with_the_plugin_is_taken(tmp_path: Path) -> None:
    path = client(tmp_path / "docker", "28.2.2", True)
    assert choose_client((path,), "27.1", "arm64") == DockerCommand(path=path, version="28.2.2", engine_version="27.1", architecture="aarch64")


def test_no_client_with_buildkit_says_which_and_the_fix(tmp_path: Path) -> None:
    path = client(tmp_path / "docker", "28.2.2", False)
    with pytest.raises(ImageFailed, match=rf"{re.escape(path)} \(28\.2\.2\) without the buildx plugin.*docker-buildx"):
        choose_client((path,), "20.10.24", "amd64")


def test_an_old_engine_is_refused() -> None:
    with pytest.raises(ImageFailed, match=r"engine is 19\.03\.8; .* 20\.10 or newer"):
        choose_client(("/usr/bin/docker",), "19.03.8", "amd64")


def test_no_client_at_all(tmp_path: Path) -> None:
    with pytest.raises(ImageFailed, match=r"no docker client on PATH.*docker\.io.*cluster\.runtime=process"):
        find_client({"PATH": str(tmp_path)})


@pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")  # the docker package leaves a socket open that found nobody
def test_an_engine_that_is_down_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nothing.sock")
    with pytest.raises(ImageFailed, match=r"does not answer.*systemctl start docker") as caught:
        built_images()
    del caught
    gc.collect()


@pytest.mark.parametrize(("text", "version"), [("20.10.24+dfsg1", (20, 10, 24)), ("28.2.2", (28, 2, 2)), ("", ())])
def test_versions(text: str, version: tuple[int, ...]) -> None:
    assert version_of(text) == version


# --------------------------------------------------------------------------------------------------------------- images


def built(name: str) -> BuiltImage:
    return BuiltImage(
        id=f"sha256:{name}", tags=(f"omnilaunch:{name}",), created="2026-01-01T00:00:00", architecture="x86_64", user="1000:1000",
        size_bytes=1, labels={},
    )  # fmt: skip


def test_an_image_that_is_wanted_or_used_is_not_surplus() -> None:
    images = tuple(map(built, ("old", "recorded", "running", "present")))
    found = surplus(images, wanted=frozenset({"omnilaunch:recorded", "omnilaunch:present"}), used=frozenset({"sha256:running"}))
    assert [image.name for image in found] == ["omnilaunch:old"]
