"""Rules about this machine, for a run on it: the packages of this interpreter, the Docker engine, the device files. Pure.

launcher.plan.local_context gathers the facts. They refuse a launch, never a plan. The nodes of other clusters are examined by the doctor.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial

from launcher.check.problem import Problem, Rule
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.states import device_count
from launcher.plan.devices import ascend_device_files, ascend_mounts, device_numbers, share_of

TORCH, TORCH_NPU = "torch", "torch-npu"
# What every run of the trainer imports, by the names of the distributions.
TRAINER_PACKAGES = (TORCH, "deepspeed", "transformers", "peft", "safetensors", "pillow")
NVIDIA_FILES = ("/dev/nvidiactl", "/dev/dxg")  # Linux, and WSL 2
NVIDIA_TOOLS = ("nvidia-container-runtime-hook", "nvidia-container-runtime", "nvidia-ctk")  # as launcher/doctor/node_scripts/toolkit.sh
ELSEWHERE = "or take another machine: cluster=NAME"
INSTALL_DOCKER = "install Docker (docs.docker.com/engine/install)"
NEEDS_DOCKER = "a container is needed, and"


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine has of what a run on it needs. `packages`: of the interpreter that ranks would run in, name -> version; `cuda`: the
    toolkit that its torch is built with, '' = none. `engine_error`: why the Docker engine cannot be used, '' where it answers or was not
    asked; `images`: the tags that it has. `paths`: device files, files of the driver and programs that exist, of those that matter."""

    interpreter: str
    user: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    cuda: str = ""
    has_docker: bool = True
    engine_error: str = ""
    images: frozenset[str] = frozenset()
    paths: frozenset[str] = frozenset()


def machine_rules(machine: Machine | None) -> tuple[Rule, ...]:
    """The rules for a run on this machine; () where it was not asked."""
    return (partial(runtime_works, machine), partial(devices_are_here, machine)) if machine else ()


def asked_paths(config: Config) -> tuple[str, ...]:
    """The paths that the rules look for."""
    numbers = device_numbers(config.cluster.nodes[0], config.hardware.devices_per_node)
    if config.hardware.accelerator == "npu":
        share = share_of(config.cluster, config.cluster.nodes[0], device_count(config))
        return (*ascend_device_files(numbers), *ascend_mounts(share))
    return (*(f"/dev/nvidia{number}" for number in numbers), *NVIDIA_FILES) if config.hardware.accelerator == "cuda" else ()


# -------------------------------------------------------------------------------------------------------------- runtime


