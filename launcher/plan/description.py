"""A plan as text for a person: short by default, everything with `full`; or as JSON."""

import json

from launcher.plan.full import describe_full
from launcher.plan.plan import Plan, to_plain
from launcher.plan.short import describe_short


def plan_json(plan: Plan) -> str:
    return json.dumps(to_plain(plan), indent=2, ensure_ascii=False)


def describe_plan(
    plan: Plan, *, full: bool = False, colours: bool = False, width: int = 100, built: bool | None = None, launching: bool = False
) -> str:
    """One screen of `width` columns; with `full`, everything that `launch` would do, then the verdict. `built`: whether this machine's
    Docker engine has the image, None = not known. `launching`: printed by `launch`, which needs no next command."""
    return describe_full(plan) if full else describe_short(plan, colours=colours, width=width, built=built, launching=launching)
