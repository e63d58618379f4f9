"""Another attempt: which node a spare replaces, what is kept of the last attempt, and the checkpoint on nodes that share no folder."""

import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from launcher.config.schema import Cluster, Node
from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.record.record import Attempt, Failure, NodeResult, load_attempts
from launcher.run.restart import (
    archive_attempt,
    copy_newest_checkpoint,
    newest_checkpoint,
    reason_against_restart,
    replace_lost,
    restore_metrics,
)
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local, Result

FOLDER = "/run/of/all"
ENVIRON = {"PATH": "/usr/bin:/bin"}


def cluster(*hosts: str) -> Cluster:
    """Hosts in order; a spare's name starts with `s`."""
    return Cluster(name="lab", runtime="docker", root="/srv", nodes=tuple(Node(host=host, spare=host.startswith("s")) for host in hosts))


def working(given: Cluster) -> list[str]:
    return [node.host for node in given.working]


@pytest.mark.parametrize(
    "hosts, lost, minimum, left",
    [
        (("a", "b", "s1"), {"b"}, 0, ["a", "s1"]),
        (("a", "s1", "b"), {"a"}, 0, ["s1", "b"]),
        (("a", "b", "c", "s1", "s2"), {"a", "c"}, 0, ["s1", "b", "s2"]),
        (("a", "b", "s1"), {"b", "s1"}, 0, ["a", "b"]),
        (("a", "b", "c"), {"b"}, 2, ["a", "c"]),
        (("a", "b", "c"), {"b", "c"}, 2, ["a", "b", "c"]),
        (("a", "b", "c", "s1"), {"b", "c"}, 3, ["a", "s1", "c"]),
        (("a", "b", "c", "s1"), {"b", "c"}, 2, ["a", "s1"]),
        (("a", "b"), set(), 0, ["a", "b"]),
    ],
)
def test_a_spare_replaces_a_lost_node(hosts: tuple[str, ...], lost: set[str], minimum: int, left: list[str]) -> None:
    assert working(replace_lost(cluster(*hosts), lost, minimum=minimum)) == left


def test_a_spare_is_used_once() -> None:
    first = replace_lost(cluster("a", "b", "s1", "s2"), {"b"}, minimum=0)
    assert [node.host for node in first.nodes if node.spare] == ["s2"]
    assert working(replace_lost(first, {"s1"}, minimum=0)) == ["a", "s2"]


def failed(number: int, *, steps: int = 7, rank: int = 1, message: str = "it broke", log: str = "") -> Attempt:
    failure = Failure(host="b", rank=rank, code=1, message=message, log=log, tail=())
    nodes = (NodeResult(host="b", node_rank=1, code=1, seconds=1.0, killed=False),)
    return Attempt(number=number, started_at="2026-11-21T01:02:03.000+00:00", seconds=1.0, steps=steps, nodes=nodes, failure=failure)


@pytest.mark.parametrize(
    "earlier, last, restarts, why",
    [
        ((), failed(1), 0, "run.restarts=0"),
        ((), failed(1), 1, ""),
        ((failed(1),), failed(2, steps=9), 1, "run.restarts=1 is used up"),
        ((failed(1),), failed(2, steps=9), 2, ""),
        ((failed(1),), failed(2), 2, "in the same way after step 7"),
        ((failed(1),), failed(2, message="another"), 2, ""),
        ((failed(1, rank=-1),), failed(2, rank=-1), 2, ""),
    ],
)
def test_when_a_run_is_not_started_again(earlier: tuple[Attempt, ...], last: Attempt, restarts: int, why: str) -> None:
    said = reason_against_restart(earlier, last, restarts=restarts)
    assert why in said and bool(why) == bool(said)


def test_a_launcher_that_was_killed_during_the_archiving_can_be_followed_by_another(tmp_path: Path) -> None:
    for said in ("first", "second", "third"):
        (tmp_path / "logs").mkdir(exist_ok=True)
        (tmp_path / "logs/node0.log").write_text(said, encoding="utf-8")
        archive_attempt(tmp_path, failed(1), mirrored=True)
        (tmp_path / "attempts/1/attempt.json").unlink()
    assert [path.name for path in sorted((tmp_path / "attempts/1").rglob("*"))] == ["logs", "node0.log"]
    assert (tmp_path / "attempts/1/logs/node0.log").read_text(encoding="utf-8") == "third"


