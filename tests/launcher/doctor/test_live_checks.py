"""What the doctor tries on the nodes: a container's options, connections, a shared folder."""

import json
import subprocess
import sys
from typing import Any

import pytest

from launcher.doctor.findings import EVERY_NODE
from launcher.doctor.live_checks import REACH
from launcher.errors import NodeFailed
from launcher.ssh.transport import Result
from tests.launcher.hospital import CPU, HOSTS, NPU, SHARED, Bed, PlanFor, beds, examined, found, room

CONTAINER_ILLS = {
    "docker: Error response from daemon: error setting rlimit type 8: operation not permitted: unknown": "cluster.ulimits",
    'docker: Error response from daemon: could not select device driver "" with capabilities: [[gpu]]': "nvidia-container-toolkit",
    'docker: Error response from daemon: error gathering device information while adding custom device "/dev/davinci9"': "devices_per_node",
}


@pytest.mark.parametrize("said", CONTAINER_ILLS)
def test_a_container_that_does_not_start(plan_for: PlanFor, said: str) -> None:
    plan = plan_for(*CPU)
    ways = beds(plan)
    ways[1].replies["true"] = (125, "", f"{said}\nSee 'docker run --help'.\n")
    finding = found(examined(plan, ways), "container", HOSTS[1])
    assert (finding.level, finding.evidence) == ("error", said) and CONTAINER_ILLS[said] in finding.fix


def test_the_container_has_the_runs_devices_and_limits(plan_for: PlanFor) -> None:
    ways = beds(plan_for(*NPU))
    examined(plan_for(*NPU), ways)
    (argv,) = [argv for argv in ways[0].asked if "true" in argv]
    assert {"/dev/davinci7", "/dev/hisi_hdc", "memlock=-1", "16g"} <= set(argv) and "--privileged" not in argv and "--rm" in argv


def test_a_node_that_does_not_reach_another(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    ways = beds(plan)
    ways[1].replies["python"] = (0, json.dumps({HOSTS[0]: "port 29500: timed out"}) + "\n", "")
    finding = found(examined(plan, ways), "connections", HOSTS[1])
    assert finding.level == "error" and "192.0.2.12 cannot reach 192.0.2.11 (192.0.2.11), port 29500: timed out" in finding.evidence
    assert found(examined(plan, ways), "connections", HOSTS[0]).level == "ok"


def test_a_folder_is_shared_as_the_cluster_file_says(plan_for: PlanFor) -> None:
    alone, together = beds(plan_for(*CPU)), beds(plan_for(*CPU))
    together[1].files = together[0].files
    assert found(examined(plan_for(*CPU), alone), "shared", EVERY_NODE).level == "ok"
    assert found(examined(plan_for(*SHARED), together), "shared", EVERY_NODE).level == "ok"
    wrongly = found(examined(plan_for(*SHARED), alone), "shared", HOSTS[1])
    assert wrongly.level == "error" and "is not seen here" in wrongly.evidence
    unsaid = found(examined(plan_for(*CPU), together), "shared", HOSTS[1])
    assert unsaid.level == "error" and unsaid.fix == "cluster.shared=true"
    assert alone[0].files == together[0].files == {}, "no mark is left"


def test_a_shared_folder_that_is_not_there_or_not_writable(plan_for: PlanFor) -> None:
    plan = plan_for(*SHARED)
    missing = found(examined(plan, beds(plan, first={"root": room("/srv")})), "shared", EVERY_NODE)
    assert missing.level == "error" and "/srv/omnilaunch is not on 192.0.2.11 yet" in missing.evidence
    ways = beds(plan)
    ways[0].replies["read-only"] = (0, "", "")
    assert found(examined(plan, ways), "shared", HOSTS[0]).level == "unchecked"


def reach_processes(addresses: list[str], others: list[str], limit_s: float) -> list[dict[str, str]]:
    """The script of the connections check, a process an address of this machine's loopback."""
    commands = [(sys.executable, "-c", REACH, own, "29377", str(limit_s), *({*addresses, *others} - {own})) for own in addresses]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for command in commands]
    return [json.loads(process.communicate(timeout=30)[0]) for process in started]


def test_the_script_that_connects() -> None:
    assert reach_processes(["127.0.0.2", "127.0.0.3", "127.0.0.4"], [], 10) == [{}, {}, {}]


def test_the_script_names_who_does_not_answer() -> None:
    first, second = reach_processes(["127.0.0.2", "127.0.0.3"], ["127.0.0.9"], 1.5)
    assert first == second == {"127.0.0.9": "port 29377: Connection refused"}


class Hanging(Bed):
    """A node whose containers do not end."""

    def run(self, argv: tuple[str, ...], **options: Any) -> Result:
        result = super().run(argv, **options)
        if argv[:2] == ("docker", "run"):
            raise NodeFailed(f"{self.host}: no answer within 60 s")
        return result


def test_a_container_whose_time_is_over_is_removed(plan_for: PlanFor) -> None:
    """Ending docker's client ends no container."""
    plan = plan_for(*CPU)
    ways: list[Bed] = [Hanging(way.host, way.answers) for way in beds(plan)]
    examined(plan, ways)
    for way in ways:
        started = {argv[argv.index("--name") + 1] for argv in way.asked if argv[:2] == ("docker", "run")}
        removed = {argv[-1] for argv in way.asked if argv[:3] == ("docker", "rm", "--force")}
        assert started and started == removed
