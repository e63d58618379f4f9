"""A container's end, as its node tells it or fails to."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.member import LOST, ContainerMember
from launcher.start import NodeCommand
from launcher.transport import Local, Result


class Node(Local):
    """Answers every command with success, unless it is dark."""

    def __init__(self, *, dark: bool) -> None:
        super().__init__({}, "node")
        self.dark = dark

    def run(
        self, argv: tuple[str, ...], *, environment: Mapping[str, str] | None = None, timeout_s: float = 60, folder: Path | None = None
    ) -> Result:
        if self.dark:
            raise NodeFailed("node: no answer")
        return Result(argv=argv, code=0, output="exited 5", errors="")


def member(tmp_path: Path, *, dark: bool) -> ContainerMember:
    command = NodeCommand(
        host="node", node_rank=0, runtime="docker", name="run-n0", folder=str(tmp_path), environment={}, prepare=(), start=(),
        remove=("docker", "rm", "--force", "run-n0"),
    )  # fmt: skip
    return ContainerMember(command, Node(dark=dark), tmp_path / "node0.log", ThreadPoolExecutor(max_workers=1), node_timeout_s=20)


def test_a_node_that_answers_is_not_lost_when_its_container_is_killed(tmp_path: Path) -> None:
    killed = member(tmp_path, dark=False)
    killed.kill()
    assert (killed.code, killed.lost) == (137, False)


def test_a_node_that_does_not_answer_when_it_is_to_be_ended_is_lost(tmp_path: Path) -> None:
    """Its peers saw its connections break and failed at once; the cause is this node, though its time was not over yet."""
    killed = member(tmp_path, dark=True)
    with pytest.raises(NodeFailed):
        killed.kill()
    assert (killed.code, killed.lost) == (LOST, True)


def test_one_that_had_ended_before_its_node_went_dark_keeps_its_code(tmp_path: Path) -> None:
    killed = member(tmp_path, dark=True)
    killed.code = 5
    with pytest.raises(NodeFailed):
        killed.kill()
    assert (killed.code, killed.lost) == (5, False)
