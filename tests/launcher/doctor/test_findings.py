"""Findings as a person and a program read them."""

import json

from launcher.doctor.findings import Finding, describe_findings, findings_json, has_errors
from tests.launcher.hospital import CPU, DENIED, HOSTS, STOPPED, PlanFor, Said, beds, examined


def test_what_a_person_reads(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    ill: dict[str, str | Said] = {"docker": DENIED, "kernel": "4.18.0\n"}
    text = describe_findings(examined(plan, beds(plan, first=ill, second=ill)).findings)
    lines = text.splitlines()
    assert lines[0] == "error     192.0.2.11, 192.0.2.12: docker_engine"
    assert lines[2].strip() == "fix: sudo usermod -aG docker trainer, then log in anew"
    assert [line.split()[0] for line in lines if line[0] != " "][:2] == ["error", "warning"]
    assert lines[-1].startswith("2 error, 2 warning, ")


def test_all_well_is_one_line_a_node(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    findings = examined(plan, beds(plan)).findings
    assert [line.split()[0] for line in describe_findings(findings).splitlines()] == ["ok", "ok", "ok", "0"]
    assert not has_errors(findings)


def test_many_nodes_with_one_problem_are_one_line() -> None:
    same = [Finding(name="shell", host=f"n{place}", level="error", evidence="fish", fix="chsh") for place in range(128)]
    assert describe_findings(same).splitlines()[0] == "error     n0, n1, n2, n3 and 124 more: shell"


def test_what_a_program_reads(plan_for: PlanFor) -> None:
    plan = plan_for(*CPU)
    data = json.loads(findings_json(examined(plan, beds(plan, second={"docker": STOPPED})).findings))
    (error,) = [finding for finding in data["findings"] if finding["level"] == "error"]
    assert (error["name"], error["host"]) == ("docker_engine", HOSTS[1]) and data["summary"]["error"] == 1
