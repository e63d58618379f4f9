"""Proofs are written, read again, and shown with the lock that they belong to."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import ImageFailed
from launcher.image.docs import describe_stacks
from launcher.image.proof import PROVEN_FILE, Proof, lock_digest, read_proofs, write_proof
from launcher.image.stack import load_stacks

ROOT = Path(__file__).resolve().parents[3]
STACKS = load_stacks(ROOT / "images")
PROOF = Proof(
    stack="cuda126", architecture="x86_64", lock=lock_digest(STACKS["cuda126"], "x86_64", ROOT), base="stand-in base",
    size_bytes=6_280_000_000, shown=("pip check", "316 tests"), missing="a GPU", date="2026-01-02",
)  # fmt: skip


@pytest.fixture
def project(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "images", tmp_path / "images")
    (tmp_path / PROVEN_FILE).unlink(missing_ok=True)
    return tmp_path


def test_a_later_proof_replaces_an_earlier_one(project: Path) -> None:
    assert read_proofs(project) == {}
    write_proof(project, PROOF)
    write_proof(project, replace(PROOF, stack="cpu"))
    write_proof(project, replace(PROOF, date="2026-01-03"))
    assert read_proofs(project) == {"cuda126-x86_64": replace(PROOF, date="2026-01-03"), "cpu-x86_64": replace(PROOF, stack="cpu")}


def test_what_was_shown_is_in_the_table_until_the_lock_changes(project: Path) -> None:
    assert "| cuda126 | x86_64 |  | not built |  | everything |  |" in describe_stacks(STACKS, project)
    write_proof(project, PROOF)
    assert "| cuda126 | x86_64 | 6.28 GB | stand-in base | pip check; 316 tests | a GPU | 2026-01-02 |" in describe_stacks(STACKS, project)
    write_proof(project, replace(PROOF, lock="another"))
    assert "| a GPU | 2026-01-02, with an earlier lock |" in describe_stacks(STACKS, project)


def test_stacks_that_share_a_lock_share_what_was_fetched(project: Path) -> None:
    lock = lock_digest(STACKS["ascend910c"], "aarch64", ROOT)
    write_proof(project, replace(PROOF, stack="ascend910c", architecture="aarch64", lock=lock, base="", shown=("56 files fetched",)))
    text = describe_stacks(STACKS, project)
    assert text.count("| not built, only fetched | 56 files fetched |") == 2


@pytest.mark.parametrize("text", ["{", "[3]", '[{"stack": "cpu"}]', "3"])
def test_a_file_that_was_not_written_by_us_is_refused(project: Path, text: str) -> None:
    (project / PROVEN_FILE).write_text(text, encoding="utf-8")
    with pytest.raises(ImageFailed, match=r"proven\.json: .*make image-check ARGS=--prove"):
        read_proofs(project)
