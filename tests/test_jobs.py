"""docs/jobs.md takes no more commands and words than the peers, and docs/status.md says what it counts."""

import pytest

from tests.jobs import OURS, PEERS, STATUS, Effort, count, jobs, with_table


def test_the_status_page_has_the_counts() -> None:
    text = STATUS.read_text(encoding="utf-8")
    assert with_table(text) == text, "run: python -m tests.jobs"


@pytest.mark.parametrize(("title", "efforts"), jobs().items(), ids=lambda value: value if isinstance(value, str) else "")
def test_no_job_takes_more_than_a_peer(title: str, efforts: dict[str, Effort]) -> None:
    ours = efforts[OURS]
    for theirs in (efforts[peer] for peer in PEERS if peer in efforts):
        assert ours.commands <= theirs.commands and ours.words <= theirs.words, title


def test_there_are_six_jobs() -> None:
    assert len(jobs()) == 6 and sum(len(efforts) > 1 for efforts in jobs().values()) == 4


def test_how_words_are_counted() -> None:
    assert count('$ make train A=b ARGS="c=d e=f"  # a note\n') == Effort(commands=1, words=5)
    assert count("tool train x.yaml\n# x.yaml\na: b\nc: d e\n") == Effort(commands=1, words=8)
