"""`make train HW=ascend910b`, typed on an Ascend host: the launcher, the engine and the devices are on one machine.

The host has real device files without a device, and an npu-smi that prints a recorded table. CANN's base image is not available here, so the image
with the plan's tag is the CPU image: the real trainer starts in it, as on an Ascend host, and its ranks end where they import torch_npu.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launcher.image.stack import LABEL
from tests.cluster.conftest import Lab
from tests.cluster.host import USER, Host, docker
from tests.cluster.test_ascend_host import DEVICES, NO_PROCESS, PROCESS, SAMPLE
from tests.images.conftest import ROOT, Built

pytestmark = pytest.mark.cluster

TREE = f"/home/{USER}/project"
LISTED = "device files of the container:"
# The device files are printed before the ranks start: the container is gone when the run has ended.
DOCKERFILE = f"""FROM {{image}}
LABEL {LABEL}fingerprint={{fingerprint}}
ENTRYPOINT ["bash", "-c", "echo {LISTED} $(ls /dev/davinci* /dev/devmm_svm /dev/hisi_hdc); exec /usr/local/bin/entrypoint.sh \\"$@\\"", "bash"]
"""


@pytest.fixture(scope="module")
def node(lab: Lab, built: Built) -> Iterator[Host]:
    """A host with make, the project's tree, and pip's settings of this machine."""
    host = lab.hosts[2]
    host.remove_npus()  # of another test
    host.run("sh", "-c", "command -v make || (apt-get update -qq && apt-get install -qq -y --no-install-recommends make)")
    files = ("Makefile", "pyproject.toml", "README.md", "conf", "images", "launcher", "trainer")
    with subprocess.Popen(("tar", "-C", str(ROOT), "--exclude=__pycache__", "-c", *files), stdout=subprocess.PIPE) as tar:
        host.run("install", "-d", "-o", USER, TREE)
        unpack = ("docker", "exec", "-i", "--user", USER, host.name, "tar", "-C", TREE, "-x", "--no-same-owner")
        subprocess.run(unpack, stdin=tar.stdout, check=True)
    if built.delivery.ca_bundle:
        docker("cp", built.delivery.ca_bundle, f"{host.name}:/etc/pip-ca.pem")
    yield host
    host.run("rm", "-rf", TREE)
    host.remove_npus()


@pytest.fixture
def image(node: Host, lab: Lab, built: Built) -> Iterator[str]:
    """The tag of the plan's image; the host's engine has an image with it."""
    planned = json.loads(lab.run("plan", "--json", "hardware=ascend910b").stdout)["image"]
    docker("build", "-q", "-t", planned["tag"], "-", input=DOCKERFILE.format(image=built.image.tag, fingerprint=planned["fingerprint"]))
    node.load(planned["tag"])
    yield planned["tag"]
    docker("image", "rm", planned["tag"])
    node.run("docker", "image", "rm", planned["tag"])


def typed(node: Host, built: Built, *words: str) -> "subprocess.CompletedProcess[str]":
    """A command in the project's folder, as the user types it; `stdout` has all of its output."""
    given = {"PIP_CERT": built.delivery.ca_bundle and "/etc/pip-ca.pem", "PIP_INDEX_URL": built.delivery.index, "HOME": f"/home/{USER}"}
    variables = tuple(part for name, value in given.items() if value for part in ("--env", f"{name}={value}"))
    argv = ("docker", "exec", "--user", USER, "--workdir", TREE, *variables, node.name, *words)
    return subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=580)


def record(node: Host) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(result.json, plan.json, the log of the node) of the only run."""
    (folder,) = node.run("sh", "-c", f"ls -d {TREE}/runs/*-ascend910b-*/").split()
    result, plan = (json.loads(node.run("cat", f"{folder}{name}.json")) for name in ("result", "plan"))
    return result, plan, node.run("cat", f"{folder}logs/node0.log")


def test_make_train_goes_up_to_the_npu(node: Host, built: Built, image: str, tmp_path: Path) -> None:
    refused = typed(node, built, "make", "train", "HW=ascend910b")
    assert refused.returncode == 2 and "setting up the launcher" in refused.stdout, refused.stdout
    assert "setting up the trainer" not in refused.stdout, "its packages are in the image"
    lines = [line for line in refused.stdout.splitlines() if line.startswith("  ") and not line.strip().startswith("would pass")]
    assert [line.split(":")[0].strip() for line in lines] == ["cluster.delivery.accept_licence", "hardware"], refused.stdout
    assert "omnilaunch licence accept cann" in lines[0] and "/dev/davinci0 to /dev/davinci7, /dev/davinci_manager" in lines[1]

    accepted = typed(node, built, ".venv/bin/omnilaunch", "licence", "accept", "cann")
    assert accepted.returncode == 0, accepted.stdout
    idle = tmp_path / "idle.txt"
    idle.write_text(SAMPLE.read_text(encoding="utf-8").replace(PROCESS, NO_PROCESS), encoding="utf-8")
    node.add_npus(8, idle)
    planned = typed(node, built, "make", "plan", "HW=ascend910b")
    assert planned.stdout.startswith("ok: this run can be launched\n") and f"{image}, built" in planned.stdout, planned.stdout
    stopped = typed(node, built, "make", "train", "HW=ascend910b")
    assert "training: 8 ranks on 1 node" in stopped.stdout and stopped.returncode == 2, stopped.stdout
    result, plan, log = record(node)
    assert result["status"] == "failed" and "torch_npu" in result["failure"]["message"], result["failure"]
    (listed,) = (line for line in log.splitlines() if LISTED in line)
    assert {*listed.partition(LISTED)[2].split()} == {*DEVICES}
    assert plan["config"]["cluster"]["runtime"] == "docker" and plan["licence"]["how"] == "omnilaunch licence accept cann"
    assert not node.containers()
