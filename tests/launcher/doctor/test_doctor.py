"""Every check of the doctor, on healthy nodes and on a node with the fault that it looks for: recorded texts in, findings out."""

from dataclasses import replace
from functools import cache

import pytest

from launcher.doctor.doctor import CROSS_NODE_CHECKS, LIVE_CHECKS, NODE_CHECKS
from launcher.doctor.findings import EVERY_NODE, has_errors
from launcher.errors import NodeFailed
from tests.launcher.doctor.fault_table import CROSS_NODE_FAULTS, FAULTS, NODE_FAULTS, Fault, gpu
from tests.launcher.fake_nodes import (
    CPU,
    DATA,
    H200,
    HOSTS,
    LOCAL,
    NPU,
    NPU_RUNTIME,
    OFFLOAD,
    P4,
    PULL,
    FakeNode,
    PlanFor,
    examined,
    found,
    healthy,
    healthy_nodes,
)  # fmt: skip


@pytest.fixture(scope="module")
def plan_for(plan_for: PlanFor) -> PlanFor:
    """Composing a plan takes longer than examining it."""
    return cache(plan_for)


def test_the_number_of_checks() -> None:
    assert (len(NODE_CHECKS), len(CROSS_NODE_CHECKS), len(LIVE_CHECKS)) == (44, 11, 3)
    assert set(NODE_FAULTS) == set(NODE_CHECKS) and set(CROSS_NODE_FAULTS) | {"clocks"} == set(CROSS_NODE_CHECKS)
    assert sum(check.launch for check in (*NODE_CHECKS.values(), *CROSS_NODE_CHECKS.values())) == 44


@pytest.mark.parametrize("words", [CPU, NPU, NPU_RUNTIME, P4, LOCAL, OFFLOAD, DATA, PULL], ids=lambda words: " ".join(words[:2]))
def test_healthy_nodes(plan_for: PlanFor, words: tuple[str, ...]) -> None:
    plan = plan_for(*words)
    findings = examined(plan, healthy_nodes(plan)).findings
    assert [finding for finding in findings if finding.level != "ok"] == []


def test_a_gpu_without_a_fault_in_any_field(plan_for: PlanFor) -> None:
    plan = plan_for(*P4)
    for states in (gpu(), gpu(mig="[N/A]", retired="[N/A]", remapped="[N/A]", failure="[N/A]", fabric="[N/A], [N/A]")):
        findings = examined(plan, healthy_nodes(plan, first=states, second=states)).findings
        assert [finding for finding in findings if finding.level != "ok"] == []


def test_a_driver_that_only_another_stack_takes(plan_for: PlanFor) -> None:
    """That stack is offered where the plan can have it; a driver that is too old for all of them is to be upgraded."""
    plan = plan_for("cluster=example", "hardware=h200", "hardware.stack=cuda130")
    for driver, fix in {
        "570.133.20": "upgrade the driver to 580 or newer; or hardware.stack=cuda126",
        "470.10": "upgrade the driver to 580 or newer",
    }.items():
        answers = {"devices": H200["devices"].replace("580.159.03", driver)}
        assert found(examined(plan, healthy_nodes(plan, first=answers)), "driver", HOSTS[0]).fix.split(", which")[0] == fix


def test_every_check_passes_on_healthy_nodes(plan_for: PlanFor) -> None:
    plans = [plan_for(*words) for words in (CPU, NPU_RUNTIME, P4, DATA)]
    names = {finding.name for plan in plans for finding in examined(plan, healthy_nodes(plan)).findings if finding.level == "ok"}
    assert names == {*NODE_CHECKS, *CROSS_NODE_CHECKS, *LIVE_CHECKS, "reach"}


@pytest.mark.parametrize(("name", "fault"), FAULTS, ids=[f"{name}-{fault.says[:30]}" for name, fault in FAULTS])
def test_each_check_finds_its_fault(plan_for: PlanFor, name: str, fault: Fault) -> None:
    plan = plan_for(*fault.words)
    ways = healthy_nodes(plan, **{("first", "second")[fault.place]: fault.answers})
    host = plan.config.cluster.nodes[fault.place].host
    finding = found(examined(plan, ways), name, host)
    assert finding.level == fault.level and fault.says in finding.evidence and fault.fix in finding.fix and finding.fix
    others = {each.level for each in examined(plan, ways).findings if each.name == name and each.host not in (host, EVERY_NODE)}
    assert others <= {"ok"} or not fault.answers, "a fault of the plan itself is found on every node"


