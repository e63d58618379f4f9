"""The plan of any overrides, with a local context that is the same on every machine."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.image.stack import load_stacks
from launcher.plan.plan import LocalContext, Plan, make_plan

PROJECT = Path(__file__).resolve().parents[2]
PLACE = LocalContext(project=PROJECT, here=Path("/home/ann/work"), interpreter="/venv/bin/python", user="1000:1000")


@pytest.fixture(scope="session")
def plan_for() -> Callable[..., Plan]:
    stacks = load_stacks(PROJECT / "images")

    def plan(*overrides: str) -> Plan:
        return make_plan(compose(overrides, PROJECT / "conf"), stacks, PLACE, run_id="R", overrides=overrides)

    return plan