def test_the_files_of_an_attempt_are_archived(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("logs/node1.log", "failure-rank1.json", "environment.json", "metrics.jsonl", "plan.json"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    archive_attempt(tmp_path, failed(1, log=str(tmp_path / "logs" / "node1.log")), mirrored=False)
    aside = tmp_path / "attempts" / "1"
    assert sorted(path.name for path in aside.iterdir()) == [
        "attempt.json",
        "environment.json",
        "failure-rank1.json",
        "logs",
        "metrics.jsonl",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["attempts", "logs", "metrics.jsonl", "plan.json"]
    (kept,) = load_attempts(tmp_path)
    assert kept.failure is not None and Path(kept.failure.log).read_text(encoding="utf-8") == "logs/node1.log"
    for number in range(2, 12):
        archive_attempt(tmp_path, failed(number), mirrored=True)
    assert [attempt.number for attempt in load_attempts(tmp_path)] == list(range(1, 12))
    assert not (tmp_path / "metrics.jsonl").exists(), "a mirror starts again"


class Rooted(Local):
    """This machine as one of several: FOLDER is a folder of its own. Real find, tar and mv run."""

    def __init__(self, host: str, root: Path) -> None:
        super().__init__(ENVIRON, host)
        self.root = root

    def here(self, argv: Sequence[str]) -> tuple[str, ...]:
        return tuple(word.replace(FOLDER, str(self.root)) for word in argv)

    def run(self, argv: tuple[str, ...], **options: Any) -> Result:
        return super().run(self.here(argv), **options)

    def put(self, content: bytes, path: str, *, mode: int = 0o600) -> None:
        super().put(content, path.replace(FOLDER, str(self.root)), mode=mode)

    def get(self, path: str) -> bytes | None:
        return super().get(path.replace(FOLDER, str(self.root)))

    def feed(self, argv: tuple[str, ...], chunks: Iterable[bytes], *, timeout_s: float) -> Result:
        return super().feed(self.here(argv), chunks, timeout_s=timeout_s)

    @contextmanager
    def stream(self, argv: tuple[str, ...], *, silence_s: float = 1800) -> Iterator[Iterator[bytes]]:
        with super().stream(self.here(argv), silence_s=silence_s) as chunks:
            yield chunks


@pytest.fixture
def nodes(tmp_path: Path) -> tuple[WorkingNode, ...]:
    def node(rank: int) -> WorkingNode:
        root = tmp_path / f"n{rank}"
        root.mkdir()
        command = NodeCommand(
            host=f"host{rank}", node_rank=rank, runtime="docker", name="c", folder=FOLDER, environment={}, prepare=(), start=()
        )
        return WorkingNode(command=command, transport=Rooted(command.host, root))

    return tuple(node(rank) for rank in range(3))


def checkpoint(tmp_path: Path, rank: int, name: str, size: int = 100_000) -> Path:
    folder = tmp_path / f"n{rank}" / "checkpoints" / name
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * (size // 256))
    return folder


def test_the_newest_checkpoint_is_copied_to_the_nodes_without_it(tmp_path: Path, nodes: tuple[WorkingNode, ...]) -> None:
    checkpoint(tmp_path, 0, "step-000100")
    newest = checkpoint(tmp_path, 1, "step-1000000", size=3_000_000)
    checkpoint(tmp_path, 2, ".step-2000000.partial")
    (tmp_path / "n2" / "checkpoints" / ".incoming" / "step-000100").mkdir(parents=True)  # a copy that was interrupted
    said: list[str] = []
    assert copy_newest_checkpoint(nodes, said.append) == "step-1000000"
    assert "from host1 to host0, host2" in said[0]
    for rank in (0, 2):
        copied = tmp_path / f"n{rank}" / "checkpoints" / "step-1000000" / "model.safetensors"
        assert copied.read_bytes() == (newest / "model.safetensors").read_bytes()
        assert not (tmp_path / f"n{rank}" / "checkpoints" / ".incoming").exists()
    said.clear()
    assert copy_newest_checkpoint(nodes, said.append) == "step-1000000" and not said, "nothing is sent to a node that has it"


def test_a_new_first_node_gets_the_metrics_rows(tmp_path: Path, nodes: tuple[WorkingNode, ...]) -> None:
    home = tmp_path / "home"
    for number, text in ((1, "old\n"), (2, "new\n")):
        (home / "attempts" / str(number)).mkdir(parents=True)
        (home / "attempts" / str(number) / "metrics.jsonl").write_text(text, encoding="utf-8")
    restore_metrics(nodes[0], home)
    assert (tmp_path / "n0" / "metrics.jsonl").read_text(encoding="utf-8") == "new\n"
    (tmp_path / "n1" / "metrics.jsonl").write_text("its own\n", encoding="utf-8")
    restore_metrics(nodes[1], home)
    assert (tmp_path / "n1" / "metrics.jsonl").read_text(encoding="utf-8") == "its own\n"


@pytest.mark.parametrize("there", [b"one\n", b"one\ntw", b"one\n\0\0\0", b""])
def test_rows_that_the_first_node_lost_in_a_power_failure_are_restored(
    tmp_path: Path, nodes: tuple[WorkingNode, ...], there: bytes
) -> None:
    """Checkpoints are synced to its disk, rows are not; the launcher has a copy of those that it has read."""
    home = tmp_path / "home"
    (home / "attempts" / "1").mkdir(parents=True)
    (home / "attempts" / "1" / "metrics.jsonl").write_bytes(b"one\ntwo\nthree\n")
    (tmp_path / "n0" / "metrics.jsonl").write_bytes(there)
    restore_metrics(nodes[0], home)
    assert (tmp_path / "n0" / "metrics.jsonl").read_bytes() == b"one\ntwo\nthree\n"


def test_no_checkpoint_anywhere(nodes: tuple[WorkingNode, ...]) -> None:
    assert [newest_checkpoint(node) for node in nodes] == ["", "", ""]
    assert copy_newest_checkpoint(nodes, print) == ""


def test_a_node_whose_checkpoints_cannot_be_listed_is_an_error(nodes: tuple[WorkingNode, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(argv: tuple[str, ...], **_: Any) -> Result:
        return Result(argv=argv, code=1, output="", errors="Input/output error")

    monkeypatch.setattr(nodes[1].transport, "run", unreadable)
    with pytest.raises(NodeFailed, match=r"host1: looking for its newest checkpoint(.|\n)*Input/output error"):
        copy_newest_checkpoint(nodes, print)


def test_a_node_that_cannot_receive_the_checkpoint_is_named_and_keeps_no_part_of_it(tmp_path: Path, nodes: tuple[WorkingNode, ...]) -> None:
    checkpoint(tmp_path, 0, "step-000100")
    (tmp_path / "n1" / "checkpoints").write_text("a file in the way", encoding="utf-8")
    with pytest.raises(NodeFailed, match="host1"):
        copy_newest_checkpoint(nodes, print)
    assert newest_checkpoint(nodes[1]) == ""
    shutil.rmtree(tmp_path / "n0" / "checkpoints")
