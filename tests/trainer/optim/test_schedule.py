import math

import pytest

from trainer.contract import Optimizer
from trainer.optim.schedule import lr_at, warmup_steps


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


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50])
def test_the_first_step_of_a_short_run_trains(schedule: str, steps: int) -> None:
    """With the shares of conf/stage the warm-up is one step of at most 33, at the full rate."""
    for warmup in (0.03, 0.05):
        first = rates(steps, schedule=schedule, warmup=warmup)[0]
        assert first == pytest.approx(1 / warmup_steps(steps, Optimizer(lr=1.0, warmup=warmup)))
        assert first == 1 if steps <= 10 else first >= 1 / 3