def runtime_works(machine: Machine, config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    """Both runtimes in one rule, so that neither is offered where it does not work."""
    if not config.cluster.is_local:
        return
    in_docker = config.cluster.runtime == "docker"
    why, forcible = (describe_docker(machine), False) if in_docker else describe_process(machine, config)
    if why:
        changes = (f"cluster.runtime={'process' if in_docker else 'docker'}",)
        yield Problem(key="cluster.runtime", what=why, changes=changes, launch_only=True, forcible=forcible)


def describe_docker(machine: Machine) -> str:
    """Why no container can be started here; '' where one can."""
    if not machine.has_docker:
        return f"{NEEDS_DOCKER} this machine has no docker command: {INSTALL_DOCKER}"
    if "permission denied" in machine.engine_error.lower():
        name = machine.user or "$USER"
        return f"{NEEDS_DOCKER} {name} may not use the Docker engine: sudo usermod -aG docker {name}, then log in again"
    if machine.engine_error:
        return f"{NEEDS_DOCKER} the Docker engine does not answer ({machine.engine_error}): sudo systemctl start docker"
    return ""


def describe_process(machine: Machine, config: Config) -> tuple[str, bool]:
    """Why the ranks cannot run in this interpreter, '' where they can; and whether they could be tried."""
    accelerator, has = config.hardware.accelerator, machine.packages
    start = f"process runs the ranks with {machine.interpreter}, which"
    if accelerator != "cpu" and (lacks := lacks_device(machine, accelerator)):
        return f"{start} has {lacks}, and {config.hardware.title} needs {NEEDED[accelerator]}", TORCH in has
    if missing := [name for name in TRAINER_PACKAGES if name not in has]:
        fix = "make setup installs the trainer's packages in .venv, and make train does it by itself"
        others = f"install them there: pip install {' '.join(missing)}"
        return f"{start} lacks {', '.join(missing)}: {fix if accelerator == 'cpu' else others}", False
    return "", False


NEEDED = {"cuda": "a torch that is built for CUDA", "npu": f"torch with the {TORCH_NPU} of the same version"}


def lacks_device(machine: Machine, accelerator: str) -> str:
    """What the interpreter has in place of the accelerator's torch; '' where it has that."""
    torch, npu = machine.packages.get(TORCH, ""), machine.packages.get(TORCH_NPU, "")
    found = f"torch {torch}" if torch else "no torch"
    if accelerator == "cuda":
        return "" if torch and machine.cuda else found
    if not npu:
        return f"{found}{' without' if torch else ' and no'} {TORCH_NPU}"
    return "" if torch and release(npu) == release(torch) else f"{found} and {TORCH_NPU} {npu}"


def release(version: str) -> str:
    """2.7.1 of 2.7.1.post8 and of 2.7.1+cpu."""
    found = re.match(r"\d+(\.\d+)*", version)
    return found[0] if found else version


# -------------------------------------------------------------------------------------------------------------- devices


def devices_are_here(machine: Machine, config: Config, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    if not config.cluster.is_local or config.hardware.accelerator == "cpu":
        return
    if config.hardware.accelerator == "npu":
        yield from npus_are_here(machine, config)
        return
    if not any(path.startswith("/dev/") for path in machine.paths):
        what = f"this machine has no NVIDIA device (/dev/nvidia0, /dev/nvidiactl): install the NVIDIA driver, {ELSEWHERE}"
        yield Problem(key="hardware", what=what, launch_only=True)
    if config.cluster.runtime == "docker" and not any(name in machine.paths for name in NVIDIA_TOOLS):
        fix = "install nvidia-container-toolkit; sudo nvidia-ctk runtime configure --runtime=docker; sudo systemctl restart docker"
        what = f"this machine has no NVIDIA container toolkit: {fix}"
        yield Problem(key="cluster.runtime", what=what, launch_only=True)


def npus_are_here(machine: Machine, config: Config) -> Iterator[Problem]:
    node, wanted = config.cluster.nodes[0], device_count(config)
    numbers = device_numbers(node, wanted)
    files = ascend_device_files(numbers)
    missing = [path for path in files if path not in machine.paths]
    if missing:
        there = 0 if node.devices else next((number for number in numbers if f"/dev/davinci{number}" not in machine.paths), wanted)
        fewer = fewer_devices(config, there) if len(missing) == wanted - there else 0  # only the last ones are missing
        fix = f"install the Ascend driver (npu-smi info lists the devices), {ELSEWHERE}"
        changes = (f"cluster.devices_per_node={fewer}",) if fewer else ()
        what = f"this machine does not have {join_numbered(missing)}: {fix}"
        yield Problem(key="hardware", what=what, changes=changes, launch_only=True)
    has_driver = any(path in machine.paths for path in files)  # without it, one line says so
    mounts = ascend_mounts(share_of(config.cluster, node, wanted)) if config.cluster.runtime == "docker" and has_driver else ()
    lacking = [path for path in mounts if path not in machine.paths]
    if lacking:
        fix = "install the driver with --full --install-for-all, or link each path to where the file is"
        what = f"this machine does not have {', '.join(lacking)}, which the container takes from the driver: {fix}"
        yield Problem(key="hardware.driver", what=what, launch_only=True)


def fewer_devices(config: Config, there: int) -> int:
    """The most of `there` devices that a job can take: whole modules, between which the global batch divides. 0 = none."""
    multiple, batch = config.hardware.device_multiple, config.stage.global_batch if config.stage.kind == "train" else 0
    return next((count for count in range(there, 0, -1) if count % multiple == 0 and batch % count == 0), 0)


def join_numbered(paths: list[str]) -> str:
    """/dev/davinci0 to /dev/davinci7, /dev/hisi_hdc: a row of numbered files in two words."""
    numbered = [path for path in paths if path[-1].isdigit()]
    rest = paths[len(numbered) :]
    return ", ".join((*([f"{numbered[0]} to {numbered[-1]}"] if len(numbered) > 2 else numbered), *rest))
