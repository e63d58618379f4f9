import math
from collections.abc import Callable
from typing import Any

import pytest

from trainer.contract import Optimizer
from trainer.optim.schedule import DECAY, lr_at, warmup_steps


def rates(steps: int, **values: object) -> list[float]:
    optimizer = Optimizer(lr=1.0, **values)  # type: ignore[arg-type]
    return [lr_at(step, steps, optimizer) for step in range(1, steps + 1)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"schedule": "constant", "warmup": 0}, [1, 1, 1, 1]),
        ({"schedule": "constant", "warmup": 2}, [0.5, 1, 1, 1]),
        ({"schedule": "linear", "warmup": 0}, [1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup": 2}, [0.5, 1, 1, 0.5]),
        ({"schedule": "cosine", "warmup": 0}, [1, 0.5 + math.sqrt(0.125), 0.5, 0.5 - math.sqrt(0.125)]),
        ({"schedule": "cosine", "warmup": 0.5}, [0.5, 1, 1, 0.5]),
        ({"schedule": "cosine", "warmup": 4}, [0.25, 0.5, 0.75, 1]),
        ({"schedule": "cosine", "warmup": 9}, [0.25, 0.5, 0.75, 1]),
    ],
)
def test_rates(values: dict[str, object], expected: list[float]) -> None:
    assert rates(4, **values) == pytest.approx(expected)


def test_no_step_has_a_rate_of_zero() -> None:
    assert all(rate > 0 for schedule in ("constant", "linear", "cosine") for rate in rates(300, schedule=schedule, warmup=20))


@pytest.mark.parametrize(
    ("warmup", "steps", "expected"), [(0.03, 1000, 30), (0.03, 10, 1), (0.07, 100, 7), (0, 10, 0), (1, 10, 1), (20, 10, 10)]
)
def test_warmup_is_a_share_below_one_and_a_count_from_one_on(warmup: float, steps: int, expected: int) -> None:
    assert warmup_steps(steps, Optimizer(lr=1.0, warmup=warmup)) == expected


def transformers_rates(steps: int, warmup: int, make: Callable[..., Any], **values: float) -> list[float]:
    """What a schedule of transformers gives in each step, for a peak of 1."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer, num_warmup_steps=warmup, num_training_steps=steps, **values)
    found = [scheduler.get_last_lr()[0]]
    for _ in range(steps - 1):
        optimizer.step()
        scheduler.step()
        found.append(scheduler.get_last_lr()[0])
    return found


SCHEDULES: tuple[tuple[dict[str, Any], str, dict[str, float]], ...] = (
    ({"schedule": "linear"}, "get_linear_schedule_with_warmup", {}),
    ({"schedule": "linear", "final_ratio": 0.1}, "get_polynomial_decay_schedule_with_warmup", {"lr_end": 0.1, "power": 1.0}),
    ({"schedule": "cosine"}, "get_cosine_schedule_with_warmup", {}),
    ({"schedule": "cosine", "final_ratio": 0.25}, "get_cosine_with_min_lr_schedule_with_warmup", {"min_lr_rate": 0.25}),
    ({"schedule": "cosine_restarts"}, "get_cosine_with_hard_restarts_schedule_with_warmup", {"num_cycles": 1}),
    ({"schedule": "cosine_restarts", "cycles": 3}, "get_cosine_with_hard_restarts_schedule_with_warmup", {"num_cycles": 3}),
    ({"schedule": "polynomial"}, "get_polynomial_decay_schedule_with_warmup", {"lr_end": 0.0, "power": 1.0}),
    (
        {"schedule": "polynomial", "power": 2.5, "final_ratio": 0.05},
        "get_polynomial_decay_schedule_with_warmup",
        {"lr_end": 0.05, "power": 2.5},
    ),
    ({"schedule": "wsd", "decay": 0.2}, "get_wsd_schedule", {"share": 0.2}),
    ({"schedule": "wsd", "decay": 0.5, "final_ratio": 0.1}, "get_wsd_schedule", {"share": 0.5, "min_lr_ratio": 0.1}),
    ({"schedule": "wsd", "decay": 2}, "get_wsd_schedule", {"count": 2}),
    ({"schedule": "wsd", "decay": 0.0}, "get_wsd_schedule", {"share": 0.0}),
)


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0), (40, 6), (7, 1), (3, 0.03), (1, 0), (5, 5)])
@pytest.mark.parametrize(("values", "name", "theirs"), SCHEDULES, ids=[str(values) for values, *_ in SCHEDULES])
def test_rates_are_those_of_transformers(values: dict[str, Any], name: str, theirs: dict[str, float], steps: int, warmup: float) -> None:
    """After the warm-up in the same step; within it one step earlier, so that no step has a rate of zero."""
    from transformers import optimization

    counted = warmup_steps(steps, Optimizer(lr=1.0, warmup=warmup))
    options = dict(theirs)
    if "share" in options:
        options["num_decay_steps"] = min(math.ceil(options.pop("share") * steps - 1e-9), steps - counted)
    if "count" in options:
        options["num_decay_steps"] = min(options.pop("count"), steps - counted)
    expected = transformers_rates(steps, counted, getattr(optimization, name), **options)
    found = rates(steps, warmup=warmup, **values)
    assert found[counted:] == pytest.approx(expected[counted:steps], abs=1e-12)
    assert found[:counted] == pytest.approx([step / counted for step in range(1, counted + 1)])
    if "min_lr_ratio" not in options:  # their wsd starts its warm-up there
        assert found[: max(0, counted - 1)] == pytest.approx(expected[1:counted], abs=1e-12)


def test_the_peak_is_reached_in_the_shortest_run() -> None:
    assert [rates(1, schedule=name, warmup=warmup) for name in DECAY for warmup in (0, 0.03, 1, 9)] == [[1.0]] * 4 * len(DECAY)
    assert rates(3, schedule="cosine", warmup=0.03)[0] == 1.0, "a share of 0.03 of 3 steps is one step"


def test_a_rate_above_zero_in_every_step_of_every_schedule() -> None:
    assert all(rate > 0 for name in DECAY for steps in (1, 2, 3, 300) for rate in rates(steps, schedule=name, warmup=0.03))


def test_defaults_change_no_bit_of_earlier_schedules() -> None:
    for step in range(1, 301):
        progress = (step - 1 - 9) / (300 - 9)
        expected = {"linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "constant": 1.0}
        for name, factor in expected.items():
            assert lr_at(step, 300, Optimizer(lr=2e-5, schedule=name)) == (2e-5 * step / 9 if step <= 9 else 2e-5 * factor)  # type: ignore[arg-type]


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_the_first_step_of_a_short_run_trains(schedule: str, steps: int) -> None:
    """With the shares of conf/stage the warm-up is one step of at most 33, at the full rate."""
    for warmup in (0.03, 0.05):
        first = rates(steps, schedule=schedule, warmup=warmup)[0]
        assert first == pytest.approx(1 / warmup_steps(steps, Optimizer(lr=1.0, warmup=warmup)))
        assert first == 1 if steps <= 10 else first >= 1 / 3
