"""The record keeps the commit of the tree, and a diff that restores its changes."""

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.record import source
from launcher.record.source import RECORD_SCHEMA, read_source
from trainer.contract import encode


def git(folder: Path, *words: str, content: bytes = b"") -> str:
    name = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
    return subprocess.run(("git", *name, *words), cwd=folder, input=content, capture_output=True, check=True).stdout.decode().strip()


FILES = (
    *("trainer/train/loop.py", "launcher/cli.py", "images/versions.yaml", "images/locks/cpu.txt", "images/entrypoint.sh", "pyproject.toml"),
    *("conf/config.yaml", "conf/stage/lora.yaml", "conf/stage/full.yaml", "conf/cluster/lab.yaml", "conf/tune/tiny.yaml"),
    *("README.md", "docs/results/cell.jsonl", "docs/compare.md", "tests/test_x.py", "Makefile"),
)
USED = ("conf/config.yaml", "conf/stage/lora.yaml", "conf/cluster/lab.yaml", "conf/tune/tiny.yaml")  # of the run's config


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with one commit."""
    project = tmp_path / "project"
    for name in FILES:
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("steps = 1\n")
    git(project, "init", "-q")
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "first")
    return project


def test_a_clean_tree_has_a_commit_and_no_diff(tree: Path) -> None:
    found = read_source(tree)
    assert found.state.commit == git(tree, "rev-parse", "HEAD") and not found.state.dirty
    assert (found.diff, found.state.diff_sha256, found.state.record_schema) == (b"", "", RECORD_SCHEMA)


def test_the_diff_makes_the_same_tree_again(tree: Path, tmp_path: Path) -> None:
    (tree / "trainer/train/loop.py").write_text("steps = 2\n")
    (tree / "trainer/new.py").write_text("new = True\n")
    (tree / "trainer/bytes.bin").write_bytes(bytes(range(256)))
    before = git(tree, "status", "--porcelain")
    found = read_source(tree)
    assert git(tree, "status", "--porcelain") == before, "the tree's own index is as it was"
    assert found.state.dirty and found.state.diff_bytes == len(found.diff) and not found.state.diff_lacks
    git(tree, "worktree", "add", "-q", "--detach", str(tmp_path / "again"))
    git(tmp_path / "again", "apply", "-", content=found.diff)
    for name in ("train/loop.py", "new.py", "bytes.bin"):
        assert (tmp_path / "again/trainer" / name).read_bytes() == (tree / "trainer" / name).read_bytes()


@pytest.mark.parametrize(
    "setting", ["color.ui=always", "diff.noprefix=true", "diff.mnemonicPrefix=true", "diff.context=9", "diff.algorithm=patience"]
)
def test_the_diff_does_not_depend_on_the_users_git_config(tree: Path, setting: str) -> None:
    (tree / "trainer/train/loop.py").write_text("steps = 2\n")
    before = read_source(tree)
    git(tree, "config", *setting.split("="))
    assert read_source(tree).diff == before.diff and before.diff


def test_the_diff_covers_the_code_only(tree: Path) -> None:
    """Cluster files may hold addresses with credentials, and the config is in the record as it was resolved."""
    (tree / "conf/stage/lora.yaml").write_text("index: https://ann:pa55@mirror\n")
    (tree / "docs/notes.md").write_text("notes\n")
    found = read_source(tree, USED)
    assert found.state.dirty and found.diff == b"" and not found.state.diff_lacks


def test_a_credential_is_never_kept(tree: Path) -> None:
    (tree / "trainer/train/loop.py").write_text('index = "https://ann:pa55@mirror"\n')
    found = read_source(tree)
    assert found.diff == b"" and "URL with credentials" in found.state.diff_lacks


def test_a_diff_is_bounded_and_says_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_DIFF_BYTES", 100)
    monkeypatch.setattr(source, "MAX_NEW_FILE_BYTES", 1000)
    (tree / "trainer/train/loop.py").write_text("step = 3\n" * 90)
    (tree / "trainer/large.bin").write_bytes(b"x" * 1001)
    found = read_source(tree)
    assert len(found.diff) == 100
    assert "trainer/large.bin, new and larger than 1,000 bytes" in found.state.diff_lacks and "first 100 of" in found.state.diff_lacks


def test_a_folder_without_git(tmp_path: Path) -> None:
    assert read_source(tmp_path).state.commit == "" and read_source(tmp_path / "missing").diff == b""


# ------------------------------------------------------------------------------------- nothing in the tree loses the commit


def socket_or_fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")


def unreadable(folder: Path) -> None:
    (folder / "secret.py").write_text("x = 1\n")
    (folder / "secret.py").chmod(0)


def repository(folder: Path, *, with_commit: bool) -> None:
    (folder / "own").mkdir()
    (folder / "own/file").write_text("x")
    git(folder / "own", "init", "-q")
    if with_commit:
        git(folder / "own", "add", ".")
        git(folder / "own", "commit", "-q", "-m", "own")


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "a symbolic link without a target": (lambda folder: (folder / "link").symlink_to("nowhere/at/all"), ""),
    "a symbolic link to a large file": (lambda folder: (folder / "link").symlink_to("/proc/kcore"), ""),
    "a symbolic link to a folder": (lambda folder: (folder / "link").symlink_to("/usr"), ""),
    "a pipe": (socket_or_fifo, ""),
    "a file that cannot be read": (unreadable, "secret.py, new and not readable"),
    "a large file": (lambda folder: (folder / "large").write_bytes(bytes(2**20 + 1)), "large, new and larger than 1,048,576 bytes"),
    "a repository without a commit": (lambda folder: repository(folder, with_commit=False), "own/, a git repository of its own"),
    "a repository with a commit": (lambda folder: repository(folder, with_commit=True), "own/, a git repository of its own"),
    "a name with a line break": (lambda folder: (folder / "a\nb.py").write_text("x = 1\n"), ""),
    "a name with quotes and blanks": (lambda folder: (folder / "a \"b' c\\d.py").write_text("x = 1\n"), ""),
    "a name that looks like a pattern": (lambda folder: (folder / ":(top)*[.py").write_text("x = 1\n"), ""),
    "a name that is not UTF-8": (lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/a\xff.py")).write_text("x = 1\n"), ""),
    "a large file whose name is not UTF-8": (
        lambda folder: Path(os.fsdecode(os.fsencode(folder) + b"/a\xff")).write_bytes(bytes(2**20 + 1)),
        "a\\udcff, new and larger",
    ),
}


@pytest.mark.parametrize("place", ["trainer", "."])
@pytest.mark.parametrize("name", ODD)
def test_no_untracked_file_loses_the_commit(tree: Path, name: str, place: str) -> None:
    make, lacks = ODD[name]
    (tree / "trainer/train/loop.py").write_text("steps = 2\n")
    if name == "a file that cannot be read" and os.geteuid() == 0:
        pytest.skip("root reads every file")
    make(tree / place)
    found = read_source(tree)
    assert found.state.commit == git(tree, "rev-parse", "HEAD") and found.state.dirty
    assert b"+steps = 2" in found.diff
    assert lacks in found.state.diff_lacks if place == "trainer" and lacks else not found.state.diff_lacks
    assert json.loads(encode(found.state).encode())["commit"] == found.state.commit, "it can be written to a record"


@pytest.mark.parametrize("name", [name for name, (_, lacks) in ODD.items() if not lacks and name != "a pipe"])
def test_a_new_file_with_an_odd_name_is_made_again(tree: Path, tmp_path: Path, name: str) -> None:
    ODD[name][0](tree / "trainer")
    found = read_source(tree)
    assert found.state.dirty and not found.state.diff_lacks
    git(tree, "worktree", "add", "-q", "--detach", str(tmp_path / "again"))
    subprocess.run(("git", "apply", "-"), cwd=tmp_path / "again", input=found.diff, check=True)
    assert {path.name for path in (tmp_path / "again/trainer").iterdir()} == {path.name for path in (tree / "trainer").iterdir()}


def test_untracked_files_elsewhere_are_listed_and_change_nothing(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = read_source(tree)
    (tree / "notes.txt").write_text("buy milk\n")
    (tree / "conf/mine.yaml").write_text("host: b\n")
    (tree / "link").symlink_to("nowhere")
    Path(os.fsdecode(os.fsencode(tree) + b"/a\xff")).write_text("x")
    found = read_source(tree)
    assert not found.state.dirty and found.diff == b"" and set(found.state.untracked) == {"notes.txt", "conf/mine.yaml", "link", "a\\udcff"}
    assert replace(found.state, untracked=()) == clean.state
    monkeypatch.setattr(source, "MAX_LISTED", 1)
    assert read_source(tree).state.untracked[1:] == ("and 3 more",)


# The file that is changed, made or removed -> whether the commit alone no longer gives what the run used.
CHANGES = {
    "trainer/train/loop.py": True,
    "launcher/cli.py": True,
    "images/versions.yaml": True,
    "images/locks/cpu.txt": True,
    "images/entrypoint.sh": True,
    "pyproject.toml": True,
    "trainer/new.py": True,
    "conf/config.yaml": True,
    "conf/stage/lora.yaml": True,
    "conf/tune/tiny.yaml": True,
    "conf/stage/full.yaml": False,  # of another stage
    "conf/cluster/lab.yaml": False,  # where it runs
    "conf/cluster/mine.yaml": False,
    "conf/stage/mine.yaml": False,
    "README.md": False,
    "docs/results/cell.jsonl": False,  # a bench adds a line
    "docs/compare.md": False,
    "docs/new.md": False,
    "tests/test_x.py": False,
    "Makefile": False,
    "report-monday.html": False,
    "runs/monday/plan.json": False,
    "notes.txt": False,
}


@pytest.mark.parametrize("how", ["changed", "staged", "removed"])
@pytest.mark.parametrize(("name", "dirty"), CHANGES.items())
def test_which_changes_make_a_tree_dirty(tree: Path, name: str, dirty: bool, how: str) -> None:
    clean, file = read_source(tree, USED), tree / name
    tracked = file.exists()
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("steps = 2\n")
    if how == "removed" and tracked:
        file.unlink()
    if how == "staged":
        git(tree, "add", name)
    found = read_source(tree, USED).state
    assert found.dirty is dirty
    listed = replace(found, dirty=False, untracked=(), changed=(), conf=(), diff_sha256="", diff_bytes=0)
    assert listed == clean.state and bool(found.diff_sha256) is (dirty and name not in USED)
    assert found.conf == ((name,) if dirty and name in USED else ())
    assert (name in found.changed) is (not dirty and (tracked or how == "staged")), "named, for information"


def test_a_file_that_the_run_used_and_no_commit_has(tree: Path) -> None:
    """Ignored ones, too; a file of the user's own folder is named by its path, and where it runs is no change."""
    (tree / ".gitignore").write_text("conf/model/\n")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "ignore")
    (tree / "conf/model").mkdir()
    (tree / "conf/model/mine.yaml").write_text("x: 1\n")
    used = (*USED, "conf/model/mine.yaml", "/home/ann/conf/cluster/rack.yaml", "/home/ann/conf/stage/mine.yaml")
    assert read_source(tree, used).state.conf == ("conf/model/mine.yaml", "/home/ann/conf/stage/mine.yaml")
    assert not read_source(tree, (*USED, "/home/ann/conf/cluster/rack.yaml")).state.dirty


def test_a_changed_submodule_is_named(tree: Path) -> None:
    repository(tree / "docs", with_commit=True)
    git(tree, "-c", "protocol.file.allow=always", "submodule", "add", "-q", str(tree / "docs/own"), "trainer/own")
    git(tree, "commit", "-q", "-m", "submodule")
    assert not read_source(tree).state.dirty
    (tree / "trainer/own/file").write_text("changed")
    found = read_source(tree)
    assert found.state.dirty and found.state.diff_lacks == "trainer/own, a submodule with another commit or with changes"


def test_a_tree_without_a_commit_and_an_index_that_is_gone(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    git(tmp_path / "empty", "init", "-q")
    assert read_source(tmp_path / "empty").state.commit == ""
    (tree / ".git/index").write_bytes(b"broken")
    found = read_source(tree)
    assert found.state.commit and found.state.dirty and found.state.diff_lacks.startswith("all of it: ")


def test_without_git(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert read_source(tree).state.commit == ""
