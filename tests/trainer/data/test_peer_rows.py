"""Rows as their owners read them: ids and labels of each row of tests/golden/peers beside those that the peer's own code made of it."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.benchmarks.peer_rows.compare import SAME, Compared, compare, summarise
from tests.benchmarks.peer_rows.golden import GOLDEN, PeerSet, answers_only, as_expected, find_sets, fold
from tests.benchmarks.peer_rows.model import MODELS, write_model

SETS = {each.name: each for each in find_sets()}
LEAST = 0.95  # of the rows, counting those that wait for another part


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peer_models")
    for name in {each.model for each in SETS.values()}:
        write_model(name, folder / name)
    return folder


@cache
def read_differences() -> dict[str, dict[int, dict[str, str]]]:
    """Set -> row -> its entry. An entry with `rows: all` holds for each row of the set that has no other."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for entry in yaml.safe_load((GOLDEN / "differences.yaml").read_text(encoding="utf-8")) or []:
        for name in entry["sets"]:
            rows = range(1, 1000) if entry["rows"] == "all" else entry["rows"]
            for row in rows:
                found.setdefault(name, {}).setdefault(row, entry)
    return found


@cache
def compared(name: str, models: Path) -> tuple[Compared, ...]:
    return compare(SETS[name], models / SETS[name].model)


@pytest.mark.parametrize("name", SETS)
def test_each_row_is_equal_or_its_difference_is_known(name: str, models: Path) -> None:
    known = read_differences().get(name, {})
    unknown = [f"row {row.row}: {row.outcome}: {row.why}" for row in compared(name, models) if not agrees(row, known.get(row.row))]
    assert not unknown, "\n".join(unknown)


def agrees(row: Compared, entry: dict[str, Any] | None) -> bool:
    if entry is None:
        return row.outcome in SAME
    known = entry["outcome"]
    return row.outcome in ([known] if isinstance(known, str) else known)


def test_the_share_of_equal_rows(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = {name: compared(name, models) for name in SETS}
    with capsys.disabled():
        print("\n" + summarise(found))
    entries = [(row, read_differences().get(name, {}).get(row.row, {})) for name in SETS for row in found[name]]
    counted = [(row, entry) for row, entry in entries if entry.get("counts", True)]
    same = sum(row.outcome in SAME for row, _ in counted)
    assert len(counted) >= 185
    assert same / len(counted) >= LEAST, f"{same} equal of {len(counted)}"


def test_every_difference_says_why_and_names_rows_that_exist() -> None:
    for entry in yaml.safe_load((GOLDEN / "differences.yaml").read_text(encoding="utf-8")):
        assert set(entry) <= {"sets", "rows", "outcome", "why", "counts"} and len(entry["why"]) > 20
        for name in entry["sets"]:
            assert name in SETS
            assert entry["rows"] == "all" or set(entry["rows"]) <= set(rows_of(SETS[name]))


def rows_of(each: PeerSet) -> list[int]:
    return [*range(1, 1 + len((each.folder / "expected.jsonl").read_text(encoding="utf-8").splitlines()))]


def test_every_model_is_used() -> None:
    assert {each.model for each in SETS.values()} == set(MODELS)


# ------------------------------------------------------------------------------------------------- the comparison itself


def test_a_run_of_image_tokens_is_one() -> None:
    made = fold([1, 9, 9, 9, 2, 9, 3], [-100, -100, -100, -100, -100, -100, 3], image=9)
    assert made == as_expected({"ids": [1, 9, 2, 9, 3], "trained": [[4, 5]]})
    with pytest.raises(ValueError, match=r"a label is not the token"):
        fold([1, 2], [-100, 3], image=9)


def test_what_a_peer_trains_beside_the_answer() -> None:
    made = as_expected({"ids": [5, 6, 7, 8, 4, 3], "trained": [[0, 6]]})
    assert answers_only(made, header=(5, 6), end=4, separator=(3,)).trained == ((2, 5),)
    assert answers_only(made, header=(), end=4, separator=()).trained == ((0, 6),)
    assert answers_only(made, header=(), end=8, separator=(3,)).trained == ((0, 6),), (
        "without the end mark before it, it is part of the answer"
    )
