"""Refreshing the locks: what is asked for, that nothing is half written, and the real uv on a folder of wheels."""

import json
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

import launcher.refresh as module
from launcher.errors import ImageFailed
from launcher.image import UNPINNED, load_stacks
from launcher.refresh import cut, find_uv, joined, look_up, name_of, needs, new_lock, refresh, resolve, rewrite_table, targets, torch_of
from tests.launcher.test_wheelhouse import wheel

ROOT = Path(__file__).resolve().parents[2]
STACKS = load_stacks(ROOT / "images")
LOCKS = sorted((ROOT / "images" / "locks").glob("*.txt"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "images", tmp_path / "images")
    shutil.copyfile(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    return tmp_path


def contents(project: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(project.rglob("*")) if path.is_file()}


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_lock_is_of_our_making_and_names_no_index_but_torchs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(module.HEADER)
    blocks = cut(text)
    assert list(blocks) == sorted(blocks)
    assert joined(blocks) == "".join(line for line in text.splitlines(True) if not line.startswith(("#", "--extra-index-url")))
    assert {line for line in text.splitlines() if "://" in line} <= {f"--extra-index-url {module.TORCH_INDEX}"}


def test_the_locks_to_write() -> None:
    found = {target.lock: target for target in targets(STACKS)}
    assert [stack.name for stack in found["locks/ascend-aarch64.txt"].stacks] == ["ascend910b", "ascend910c"]
    assert found["locks/ascend-x86_64.txt"].torch == "2.7.1+cpu" and found["locks/ascend-aarch64.txt"].torch == "2.7.1"
    assert found["locks/cpu-x86_64.txt"].torch == "2.13.0+cpu" and found["locks/cuda126-x86_64.txt"].torch == "2.7.1"
    assert not found["locks/cuda126-x86_64.txt"].alone and found["locks/cpu-x86_64.txt"].alone
    assert "locks/ascend910b_torch210-x86_64.txt" in found, "a lock that is not there yet is named after its sibling"
    assert new_lock(STACKS["cpu"], "aarch64") == "locks/cpu-aarch64.txt"
    assert torch_of(STACKS["cuda126"], "x86_64") == "2.7.1"


def test_requirements_come_from_pyproject() -> None:
    assert {"hydra-core", "fabric", "docker"} <= set(map(name_of, needs(ROOT, "")))
    assert {"deepspeed", "scikit-learn"} <= set(map(name_of, needs(ROOT, "trainer")))
    assert "uv" in map(name_of, needs(ROOT, "dev"))
    assert name_of("types-PyYAML") == "types-pyyaml" and name_of("jinja2>=3.1,<4") == "jinja2"


def test_the_real_uv_resolves_with_hashes_and_without_what_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = tmp_path / "index"
    alpha, other = wheel(index, "alpha", "1.0"), wheel(index, "beta", "2.0")
    wheel(index, "alpha", "1.1")
    monkeypatch.setenv("UV_FIND_LINKS", str(index))
    monkeypatch.setenv("UV_OFFLINE", "1")
    lock = tmp_path / "lock.txt"
    row = f"alpha==1.0 \\\n    --hash=sha256:{sha256(alpha.read_bytes()).hexdigest()}\n"
    lock.write_text(row, encoding="utf-8")
    found = resolve(find_uv(), ["alpha", "beta"], platform="aarch64-manylinux_2_28", existing=lock, without=("beta",))
    assert found == {"alpha": row}, "the locked version is kept"
    newest = resolve(find_uv(), ["alpha", "beta"], platform="aarch64-manylinux_2_28", existing=lock, upgrade=True)
    assert newest["alpha"].startswith("alpha==1.1 ") and sha256(other.read_bytes()).hexdigest() in newest["beta"]
    with pytest.raises(ImageFailed, match=r"uv did not resolve no-such-package for aarch64-manylinux_2_28:[\s\S]*no-such-package"):
        resolve(find_uv(), ["no-such-package"], platform="aarch64-manylinux_2_28")


def test_nothing_is_written_when_one_lock_cannot_be_resolved(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uv = script(tmp_path / "uv", 'for word in "$@"; do case "$word" in aarch64*) echo "no solution" >&2; exit 1;; esac; done')
    monkeypatch.setattr(module, "find_uv", lambda: uv)
    before = contents(project)
    with pytest.raises(ImageFailed, match=r"no solution"):
        refresh(project, stacks=("ascend910b",), say=lambda line: None)
    assert contents(project) == before


def test_an_unknown_stack_is_refused(project: Path) -> None:
    with pytest.raises(ImageFailed, match=r"unknown stack 'cuda12'.*did you mean 'cuda126'"):
        refresh(project, stacks=("cuda12",), say=lambda line: None)


def test_a_missing_uv_says_what_brings_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ImageFailed, match=r"uv is not there.*make setup"):
        find_uv()


def test_only_digests_and_paths_change_in_the_table() -> None:
    text = (ROOT / "images" / "versions.yaml").read_text(encoding="utf-8")
    paths = {(stack.name, architecture): lock for stack in STACKS.values() for architecture, lock in stack.locks.items()}
    assert rewrite_table(text, STACKS, {name: stack.digest for name, stack in STACKS.items()}, paths) == text
    paths["ascend910b_torch210", "x86_64"] = "locks/new.txt"
    changed = rewrite_table(text, STACKS, {"ascend910b_torch210": "sha256:1"}, paths)
    differing = [pair for pair in zip(text.splitlines(), changed.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [pair[1].strip() for pair in differing] == [
        "digest: sha256:1", "locks: {aarch64: locks/ascend910b_torch210-aarch64.txt, x86_64: locks/new.txt}",
    ]  # fmt: skip


@pytest.fixture
def registry() -> Iterator[str]:
    """As little of a registry as answers for one manifest, on this machine, where engines need no TLS."""
    manifest = json.dumps({
        "schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {"mediaType": "application/vnd.docker.container.image.v1+json", "size": 2, "digest": f"sha256:{'1' * 64}"}, "layers": [],
    }).encode()  # fmt: skip

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = manifest if "/manifests/" in self.path else b"{}"
            self.send_response(200)
            self.send_header("Content-Type", "application/vnd.docker.distribution.manifest.v2+json")
            self.send_header("Docker-Content-Digest", f"sha256:{sha256(body).hexdigest()}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            return

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", f"sha256:{sha256(manifest).hexdigest()}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.docker
def test_a_digest_is_asked_of_the_registry(registry: tuple[str, str]) -> None:
    address, digest = registry
    assert look_up(f"{address}/library/python:3.11", UNPINNED, print) == digest


@pytest.mark.docker
def test_a_registry_that_does_not_answer_leaves_what_is_known() -> None:
    said: list[str] = []
    assert look_up("registry.invalid/python:3.11", UNPINNED, said.append) == UNPINNED
    assert "registry.invalid/python:3.11: its registry gave no digest, 'unpinned' is kept" in said[0]
