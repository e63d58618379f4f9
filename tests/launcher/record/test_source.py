"""What a record keeps of the tree: the commit, and a diff that makes the same tree of it again."""

import subprocess
from pathlib import Path

import pytest

from launcher.record import source
from launcher.record.source import RECORD_SCHEMA, read_source


def git(folder: Path, *words: str, content: bytes = b"") -> str:
    name = ("-c", "user.name=Ann", "-c", "user.email=ann@example.org")
    return subprocess.run(("git", *name, *words), cwd=folder, input=content, capture_output=True, check=True).stdout.decode().strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with one commit."""
    project = tmp_path / "project"
    for name in ("trainer", "conf", "docs"):
        (project / name).mkdir(parents=True)
    (project / "trainer/train/loop.py").write_text("steps = 1\n")
    (project / "conf/lab.yaml").write_text("host: a\n")
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
    for name in ("loop.py", "new.py", "bytes.bin"):
        assert (tmp_path / "again/trainer" / name).read_bytes() == (tree / "trainer" / name).read_bytes()


def test_what_no_run_is_made_of_is_in_no_diff(tree: Path) -> None:
    """Cluster files may hold addresses with credentials, and the config is in the record as it was resolved."""
    (tree / "conf/lab.yaml").write_text("index: https://ann:pa55@mirror\n")
    (tree / "docs/notes.md").write_text("notes\n")
    found = read_source(tree)
    assert found.state.dirty and found.diff == b"" and not found.state.diff_lacks


def test_a_credential_is_never_kept(tree: Path) -> None:
    (tree / "trainer/train/loop.py").write_text('index = "https://ann:pa55@mirror"\n')
    found = read_source(tree)
    assert found.diff == b"" and "URL with credentials" in found.state.diff_lacks


def test_a_diff_is_bounded_and_says_so(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_DIFF_BYTES", 100)
    monkeypatch.setattr(source, "MOST_NEW_FILE_BYTES", 1000)
    (tree / "trainer/train/loop.py").write_text("step = 3\n" * 90)
    (tree / "trainer/large.bin").write_bytes(b"x" * 1001)
    found = read_source(tree)
    assert len(found.diff) == 100
    assert "trainer/large.bin, new and larger than 1,000 bytes" in found.state.diff_lacks and "first 100 of" in found.state.diff_lacks


def test_a_folder_without_git(tmp_path: Path) -> None:
    assert read_source(tmp_path).state.commit == "" and read_source(tmp_path / "missing").diff == b""
