"""Builds that must fail: each reports why and what to do, and leaves no tag."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.errors import ImageFailed
from launcher.image.docker import find
from launcher.image.stack import load_stacks, render
from tests.images.conftest import BASE, ROOT, Built, run, tags

pytestmark = pytest.mark.docker


def test_a_base_without_the_expected_python(built: Built, make: Callable[..., Built], project: Path) -> None:
    name = "omnilaunch-base:wrong-python"
    pretend = "import sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (pretended)'"  # a line that Python's start-up runs
    dockerfile = f'FROM {built.delivery.base}\nRUN echo "{pretend}" > /usr/lib/python3/dist-packages/pretend.pth\n'
    subprocess.run(("docker", "build", "-q", "-t", name, "-"), input=dockerfile, text=True, capture_output=True, check=True)
    try:
        with pytest.raises(ImageFailed, match=r"the base has Python 3\.9\.2[\s\S]*use a base with the Python of the lock"):
            make(project, base=name)
        image = render(load_stacks(project / "images")["cpu"], architecture="x86_64", root=project, base=name)
        assert find(image) is None and image.tag not in tags()
    finally:
        run("docker", "image", "rm", name)


def test_a_base_that_is_not_available(make: Callable[..., Built], project: Path) -> None:
    with pytest.raises(ImageFailed, match=r"cluster\.delivery\.base=IMAGE"):
        make(project, base="registry.invalid/nothing:1")


def test_a_package_that_is_not_the_locked_one(make: Callable[..., Built], copied: Path) -> None:
    lock = copied / "images" / "locks" / "cpu-x86_64.torch.txt"
    lock.write_text(re.sub(r"sha256:[0-9a-f]{64}", f"sha256:{'ab' * 32}", lock.read_text(encoding="utf-8")), encoding="utf-8")
    before = tags()
    with pytest.raises(ImageFailed, match=r"DO NOT MATCH THE HASHES[\s\S]*never loosen the hash"):
        make(copied)
    assert tags() == before


def test_a_lock_that_misses_a_package(make: Callable[..., Built], copied: Path) -> None:
    lock = copied / "images" / "locks" / "cpu-x86_64.txt"
    text = re.sub(r"^hjson==(.*\\\n)+.*\n", "", lock.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(text) < len(lock.read_text(encoding="utf-8"))
    lock.write_text(text, encoding="utf-8")
    before = tags()
    with pytest.raises(
        ImageFailed, match=r"In --require-hashes mode[\s\S]*hjson[\s\S]*the lock misses a package: omnilaunch image refresh"
    ):
        make(copied)
    assert tags() == before


def test_a_changed_lock_is_another_image(built: Built, copied: Path) -> None:
    lock = copied / "images" / "locks" / "cpu-x86_64.txt"
    lock.write_text(lock.read_text(encoding="utf-8") + "# another\n", encoding="utf-8")
    other = render(load_stacks(copied / "images")["cpu"], architecture="x86_64", root=copied, base=built.image.base)
    assert other.fingerprint != built.image.fingerprint and other.tag != built.image.tag and find(other) is None


def test_another_architecture(make: Callable[..., Built], project: Path) -> None:
    from launcher.config.schema import Delivery
    from launcher.image.build import build

    image = render(load_stacks(project / "images")["ascend910b"], architecture="aarch64", root=project, base=BASE)
    with pytest.raises(ImageFailed, match=r"is for aarch64, the Docker engine here is x86_64"):
        build(image, root=project, delivery=Delivery(accept_licence=True), on_line=print)


def test_an_interrupted_build_leaves_no_tag(base: str) -> None:
    other = "omnilaunch-base:interrupted"
    run("docker", "tag", base, other)
    before = tags()
    argv = (sys.executable, "-m", "launcher.cli", "image", "build", "hardware=cpu", f"cluster.delivery.base={other}", "--fresh")
    with subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            for line in process.stdout or ():
                if "apt-get install" in line:
                    process.send_signal(signal.SIGINT)
                    break
            rest, _ = process.communicate(timeout=60)
        finally:
            process.kill()
            run("docker", "image", "rm", other)
    assert process.returncode == 130, rest
    assert tags() == before


@pytest.fixture
def small_engine(base: str, tmp_path: Path) -> Iterator[str]:
    """The address of a second engine whose disk holds 600 MB and the base. It has a network namespace of its own, since an engine without
    a bridge removes that of the other engine."""
    disk, socket = tmp_path / "disk", tmp_path / "docker.sock"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=600m", "tmpfs", str(disk))
    log = (tmp_path / "dockerd.log").open("w")
    engine = subprocess.Popen(
        ("unshare", "--net", "dockerd", "--data-root", str(disk), "--exec-root", str(tmp_path / "exec"), "--pidfile", str(tmp_path / "pid"),
         "--host", f"unix://{socket}", "--bridge", "none", "--iptables=false"), stdout=log, stderr=log,
    )  # fmt: skip
    try:
        for _ in range(100):
            if subprocess.run(("docker", "-H", f"unix://{socket}", "info"), capture_output=True).returncode == 0:
                break
            time.sleep(0.2)
        with subprocess.Popen(("docker", "save", base), stdout=subprocess.PIPE) as save:
            subprocess.run(("docker", "-H", f"unix://{socket}", "load"), stdin=save.stdout, check=True, capture_output=True)
        yield f"unix://{socket}"
    finally:
        engine.terminate()
        engine.wait(30)
        log.close()
        run("umount", "-R", str(disk))


def test_a_disk_that_fills_up(
    small_engine: str, make: Callable[..., Built], project: Path, wheelhouse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "DOCKER_HOST", small_engine)
    with pytest.raises(ImageFailed, match=r"(?i)no space left on device[\s\S]*the engine's disk is full: docker system df"):
        make(project, wheelhouse=str(wheelhouse), find_links="", index="")
    assert tags() == set()


def test_a_wheelhouse_with_an_altered_and_a_missing_file(
    make: Callable[..., Built], project: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "altered"
    folder.mkdir()
    for path in wheelhouse.glob("*.*"):
        (folder / path.name).hardlink_to(path)
    (folder / next(folder.glob("hjson-*")).name).unlink()
    einops = next(folder.glob("einops-*"))
    einops.unlink()
    einops.write_bytes(b"altered")
    before = tags()
    with pytest.raises(ImageFailed, match=r"not the locked file: einops-\S+\n  missing: hjson=="):
        make(project, fresh=True, wheelhouse=str(folder), find_links="")
    assert tags() == before


def test_the_command_ends_with_exit_code_3(tmp_path: Path) -> None:
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/nothing.sock"}
    argv = (sys.executable, "-m", "launcher.cli", "image", "build", "hardware=cpu")
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 3
    assert "does not answer" in done.stderr and "systemctl start docker" in done.stderr and "Traceback" not in done.stderr
