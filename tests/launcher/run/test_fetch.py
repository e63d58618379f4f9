"""What is brought from a node's run folder, and CANN's log that is among it."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from launcher.plan.commands import CANN_LOGS, NodeCommand
from launcher.run import run_folder
from launcher.run.run_folder import WorkingNode, fetch_large
from launcher.ssh.transport import Local
from tests.launcher.conftest import PROJECT

PATH = os.environ["PATH"]


@pytest.fixture
def node(tmp_path: Path) -> WorkingNode:
    (tmp_path / "run/cann/node0/debug/plog").mkdir(parents=True)
    (tmp_path / "run/cann/node0/debug/plog/plog-1.log").write_text("[ERROR] HCCL\n" + "x" * 5000)
    command = NodeCommand(
        host="a", node_rank=0, runtime="docker", name="c", folder=str(tmp_path / "run"), environment={}, prepare=(), start=()
    )
    return WorkingNode(command=command, transport=Local({"PATH": PATH}))


def test_a_folder_arrives_whole(node: WorkingNode, tmp_path: Path) -> None:
    fetch_large(node, CANN_LOGS, tmp_path / "node0-cann.tgz", packed=True)
    with tarfile.open(tmp_path / "node0-cann.tgz") as archive:
        assert "cann/node0/debug/plog/plog-1.log" in archive.getnames()


@pytest.mark.parametrize(("name", "limit"), [("nothing", 2**20), (CANN_LOGS, 10)])
def test_what_is_not_there_or_too_large_leaves_nothing_here(
    node: WorkingNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr(run_folder, "FOLDER_BYTES", limit)
    fetch_large(node, name, tmp_path / "kept.tgz", packed=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def entered(folder: Path) -> tuple[str, str]:
    """What a container's command sees as CANN's folder, and what is said before."""
    argv = ("bash", str(PROJECT / "images/entrypoint.sh"), "sh", "-c", 'echo "${ASCEND_PROCESS_LOG_PATH-unset}"')
    environment = {"PATH": PATH, "HOME": "/tmp", "ASCEND_PROCESS_LOG_PATH": str(folder)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_the_containers_user_makes_the_folder_of_canns_log(tmp_path: Path) -> None:
    assert entered(tmp_path / "cann/node1") == (str(tmp_path / "cann/node1"), "")
    assert (tmp_path / "cann/node1").is_dir()


def test_a_folder_that_cannot_be_made_leaves_canns_log_in_its_own_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen, said = entered(tmp_path / "file/node1")
    assert seen == "unset" and "CANN's log goes to /tmp/ascend/log" in said and str(tmp_path / "file/node1") in said
