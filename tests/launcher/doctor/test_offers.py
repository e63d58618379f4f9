"""Overrides that findings offer: each one works. Every fault of test_doctor.py, and faults in which the first answer that comes to mind fails."""

import re
from collections.abc import Mapping
from functools import cache

import pytest

from launcher.config.defaults import keys_of, without_keys
from launcher.doctor.findings import Finding
from tests.launcher.doctor.fault_table import FAULTS, FIVE, Fault, npu_table
from tests.launcher.fake_nodes import CPU, HOSTS, NO_DOCKER, NPU, PlanFor, Said, ascend, examined, found, healthy_nodes, room, tcp


@pytest.fixture(scope="module")
def plan_for(plan_for: PlanFor) -> PlanFor:
    return cache(plan_for)


OVERRIDE = re.compile(r"(?<![\w.{-])((?:cluster|data|hardware|model|precision|run|stage|strategy|tune)(?:\.\w+)*=(?:\[[^]]*\]|[^\s,;)]+))")
TAKEN = {"tcp": tcp(60003, *range(61000, 61032), 50031)}
OWN_PORTS = (*NPU, "cluster.environment.HCCL_IF_BASE_PORT=61000")
LARGE = (*NPU, "model=llava_1_5_7b", "tune=null")  # the strategy is left open
STILL_FAULTY = {
    # Advice is given again and again for as long as something is wrong: what is offered must not be what is set, or refused.
    "hccl_ports": (Fault(words=OWN_PORTS, answers=TAKEN, says="HCCL uses ports 61000-61031"),),
    "rendezvous_port": (
        Fault(words=(*NPU, "cluster.rendezvous_port=59999"), answers={"tcp": tcp(59999)}, says="port 59999 is in use", place=0),
        Fault(words=(*CPU, "cluster.rendezvous_port=65535"), answers={"tcp": tcp(65535)}, says="port 65535 is in use", place=0),
    ),
    "shm": (
        Fault(answers={"memory": "MemTotal: 1000000 kB\nMemAvailable: 1000000 kB\n"}, says="of 1.0 GiB memory"),
        Fault(answers={"memory": "MemTotal: 0 kB\nMemAvailable: 0 kB\n"}, says="of 0.0 GiB memory"),
    ),
    "fit": (
        Fault(words=LARGE, answers=npu_table("65536", "32768"), says="GiB, 28.7 of 32.0 are free"),
        Fault(words=LARGE, answers=npu_table("65536", "4600"), says="of 4.5 are free"),
    ),
    "room": (Fault(words=(*CPU, "run.keep_checkpoints=1"), answers={"root": room(free_kib=4_000)}, says="free"),),
    "docker_client": (Fault(words=("cluster.runtime=docker",), answers={"docker_client": NO_DOCKER}, says="no docker", place=0),),
    "device_access": (
        Fault(
            words=NPU,  # one file is open to a group, another to none: no group can use both
            answers={
                "modes": ascend()["modes"].replace("davinci6 666 0 1000", "davinci6 660 0 1900").replace("svm 666 0 1000", "svm 600 0 0")
            },
            says="may not use",
        ),
    ),
    "device_count": (
        Fault(words=(*NPU, "cluster.devices_per_node=7", "stage.global_batch=14"), answers={"devices": FIVE}, says="5 devices"),
    ),
}


def overrides_in(fix: str) -> list[tuple[str, ...]]:
    """The alternatives of a fix, each as its overrides; placeholders such as FOLDER or N are none."""
    alternatives = (tuple(OVERRIDE.findall(part)) for part in re.split(r"\bor\b|;", fix))
    return [words for words in alternatives if words and not any(re.search(r"=\[?[A-Z]", word) for word in words)]


@pytest.mark.parametrize(
    ("name", "fault"),
    [*FAULTS, *((name, fault) for name, faults in STILL_FAULTY.items() for fault in faults)],
)
def test_an_override_that_a_finding_offers_removes_it(plan_for: PlanFor, name: str, fault: Fault) -> None:
    """Each alternative by itself gives a plan that is not refused, and on the same nodes the finding is gone."""

    def finding_with(*overrides: str) -> Finding | None:
        plan = plan_for(*without_keys(fault.words, keys_of(overrides)), *overrides)
        answers: dict[str, Mapping[str, str | Said]] = {("first", "second")[fault.place]: fault.answers}
        ways = healthy_nodes(plan, **answers)
        host = plan.config.cluster.nodes[fault.place].host
        return next((each for each in examined(plan, ways).findings if (each.name, each.host) == (name, host) and each.level != "ok"), None)

    finding = finding_with()
    assert finding is not None and fault.says in finding.evidence
    for words in overrides_in(finding.fix):
        if not any(word.startswith(("cluster.root=", "cluster.sync=")) for word in words):  # these depend on files, not on the plan
            after = finding_with(*words)
            # Nodes with different numbers of devices are a warning even where each has enough.
            assert after is None or (name, finding.level, after.level) == ("same_count", "error", "warning"), words


def test_the_overrides_in_a_fix_are_found() -> None:
    """The test above looks at something: these are the findings with an override that can be tried."""
    assert overrides_in("end it  or  strategy=zero3 run.x=[1,2]; or cluster.root=FOLDER") == [("strategy=zero3", "run.x=[1,2]")]


def test_reserved_ports_are_added_to_those_that_are_reserved(plan_for: PlanFor) -> None:
    """The setting of the kernel replaces the old one."""
    plan = plan_for(*NPU)
    some = {"ephemeral": "32768\t60999\n40000,41000-41002\n"}
    fix = found(examined(plan, healthy_nodes(plan, second=some)), "hccl_reserved", HOSTS[1]).fix
    reserved = fix.rpartition("=")[2]
    assert reserved == "40000-40000,41000-41002,60000-60031"
    after = {"ephemeral": f"32768\t60999\n{reserved}\n"}
    assert found(examined(plan, healthy_nodes(plan, second=after)), "hccl_reserved", HOSTS[1]).level == "ok"


def test_a_port_that_is_offered_is_free_on_every_node(plan_for: PlanFor) -> None:
    plan = plan_for(*NPU)
    ways = healthy_nodes(plan, first={"tcp": tcp(61005)}, second={"tcp": tcp(60003)})
    assert found(examined(plan, ways), "hccl_ports", HOSTS[1]).fix == "cluster.environment.HCCL_IF_BASE_PORT=50000"
