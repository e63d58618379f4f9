"""The run's folder on a node: created by one command, mirrored while it grows, copied at the end."""

import os
import subprocess
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.plan.commands import CANN_LOGS, NodeCommand
from launcher.plan.plan import Plan
from launcher.run.run_folder import FolderRequest, Mirror, WorkingNode, create_folders, fetch_large, reopen_folders
from launcher.ssh.transport import Local
from tests.launcher.conftest import PROJECT
from trainer.contract import DATA_PENDING_FILE, RESULT_FILE, SPEC_FILE, TrainSpec, encode, read

PlanFor = Callable[..., Plan]
HOSTILE = "a b'c\"$(touch D)\n-rf"


class Counting(Local):
    def __init__(self) -> None:
        super().__init__({"PATH": os.environ["PATH"]})
        self.fed, self.ran = 0, list[tuple[str, ...]]()

    def feed(self, argv: tuple[str, ...], *rest: object, **named: object) -> object:  # type: ignore[override]
        self.fed += 1
        return super().feed(argv, *rest, **named)  # type: ignore[arg-type]

    def run(self, argv: tuple[str, ...], **named: object) -> object:  # type: ignore[override]
        self.ran.append(argv)
        return super().run(argv, **named)  # type: ignore[arg-type]


def spec_in(plan_for: PlanFor, folder: Path) -> TrainSpec:
    spec = plan_for().spec
    return replace(spec, output=str(folder / HOSTILE / "runs" / "R"), data=replace(spec.data, root=str(folder / HOSTILE / "data")))


def node(transport: Local, spec: TrainSpec) -> WorkingNode:
    command = NodeCommand(host="a", node_rank=0, runtime="docker", name="c", folder=spec.output, environment={}, prepare=(), start=())
    return WorkingNode(command=command, transport=transport)


def request(spec: TrainSpec, *, user: str, shared: bool) -> FolderRequest:
    return FolderRequest(spec=spec, text=encode(spec).encode(), image="image", user=user, shared=shared, local=False)


def owner(path: Path | str) -> str:
    return f"{Path(path).stat().st_uid}:{Path(path).stat().st_gid}"


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user takes root")
@pytest.mark.parametrize("user", ["0:0", "1000:1000"])
def test_the_folder_is_created_by_one_command(plan_for: PlanFor, tmp_path: Path, user: str) -> None:
    transport, spec = Counting(), spec_in(plan_for, tmp_path)
    create_folders((node(transport, spec),), request(spec, user=user, shared=False))
    assert (transport.fed, transport.ran) == (1, [])
    assert read(TrainSpec, Path(spec.output) / SPEC_FILE) == spec
    assert {owner(spec.output), owner(Path(spec.output) / SPEC_FILE), owner(spec.data.root)} == {user}
    assert {path.name for path in Path(spec.output).iterdir()} == {SPEC_FILE, DATA_PENDING_FILE} and {
        path.name for path in tmp_path.iterdir()
    } == {HOSTILE}


def test_a_folder_that_exists_belongs_to_another_run(plan_for: PlanFor, tmp_path: Path) -> None:
    spec = spec_in(plan_for, tmp_path)
    Path(spec.output).mkdir(parents=True)
    with pytest.raises(NodeFailed, match="choose a different one: --run-id"):
        create_folders((node(Counting(), spec),), request(spec, user="0:0", shared=False))
    assert not list(Path(spec.output).iterdir())


def test_a_root_that_cannot_be_created_says_what_to_do(plan_for: PlanFor, tmp_path: Path) -> None:
    (tmp_path / HOSTILE).write_text("")
    spec = spec_in(plan_for, tmp_path)
    with pytest.raises(NodeFailed, match=r"^a: mkdir: .*sudo install -d -o USER FOLDER"):
        create_folders((node(Counting(), spec),), request(spec, user="0:0", shared=False))


def test_one_of_the_nodes_that_share_a_folder_creates_it(plan_for: PlanFor, tmp_path: Path) -> None:
    transports, spec = (Counting(), Counting()), spec_in(plan_for, tmp_path)
    create_folders(tuple(node(each, spec) for each in transports), request(spec, user="0:0", shared=True))
    assert [each.fed for each in transports] == [1, 0] and (Path(spec.output) / SPEC_FILE).exists()


# ------------------------------------------------------------------------------------------------------------- mirrors

CUT = "é漢🙂\n".encode()  # characters of 2, 3 and 4 bytes


def mirror_of(tmp_path: Path, transport: Local | None = None) -> Mirror:
    for name in ("node", "here"):
        (tmp_path / name).mkdir()
    command = NodeCommand(
        host="a", node_rank=0, runtime="docker", name="c", folder=str(tmp_path / "node"), environment={}, prepare=(), start=()
    )
    transport = transport or Local({"PATH": os.environ["PATH"]})
    return Mirror(WorkingNode(command=command, transport=transport), "metrics.jsonl", tmp_path / "here")


@pytest.mark.parametrize("size", range(1, len(CUT) + 1))
def test_a_mirror_equals_its_file_wherever_a_character_is_cut(tmp_path: Path, size: int) -> None:
    """The file grows by `size` bytes between two looks."""
    mirror, content = mirror_of(tmp_path), CUT * 3
    for end in range(size, len(content) + size, size):
        (tmp_path / "node/metrics.jsonl").write_bytes(content[:end])
        mirror.ask()
        assert (tmp_path / "here/metrics.jsonl").read_bytes() == content[:end]


def test_a_file_that_does_not_exist_yet_leaves_nothing(tmp_path: Path) -> None:
    mirror_of(tmp_path).ask()
    assert not list((tmp_path / "here").iterdir())


