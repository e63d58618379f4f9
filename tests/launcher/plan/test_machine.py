"""What this machine lacks for a run on it: each in one line, in the plan, and only where the run is here."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.check.problem import Problem
from launcher.config.compose import compose
from launcher.config.defaults import keys_of, without_keys
from launcher.image.stack import load_stacks
from launcher.plan.machine import NVIDIA_TOOLS, TRAINER_PACKAGES, Machine, asked_paths
from launcher.plan.plan import Plan, make_plan
from launcher.plan.short import describe_short
from tests.launcher.conftest import PLACE, PROJECT

STACKS, CONF = load_stacks(PROJECT / "images"), PROJECT / "conf"
TRAINER = dict.fromkeys(TRAINER_PACKAGES, "1") | {"torch": "2.13.0+cpu"}
CUDA_TORCH = TRAINER | {"torch": "2.7.1"}
NPU_TORCH = TRAINER | {"torch": "2.7.1+cpu", "torch-npu": "2.7.1.post8"}
EVERYTHING = frozenset(path for name in ("ascend910b", "ascend910c", "h200") for path in asked_paths(compose((f"hardware={name}",), CONF)))
GOOD = Machine(interpreter="/venv/bin/python", user="ann", packages=TRAINER, paths=EVERYTHING | {*NVIDIA_TOOLS})
PROCESS, DOCKER, ACCEPTED = "cluster.runtime=process", "cluster.runtime=docker", "cluster.delivery.accept_licence=true"
NO_DOCKER = replace(GOOD, has_docker=False)


def plan_on(machine: Machine, *words: str) -> Plan:
    words = (*words, ACCEPTED)
    return make_plan(compose(words, CONF), STACKS, replace(PLACE, machine=machine), run_id="R", overrides=words, conf=CONF)


def problems_on(machine: Machine, *words: str) -> tuple[Problem, ...]:
    return plan_on(machine, *words).verdict.problems


def without(*paths: str) -> Machine:
    return replace(GOOD, paths=GOOD.paths - {*paths})


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (GOOD, ()),
        (GOOD, (DOCKER,)),
        (GOOD, ("hardware=ascend910b",)),
        (GOOD, ("hardware=h200",)),
        (replace(GOOD, packages=CUDA_TORCH, cuda="12.6"), ("hardware=h200", PROCESS)),
        (replace(GOOD, packages=NPU_TORCH), ("hardware=ascend910b", PROCESS)),
        (replace(GOOD, packages={}), (DOCKER,)),  # the image has them
        (NO_DOCKER, ()),  # no container is needed
        (replace(NO_DOCKER, paths=frozenset()), ("hardware=ascend910b", "cluster=example")),  # the doctor asks other machines
        (without("/dev/davinci6", "/dev/davinci7"), ("hardware=ascend910b", "cluster.devices_per_node=4")),
        (without("/dev/davinci0"), ("hardware=ascend910b", "cluster.devices_per_node=1", "cluster.nodes.0.devices=[5]")),
        (without("/usr/local/dcmi", "/usr/local/bin/npu-smi"), ("hardware=ascend910b", "cluster.ascend_runtime=true")),
        (without("/etc/ascend_install.info"), ("hardware=ascend910b", PROCESS, "run.force=a torch of our own")),  # no mount
    ],
)
def test_a_machine_that_has_everything_is_not_refused(machine: Machine, words: tuple[str, ...]) -> None:
    assert problems_on(machine, *words) == ()


@pytest.mark.parametrize(
    ("machine", "words", "key", "said", "changes"),
    [
        (NO_DOCKER, ("hardware=ascend910b",), "cluster.runtime", "no docker command: install Docker", ()),
        (NO_DOCKER, (DOCKER,), "cluster.runtime", "no docker command: install Docker", (PROCESS,)),
        (replace(NO_DOCKER, packages={}), (DOCKER,), "cluster.runtime", "no docker command", ()),
        (
            replace(NO_DOCKER, packages=CUDA_TORCH, cuda="12.6"),
            ("hardware=h200",),
            "cluster.runtime",
            "no docker command",
            (PROCESS,),
        ),
        (
            replace(GOOD, engine_error="permission denied while trying to connect to the Docker daemon socket"),
            ("hardware=h200",),
            "cluster.runtime",
            "ann may not use the Docker engine: sudo usermod -aG docker ann",
            (),
        ),
        (
            replace(GOOD, engine_error="Cannot connect to the Docker daemon"),
            (DOCKER,),
            "cluster.runtime",
            "does not answer (Cannot connect to the Docker daemon): sudo systemctl start docker",
            (PROCESS,),
        ),
        (GOOD, ("hardware=h200", PROCESS), "cluster.runtime", "torch 2.13.0+cpu, and NVIDIA H200 needs a torch", (DOCKER,)),
        (replace(GOOD, packages={}), ("hardware=h200", PROCESS), "cluster.runtime", "which has no torch, and NVIDIA H200", (DOCKER,)),
        (GOOD, ("hardware=ascend910b", PROCESS), "cluster.runtime", "has torch 2.13.0+cpu without torch-npu, and", (DOCKER,)),
        (
            replace(GOOD, packages=NPU_TORCH | {"torch": "2.13.0+cpu"}),
            ("hardware=ascend910b", PROCESS),
            "cluster.runtime",
            "torch 2.13.0+cpu and torch-npu 2.7.1.post8, and",
            (DOCKER,),
        ),
        (replace(NO_DOCKER, paths=EVERYTHING), ("hardware=h200", PROCESS), "cluster.runtime", "built for CUDA", ()),
        (
            replace(GOOD, packages=CUDA_TORCH | {"torch": "2.7.1"}, cuda="12.6", paths=frozenset()),
            ("hardware=h200", PROCESS),
            "hardware",
            "no NVIDIA device (/dev/nvidia0, /dev/nvidiactl): install the NVIDIA driver",
            (),
        ),
        (
            replace(GOOD, packages={"torch": "2.13.0+cpu", "transformers": "5"}),
            (),
            "cluster.runtime",
            "lacks deepspeed, peft, safetensors, pillow: make setup installs",
            (DOCKER,),
        ),
        (without(*NVIDIA_TOOLS), ("hardware=h200",), "cluster.runtime", "NVIDIA container toolkit", ()),
        (
            without(*(path for path in EVERYTHING if path.startswith("/dev/"))),
            ("hardware=ascend910b",),
            "hardware",
            "does not have /dev/davinci0 to /dev/davinci7, /dev/davinci_manager, /dev/devmm_svm, /dev/hisi_hdc: install the Ascend driver",
            (),
        ),
        (
            without("/dev/davinci6", "/dev/davinci7"),
            ("hardware=ascend910b",),
            "hardware",
            "/dev/davinci6, /dev/davinci7:",
            ("cluster.devices_per_node=4",),  # 6 do not divide the global batch of 64
        ),
        (without("/dev/davinci3"), ("hardware=ascend910c",), "hardware", "have /dev/davinci3: install", ()),
        (without("/dev/hisi_hdc"), ("hardware=ascend910b",), "hardware", "does not have /dev/hisi_hdc:", ()),
        (
            without("/usr/local/dcmi"),
            ("hardware=ascend910b",),
            "hardware.driver",
            "does not have /usr/local/dcmi, which the container takes from the driver",
            (),
        ),
    ],
)
def test_what_is_missing_is_one_line_and_what_is_offered_works(
    machine: Machine, words: tuple[str, ...], key: str, said: str, changes: tuple[str, ...]
) -> None:
    """A plan is made, and refuses the launch."""
    (problem,) = problems_on(machine, *words)
    assert (problem.key, problem.changes, problem.launch_only) == (key, changes, True)
    assert said in problem.what and "\n" not in problem.what
    for change in changes:
        kept = without_keys(words, keys_of((change,)))
        assert problems_on(machine, *kept, change) == ()


def test_a_plan_names_everything_that_is_missing_at_once() -> None:
    plan = plan_on(replace(NO_DOCKER, paths=frozenset()), "hardware=ascend910b")
    text = describe_short(plan).splitlines()
    assert text[0] == "planned; a launch is refused:"
    assert [line.split(":")[0].strip() for line in text[1:3]] == ["cluster.runtime", "hardware"]
    assert not any(line.startswith("next:") for line in text) and any(line.startswith("ranks") for line in text)


def test_a_torch_of_the_users_own_may_be_tried_with_a_reason() -> None:
    verdict = plan_on(GOOD, "hardware=h200", PROCESS, "run.force=built from source").verdict
    assert verdict.launchable and [problem.key for problem in verdict.forced] == ["cluster.runtime"]
    missing = replace(GOOD, packages={})
    assert not plan_on(missing, "hardware=h200", PROCESS, "run.force=please").verdict.launchable, "without a torch nothing can be tried"


def test_without_facts_nothing_is_judged(plan_for: Callable[..., Plan]) -> None:
    assert plan_for("hardware=ascend910b", ACCEPTED).verdict.launchable
