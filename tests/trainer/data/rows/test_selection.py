"""Which rows are trained on and held out, by table, and what holds of every choice."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.trainer.conftest import make_spec
from trainer.contract import DataSpec
from trainer.contract.row_sets.selection import CannotSelect, Choice, SetSize, count_selected
from trainer.data.rows.selection import RowSelection, place_of, select

A, B = {"name": "a", "rows": 6}, {"name": "b", "rows": 4}


@pytest.fixture
def data(tmp_path: Any) -> DataSpec:
    return make_spec(tmp_path, tmp_path).data


def sizes_of(*sets: dict[str, Any]) -> list[SetSize]:
    return [SetSize(**each) for each in sets]


# (sets, options) -> rows that are trained on, in order
PLAIN: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], list[int]]] = {
    "all": ((A, B), {}, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "one set twice, half of the other": ((A | {"repeat": 2}, B | {"repeat": 0.5}), {}, [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5, 6, 7]),
    "the first ones of each": ((A, B), {"max_samples": 3}, [0, 1, 2, 6, 7, 8]),
    "more than there are": ((A, B), {"max_samples": 5}, [0, 1, 2, 3, 4, 6, 7, 8, 9]),
    "the first ones, twice": ((A | {"repeat": 2},), {"max_samples": 2}, [0, 1, 0, 1]),
    "a set without rows": (({"name": "none", "rows": 0}, B), {}, [0, 1, 2, 3]),
    "equal parts until the shorter ends": ((A, B), {"mixing": "interleave"}, [0, 1, 2, 3, 6, 7, 8, 9]),
    "equal parts until both end": (
        (A, B),
        {"mixing": "interleave", "mixing_stop": "all_exhausted"},
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 6, 7],
    ),
    "three to one": ((A | {"weight": 0.75}, B | {"weight": 0.25}), {"mixing": "interleave"}, [0, 1, 2, 3, 4, 5, 6, 7]),
    "weights without a sum of one": ((A | {"weight": 3}, B | {"weight": 1}), {"mixing": "interleave"}, [0, 1, 2, 3, 4, 5, 6, 7]),
    "a weight is for mixing only": ((A | {"weight": 3}, B | {"weight": 1}), {}, list(range(10))),
}


@pytest.mark.parametrize("name", PLAIN)
def test_the_rows_that_are_trained_on(data: DataSpec, name: str) -> None:
    sets, options, expected = PLAIN[name]
    trained, held = select(sizes_of(*sets), replace(data, **options))
    assert trained.rows().tolist() == expected and len(trained) == len(expected) and len(held) == 0
    assert [count.trained for count in count_selected(sizes_of(*sets), Choice(**options))] == [pick.count for pick in trained.picks]


@pytest.mark.parametrize("samples", [1, 3, 6, 8, 12, 15])
def test_drawn_samples(data: DataSpec, samples: int) -> None:
    """Without repetition as far as there are rows, and of the others each equally often or once more."""
    trained, _ = select(sizes_of(B, A | {"samples": samples}), data)
    rows = trained.rows()[4:]
    times = np.bincount(rows - 4, minlength=6)
    assert len(rows) == samples and times.sum() == samples and times.max() - times.min() <= 1
    drawn = {
        seed: tuple(select(sizes_of(A | {"samples": samples}), replace(data, split_seed=seed))[0].rows().tolist()) for seed in range(6)
    }
    assert len(set(drawn.values())) > 1 or samples == 6


# (sets, split) -> held-out rows of each set
SPLITS = {
    "a share": ((A, B), 0.2, [1, 1]),
    "a half": ((A, B), 0.5, [3, 2]),
    "a number": ((A, B), 3, [2, 1]),
    "one row": ((A, B), 1, [1, 0]),
    "a share of many": (({"name": "c", "rows": 1000}, {"name": "d", "rows": 10}), 0.05, [50, 0]),
    "of the rows that are drawn": ((A | {"samples": 3}, B), 0.5, [2, 2]),
    "of repeated rows": ((A | {"repeat": 3}, B), 0.5, [3, 2]),
    "of more samples than rows": ((A | {"samples": 12},), 0.5, [3]),
}


@pytest.mark.parametrize("name", SPLITS)
def test_a_split_divides_every_set(data: DataSpec, name: str) -> None:
    sets, split, expected = SPLITS[name]
    data = replace(data, split=split)
    trained, held = select(sizes_of(*sets), data)
    assert not set(trained.rows()) & set(held.rows()), "no row is on both sides"
    ends = np.cumsum([each["rows"] for each in sets])
    assert np.bincount(np.searchsorted(ends, held.rows(), side="right"), minlength=len(sets)).tolist() == expected
    assert len(held) == len(set(held.rows().tolist()))
    assert [count.held_out for count in count_selected(sizes_of(*sets), Choice(split=split))] == expected
    assert [count.trained for count in count_selected(sizes_of(*sets), Choice(split=split))] == [pick.count for pick in trained.picks]
    if all(not {"samples"} & set(each) for each in sets):
        assert sorted({*trained.rows().tolist(), *held.rows().tolist()}) == list(range(int(ends[-1]))), "every row is on one of them"


def test_another_seed_holds_out_other_rows(data: DataSpec) -> None:
    def held(seed: int) -> tuple[int, ...]:
        return tuple(select(sizes_of({"name": "a", "rows": 1000}), replace(data, split=0.05, split_seed=seed))[1].rows().tolist())

    assert held(1) == held(1) and len({held(seed) for seed in range(5)}) == 5


@pytest.mark.parametrize("seed", range(8))
def test_rows_that_share_an_image_stay_together(data: DataSpec, seed: int) -> None:
    groups = np.array([0, 0, 2, 3, 3, 3, 6, 0, 8, 9, 10, 11, 12, 13])
    sizes = sizes_of({"name": "a", "rows": 7}, {"name": "b", "rows": 7})
    trained, held = select(sizes, replace(data, split=0.5, split_seed=seed), groups)
    assert not set(groups[trained.rows()]) & set(groups[held.rows()])
    assert len(trained) + len(held) == 14 and 0 < len(held) <= 7


# (sets, options, groups) -> what is refused
REFUSED: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], Any, str]] = {
    "nothing is held out": ((B,), {"split": 0.1}, None, "data.evaluation=0.1 holds out no row of 4"),
    "all is held out": ((A, B), {"split": 10}, None, "holds out all of 10 rows"),
    "a set is held out": (({"name": "tiny", "rows": 1}, A), {"split": 0.9}, None, "all of the 1 rows of tiny"),
    "one image in all rows": ((A,), {"split": 0.5}, np.zeros(6, int), "holds out no row: rows that share an image stay together"),
    "one of the weights": ((A | {"weight": 1.0}, B), {"mixing": "interleave"}, None, "b has no weight"),
    "nothing to mix": ((A, {"name": "none", "rows": 0}), {"mixing": "interleave"}, None, "none has no rows to mix"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_do_not_fit(data: DataSpec, name: str) -> None:
    sets, options, groups, problem = REFUSED[name]
    with pytest.raises(CannotSelect, match=problem):
        select(sizes_of(*sets), replace(data, **options), groups)


@pytest.mark.parametrize("options", [{}, {"max_samples": 3}, {"split": 0.4}, {"mixing": "interleave", "mixing_stop": "all_exhausted"}])
def test_uses_of_a_row(data: DataSpec, options: dict[str, Any]) -> None:
    trained, _ = select(sizes_of(A | {"repeat": 3}, B | {"samples": 9}), replace(data, **options))
    rows = trained.rows().tolist()
    assert trained.times().tolist() == [rows.count(row) for row in range(10)]
    assert [trained.find(row) for row in range(10)] == [rows.index(row) if row in rows else None for row in range(10)]
    picked = [pick.row(number) for pick in trained.picks for number in range(pick.count)]
    assert picked == rows == [trained.row(number) for number in range(len(trained))]


def test_places() -> None:
    assert [place_of(row, (3, 3, 5)) for row in range(5)] == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1)]
    assert len(RowSelection(picks=())) == 0 and RowSelection(picks=()).rows().tolist() == []
