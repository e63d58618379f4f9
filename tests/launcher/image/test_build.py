"""Building, without an engine: the build context, the argv, and the errors. tests/images builds with a real engine."""

import os
import re
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed
from launcher.image.build import build_command, fill_context, progress_line, refuse_unbuildable, run_build, source_commit, write_secrets
from launcher.image.docker import DockerCommand
from launcher.image.stack import Image, context_files, load_stacks, render

ROOT = Path(__file__).resolve().parents[3]
CLIENT = DockerCommand(path="/usr/bin/docker", architecture="x86_64")


@pytest.fixture
def image() -> Image:
    return render(load_stacks(ROOT / "images")["cpu"], architecture="x86_64", root=ROOT)


@pytest.fixture
def project(tmp_path: Path, image: Image) -> Path:
    """A copy of the sources of the image, which a test may change."""
    for path in context_files(ROOT, image.lock).values():
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path


def script(path: Path, text: str) -> Path:
    """A program in place of the docker client."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


# -------------------------------------------------------------------------------------------------------------- refusal


@pytest.mark.parametrize(("change", "delivery", "words"), [
    ({"lock": ""}, Delivery(), ("no lock for x86_64", "stacks.cpu.locks")),
    ({"licence": "CANN 2.0"}, Delivery(), ("CANN 2.0", "cluster.delivery.accept_licence=true")),
    ({"architecture": "aarch64"}, Delivery(), ("for aarch64", "engine here is x86_64", "image fetch --architecture aarch64")),
    ({}, Delivery(kind="pull"), ("cluster.delivery.kind=pull", "cluster.delivery.kind=build")),
])  # fmt: skip
def test_an_image_that_may_not_be_built_is_refused(
    image: Image, change: dict[str, str], delivery: Delivery, words: tuple[str, ...]
) -> None:
    with pytest.raises(ImageFailed) as caught:
        refuse_unbuildable(replace(image, **change), delivery, CLIENT)
    assert all(word in str(caught.value) for word in words)


def test_a_refusal_names_the_command_that_accepts_a_known_licence(image: Image) -> None:
    column = load_stacks(ROOT / "images")["ascend910b"].licence
    with pytest.raises(ImageFailed, match=r"omnilaunch licence show cann.*omnilaunch licence accept cann"):
        refuse_unbuildable(replace(image, licence=column), Delivery(), CLIENT)


def test_an_image_that_may_be_built_is_not_refused(image: Image) -> None:
    refuse_unbuildable(image, Delivery(), CLIENT)
    refuse_unbuildable(replace(image, licence="CANN 2.0"), Delivery(accept_licence=True), CLIENT)


# -------------------------------------------------------------------------------------------------------------- context


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_the_context_holds_the_images_files_and_nothing_else(image: Image, project: Path) -> None:
    folder = fill_context(image, project, Delivery())
    assert names(folder) == {*image.files, "Dockerfile"}
    assert (folder / "wheelhouse").is_dir() and (folder / "system").is_dir()
    assert stat.S_IMODE((folder / "entrypoint.sh").stat().st_mode) == 0o755
    assert stat.S_IMODE((folder / "trainer" / "train" / "loop.py").stat().st_mode) == 0o644
    (folder / "trainer" / "stray.py").write_text("", encoding="utf-8")
    before = (folder / "trainer" / "train" / "loop.py").stat().st_ino
    assert names(fill_context(image, project, Delivery())) == {*image.files, "Dockerfile"}
    assert (folder / "trainer" / "train" / "loop.py").stat().st_ino == before, "what has not changed is left"


def test_a_file_that_changed_after_planning_is_noticed(image: Image, project: Path) -> None:
    (project / "trainer" / "train" / "loop.py").write_text("another\n", encoding="utf-8")
    with pytest.raises(ImageFailed, match=r"loop\.py has changed since omnilaunch:cpu-\w+ was planned; run the command again"):
        fill_context(image, project, Delivery())


def test_only_locked_wheels_are_in_the_context(image: Image, project: Path, tmp_path: Path) -> None:
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    taken = {"torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", "deepspeed-0.19.8.tar.gz", "huggingface_hub-2.4.0-py3-none-any.whl"}
    for name in (*taken, "torch-2.7.1-cp311-none-linux_x86_64.whl", "notes.txt", "sixth-1.0-py3-none-any.whl"):
        (wheels / name).write_bytes(b"x")
    folder = fill_context(image, project, Delivery(find_links=str(wheels)))
    assert {path.name for path in (folder / "wheelhouse").iterdir()} == taken
    fill_context(image, project, Delivery())
    assert not list((folder / "wheelhouse").iterdir())


def test_a_missing_wheel_folder_is_named(image: Image, project: Path) -> None:
    with pytest.raises(ImageFailed, match=r"cluster\.delivery\.find_links: the folder /nowhere does not exist"):
        fill_context(image, project, Delivery(find_links="/nowhere"))


def test_index_and_bundle_are_passed_as_secrets(tmp_path: Path, image: Image) -> None:
    bundle = tmp_path / "ca.pem"
    bundle.write_text("certificates", encoding="utf-8")
    delivery = Delivery(index="https://ann:secret@mirror.example/simple", extra_index="https://two.example", ca_bundle=str(bundle))
    secrets = write_secrets(delivery, tmp_path)
    assert secrets["ca"] == bundle
    assert secrets["pip"].read_text(encoding="utf-8").splitlines() == [
        "[global]", "find-links = /wheelhouse", "index-url = https://ann:secret@mirror.example/simple",
        "extra-index-url = https://two.example", "cert = /run/secrets/ca",
    ]  # fmt: skip
    assert stat.S_IMODE(secrets["pip"].stat().st_mode) == 0o600
    command = build_command(CLIENT.path, image, tmp_path, secrets, "0123", delivery=delivery, fresh=False)
    assert "secret@" not in " ".join(command)
    assert command[:6] == ("/usr/bin/docker", "build", "--progress", "plain", "--tag", image.tag)
    assert command[-1] == str(tmp_path)
    assert "--network" not in command and "--no-cache" not in command
    assert f"id=ca,src={bundle}" in command and "org.opencontainers.image.revision=0123" in command


def test_a_wheelhouse_turns_the_index_and_the_network_off_and_a_missing_bundle_is_named(tmp_path: Path, image: Image) -> None:
    delivery = Delivery(wheelhouse="wheels")
    secrets = write_secrets(delivery, tmp_path)
    assert "no-index = true" in secrets["pip"].read_text(encoding="utf-8")
    command = build_command(CLIENT.path, image, tmp_path, secrets, "0123", delivery=delivery, fresh=True)
    assert command[command.index("--network") + 1] == "none" and "--no-cache" in command
    with pytest.raises(ImageFailed, match=r"ca_bundle: the file /nowhere\.pem does not exist"):
        write_secrets(Delivery(ca_bundle="/nowhere.pem"), tmp_path)


# ---------------------------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(("said", "advice"), [
    ("#9 1.2 ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE.", "never loosen the hash"),
    ("#9 1.2 ERROR: In --require-hashes mode, all requirements must have their versions pinned", "the lock misses a package"),
    ("#9 write /opt/x: no space left on device", "docker system df"),
    ("#5 0.3 AssertionError: the base has Python 3.9.2, the locks are for 3.11", "use a base with the Python of the lock"),
    ("unknown flag: --secret", "install docker-buildx-plugin"),
    ("#5 exec /bin/sh: exec format error", "another architecture"),
    ("#9 [SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "cluster.delivery.ca_bundle"),
    ("#9 1.2 ERROR: No matching distribution found for torch==2.13.0+cpu", "cluster.delivery.find_links"),
    ("failed to solve: failed to do request: dial tcp: lookup registry: no such host", "cluster.delivery.base"),
])  # fmt: skip
def test_a_failed_build_says_why_and_what_to_do(tmp_path: Path, said: str, advice: str) -> None:
    docker = script(tmp_path / "docker", f'echo "#1 [base 1/3] FROM x"\necho "{said}" >&2\nexit 1')
    seen: list[str] = []
    with pytest.raises(ImageFailed) as caught:
        run_build((str(docker), "build"), tmp_path / "build.log", Delivery(), seen.append)
    assert said in str(caught.value) and advice in str(caught.value) and str(tmp_path / "build.log") in str(caught.value)
    assert said in (tmp_path / "build.log").read_text(encoding="utf-8")
    assert seen == ["  [base 1/3] FROM x"]


def test_buildkit_is_used_and_the_proxy_is_not_in_the_argv(tmp_path: Path) -> None:
    docker = script(tmp_path / "docker", 'echo "$DOCKER_BUILDKIT $https_proxy" > "$1"')
    run_build((str(docker), str(tmp_path / "seen")), tmp_path / "build.log", Delivery(proxy="http://proxy.example:3128"), print)
    assert (tmp_path / "seen").read_text(encoding="utf-8") == "1 http://proxy.example:3128\n"


def test_an_interrupted_build_ends_its_client(tmp_path: Path) -> None:
    docker = script(tmp_path / "docker", 'echo $$ > "$1"\necho "#1 [base 1/3] FROM x"\nexec sleep 60')

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build((str(docker), str(tmp_path / "pid")), tmp_path / "build.log", Delivery(), interrupt)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text(encoding="utf-8")), 0)


@pytest.mark.parametrize(("line", "said"), [
    ("#11 [packages  4/10] RUN --mount=type=cache,target=/root/.cache/pip --mount=type=secret,id=pip     python3 -m venv /opt/venv",
     "  [packages 4/10] RUN python3 -m venv /opt/venv"),
    ("#11 DONE 36.1s", "    36 s"), ("#11 DONE 0.4s", ""), ("#11 CACHED", ""), ("#11 7.116 WARNING: Retrying", ""), ("", ""),
])  # fmt: skip
def test_progress_lines(line: str, said: str) -> None:
    assert progress_line(line) == said


def test_the_commit_comes_from_git(tmp_path: Path) -> None:
    assert re.fullmatch(r"[0-9a-f]{40}", source_commit(ROOT))
    assert source_commit(tmp_path) == "unknown"
