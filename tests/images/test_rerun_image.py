"""A rerun in containers is bitwise identical from the record alone; an image with another id than the recorded one is refused."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.record.checksums import SEAL_FILE, make_seal
from tests.images.conftest import ROOT, Built, inspect
from tests.images.test_train import SHORT, command, docker_overrides, rows_of
from trainer import contract

pytestmark = pytest.mark.docker


def launcher(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run((sys.executable, "-m", "launcher.cli", *words), cwd=ROOT, capture_output=True, text=True, timeout=300)


def rerun(record: Path, root: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return launcher("rerun", str(record), f"cluster.root={root}", *words)


def test_a_rerun_in_containers_has_the_same_bits_or_is_refused(built: Built, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)  # the container's user must be able to walk to the run's folder
    first, elsewhere = tmp_path / "runs/first", tmp_path / "elsewhere"
    done = subprocess.run(
        command(tmp_path, "first", *SHORT, *docker_overrides(built)), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((first / "result.json").read_text())
    assert result["image_id"] == inspect(built.image.tag)["Id"]
    again = rerun(first, elsewhere, "--run-id", "second")
    assert again.returncode == 0, again.stdout + again.stderr
    second = elsewhere / "runs/second"
    assert rows_of(second) == rows_of(first)
    assert json.loads((second / "result.json").read_text())["weights_sha256"] == result["weights_sha256"]
    compared = launcher("compare", str(first), str(second))
    assert compared.returncode == 0 and "verdict: same" in compared.stdout, compared.stdout + compared.stderr

    record = tmp_path / "record"
    shutil.copytree(first, record, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    (record / "result.json").write_text(json.dumps({**result, "image_id": f"sha256:{'0' * 64}"}))
    contract.write(make_seal(record, "first", unwritten={}), record / SEAL_FILE)
    refused = rerun(record, elsewhere, "--run-id", "third")
    assert refused.returncode == 3 and "is not the image that run first had, sha256:000" in refused.stderr
    taken = rerun(record, elsewhere, "--accept", "image", "--run-id", "fourth")
    assert taken.returncode == 0 and json.loads((elsewhere / "runs/fourth/result.json").read_text())["accepted"] == ["image"]
