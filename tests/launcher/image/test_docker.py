"""The arguments of the docker client, and how its output is read. tests/images does the same with a real engine."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.errors import ImageFailed
from launcher.image.docker import (
    FINGERPRINT,
    BuiltImage,
    DockerCommand,
    built_images,
    choose_client,
    find,
    find_client,
    inspect,
    is_absent,
    remove,
    surplus,
    used_images,
    version_of,
)
from launcher.image.stack import load_stacks, render


def script(path: Path, text: str) -> Path:
    """A program in place of the docker client."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def engine(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """The first docker client on PATH, which runs these commands of the shell."""
    script(folder / "docker", text)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def client(path: Path, version: str, buildx: bool) -> str:
    plugin = "echo v0.12" if buildx else "exit 1"
    return str(script(path, f'case "$1" in version) echo {version};; buildx) {plugin};; esac'))


# --------------------------------------------------------------------------------------------------- engine and client


def test_a_client_with_buildkit_is_preferred_to_an_earlier_one_without(tmp_path: Path) -> None:
    paths = (client(tmp_path / "a" / "docker", "28.2.2", False), client(tmp_path / "b" / "docker", "20.10.24+dfsg1", False))
    assert choose_client(paths, "20.10.24", "amd64").path == paths[1]


def test_a_newer_client_with_the_plugin_is_used(tmp_path: Path) -> None:
    path = client(tmp_path / "docker", "28.2.2", True)
    assert choose_client((path,), "27.1", "arm64") == DockerCommand(path=path, architecture="aarch64")


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


def test_an_engine_that_is_down_says_how_to_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path, monkeypatch, "echo 'Cannot connect to the Docker daemon at unix:///x.sock. Is the docker daemon running?' >&2; exit 1")
    for question in (built_images, lambda: find_client({"PATH": str(tmp_path)}), lambda: inspect("omnilaunch:cpu-1")):
        with pytest.raises(ImageFailed, match=r"does not answer.*systemctl start docker"):
            question()


def test_an_engine_that_refuses_this_user_is_reported_with_the_group_to_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path, monkeypatch, "echo 'permission denied while trying to connect to the Docker daemon socket' >&2; exit 1")
    with pytest.raises(ImageFailed, match=r"does not answer.*group docker"):
        built_images()


def test_an_engine_that_hangs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine(tmp_path, monkeypatch, "exec sleep 30")
    monkeypatch.setattr("launcher.image.docker.TIMEOUT_S", 0.2)
    with pytest.raises(ImageFailed, match=r"does not answer \(no answer within 0\.2 s\)"):
        built_images()


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


ROOT = Path(__file__).resolve().parents[3]


def inspected(name: str, fingerprint: str, created: str = "2026-01-01T00:00:00.123456789Z") -> str:
    """A line of `docker image inspect`, as docker 28 prints it."""
    facts: dict[str, Any] = {
        "Id": f"sha256:{name}", "RepoTags": [f"omnilaunch:{name}"], "RepoDigests": None, "Created": created, "Architecture": "amd64",
        "Size": 1_430_000_000, "Config": {"User": "1000:1000", "Labels": {FINGERPRINT: fingerprint} if fingerprint else None},
        "RootFS": {"Type": "layers", "Layers": ["sha256:a", "sha256:b"]},
    }  # fmt: skip
    return json.dumps(facts)


def test_an_image_is_found_by_its_tag_and_its_whole_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = render(load_stacks(ROOT / "images")["cpu"], architecture="x86_64", root=ROOT)
    engine(tmp_path, monkeypatch, f"echo \"$*\" >'{tmp_path}/asked'; cat '{tmp_path}/said'")
    (tmp_path / "said").write_text(inspected("cpu-1", image.fingerprint))
    assert find(image) == "sha256:cpu-1"
    assert (tmp_path / "asked").read_text() == f"image inspect --format {{{{json .}}}} {image.tag}\n"
    (tmp_path / "said").write_text(inspected("cpu-1", "0" * 64))
    assert find(image) is None


def test_an_image_that_is_absent_or_was_built_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = render(load_stacks(ROOT / "images")["cpu"], architecture="x86_64", root=ROOT)
    engine(tmp_path, monkeypatch, "echo; echo 'Error response from daemon: No such image: omnilaunch:x' >&2; exit 1")
    assert find(image) is None
    with pytest.raises(ImageFailed, match=r"the engine has no image omnilaunch:x; .*image ls"):
        inspect("omnilaunch:x")
    (tmp_path / "said").write_text(inspected("other", ""))
    engine(tmp_path, monkeypatch, f"cat '{tmp_path}/said'")
    with pytest.raises(ImageFailed, match=r"was not built by omnilaunch"):
        inspect("other:1")


def test_what_is_in_an_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    history = [{"Size": "140000", "CreatedBy": "COPY trainer trainer"}, {"Size": "0", "CreatedBy": 'CMD ["python"]'}]
    (tmp_path / "history").write_text("\n".join(map(json.dumps, history)))
    (tmp_path / "said").write_text(inspected("cpu-1", "f" * 64))
    engine(tmp_path, monkeypatch, f"case \"$2\" in history) cat '{tmp_path}/history' ;; *) cat '{tmp_path}/said' ;; esac")
    assert inspect("omnilaunch:cpu-1") == BuiltImage(
        id="sha256:cpu-1", tags=("omnilaunch:cpu-1",), created="2026-01-01T00:00:00", architecture="x86_64", user="1000:1000",
        size_bytes=1_430_000_000, labels={FINGERPRINT: "f" * 64}, layer_digests=("sha256:a", "sha256:b"),
        layers=((140000, "COPY trainer trainer"), (0, 'CMD ["python"]')),
    )  # fmt: skip


def test_images_and_containers_that_vanish_meanwhile_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "said").write_text("\n".join((inspected("old", "1" * 64, "2025-01-01T00:00:00Z"), inspected("new", "2" * 64))))
    engine(tmp_path, monkeypatch, f"""case "$1 $2" in
  "image ls") printf 'sha256:old\\nsha256:new\\nsha256:gone\\nsha256:new\\n' ;;
  "image inspect") cat '{tmp_path}/said'; echo 'Error: No such image: sha256:gone' >&2; exit 1 ;;
  "container ls") printf 'c1\\nc2\\n' ;;
  "container inspect") echo sha256:old; echo 'Error: No such container: c2' >&2; exit 1 ;;
esac""")  # fmt: skip
    assert [image.name for image in built_images()] == ["omnilaunch:new", "omnilaunch:old"]
    assert used_images() == {"sha256:old"}
    engine(tmp_path, monkeypatch, "exit 0")
    assert built_images() == () and used_images() == frozenset()


def test_an_image_in_use_is_not_removed_and_one_that_is_gone_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "Error response from daemon: conflict: unable to remove repository reference: container 1 is using its referenced image"
    engine(tmp_path, monkeypatch, f"echo '{said}' >&2; exit 1")
    with pytest.raises(ImageFailed, match=r"omnilaunch:a was not removed: .*is using its referenced image"):
        remove(built("a"))
    engine(tmp_path, monkeypatch, "echo 'Error response from daemon: No such image: omnilaunch:a' >&2; exit 1")
    remove(built("a"))


@pytest.mark.parametrize(("errors", "absent"), [
    ("Error: No such image: x", True), ("error: no such object: x", True), ("Error response from daemon: No such container: x", True),
    ("dial unix /var/run/docker.sock: no such file or directory", False), ("dial tcp: lookup x: no such host", False),
])  # fmt: skip
def test_what_is_absent(errors: str, absent: bool) -> None:
    assert is_absent(errors) is absent
