"""Refreshing the locks: the requirements, that files are written all or none, and the real uv with an index of empty wheels."""

import os
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote
from zipfile import ZipFile

import pytest

import launcher.image.refresh as module
from launcher.errors import ImageFailed
from launcher.image.lock import join, name_of, read_lock, split_rows
from launcher.image.refresh import (
    TORCH_INDEX,
    LockTarget,
    local_torch,
    needs,
    new_lock,
    pins,
    refresh,
    rewrite_table,
    targets,
    torch_of,
    write_all,
)
from launcher.image.resolver import IndexUnreachable, find_uv, resolve
from launcher.image.stack import load_stacks

ROOT = Path(__file__).resolve().parents[3]
STACKS = load_stacks(ROOT / "images")
LOCKS = sorted((ROOT / "images" / "locks").glob("*.txt"))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "project"
    shutil.copytree(ROOT / "images", folder / "images")
    shutil.copyfile(ROOT / "pyproject.toml", folder / "pyproject.toml")
    return folder


def contents(project: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(project.rglob("*")) if path.is_file()}


def package(index: Path, name: str, version: str, *wants: str) -> str:
    """Add a wheel of an empty package with dependencies; its sha256."""
    index.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    path, info = index / f"{stem}-py3-none-any.whl", f"{stem}.dist-info"
    asks = "".join(f"Requires-Dist: {want}\n" for want in wants)
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{asks}")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of wheels, served as two indexes: PyTorch's with local versions only, and the common one with all others."""
    folder = tmp_path / "index"

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, name = self.path.strip("/").split("/")[:2]
            if kind == "file":
                self.answer("application/zip", (folder / unquote(name)).read_bytes())
                return
            wheels = [wheel for wheel in folder.glob(f"{name.replace('-', '_')}-*.whl") if ("+" in wheel.name) == (kind == "torch")]
            rows = (
                f'<a href="/file/{quote(wheel.name)}#sha256={sha256(wheel.read_bytes()).hexdigest()}">{wheel.name}</a>' for wheel in wheels
            )
            self.answer("text/html", "\n".join(rows).encode())

        def answer(self, kind: str, body: bytes) -> None:
            self.send_response(200 if body else 404)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, format: str, *arguments: object) -> None:
            return

    with serving(Handler) as address:
        monkeypatch.setattr(module, "TORCH_INDEX", f"http://{address}/torch")
        for variable in [name for name in os.environ if name.startswith("UV_")]:
            monkeypatch.delenv(variable)
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://{address}/common")
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        yield folder


class Server(ThreadingHTTPServer):
    request_queue_size = 128  # uv asks for all packages at once; a connection that is dropped costs it a second


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def fill(index: Path) -> None:
    """One wheel for each of the project's requirements and for each pin of the stacks cpu and ascend910b."""
    asked = [*needs(ROOT, ""), *needs(ROOT, "trainer"), *needs(ROOT, "dev"), "sympy>=1.13.3", "networkx>=2.5.1", "setuptools>=77"]
    for need in asked:
        found = re.search(r"[=>]=([\d.]+)", need)
        package(index, name_of(need), found[1] if found else "1.0")
    for stack in ("cpu", "ascend910b"):
        for name, version in STACKS[stack].packages.items():
            package(index, name, version)
    package(index, "sympy", "2.0")
    for name in ("nvidia-cublas", "cuda-bindings", "triton", "nvidia-ml-py"):
        package(index, name, "1.0")
    package(index, "deepspeed", "0.19.8", "torch", "nvidia-ml-py")
    for version in ("2.13.0", "2.7.1"):
        package(index, "torch", version, "sympy>=1.13.3,<2", "networkx", "triton", "nvidia-cublas", "cuda-bindings")
        package(index, "torch", f"{version}+cpu", "sympy>=1.13.3,<2", "networkx")
    package(index, "torch-npu", "2.7.1.post8", "torch==2.7.1+cpu ; platform_machine == 'x86_64'")


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_lock_was_written_by_refresh_and_names_no_index_but_pytorchs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith(module.HEADER)
    blocks = split_rows(text)
    assert list(blocks) == sorted(blocks)
    assert join(blocks) == "".join(line for line in text.splitlines(True) if not line.startswith(("#", "--extra-index-url")))
    assert {line for line in text.splitlines() if "://" in line} <= {f"--extra-index-url {TORCH_INDEX}"}


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
    assert {"hydra-core", "fabric", "packaging"} <= set(map(name_of, needs(ROOT, "")))
    assert {"deepspeed", "scikit-learn"} <= set(map(name_of, needs(ROOT, "trainer")))
    assert "uv" in map(name_of, needs(ROOT, "dev"))
    assert name_of("types-PyYAML") == "types-pyyaml" and name_of("jinja2>=3.1,<4") == "jinja2"


