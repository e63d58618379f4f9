"""Overrides that a finding may offer: each is tried on the plan before it is printed, so that what is advised can work. Pure."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from launcher.check.rules import check
from launcher.check.strategy import resolve
from launcher.check.suggestions import set_values, write_override
from launcher.config.defaults import keys_of
from launcher.config.schema import Config
from launcher.doctor.findings import CheckedNode
from launcher.plan.commands import HCCL_PORT_COUNT
from launcher.plan.plan import Plan

PORTS = range(1024, 65536)
PREFERRED_PORTS = (61000, 50000, 40000, 20000)  # the first ports of ranges that are tried for HCCL, before all others


def offer(checked: CheckedNode, values: Mapping[str, Any]) -> str:
    """`values`, dotted key -> value, as overrides; '' where the plan has them already or a rule refuses the plan with them."""
    before = asked_config(checked.plan)
    asked = set_values(before, values)
    resolved = resolve(asked)
    problems = check(asked, dict(checked.stacks), resolved=resolved).problems
    if asked == before or set(problems) - set(checked.plan.verdict.problems):
        return ""
    return " ".join(map(write_override, values.items()))


def asked_config(plan: Plan) -> Config:
    """The plan's config before its strategy was chosen, as far as the plan shows it: what was left open is chosen again with an override."""
    typed = keys_of(plan.overrides)
    if not plan.choice:  # nothing was left open
        return plan.config
    name: dict[str, Any] = {"name": "auto", "gradient_checkpointing": None} if "strategy" not in typed else {}
    changes = {key: value for key, value in {**name, "micro_batch": None}.items() if f"strategy.{key}" not in typed}
    return replace(plan.config, strategy=replace(plan.config.strategy, **changes))


def offer_devices(checked: CheckedNode, most: int) -> str:
    """The largest number of devices per node, at most `most`, that the plan can have."""
    offers = (offer(checked, {"cluster.devices_per_node": count}) for count in range(most, 0, -1))
    return next(filter(None, offers), "")


def free_port(used: Collection[int], after: int) -> int:
    """The next port that is free, from `after` on; below it when there is none. 0 when all are in use."""
    return next((port for port in (*range(after, PORTS.stop), *range(PORTS.start, after)) if port not in used), 0)


def free_hccl_ports(used: Collection[int]) -> int:
    """The first port of a range for HCCL that is free; 0 when there is none."""
    starts = (*PREFERRED_PORTS, *range(PORTS.start, PORTS.stop - HCCL_PORT_COUNT, HCCL_PORT_COUNT))
    return next((first for first in starts if not set(used).intersection(range(first, first + HCCL_PORT_COUNT))), 0)