def test_a_missing_image_is_brought_and_what_needs_it_is_not_checked(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    examination = examined(plan, healthy_nodes(plan, second={"image": (1, "", "Error: No such image")}))
    assert "launch builds and sends it" in found(examination, "image", HOSTS[1]).evidence
    assert found(examination, "image", HOSTS[1]).level == "ok" and not has_errors(examination.findings)
    assert found(examination, "connections", EVERY_NODE).level == "unchecked"
    assert found(examination, "container", HOSTS[1]).level == "unchecked" and found(examination, "container", HOSTS[0]).level == "ok"


@pytest.mark.parametrize(("apart_s", "level"), [(0.5, ""), (5.0, "warning"), (3600.0, "error")])
def test_clocks(plan_for: PlanFor, apart_s: float, level: str) -> None:
    plan = plan_for(*CPU)
    ways = healthy_nodes(plan)
    ways[1].clock_s += apart_s
    levels = {finding.host: finding.level for finding in examined(plan, ways).findings if finding.name == "clocks"}
    assert levels == (dict.fromkeys(HOSTS, level) if level else {EVERY_NODE: "ok"})


# ----------------------------------------------------------------------------------------------------- the whole cluster


def test_a_node_that_cannot_be_reached(plan_for: PlanFor) -> None:
    """One error; its own checks and those that need two nodes are unchecked, the other node is checked."""
    plan = plan_for(*CPU)
    ways = [healthy_nodes(plan)[0], NodeFailed("trainer@192.0.2.12:22: no answer within 10 s\n  Next: ssh trainer@192.0.2.12 true")]
    examination = examined(plan, ways)
    theirs = [finding for finding in examination.findings if finding.host == HOSTS[1]]
    assert [(finding.name, finding.fix) for finding in theirs if finding.level == "error"] == [("reach", "ssh trainer@192.0.2.12 true")]
    assert {finding.level for finding in theirs if finding.name != "reach"} == {"unchecked"} and len(theirs) > 10
    assert {finding.level for finding in examination.findings if finding.host == EVERY_NODE} == {"unchecked"}
    assert {finding.level for finding in examination.findings if finding.host == HOSTS[0]} == {"ok"}
    assert examination.choices == () and set(examination.facts) == {HOSTS[0]}


def test_all_lines_of_a_failure_are_evidence_but_the_next_step(plan_for: PlanFor) -> None:
    plan = plan_for("cluster=example", "hardware=cpu", "cluster.nodes.1={host: gpu2, user: me, port: 2200, jump: gate}")
    tried = "gpu2: the login of user 'me' was refused. Tried:\n  id_rsa: refused\n  agent key x: refused"
    for text, fix in {f"{tried}\n  Next: ssh-copy-id gpu2": "ssh-copy-id gpu2", tried: "ssh -J gate -p 2200 me@gpu2 true"}.items():
        finding = found(examined(plan, [healthy_nodes(plan)[0], NodeFailed(text)]), "reach", "gpu2")
        assert (finding.evidence, finding.fix) == (tried, fix)


def test_a_launch_waits_for_less_and_tries_nothing(plan_for: PlanFor) -> None:
    plan = plan_for(*DATA)
    ways = healthy_nodes(plan)
    names = {finding.name for finding in examined(plan, ways, launching=True).findings}
    assert not names & {*LIVE_CHECKS, "contents", "same_contents", "kernel"} and {"room", "docker_engine", "clocks"} <= names
    assert all(argv[0] in ("sh", "date") for argv in ways[0].asked) and "/d/train.json" not in str(ways[0].asked)


def test_a_spare_is_examined_and_takes_no_part_in_the_network(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    cluster = plan.config.cluster
    spare = replace(cluster.nodes[1], host="spare", address="", interface="", spare=True)
    plan = replace(plan, config=replace(plan.config, cluster=replace(cluster, nodes=(*cluster.nodes, spare))))
    ways = [*healthy_nodes(plan_for(*CPU)), FakeNode("spare", healthy("192.0.2.13"))]
    examination = examined(plan, ways)
    assert [choice.address for choice in examination.choices] == list(HOSTS) and found(examination, "room", "spare").level == "ok"