def test_an_answer_that_comes_after_the_last_look_is_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole file is copied after that, and rows would be in it twice."""
    monkeypatch.setattr("launcher.run.run_folder.SETTLE_S", 0.1)
    answer = threading.Event()

    class Late(Local):
        @contextmanager
        def stream(self, argv: tuple[str, ...], **_: object) -> Iterator[Iterator[bytes]]:
            answer.wait(20)
            yield iter([b"a row\n"])

    mirror = mirror_of(tmp_path, Late({}))
    mirror.update()
    mirror.settle()
    answer.set()
    assert mirror.asking is not None and mirror.asking.result(20) is None
    assert not list((tmp_path / "here").iterdir())


# --------------------------------------------------------------------------------------------------------------- copies


@pytest.fixture
def filled_node(tmp_path: Path) -> WorkingNode:
    (tmp_path / "run/cann/node0/debug/plog").mkdir(parents=True)
    (tmp_path / "run/cann/node0/debug/plog/plog-1.log").write_text("[ERROR] HCCL\n" + "x" * 5000)
    command = NodeCommand(
        host="a", node_rank=0, runtime="docker", name="c", folder=str(tmp_path / "run"), environment={}, prepare=(), start=()
    )
    return WorkingNode(command=command, transport=Local({"PATH": os.environ["PATH"]}))


def test_a_folder_is_copied_complete(filled_node: WorkingNode, tmp_path: Path) -> None:
    fetch_large(filled_node, CANN_LOGS, tmp_path / "node0-cann.tgz", packed=True)
    with tarfile.open(tmp_path / "node0-cann.tgz") as archive:
        assert "cann/node0/debug/plog/plog-1.log" in archive.getnames()


@pytest.mark.parametrize(("name", "limit"), [("nothing", 2**20), (CANN_LOGS, 10)])
def test_a_folder_that_is_missing_or_too_large_is_not_copied(
    filled_node: WorkingNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, limit: int
) -> None:
    monkeypatch.setattr("launcher.run.run_folder.FOLDER_BYTES", limit)
    fetch_large(filled_node, name, tmp_path / "kept.tgz", packed=True)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def entered(folder: Path) -> tuple[str, str]:
    """The folder of CANN's log that a command in the container sees, and what the entrypoint prints."""
    argv = ("bash", str(PROJECT / "images/entrypoint.sh"), "sh", "-c", 'echo "${ASCEND_PROCESS_LOG_PATH-unset}"')
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "ASCEND_PROCESS_LOG_PATH": str(folder)}
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip(), done.stderr


def test_the_entrypoint_creates_the_folder_of_canns_log(tmp_path: Path) -> None:
    assert entered(tmp_path / "cann/node1") == (str(tmp_path / "cann/node1"), "")
    assert (tmp_path / "cann/node1").is_dir()


def test_the_entrypoint_enters_a_folder_that_the_user_may_write(tmp_path: Path) -> None:
    """CANN's compiler writes to the working folder, and the trainer is found from there."""
    package = tmp_path / "image" / "trainer"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    command = 'touch fusion_result.json && pwd && python3 -c "import trainer; print(trainer.__path__[0])"'
    argv = ("bash", str(PROJECT / "images/entrypoint.sh"), "sh", "-c", command)
    environment = {"PATH": os.environ["PATH"], "HOME": "/tmp", "ASCEND_PROCESS_LOG_PATH": str(tmp_path / "node1"), "PYTHONPATH": "/nowhere"}
    done = subprocess.run(argv, env=environment, cwd=package.parent, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(tmp_path / "node1" / "work"), str(package)]
    other = subprocess.run(argv, env={"PATH": os.environ["PATH"]}, cwd=package.parent, capture_output=True, text=True, check=True)
    assert other.stdout.split() == [str(package.parent), str(package)], "the folder of the image, where nothing else is asked for"


def test_canns_log_stays_in_its_default_place_when_the_folder_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen, said = entered(tmp_path / "file/node1")
    assert seen == "unset" and "CANN's log goes to /tmp/ascend/log" in said and str(tmp_path / "file/node1") in said


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user takes root")
@pytest.mark.parametrize("checks_first", [False, True])
def test_a_resumed_run_waits_for_its_data_check_and_a_restarted_one_does_not(plan_for: PlanFor, tmp_path: Path, checks_first: bool) -> None:
    """While a run is stopped, its data may change."""
    (tmp_path / "docker").write_text("#!/bin/sh\n")
    (tmp_path / "docker").chmod(0o755)
    spec, transport = spec_in(plan_for, tmp_path), Local({"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    Path(spec.output).mkdir(parents=True)
    (Path(spec.output) / RESULT_FILE).touch()
    asked = replace(request(spec, user="1000:1000", shared=True), checks_first=checks_first)
    reopen_folders((node(transport, spec),), asked, copy_checkpoint=lambda nodes: None)
    assert {path.name for path in Path(spec.output).iterdir()} == {SPEC_FILE, *([DATA_PENDING_FILE] if checks_first else [])}
    assert {owner(path) for path in Path(spec.output).iterdir()} == {"1000:1000"}
    (Path(spec.output) / SPEC_FILE).write_text("of this machine's launcher", encoding="utf-8")
    os.chown(Path(spec.output) / SPEC_FILE, 0, 0)
    reopen_folders((node(transport, spec),), replace(asked, local=True), copy_checkpoint=lambda nodes: None)
    assert owner(Path(spec.output) / SPEC_FILE) == ("1000:1000" if checks_first else "0:0")
