"""Findings as a person and a program read them."""

import json

from launcher.doctor.findings import Finding, describe_findings, findings_json, has_errors
from launcher.errors import NodeFailed
from tests.launcher.fake_nodes import CPU, DENIED, HOSTS, STOPPED, PlanFor, Said, examined, healthy_nodes


def test_the_text(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    fault: dict[str, str | Said] = {"docker": DENIED, "kernel": "4.18.0\n"}
    text = describe_findings(examined(plan, healthy_nodes(plan, first=fault, second=fault)).findings)
    lines = text.splitlines()
    assert lines[0] == "error     192.0.2.11, 192.0.2.12: docker_engine"
    assert lines[2].strip() == "fix: sudo usermod -aG docker trainer, then log in again"
    assert [line.split()[0] for line in lines if line[0] != " "][:2] == ["error", "warning"]
    assert lines[-1].startswith("2 error, 2 warning, ")


def test_healthy_nodes_are_one_line_each(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    findings = examined(plan, healthy_nodes(plan)).findings
    assert [line.split()[0] for line in describe_findings(findings).splitlines()] == ["ok", "ok", "ok", "0"]
    assert not has_errors(findings)


def test_many_nodes_with_one_problem_are_one_line() -> None:
    same = [Finding(name="shell", host=f"n{place}", level="error", evidence="fish", fix="chsh") for place in range(128)]
    assert describe_findings(same).splitlines()[0] == "error     n0, n1, n2, n3 and 124 more: shell"


def test_the_json(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    data = json.loads(findings_json(examined(plan, healthy_nodes(plan, second={"docker": STOPPED})).findings))
    (error,) = [finding for finding in data["findings"] if finding["level"] == "error"]
    assert (error["name"], error["host"]) == ("docker_engine", HOSTS[1]) and data["summary"]["error"] == 1


def test_checks_of_nodes_that_were_not_reached_are_not_counted(plan_for: PlanFor) -> None:
    """`137 unchecked` said nothing of three nodes that are down."""
    plan = plan_for(*CPU)
    ways = [NodeFailed(f"{node.host}: timed out\nssh {node.host} true") for node in plan.config.cluster.nodes]
    lines = describe_findings(examined(plan, ways).findings).splitlines()
    assert lines[-1] == "2 error, 0 warning, 0 unchecked, 0 ok; 2 nodes not reached"
    assert any("checks: the node could not be reached" in line for line in lines)
