"""A wheelhouse is compared with its lock: complete, or every wrong file is named. pip itself fetches, from a folder."""

import json
import os
import sys
from hashlib import sha256
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.version import Version

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed
from launcher.image.lock import locked_packages, packages_of
from launcher.image.stack import load_stacks
from launcher.image.wheelhouse import (
    MANIFEST,
    complete,
    distributions,
    download_command,
    fetch_wheels,
    local_files,
    run_pip,
    system_files,
    write_manifest,
)

ROOT = Path(__file__).resolve().parents[3]
CPU = load_stacks(ROOT / "images")["cpu"]


def wheel(folder: Path, name: str, version: str, platform: str = "any") -> Path:
    """Add a wheel of an empty package."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{version}-{'py3-none' if platform == 'any' else 'cp311-cp311'}-{platform}.whl"
    info = f"{name}-{version}.dist-info"
    with ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-{platform}\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def row(path: Path) -> str:
    name, version = path.name.split("-")[:2]
    return f"{name}=={version} \\\n    --hash=sha256:{sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project whose lock has two packages, one of them for aarch64; `index` has both, and the second one for x86_64 too."""
    index, locks = tmp_path / "index", tmp_path / "project" / "images" / "locks"
    locks.mkdir(parents=True)
    tools = wheel(index, "tools", "1.0")
    files = (wheel(index, "alpha", "1.0"), wheel(index, "beta", "2.0", "manylinux_2_28_aarch64"))
    wheel(index, "beta", "2.0", "manylinux_2_28_x86_64")
    (locks / "build.txt").write_text(row(tools), encoding="utf-8")
    (locks / "cpu-aarch64.txt").write_text("".join(map(row, files)), encoding="utf-8")
    return tmp_path / "project"


