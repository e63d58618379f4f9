"""A run whose plan was written without the credentials of its addresses: what works without them, and how they are given again."""

import os
from collections.abc import Callable
from dataclasses import replace

import pytest

from launcher.commands.live.live_run import with_credentials
from launcher.config.credentials import give_credentials, masked_addresses
from launcher.config.schema import Delivery
from launcher.errors import ConfigRefused, ImageFailed
from launcher.image.build import refuse_unready
from launcher.image.stack import load_stacks
from launcher.plan.plan import Plan, move_plan
from launcher.redact import mask_credentials
from tests.launcher.conftest import PLACE, PROJECT

WHOLE = "https://ann:p@ss@mirror.example/simple"
MASKED = str(mask_credentials(WHOLE))
SAYS = f"export OMNILAUNCH_DELIVERY_INDEX={MASKED.replace('***', 'USER:PASSWORD')}"


@pytest.fixture
def plan(plan_for: Callable[..., Plan]) -> Plan:
    made = plan_for("cluster.runtime=docker")
    cluster = replace(made.config.cluster, delivery=replace(made.config.cluster.delivery, index=MASKED))
    return replace(made, config=replace(made.config, cluster=cluster))


def test_a_run_restarts_without_an_address_that_only_a_build_needs(plan: Plan) -> None:
    moved = move_plan(plan, plan.config.cluster, load_stacks(PROJECT / "images"), PLACE)
    assert moved.config.cluster.delivery.index == MASKED and moved.verdict.launchable


def test_a_build_names_the_variable_to_set(plan: Plan) -> None:
    with pytest.raises(ImageFailed) as caught:
        refuse_unready(plan.image, plan.config.cluster.delivery)
    assert SAYS in str(caught.value)
    refuse_unready(plan.image, replace(plan.config.cluster.delivery, index=WHOLE))


def test_the_environment_gives_the_credentials(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNILAUNCH_DELIVERY_INDEX", WHOLE)
    assert with_credentials(plan).config.cluster.delivery.index == WHOLE
    monkeypatch.delenv("OMNILAUNCH_DELIVERY_INDEX")
    assert with_credentials(plan) == plan


def test_another_address_is_refused_and_its_password_not_printed() -> None:
    with pytest.raises(ConfigRefused, match="OMNILAUNCH_DELIVERY_INDEX is another address") as caught:
        give_credentials(Delivery(index=MASKED), {"OMNILAUNCH_DELIVERY_INDEX": "https://bob:hidden@elsewhere.example/simple"})
    assert "hidden" not in str(caught.value)


def test_a_complete_address_needs_no_variable() -> None:
    assert masked_addresses(Delivery(index=WHOLE, find_links="/wheels")) == ""
    assert give_credentials(Delivery(index=WHOLE), dict(os.environ)) == Delivery(index=WHOLE)
