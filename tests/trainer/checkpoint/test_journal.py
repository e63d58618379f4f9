from pathlib import Path

import pytest

from trainer.checkpoint.journal import Journal

ROWS = [{"row": 1, "answer": "größer"}, {"row": 2, "answer": "7"}]


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    first = Journal(tmp_path / "j", "task")
    first.add(3, ROWS)
    first.add(5, ROWS[:1])
    again = Journal(tmp_path / "j", "task")
    assert again.done == {3: ROWS, 5: ROWS[:1]}
    again.remove()
    assert not (tmp_path / "j").exists()


def test_a_torn_line_is_cut_wherever_it_tore(tmp_path: Path) -> None:
    """Every length of the file that a kill could have left: the whole batches stand, and what follows is written behind them."""
    whole = Journal(tmp_path / "whole", "task")
    whole.add(0, ROWS)
    whole.add(1, ROWS)
    content = (tmp_path / "whole").read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == 10]
    assert len(ends) == 3
    for length in range(len(content) + 1):
        (tmp_path / "torn").write_bytes(content[:length])
        torn = Journal(tmp_path / "torn", "task")
        stands = sum(length >= end for end in ends[1:])
        assert sorted(torn.done) == list(range(stands))
        for number in range(stands, 2):
            torn.add(number, ROWS)
        assert (tmp_path / "torn").read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{}\n", b"\xff\xfe\n[1, []]\n", b'{"of": "task"}\n7\n', b'{"of": "task"}\n[1]\n', b"\n\n"])
def test_what_is_no_journal_is_begun_anew(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(content)
    assert Journal(tmp_path / "j", "task").done == {}


def test_a_journal_of_another_task_is_begun_anew(tmp_path: Path) -> None:
    Journal(tmp_path / "j", "task").add(0, ROWS)
    assert Journal(tmp_path / "j", "other").done == {}
    assert Journal(tmp_path / "j", "task").done == {}
