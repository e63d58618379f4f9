"""The run's folder on a node, made by one command."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.errors import NodeFailed
from launcher.plan.commands import NodeCommand
from launcher.plan.plan import Plan
from launcher.run.run_folder import WorkingNode, create_folders
from launcher.ssh.transport import Local
from trainer.contract import SPEC_FILE, TrainSpec, encode, read

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


def owner(path: Path | str) -> str:
    return f"{Path(path).stat().st_uid}:{Path(path).stat().st_gid}"


@pytest.mark.skipif(os.getuid() != 0, reason="giving a folder to another user takes root")
@pytest.mark.parametrize("user", ["0:0", "1000:1000"])
def test_the_folder_is_made_by_one_command(plan_for: PlanFor, tmp_path: Path, user: str) -> None:
    transport, spec = Counting(), spec_in(plan_for, tmp_path)
    create_folders((node(transport, spec),), spec, encode(spec).encode(), image="image", user=user, shared=False, local=False)
    assert (transport.fed, transport.ran) == (1, [])
    assert read(TrainSpec, Path(spec.output) / SPEC_FILE) == spec
    assert {owner(spec.output), owner(Path(spec.output) / SPEC_FILE), owner(spec.data.root)} == {user}
    assert [path.name for path in Path(spec.output).iterdir()] == [SPEC_FILE] and {path.name for path in tmp_path.iterdir()} == {HOSTILE}


def test_a_folder_that_is_there_is_another_runs(plan_for: PlanFor, tmp_path: Path) -> None:
    spec = spec_in(plan_for, tmp_path)
    Path(spec.output).mkdir(parents=True)
    with pytest.raises(NodeFailed, match="choose one: --run-id"):
        create_folders((node(Counting(), spec),), spec, encode(spec).encode(), image="image", user="0:0", shared=False, local=False)
    assert not list(Path(spec.output).iterdir())


def test_a_root_that_cannot_be_made_says_what_to_do(plan_for: PlanFor, tmp_path: Path) -> None:
    (tmp_path / HOSTILE).write_text("")
    spec = spec_in(plan_for, tmp_path)
    with pytest.raises(NodeFailed, match=r"^a: mkdir: .*sudo install -d -o USER FOLDER"):
        create_folders((node(Counting(), spec),), spec, encode(spec).encode(), image="image", user="0:0", shared=False, local=False)


def test_of_nodes_that_share_it_one_makes_it(plan_for: PlanFor, tmp_path: Path) -> None:
    transports, spec = (Counting(), Counting()), spec_in(plan_for, tmp_path)
    create_folders(
        tuple(node(each, spec) for each in transports), spec, encode(spec).encode(), image="image", user="0:0", shared=True, local=False
    )
    assert [each.fed for each in transports] == [1, 0] and (Path(spec.output) / SPEC_FILE).exists()