def test_the_real_uv_resolves_with_hashes(index: Path) -> None:
    digest, other = package(index, "alpha", "1.0"), package(index, "beta", "2.0")
    package(index, "alpha", "1.1")
    row = f"alpha==1.0 \\\n    --hash=sha256:{digest}\n"
    there = {"python": "3.11", "platform": "aarch64-manylinux_2_28"}
    found = resolve(find_uv(), ["alpha"], **there, kept={"alpha": row})
    assert found == {"alpha": row}, "the locked version is kept"
    assert resolve(find_uv(), ["alpha"], **there, agreeing={"alpha": row}) == found
    newest = resolve(find_uv(), ["alpha", "beta"], **there)
    assert newest["alpha"].startswith("alpha==1.1 ") and other in newest["beta"]
    with pytest.raises(
        ImageFailed, match=r"uv did not resolve alpha==9 for aarch64-manylinux_2_28:[\s\S]*no version of alpha==9"
    ) as caught:
        resolve(find_uv(), ["alpha==9"], **there)
    assert not isinstance(caught.value, IndexUnreachable)
    with pytest.raises(IndexUnreachable, match=r"uv did not resolve no-such-package"):
        resolve(find_uv(), ["no-such-package"], **there)


def test_a_whole_refresh_with_the_real_uv(project: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(index)
    monkeypatch.setattr(module, "look_up", lambda base, known, say: f"sha256:{'5' * 64}")
    (project / "images" / "locks" / "dev.txt").unlink()  # a lock that does not exist yet
    before, said = contents(project), list[str]()
    found = refresh(project, stacks=("cpu", "ascend910b"), say=said.append, upgrade=True)

    locks = project / "images" / "locks"
    assert {path.name for path in found} >= {
        "versions.yaml",
        "cpu-x86_64.txt",
        "cpu-aarch64.txt",
        "launcher.txt",
        "dev.txt",
        "ascend-x86_64.txt",
    }
    assert {path for path, text in contents(project).items() if before.get(path) != text} == set(found)
    cpu = read_lock(locks / "cpu-x86_64.txt")
    assert cpu["torch"].startswith("torch==2.13.0+cpu ") and read_lock(locks / "cpu-x86_64.torch.txt") == {"torch": cpu["torch"]}
    assert cpu["sympy"].startswith("sympy==1.13.3 "), "torch's own bounds hold"
    assert not {"triton", "nvidia-cublas", "cuda-bindings"} & set(cpu) and "nvidia-ml-py" in cpu, "deepspeed's stays, torch's go"
    ascend = locks / "ascend-x86_64.txt"
    assert read_lock(ascend)["torch"].startswith("torch==2.7.1+cpu ") and "torch-npu" in read_lock(ascend)
    assert ascend.read_text(encoding="utf-8").splitlines()[1].startswith("# Stacks ascend910b and ascend910c, x86_64"), (
        "though one was named"
    )
    assert "  deepspeed: none -> 0.19.8" in said, "cpu-aarch64 is new"

    stacks = load_stacks(project / "images")
    assert stacks["cpu"].locks["aarch64"] == "locks/cpu-aarch64.txt" and stacks["cpu"].digest == f"sha256:{'5' * 64}"
    assert stacks["ascend910c"] == STACKS["ascend910c"] and stacks["cuda126"] == STACKS["cuda126"], "rows that were not named stay"
    assert refresh(project, stacks=("cpu",), say=said.append) == (), "the same index gives the same bytes"

    package(index, "networkx", "9.0")
    package(index, "newcomer", "1.0", "networkx", "its-own")
    package(index, "its-own", "2.0")
    asked = project / "pyproject.toml"
    asked.write_text(asked.read_text(encoding="utf-8").replace('    "ninja",\n', '    "ninja",\n    "newcomer",\n'), encoding="utf-8")
    refresh(project, stacks=("cpu",), say=said.append)
    after = read_lock(locks / "cpu-x86_64.txt")
    assert [after.pop(name).split()[0] for name in ("newcomer", "its-own")] == ["newcomer==1.0", "its-own==2.0"]
    assert after == cpu, "what is locked stays, though the index has a newer one"


@pytest.mark.parametrize("output", ["<html>blocked</html>", "alpha==1.0", "alpha==1.0 \\\\\n    --hash=md5:1", ""])
def test_output_that_is_not_a_lock_is_refused(tmp_path: Path, output: str) -> None:
    uv = script(tmp_path / "uv", f'while [ "$1" != --output-file ]; do shift; done; printf \'{output}\\n\' > "$2"')
    with pytest.raises(ImageFailed, match=r"uv's output for x86_64.*(is not a lock with hashes|lacks alpha).*make setup"):
        resolve(uv, ["alpha"], python="3.11", platform="x86_64-manylinux_2_28")


def cpu_target(torch: str) -> LockTarget:
    return replace(next(target for target in targets(STACKS) if target.lock == "locks/cpu-x86_64.txt"), torch=torch)


@pytest.mark.parametrize(("known", "found", "says"), [
    ("torch==2.13.0+cpu \\\n", "torch==2.13.0+cpu \\\n", "its row is kept"), ("", "", "so locks/cpu-x86_64.txt was not resolved"),
])  # fmt: skip
def test_a_torch_whose_index_does_not_answer(tmp_path: Path, known: str, found: str, says: str) -> None:
    said: list[str] = []
    uv = script(tmp_path / "uv", "echo 'error: Failed to fetch' >&2; exit 2")
    assert local_torch(uv, cpu_target("2.13.0+cpu"), known, said.append) == found
    assert len(said) == 1 and f"torch==2.13.0+cpu: {TORCH_INDEX} did not answer" in said[0] and says in said[0]


def test_a_lock_of_another_torch_is_not_lost_to_an_index_that_does_not_answer(tmp_path: Path) -> None:
    uv = script(tmp_path / "uv", "echo 'error: Failed to fetch' >&2; exit 2")
    with pytest.raises(ImageFailed, match=r"stacks\.cpu\.torch.*locks/cpu-x86_64\.txt is for torch 2\.12\.0\+cpu; refresh where"):
        local_torch(uv, cpu_target("2.13.0+cpu"), "torch==2.12.0+cpu \\\n", print)


def test_a_torch_that_its_index_does_not_have_is_an_error(tmp_path: Path) -> None:
    uv = script(tmp_path / "uv", "echo 'there is no version of torch==9+cpu' >&2; exit 1")
    with pytest.raises(ImageFailed, match=r"no version of torch==9"):
        local_torch(uv, cpu_target("9+cpu"), "torch==9+cpu \\\n", print)


def test_stacks_that_share_a_lock_must_agree() -> None:
    with pytest.raises(ImageFailed, match=r"stacks\.ascend910b and stacks\.ascend910c share locks/ascend-aarch64\.txt and differ"):
        targets(STACKS | {"ascend910c": replace(STACKS["ascend910c"], plugin="torch-npu 2.7.1.post10")})
    assert pins(STACKS["ascend910b"], "x86_64")[-2:] == ("torch-npu==2.7.1.post8", "torch==2.7.1+cpu")


def test_nothing_is_written_when_one_file_cannot_be(project: Path) -> None:
    first, second = project / "pyproject.toml", project / "images" / "versions.yaml"
    second.with_name(".versions.yaml.new").mkdir()
    before = contents(project)
    with pytest.raises(ImageFailed, match=r"versions\.yaml: cannot be written: Is a directory; no file was changed"):
        write_all({first: "one", second: "two"})
    assert contents(project) == before


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


def test_a_missing_uv_is_reported_with_what_installs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ImageFailed, match=r"uv does not exist.*make setup"):
        find_uv()


