"""The facts of this machine, read from a real interpreter, a docker client that is a script, and a folder in place of /."""

import json
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.config.compose import compose
from launcher.image.licence import accept, find_licence, store_path
from launcher.image.stack import load_stacks
from launcher.plan.full import describe_full
from launcher.plan.local_context import (
    context_for,
    find_built,
    find_taken_port,
    for_this_machine,
    read_cuda,
    read_machine,
    why_not_sent,
    with_own_licence,
)
from launcher.plan.plan import Plan, make_plan
from launcher.plan.short import describe_short
from tests.launcher.conftest import PLACE, PROJECT

STACKS, CONF = load_stacks(PROJECT / "images"), PROJECT / "conf"
ASCEND = ("hardware=ascend910b",)
DOCKER = """#!/bin/sh
echo "$@" >>'{calls}'
{answer}
"""
PlanFor = Callable[..., Plan]


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a docker client that does `answer` on PATH, alone; the file of its arguments."""

    def put(answer: str) -> Path:
        programs, calls = tmp_path / "bin", tmp_path / "calls"
        programs.mkdir(exist_ok=True)
        (programs / "docker").write_text(DOCKER.format(calls=calls, answer=answer), encoding="utf-8")
        (programs / "docker").chmod(0o755)
        monkeypatch.setenv("PATH", str(programs))
        return calls

    return put


def test_an_engine_is_asked_once_for_all_its_images(docker: Callable[[str], Path], plan_for: PlanFor) -> None:
    plan = plan_for(*ASCEND)
    calls = docker(f"echo '{plan.image.tag}'; echo localhost/omnilaunch:cpu-1")
    machine = read_machine(plan.config)
    assert (machine.has_docker, machine.engine_error, machine.images) == (True, "", {plan.image.tag, "omnilaunch:cpu-1"})
    assert find_built(plan, machine) is True and find_built(plan_for("hardware=h200"), machine) is False
    assert calls.read_text(encoding="utf-8").splitlines() == ["image ls --format {{.Repository}}:{{.Tag}} omnilaunch"]
    assert find_built(plan_for("cluster=example")) is True, "for other nodes it is asked for the one image"


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ("echo 'permission denied while trying to connect' >&2; exit 1", "permission denied while trying to connect"),
        ("echo 'Cannot connect to the Docker daemon' >&2; echo more >&2; exit 1", "Cannot connect to the Docker daemon"),
        ("exit 3", "docker image ls ended with exit code 3"),
    ],
)
def test_an_engine_that_does_not_answer(docker: Callable[[str], Path], plan_for: PlanFor, answer: str, error: str) -> None:
    docker(answer)
    plan = plan_for(*ASCEND)
    machine = read_machine(plan.config)
    assert machine.engine_error == error and find_built(plan, machine) is None


def test_no_docker_client_and_no_devices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    machine = read_machine(compose(ASCEND, CONF), root=tmp_path)
    assert (machine.has_docker, machine.paths) == (False, frozenset())


def test_a_process_run_asks_no_engine(docker: Callable[[str], Path]) -> None:
    calls = docker("exit 1")
    assert read_machine(compose((), CONF)).engine_error == "" and not calls.exists()


def test_device_files_and_programs_that_exist_are_found(docker: Callable[[str], Path], tmp_path: Path) -> None:
    docker("exit 0")
    (tmp_path / "dev").mkdir()
    for name in ("davinci0", "davinci_manager", "nvidia0", "nvidia9", "nvidiactl"):
        (tmp_path / "dev" / name).touch()
    (tmp_path / "bin" / "nvidia-ctk").symlink_to("docker")
    assert read_machine(compose(ASCEND, CONF), root=tmp_path).paths == {"/dev/davinci0", "/dev/davinci_manager"}
    found = read_machine(compose(("hardware=h200",), CONF), root=tmp_path).paths
    assert found == {"/dev/nvidia0", "/dev/nvidiactl", "nvidia-ctk"}


def test_the_packages_are_those_of_this_interpreter() -> None:
    pytest.importorskip("torch", reason="the trainer's packages are not installed in this environment")
    import torch

    machine = read_machine(compose((), CONF))
    assert machine.interpreter == sys.executable and machine.packages["torch"] == torch.__version__
    assert machine.cuda == (torch.version.cuda or "") and {"transformers", "deepspeed"} <= machine.packages.keys()


@pytest.mark.parametrize(
    ("version", "file", "cuda"),
    [
        ("2.7.1", "__version__ = '2.7.1+cu126'\ncuda: Optional[str] = '12.6'\n", "12.6"),  # of the common index, without a label
        ("2.7.1+cpu", "cuda: Optional[str] = None\nhip: Optional[str] = None\n", ""),
        ("2.8.0a0+git1", "cuda = '13.0'\n", "13.0"),  # built from source
        ("2.8.0+rocm6.3", "cuda: Optional[str] = None\nhip: Optional[str] = '6.3'\n", ""),
        ("2.7.1+cu126", None, "12.6"),
        ("2.7.1", None, ""),
    ],
)
def test_the_cuda_of_a_torch_that_is_not_imported(tmp_path: Path, version: str, file: str | None, cuda: str) -> None:
    info = tmp_path / f"torch-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n", encoding="utf-8")
    if file is not None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "version.py").write_text(file, encoding="utf-8")
    assert read_cuda(PathDistribution(info)) == cuda


def test_the_node_of_this_machine_has_its_architecture() -> None:
    """An Ascend host is often aarch64, and conf/cluster/local.yaml is one file for all."""
    config = compose(ASCEND, CONF)
    assert [node.architecture for node in for_this_machine(config, ASCEND, "aarch64").cluster.nodes] == ["aarch64"]
    typed = (*ASCEND, "cluster.nodes.0.architecture=x86_64")
    for words in (typed, (), ("cluster=example", "hardware=ascend910b")):  # typed; a process; other machines
        config = compose(words, CONF)
        assert for_this_machine(config, words, "aarch64") == config
    assert for_this_machine(compose(ASCEND, CONF), ASCEND, "riscv64") == compose(ASCEND, CONF), "the plan then says what is supported"


# ------------------------------------------------------------------------------------------------------------- licences


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return store_path(os.environ)


def plan_here(*words: str) -> Plan:
    config = compose(words, CONF)
    context = replace(context_for(config, STACKS, PROJECT, asks=False), here=PLACE.here)
    return make_plan(config, STACKS, context, run_id="R", overrides=words)


def test_an_accepted_licence_makes_a_plan_launchable_and_the_record_says_how(store: Path) -> None:
    refused = plan_here(*ASCEND)
    assert not refused.verdict.launchable and refused.licence is None
    assert "omnilaunch licence accept cann" in refused.verdict.problems[0].what
    accept(find_licence("cann"), store, at="2026-12-01T10:00:00+00:00", user="ann", host="npu1")
    plan = plan_here(*ASCEND)
    assert plan.verdict.launchable and plan.config.cluster.delivery.accept_licence and plan.licence is not None
    assert (plan.licence.name, plan.licence.how, plan.licence.is_stored) == ("cann", "omnilaunch licence accept cann", True)
    assert (plan.licence.sha256, plan.licence.accepted_at) == (find_licence("cann").sha256, "2026-12-01T10:00:00+00:00")
    assert "cann, accepted at 2026-12-01T10:00:00+00:00 with omnilaunch licence accept cann" in describe_full(plan)
    assert not plan_here("hardware=h200").verdict.launchable, "another licence"
    typed = plan_here(*ASCEND, "cluster.delivery.accept_licence=true")
    assert typed.licence is not None and (typed.licence.how, typed.licence.is_stored) == ("cluster.delivery.accept_licence=true", False)
    assert plan_here().licence is None, "the CPU image has none"


def test_a_recorded_acceptance_of_another_user_is_not_taken_over(store: Path) -> None:
    accept(find_licence("cann"), store, at="2026-12-01T10:00:00+00:00", user="ann", host="npu1")
    plan = plan_here(*ASCEND)
    assert with_own_licence(plan, STACKS) == plan
    store.unlink()
    other = with_own_licence(plan, STACKS)
    assert other.licence is None and not other.config.cluster.delivery.accept_licence
    typed = plan_here(*ASCEND, "cluster.delivery.accept_licence=true")
    assert with_own_licence(typed, STACKS) == typed, "what was part of the command is part of the record"


def test_a_file_of_licences_that_cannot_be_read_stops_only_what_needs_it(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store.parent.mkdir(parents=True)
    store.write_text('{"accepted": ', encoding="utf-8")
    assert main(["plan", *ASCEND]) == 2
    said = capsys.readouterr().err
    assert str(store) in said and "Nothing was changed" in said and store.read_text(encoding="utf-8") == '{"accepted": '
    assert main(["plan", "--json"]) == 0 and json.loads(capsys.readouterr().out)["licence"] is None
    assert main(["plan", "--json", *ASCEND, "cluster.delivery.accept_licence=true"]) == 0


def test_a_port_that_another_program_has_is_refused_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        words = [
            "stage=serve",
            "stage.checkpoint=/nowhere/else",
            "model=tiny_llava",
            "cluster.runtime=process",
            f"stage.serving.port={port}",
        ]
        (problem,) = find_taken_port(compose(words, PROJECT / "conf"))
        assert (problem.key, problem.launch_only) == ("stage.serving.port", True) and f"port {port} of 127.0.0.1 is in use" in problem.what
        (change,) = problem.changes
        assert find_taken_port(compose([*words[:-1], change], PROJECT / "conf")) == ()
        far = "cluster.nodes=[{host: gpu1}]"
        assert find_taken_port(compose([*words, far, "cluster.root=/srv/omnilaunch"], PROJECT / "conf")) == (), "of another machine"
    assert find_taken_port(compose(words, PROJECT / "conf")) == (), "the program has ended"
    assert find_taken_port(compose([*words[:-1], "stage.serving.port=0"], PROJECT / "conf")) == ()


@pytest.mark.parametrize(
    ("words", "docker", "built", "said"),
    [
        ((), None, None, "this machine has no docker command"),
        ((), "/usr/bin/docker", None, "the Docker engine here does not answer"),
        ((), "/usr/bin/docker", False, "this machine is aarch64, and the nodes are x86_64"),
        (("cluster.delivery.kind=ship",), "/usr/bin/docker", False, "the engine here does not have it"),
        ((), "/usr/bin/docker", True, ""),
        (("cluster.delivery.kind=build_on_nodes",), None, None, ""),
        (("cluster.delivery.kind=pull", "cluster.delivery.registry=lan/x"), None, None, ""),
    ],
)
def test_a_machine_that_cannot_send_the_image_says_why_and_what_is_left(
    plan_for: Callable[..., Plan],
    words: tuple[str, ...],
    docker: str | None,
    built: bool | None,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A cluster was `ok: this run can be launched` from a machine that can build nothing."""
    monkeypatch.setattr("launcher.plan.local_context.shutil.which", lambda _: docker)
    plan = plan_for("hardware=ascend910b", "cluster=example", "cluster.delivery.accept_licence=true", *words)
    why = why_not_sent(plan, built, "aarch64")
    assert why.startswith(said) and bool(why) == bool(said)
    for text in (describe_short(plan, built=built, unsent=why), describe_full(plan, why)):
        assert text.startswith("ok, if every node has the image: this machine cannot send it" if said else "ok: this run can be launched")
        words_of = " ".join(text.split())
        assert all(
            (word in words_of) == bool(said) for word in ("each node builds it", "kind=pull with cluster.delivery.registry", "docker load")
        )


def test_the_same_architecture_and_this_machine_need_no_word(plan_for: Callable[..., Plan]) -> None:
    assert why_not_sent(plan_for("hardware=h200", "cluster=example"), False, "x86_64") == ""
    assert why_not_sent(plan_for("hardware=h200", "cluster.runtime=docker"), None) == "", "it is refused with the missing engine"