def fetch(project: Path, folder: Path) -> tuple[Path, ...]:
    from dataclasses import replace

    stack = replace(CPU, locks={"aarch64": "locks/cpu-aarch64.txt"})
    environ = {"PATH": os.environ["PATH"], "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
    delivery = Delivery(find_links=str(project.parent / "index"))
    return fetch_wheels(
        stack, architecture="aarch64", root=project, folder=folder, environ=environ, delivery=delivery, say=lambda line: None
    )


def test_fetch_downloads_the_files_of_the_given_architecture(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "house"
    names = {path.name for path in fetch(project, folder)}
    assert names == {"tools-1.0-py3-none-any.whl", "alpha-1.0-py3-none-any.whl", "beta-2.0-cp311-cp311-manylinux_2_28_aarch64.whl"}
    assert {path.name for path in folder.iterdir()} == names
    assert fetch(project, folder), "again, with nothing to download"
    found = local_files(project, "locks/cpu-aarch64.txt", Delivery(wheelhouse=str(folder)))
    assert set(found) == names


def test_a_file_whose_hash_is_not_in_the_lock_is_not_fetched(project: Path, tmp_path: Path) -> None:
    wheel(project.parent / "index", "alpha", "1.0").write_bytes(b"another")
    with pytest.raises(ImageFailed, match=r"not fetched \(pip ended with 1\)[\s\S]*DO NOT MATCH THE HASHES"):
        fetch(project, tmp_path / "house")


def test_a_missing_lock_is_reported_with_the_existing_ones(tmp_path: Path) -> None:
    with pytest.raises(ImageFailed, match=r"stack cpu has no lock for riscv64 .*stacks\.cpu\.locks.*it has: .*x86_64"):
        fetch_wheels(
            CPU, architecture="riscv64", root=ROOT, folder=tmp_path, environ={}, delivery=Delivery(), say=lambda line: None
        )  # fmt: skip


def test_missing_and_altered_files_are_all_named(project: Path, tmp_path: Path) -> None:
    folder = tmp_path / "house"
    fetch(project, folder)
    (folder / "alpha-1.0-py3-none-any.whl").write_bytes(b"altered")
    (folder / "beta-2.0-cp311-cp311-manylinux_2_28_aarch64.whl").unlink()
    with pytest.raises(ImageFailed) as caught:
        local_files(project, "locks/cpu-aarch64.txt", Delivery(wheelhouse=str(folder)))
    said = str(caught.value)
    assert "not the locked file: alpha-1.0-py3-none-any.whl" in said and "missing: beta==2.0" in said
    assert "omnilaunch image fetch" in said


def test_a_folder_of_find_links_need_not_have_all(project: Path, tmp_path: Path) -> None:
    some = tmp_path / "some"
    wheel(some, "alpha", "1.0"), wheel(some, "stray", "3.0")
    found = local_files(project, "locks/cpu-aarch64.txt", Delivery(find_links=str(some)))
    assert set(found) == {"alpha-1.0-py3-none-any.whl"}
    assert local_files(project, "locks/cpu-aarch64.txt", Delivery()) == {}


@pytest.mark.parametrize("lock", sorted((ROOT / "images" / "locks").glob("*.txt")), ids=lambda path: path.name)
def test_every_row_of_every_lock_has_hashes(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    rows = locked_packages(lock)
    assert len(rows) == text.count("==") and len({row.name for row in rows}) == len(rows)


def test_a_row_without_a_hash_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text("alpha==1.0\n", encoding="utf-8")
    with pytest.raises(ImageFailed, match=r"alpha==1\.0 has no hash; .*omnilaunch image refresh"):
        tuple(packages_of(tmp_path / "lock.txt"))


@pytest.mark.parametrize(("file", "key"), [
    ("torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl", ("torch", "2.13.0+cpu")),
    ("huggingface_hub-2.4.0-py3-none-any.whl", ("huggingface-hub", "2.4.0")),
    ("deepspeed-0.19.8.tar.gz", ("deepspeed", "0.19.8")),
    ("ruamel.yaml-0.19.1-py3-none-any.whl", ("ruamel-yaml", "0.19.1")),
    ("antlr4-python3-runtime-4.9.3.tar.gz", ("antlr4-python3-runtime", "4.9.3")),
    ("flash-attn-2.8.3.post1.tar.gz", ("flash-attn", "2.8.3.post1")),
    ("zope.interface-7.0.zip", ("zope-interface", "7.0")),
    ("backports.zoneinfo-0.2.1.tar.bz2", ("backports-zoneinfo", "0.2.1")),
    ("jaraco.text-4.0.tgz", ("jaraco-text", "4.0")),
    ("mpi4py-4.1.0-1-cp311-cp311-linux_x86_64.whl", ("mpi4py", "4.1.0")),
    ("PyYAML-6.0.tar.gz", ("pyyaml", "6.0")),
])  # fmt: skip
def test_names_and_versions_of_files(tmp_path: Path, file: str, key: tuple[str, str]) -> None:
    (tmp_path / file).touch()
    (tmp_path / "notes.txt").touch()
    name, version = key
    assert distributions(tmp_path)[0] == {(name, Version(version)): (tmp_path / file,)}


def test_a_version_of_a_file_is_compared_as_a_version(tmp_path: Path) -> None:
    """pytz-2024.01 is version 2024.1, and 1.0 equals 1.0.0 (PEP 440)."""
    (tmp_path / "pytz-2024.01.tar.gz").touch()
    assert ("pytz", Version("2024.1.0")) in distributions(tmp_path)[0]


def test_a_source_distribution_with_a_hyphen_in_its_name_is_found_and_listed(tmp_path: Path) -> None:
    source = tmp_path / "antlr4-python3-runtime-4.9.3.tar.gz"
    old = tmp_path / "flash-attn-2.8.3.tar.bz2"
    source.write_bytes(b"source"), old.write_bytes(b"old")
    lock = tmp_path / "lock.txt"
    lock.write_text(
        "".join(
            f"{name} \\\n    --hash=sha256:{sha256(path.read_bytes()).hexdigest()}\n"
            for name, path in (("antlr4-python3-runtime==4.9.3", source), ("flash-attn==2.8.3", old))
        ),
        encoding="utf-8",
    )
    assert complete(locked_packages(lock), tmp_path) == (source, old)
    assert set(json.loads(write_manifest(tmp_path, CPU, "x86_64").read_text(encoding="utf-8"))["files"]) == {source.name, old.name}


@pytest.mark.parametrize(
    "broken", ["alpha.whl", "alpha-1.0.whl", "alpha-one-py3-none-any.whl", "alpha.tar.gz", "-.zip", "a__b-1-py3-none-any.whl"]
)
def test_a_broken_file_name_is_reported_where_a_package_is_missing(tmp_path: Path, broken: str) -> None:
    (tmp_path / broken).touch()
    lock = tmp_path / "lock.txt"
    lock.write_text(f"alpha==1.0 \\\n    --hash=sha256:{'0' * 64}\n", encoding="utf-8")
    with pytest.raises(ImageFailed) as caught:
        complete(locked_packages(lock), tmp_path)
    assert "missing: alpha==1.0" in str(caught.value)
    assert f"not a valid file name of a package: {broken}" in str(caught.value)


def test_a_lock_with_a_broken_version_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lock.txt").write_text(f"alpha==one \\\n    --hash=sha256:{'0' * 64}\n", encoding="utf-8")
    with pytest.raises(ImageFailed, match=r"lock\.txt: alpha==one is not a valid version; .*omnilaunch image refresh"):
        locked_packages(tmp_path / "lock.txt")


def test_complete_takes_the_right_one_of_two_files(tmp_path: Path) -> None:
    good, other = wheel(tmp_path, "beta", "2.0"), wheel(tmp_path, "beta", "2.0", "manylinux_2_28_x86_64")
    (tmp_path / "lock.txt").write_text(row(good), encoding="utf-8")
    assert other.read_bytes() and complete(locked_packages(tmp_path / "lock.txt"), tmp_path) == (good,)


def test_pip_gets_platform_mirror_and_hashes() -> None:
    delivery = Delivery(index="https://mirror.example/simple", proxy="http://proxy.example:3128", ca_bundle="/ca.pem")
    command = download_command(ROOT / "images" / "locks" / "build.txt", "aarch64", "3.11", Path("/house"), delivery)
    text = " ".join(command)
    assert command[:4] == (sys.executable, "-m", "pip", "download") and "--require-hashes --no-deps" in text
    for words in ("--platform manylinux_2_28_aarch64", "--platform manylinux2014_aarch64", "--python-version 3.11", "--abi cp311",
                  "--index-url https://mirror.example/simple", "--proxy http://proxy.example:3128", "--cert /ca.pem"):  # fmt: skip
        assert words in text
    assert "x86_64" not in text


def test_the_last_lines_of_a_failed_pip_are_in_the_error(tmp_path: Path) -> None:
    with pytest.raises(ImageFailed, match=r"pip ended with 7.*\n  no space left"):
        run_pip((sys.executable, "-c", "print('no space left'); raise SystemExit(7)"), {}, lambda line: None)


def test_system_packages_are_checked_against_the_list(tmp_path: Path) -> None:
    package = tmp_path / "system" / "run" / "libgomp1_12_amd64.deb"
    package.parent.mkdir(parents=True)
    package.write_bytes(b"package")
    write_manifest(tmp_path, CPU, "x86_64")
    delivery = Delivery(wheelhouse=str(tmp_path))
    assert system_files(delivery) == {"run/libgomp1_12_amd64.deb": package}
    package.write_bytes(b"altered")
    with pytest.raises(ImageFailed, match=r"does not match its own wheelhouse\.json: system/run/libgomp1_12_amd64\.deb"):
        system_files(delivery)
    package.unlink()
    with pytest.raises(ImageFailed, match=r"libgomp1_12_amd64\.deb; fill it again"):
        system_files(delivery)
    assert system_files(Delivery()) == {}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"files": 3}'])
def test_a_list_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "system").mkdir()
    (tmp_path / MANIFEST).write_text(text, encoding="utf-8")
    with pytest.raises(ImageFailed, match=r"wheelhouse\.json: cannot be read as the list of a wheelhouse"):
        system_files(Delivery(wheelhouse=str(tmp_path)))


def test_the_list_names_every_file(tmp_path: Path) -> None:
    path = wheel(tmp_path, "alpha", "1.0")
    listed = json.loads(write_manifest(tmp_path, CPU, "x86_64").read_text(encoding="utf-8"))
    assert listed == {
        "stack": "cpu", "architecture": "x86_64", "files": {path.name: sha256(path.read_bytes()).hexdigest()},
    }  # fmt: skip
