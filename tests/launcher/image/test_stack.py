"""The table of stacks, the locks that it names, and the image that is rendered from both."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from launcher.errors import ImageFailed
from launcher.image.docs import TABLE_FILE, describe_stacks, rendered_path, write_rendered
from launcher.image.refresh import torch_of
from launcher.image.stack import (
    LATER_COLUMNS,
    VERSIONS_FILE,
    Stack,
    draw,
    find_stack,
    load_stacks,
    render,
    torch_lock,
)

ROOT = Path(__file__).resolve().parents[3]
STACKS = load_stacks(ROOT / "images")
LOCKED = [(stack, architecture) for stack in STACKS.values() for architecture, lock in stack.locks.items() if lock]
LOCKS = sorted((ROOT / "images" / "locks").glob("*.txt"))


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the sources of an image, which a test may change."""
    for folder in ("images", "trainer"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def cpu(root: Path, base: str = "") -> str:
    return render(load_stacks(root / "images")["cpu"], architecture="x86_64", root=root, base=base).fingerprint


# ---------------------------------------------------------------------------------------------------------------- table


def test_the_stacks() -> None:
    assert list(STACKS) == ["cpu", "cuda126", "cuda130", "ascend910b", "ascend910c", "ascend910b_torch210"]
    assert len(LOCKED) == 8


@pytest.mark.parametrize(("stack", "chip", "covered"), [
    ("cuda126", "sm_60", True), ("cuda126", "sm_61", True), ("cuda126", "sm_86", True), ("cuda126", "sm_89", True),
    ("cuda126", "sm_90", True), ("cuda126", "sm_100", False), ("cuda126", "sm_35", False),
    ("cuda130", "sm_61", False), ("cuda130", "sm_90", True), ("cuda130", "sm_103", True), ("cuda130", "sm_101", True),
    ("ascend910b", "ascend910b", True), ("ascend910b", "ascend910c", False), ("cpu", "x86_64", True), ("cpu", "aarch64", False),
])  # fmt: skip
def test_which_chips_a_stack_covers(stack: str, chip: str, covered: bool) -> None:
    assert STACKS[stack].covers(chip) is covered


@pytest.mark.parametrize(("before", "after", "words"), [
    ("family: ascend", "family: asscend", ("stacks.ascend910b.family", "'asscend'", "'cpu'")),
    ("    driver_kind: none\n", "", ("stacks.cpu", "driver_kind")),
    ("    title: CPU\n", "    title: CPU\n    colour: blue\n", ("stacks.cpu", "colour", "valid are")),
    ("torch: 2.7.1", "torch: 2.7", ("stacks.cuda126.torch", "2.7")),
    ("locks/cuda126-x86_64.txt", "locks/gone.txt", ("stacks.cuda126.locks.x86_64", "locks/gone.txt", "omnilaunch image refresh")),
    ("stacks:\n", "rows:\n", ("versions.yaml",)),
])  # fmt: skip
def test_a_bad_row_names_file_and_key(project: Path, before: str, after: str, words: tuple[str, ...]) -> None:
    table = project / "images" / "versions.yaml"
    text = table.read_text(encoding="utf-8")
    assert before in text
    table.write_text(text.replace(before, after, 1), encoding="utf-8")
    with pytest.raises(ImageFailed) as caught:
        load_stacks(project / "images")
    for word in ("versions.yaml", *words):
        assert word in str(caught.value)


def test_an_unknown_stack_is_answered_with_the_valid_ones() -> None:
    with pytest.raises(ImageFailed, match=r"did you mean 'cuda126'\? valid are: ascend910b"):
        find_stack(STACKS, "cuda-126")


# ---------------------------------------------------------------------------------------------------------------- locks


@pytest.mark.parametrize(("stack", "architecture"), LOCKED, ids=lambda value: getattr(value, "name", value))
def test_a_lock_has_the_versions_of_its_row(stack: Stack, architecture: str) -> None:
    locked = pins(ROOT / "images" / stack.locks[architecture])
    assert locked["torch"] == torch_of(stack, architecture)
    assert {name: locked[name] for name in stack.packages} == stack.packages
    if stack.plugin:
        name, version = stack.plugin.split()
        assert locked[name] == version
    assert "torchvision" not in locked
    cuda = {name for name in locked if name.startswith(("nvidia-", "triton", "cuda-"))}
    assert bool(cuda) == (stack.family == "cuda")


@pytest.mark.parametrize("path", LOCKS, ids=lambda path: path.name)
def test_every_locked_package_has_hashes(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    rows = re.split(r"\n(?=[\w.-]+==)", text)[1 if text.startswith("#") else 0 :]
    assert rows
    for row in rows:
        assert re.match(r"[\w.-]+==\S+ \\\n( {4}--hash=sha256:[0-9a-f]{64}( \\)?\n?)+\Z", row), row[:80]


def test_no_lock_names_this_machine_or_the_common_index() -> None:
    for path in LOCKS:
        addresses = set(re.findall(r"https?://[^/\s]+|file:\S+|(?<=find-links )\S+", path.read_text(encoding="utf-8")))
        assert addresses <= {"https://download.pytorch.org"}, path.name


@pytest.mark.parametrize("name", ["build.txt", "launcher.txt", "dev.txt"])
def test_the_tools_agree_with_the_cpu_lock(name: str) -> None:
    locks = ROOT / "images" / "locks"
    reference = pins(locks / "launcher.txt") | pins(locks / "cpu-x86_64.txt")
    mine = pins(locks / name)
    assert {key: value for key, value in mine.items() if reference.get(key, value) != value} == {}


def test_the_lock_of_torch_has_the_torch_of_the_complete_lock() -> None:
    pairs = [(lock, torch_lock(lock)) for lock in LOCKS if torch_lock(lock).is_file()]
    assert len(pairs) == 4
    for whole, alone in pairs:
        assert pins(alone) == {"torch": pins(whole)["torch"]}


# --------------------------------------------------------------------------------------------------------------- render


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_rendered_files_are_what_the_templates_say(stack: Stack) -> None:
    assert rendered_path(ROOT, stack.name).read_text(encoding="utf-8") == draw(stack, ROOT), "run: make render"


def test_rendered_folder_holds_nothing_else_and_the_table_is_current() -> None:
    assert {path.name for path in (ROOT / "images" / "rendered").iterdir()} == set(STACKS)
    assert (ROOT / TABLE_FILE).read_text(encoding="utf-8") == describe_stacks(STACKS, ROOT), "run: make render"


def test_rendering_writes_the_same_bytes_again(project: Path) -> None:
    first = {path: path.read_bytes() for path in write_rendered(project)}
    assert len(first) == len(STACKS) + 1
    assert {path: path.read_bytes() for path in write_rendered(project)} == first


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_every_dockerfile_follows_the_rules(stack: Stack) -> None:
    lines = [line for line in draw(stack, ROOT).splitlines() if line and not line.startswith("#")]
    text = "\n".join(lines)
    assert lines[-1] == "COPY trainer trainer", "the code changes most, so it comes last"
    assert "USER 1000:1000" in lines
    assert "--privileged" not in text and ":latest" not in text and "# syntax" not in text
    assert all(
        "--require-hashes" in line or "--no-index" in line for part in text.split("RUN ") for line in re.findall(r"pip install[^&]*", part)
    )
    assert not re.search(r"https?://|password|token", text, re.IGNORECASE)


def test_image_of_the_cpu() -> None:
    image = render(STACKS["cpu"], architecture="x86_64", root=ROOT)
    assert image.tag == f"omnilaunch:cpu-{image.fingerprint[:12]}"
    assert image.lock == "locks/cpu-x86_64.txt"
    assert {"entrypoint.sh", "operators.py", "selftest.py", "build.txt", "lock.txt", "torch.txt"} == {
        n for n in image.files if "/" not in n
    }
    assert "trainer/contract/spec.py" in image.files
    assert "trainer/serving/page.html" in image.files
    assert not [name for name in image.files if not name.endswith((".py", ".txt", ".sh", "page.html", "determinism.toml"))]
    assert image.labels["io.omnilaunch.fingerprint"] == image.fingerprint
    assert image.labels["io.omnilaunch.lock"] == image.files["lock.txt"]
    assert 'io.omnilaunch.contract="1"' in image.dockerfile and 'io.omnilaunch.torch="2.13.0+cpu"' in image.dockerfile


def test_a_digest_pins_the_base_and_a_given_base_replaces_it(project: Path) -> None:
    table = project / "images" / "versions.yaml"
    table.write_text(table.read_text(encoding="utf-8").replace("digest: unpinned", f"digest: sha256:{'ab' * 32}", 1), encoding="utf-8")
    stack = load_stacks(project / "images")["cpu"]
    assert f"FROM docker.io/library/python:3.11-slim-bookworm@sha256:{'ab' * 32} AS base" in draw(stack, project)
    assert "not pinned" not in draw(stack, project)
    assert "FROM mirror.example/python:3.11 AS base" in draw(stack, project, base="mirror.example/python:3.11")


def test_the_fingerprint_depends_on_what_is_in_the_image(project: Path) -> None:
    before = cpu(project)
    assert cpu(project) == before == cpu(ROOT)
    (project / "trainer" / "README.md").write_text("a note\n", encoding="utf-8")
    (project / "images" / "locks" / "dev.txt").write_text("", encoding="utf-8")
    assert cpu(project) == before, "neither is in the image"
    assert cpu(project, base="other:1") != before


@pytest.mark.parametrize("name", [
    "trainer/train/loop.py", "images/entrypoint.sh", "images/locks/cpu-x86_64.txt", "images/locks/cpu-x86_64.torch.txt", "images/locks/build.txt",
    "images/operators.py", "images/selftest.py", "images/cpu.Dockerfile.j2",
])  # fmt: skip
def test_one_changed_line_changes_the_fingerprint(project: Path, name: str) -> None:
    before = cpu(project)
    with (project / name).open("a", encoding="utf-8") as file:
        file.write("# one more line\n")
    assert cpu(project) != before


@pytest.mark.parametrize("stack", STACKS.values(), ids=STACKS)
def test_a_stack_says_its_system_packages_and_its_size(stack: Stack) -> None:
    assert set(stack.system_packages) == {"run", "build"} and "libgomp1" in stack.system_packages["run"]
    assert all(name == f"libpython{stack.python}-dev" for name in stack.system_packages["build"] if name.startswith("libpython"))
    assert stack.image_gib > 0 and "image_gib" in stack.sources
    dockerfile = draw(stack, ROOT)
    assert all(" ".join(names) in dockerfile for names in stack.system_packages.values())


def test_another_architecture_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ImageFailed, match=r"stack cpu has no riscv64 image .*stacks\.cpu\.locks.* it has: x86_64"):
        render(STACKS["cpu"], architecture="riscv64", root=ROOT)


def test_a_row_without_a_lock_can_be_planned() -> None:
    stack = STACKS["ascend910b_torch210"]
    image = render(stack, architecture="x86_64", root=ROOT)
    assert image.lock == "" and "lock.txt" not in image.files
    assert image.fingerprint != render(stack, architecture="aarch64", root=ROOT).fingerprint


def test_a_missing_file_is_named(project: Path) -> None:
    (project / "images" / "entrypoint.sh").unlink()
    with pytest.raises(ImageFailed, match=r"entrypoint\.sh: needed for the image"):
        cpu(project)


def test_a_table_of_an_earlier_commit_is_read_with_the_packages_that_its_code_had(project: Path) -> None:
    """A rerun renders the image of a recorded commit from that commit's table, which lacks later columns."""
    table = project / "images" / VERSIONS_FILE
    now = load_stacks(project / "images")
    rows = yaml.safe_load(table.read_text(encoding="utf-8"))
    for row in rows["stacks"].values():
        for column in LATER_COLUMNS:
            del row[column]
    table.write_text(yaml.safe_dump(rows), encoding="utf-8")
    then = load_stacks(project / "images")
    had = {"cpu": ("libgomp1",), "cuda": ("libgomp1", "gcc", "libc6-dev"), "ascend": ("numactl", "libgomp1")}
    assert {name: stack.system_packages["run"] for name, stack in then.items()} == {name: had[stack.family] for name, stack in now.items()}
    for name, stack in now.items():  # nothing else of a Dockerfile depends on the later columns
        assert draw(then[name], project) == draw(replace(stack, system_packages=then[name].system_packages), project)
