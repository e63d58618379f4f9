"""The ranks of a node measure each sample once, together."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from tests.trainer.data.conftest import with_data
from trainer.contract import InputRefused
from trainer.data.batch import length_table
from trainer.data.batch.length_table import LengthTable, open_table, private_table


def test_ranks_share_the_work(tmp_path: Path) -> None:
    known = np.zeros(1000, np.int32)
    counted: list[list[int]] = [[] for _ in range(4)]
    found: list[list[int]] = [[] for _ in range(4)]

    def work(place: int) -> None:
        table = LengthTable(known=known, place=place, ranks=4)

        def count(number: int) -> int:
            counted[place].append(number)
            return number + 7

        for start in range(0, 1000, 100):
            found[place] += table.measure(range(start, start + 100), count)

    threads = [Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[number + 7 for number in range(1000)]] * 4
    times = Counter(number for one in counted for number in one)
    assert set(times) == set(range(1000)) and max(times.values()) <= 4


def test_a_rank_that_comes_later_measures_nothing() -> None:
    known = np.zeros(8, np.int32)
    LengthTable(known=known, place=0, ranks=2).measure(range(8), lambda number: number + 1)
    later = LengthTable(known=known, place=1, ranks=2)
    assert later.measure([5, 0], lambda _: pytest.fail("measured again")) == [6, 1]


def test_each_rank_begins_with_its_own_part() -> None:
    order: list[int] = []
    LengthTable(known=np.zeros(8, np.int32), place=1, ranks=2).measure(range(8), lambda number: order.append(number) or 1)
    assert order == [4, 5, 6, 7, 0, 1, 2, 3]


def test_a_sample_that_cannot_be_measured_is_not_known() -> None:
    def refuse(number: int) -> int:
        raise InputRefused("bad")

    table = private_table(3)
    with pytest.raises(InputRefused):
        table.measure([1], refuse)
    assert table.measure([1], lambda _: 9) == [9]


def test_the_memory_of_the_ranks_of_a_node_is_one(spec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = with_data(spec, length_aware="window")
    monkeypatch.setattr(length_table.tempfile, "tempdir", str(tmp_path))
    made = length_table.make_file(10)
    monkeypatch.setattr(length_table, "make_file", lambda _: made)
    host = length_table.socket.gethostname()
    monkeypatch.setattr(length_table, "gather_objects", lambda value: [(host, made), (host, "")])
    one = open_table(spec, 10, 1)
    other = open_table(spec, 10, 0)
    one.known[3] = 77
    assert other.known[3] == 77 and (one.place, one.ranks, other.place) == (1, 2, 0)
    assert list(tmp_path.iterdir()) == [], "no file is left"
    alone = replace(spec, device=replace(spec.device, world_size=1, devices_per_node=1))
    assert open_table(alone, 10, 0).ranks == open_table(with_data(spec, length_aware="off"), 10, 0).ranks == 1
