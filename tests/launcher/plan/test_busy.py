"""Two threads on cores that other work has taken were 25 times slower than one."""

from collections.abc import Callable

import pytest

from launcher.plan.busy import describe_busy
from launcher.plan.plan import Plan


@pytest.mark.parametrize(
    ("words", "load", "said"),
    [
        ((), 20.6, "this machine has 2 core(s), and its load is 20.6"),
        ((), 1.9, ""),
        (("cluster.devices_per_node=2",), 0.1, "the ranks have 4 threads"),
        (("hardware.threads=1",), 20.6, ""),
        (("cluster.environment.OMP_WAIT_POLICY=passive",), 20.6, ""),
        (("cluster=example",), 20.6, ""),
    ],
)
def test_a_busy_machine_is_named(plan_for: Callable[..., Plan], words: tuple[str, ...], load: float, said: str) -> None:
    notes = describe_busy(plan_for(*words), load=load, cores=2)
    assert len(notes) == bool(said) and said in "".join(notes)


def test_what_the_note_offers_is_accepted_and_reaches_the_ranks(plan_for: Callable[..., Plan]) -> None:
    (note,) = describe_busy(plan_for(), load=9.0, cores=2)
    sleeping, one = (word for word in note.split() if "=" in word)
    assert plan_for(sleeping).commands[0].environment["OMP_WAIT_POLICY"] == "passive"
    assert plan_for(one).spec.device.threads == 1