def test_only_digests_and_paths_change_in_the_table() -> None:
    path = ROOT / "images" / "versions.yaml"
    text = path.read_text(encoding="utf-8").replace("digest: unpinned", "digest: unpinned  # not looked up yet", 1)
    assert rewrite_table(text, STACKS, path) == text
    old = STACKS["ascend910b_torch210"]
    row = replace(old, digest="sha256:1", locks={**old.locks, "x86_64": "locks/new.txt"})
    named = replace(STACKS["cpu"], digest="sha256:2")
    changed = rewrite_table(text, STACKS | {"ascend910b_torch210": row, "cpu": named}, path)
    differing = [pair for pair in zip(text.splitlines(), changed.splitlines(), strict=True) if pair[0] != pair[1]]
    assert [pair[1].strip() for pair in differing] == [
        "digest: sha256:2  # not looked up yet",
        "digest: sha256:1",
        "locks: {aarch64: locks/ascend910b_torch210-aarch64.txt, x86_64: locks/new.txt}",
    ]


@pytest.mark.parametrize(("old", "new"), [
    ("    digest: unpinned\n", "    digest:\n      unpinned\n"), ("{x86_64: locks/cuda126-x86_64.txt}", "\n      x86_64: locks/cuda126-x86_64.txt"),
])  # fmt: skip
def test_a_table_laid_out_in_another_way_is_refused(old: str, new: str) -> None:
    path = ROOT / "images" / "versions.yaml"
    text = path.read_text(encoding="utf-8")
    start = text.index("  cuda126:")
    other = text[:start] + text[start:].replace(old, new, 1)
    row = replace(STACKS["cuda126"], digest="sha256:1", locks={"x86_64": "locks/new.txt"})
    with pytest.raises(
        ImageFailed, match=r"versions\.yaml, stacks\.cuda126: to be rewritten, digest and locks must each be on a line of their own"
    ):
        rewrite_table(other, STACKS | {"cuda126": row}, path)
