"""What a check reports about a node or a cluster, and how it is printed, as text and as JSON."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from launcher.config.schema import Node
from launcher.doctor.node_facts import NodeFacts
from launcher.image.stack import Stack
from launcher.plan.commands import NodeCommand, docker_command
from launcher.plan.plan import Plan
from trainer.contract.listing import list_some
from trainer.contract.wording import plural

Level = Literal["ok", "warning", "error", "unchecked"]
ORDER: tuple[Level, ...] = ("error", "warning", "unchecked", "ok")
EVERY_NODE = "all nodes"
REACH = "reach"  # the check that the node is reached and its shell runs a script: all others need it
SHOWN_HOSTS = 4
INDENT = 10


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """`evidence`: what was seen; `fix`: the command or override that removes the problem, '' when there is none."""

    level: Level
    evidence: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A result with the name of its check and the host."""

    name: str
    host: str
    level: Level
    evidence: str
    fix: str = ""


@dataclass(frozen=True, kw_only=True)
class CheckedNode:
    """A node that answered, and the plan that it is checked for. `stacks`: all rows of versions.yaml. `rank`: its node rank, None for a
    spare. `used_ports`: TCP ports that are in use on any node of the plan."""

    plan: Plan
    stacks: Mapping[str, Stack]
    node: Node
    rank: int | None
    facts: NodeFacts
    used_ports: frozenset[int] = frozenset()

    @property
    def host(self) -> str:
        return self.node.host

    @property
    def stack(self) -> Stack:
        return self.stacks[self.plan.config.hardware.stack]

    @property
    def command(self) -> NodeCommand:
        """The node's command; for a spare, the one it gets when it takes the place of rank 0."""
        plan = self.plan
        if self.rank is not None or plan.config.cluster.runtime != "docker":
            return plan.commands[self.rank or 0]
        return docker_command(plan.config, plan.image, plan.spec, self.node, 0, plan.container_user)


# A check of one node, and one that compares nodes: host -> its result, or EVERY_NODE -> one result for all.
NodeCheck = Callable[[CheckedNode], CheckResult]
CrossCheck = Callable[[Sequence[CheckedNode]], dict[str, CheckResult]]


def passed(evidence: str) -> CheckResult:
    return CheckResult(level="ok", evidence=evidence)


def warned(evidence: str, fix: str) -> CheckResult:
    return CheckResult(level="warning", evidence=evidence, fix=fix)


def failed(evidence: str, fix: str) -> CheckResult:
    return CheckResult(level="error", evidence=evidence, fix=fix)


def unchecked(evidence: str, fix: str = "") -> CheckResult:
    return CheckResult(level="unchecked", evidence=evidence, fix=fix)


def named(name: str, host: str, result: CheckResult) -> Finding:
    return Finding(name=name, host=host, level=result.level, evidence=result.evidence, fix=result.fix)


def has_errors(findings: Sequence[Finding]) -> bool:
    return any(finding.level == "error" for finding in findings)


def findings_json(findings: Sequence[Finding]) -> str:
    counts = Counter(finding.level for finding in findings)
    summary = {level: counts[level] for level in ORDER}
    return json.dumps({"summary": summary, "findings": [asdict(finding) for finding in findings]}, indent=2, ensure_ascii=False) + "\n"


def describe_findings(findings: Sequence[Finding]) -> str:
    """Problems first, each with its evidence and fix; a problem that several nodes share is printed once. Then one line per node."""
    lines = [line for level in ("error", "warning") for line in describe_level(findings, level)]
    lines += describe_unchecked(findings)
    ok = Counter(finding.host for finding in findings if finding.level == "ok")
    width = max(map(len, ok), default=0)
    lines += [f"{'ok':{INDENT}}{host:{width}}  {plural(count, 'check')}" for host, count in ok.items()]
    return "\n".join((*lines, count_levels(findings)))


def count_levels(findings: Sequence[Finding]) -> str:
    """`1 error, 0 warning, 0 unchecked, 33 ok; 1 node not reached`: a check that could not be asked for that reason is not counted."""
    unreached = {finding.host for finding in findings if finding.name == REACH and finding.level == "error"}
    of_them = {*unreached, EVERY_NODE} if unreached else unreached
    counts = Counter(finding.level for finding in findings if not (finding.level == "unchecked" and finding.host in of_them))
    listed = ", ".join(f"{counts[level]} {level}" for level in ORDER)
    return f"{listed}; {plural(len(unreached), 'node')} not reached" if unreached else listed


def describe_level(findings: Sequence[Finding], level: str) -> Iterator[str]:
    same: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        if finding.level == level:
            same.setdefault((finding.name, finding.evidence, finding.fix), []).append(finding.host)
    for (name, evidence, fix), hosts in same.items():
        yield f"{level:{INDENT}}{list_some(hosts, SHOWN_HOSTS)}: {name}"
        yield from (" " * INDENT + line for line in evidence.splitlines())
        yield from (" " * INDENT + f"{'fix: ' if index == 0 else '     '}{line}" for index, line in enumerate(fix.splitlines()))


def describe_unchecked(findings: Sequence[Finding]) -> Iterator[str]:
    """Grouped by reason: a node that is down leaves thirty checks undone for one reason."""
    undone: dict[tuple[str, str, str], list[str]] = {}
    for finding in findings:
        if finding.level == "unchecked":
            undone.setdefault((finding.host, finding.evidence, finding.fix), []).append(finding.name)
    same: dict[tuple[tuple[str, ...], str, str], list[str]] = {}
    for (host, evidence, fix), names in undone.items():
        same.setdefault((tuple(names), evidence, fix), []).append(host)
    for (checks, evidence, fix), hosts in same.items():
        what = checks[0] if len(checks) == 1 else f"{len(checks)} checks"
        yield f"{'unchecked':{INDENT}}{list_some(hosts, SHOWN_HOSTS)}: {what}: {evidence}" + (f" ({fix})" if fix else "")
