"""What is said about a whole log: the first cause first, by rank and time, and the likely lines where nothing is known."""

import io

import pytest

from launcher.run.diagnosis import SHOWN
from launcher.run.failures.explanation import MOST_LIKELY, MOST_SHOWN, Explanation, explain
from launcher.run.failures.log_text import read_log


def explained(text: str) -> Explanation:
    return explain(read_log(io.BytesIO(text.encode()), "LOG"))


MEMORY = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB"
FULL = "OSError: [Errno 28] No space left on device"
TIMEOUT = "[E] [Rank 5] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=9)"
# log -> (row, line, rank) of each, the first first
LOGS = {
    f"step 1\n{MEMORY}\n": [("cuda-out-of-memory", 2, -1)],
    f"{TIMEOUT}\nstep\n{MEMORY}\n": [("cuda-out-of-memory", 3, -1), ("nccl-timeout", 1, 5)],
    f"[rank2]: {FULL}\n[rank0]: {MEMORY}\n": [("disk-full", 1, 2), ("cuda-out-of-memory", 2, 0)],
    # lines of ranks in another order than their times
    f"2026-01-02 10:00:05,100 [rank1]: {MEMORY}\n2026-01-02 10:00:04,900 [rank3]: {FULL}\n": [
        ("disk-full", 2, 3),
        ("cuda-out-of-memory", 1, 1),
    ],
    f"2026-01-02 10:00:05 {MEMORY}\n[E0102 09:00:00.1 x] {FULL}\n": [("cuda-out-of-memory", 1, -1), ("disk-full", 2, -1)],
    # two rows on one line: the first of the tables
    "[rank1]: EI0009: [PID: 3] Transport init error. Reason: x\n": [("hccl-transport", 1, 1)],
    f"\x1b[31m{MEMORY}\x1b[0m\n": [("cuda-out-of-memory", 1, -1)],
    f"50%|x\r60%|x\r{MEMORY}": [("cuda-out-of-memory", 1, -1)],
}


@pytest.mark.parametrize(("text", "found"), LOGS.items(), ids=[str(number) for number in range(len(LOGS))])
def test_the_first_cause_comes_first(text: str, found: list[tuple[str, int, int]]) -> None:
    assert [(each.symptom.name, each.number, each.rank) for each in explained(text).found] == found


def test_few_are_explained_in_full_and_all_are_of_one_kind() -> None:
    causes = [
        MEMORY,
        FULL,
        "RuntimeError: No CUDA GPUs are available",
        "exec x: exec format error",
        "OSError: [Errno 24] Too many open files",
    ]
    found = explained("\n".join([TIMEOUT, *causes]))
    assert len(found.found) == 6 and len(found.explained) == MOST_SHOWN and [each.number for each in found.explained] == [2, 3, 4]
    assert [each.symptom.name for each in found.others] == ["docker-wrong-architecture", "open-files", "nccl-timeout"]


def test_of_a_long_line_the_part_that_matched_is_shown() -> None:
    (found,) = explained("x" * 50_000 + MEMORY + "y" * 50_000).found
    assert MEMORY[:40] in found.line and len(found.line) <= SHOWN and found.number == 1


def test_a_traceback_that_is_one_line_of_json_is_explained() -> None:
    assert explained(
        '{"message": {"py_callstack": "Traceback ...' + "\\n  File x" * 900 + "\\nRuntimeError: No CUDA GPUs are available" + '"}}'
    ).found


LIKELY = {
    "": (),
    "step 1\nValueError: a\nok\nERROR x 1\nERROR x 2\n": ("ValueError: a", "ERROR x 2"),
    "训练失败：内存\nfine\n": ("训练失败：内存",),
    "my.package.SomeException: b\n[rank1]: KeyError: 'c'\n": ("my.package.SomeException: b", "[rank1]: KeyError: 'c'"),
}


@pytest.mark.parametrize(("text", "lines"), list(LIKELY.items())[1:], ids=["errors", "chinese", "exceptions"])
def test_where_nothing_is_known_the_lines_that_look_most_like_errors_are_shown(text: str, lines: tuple[str, ...]) -> None:
    found = explained(text)
    assert not found.found and tuple(each.line for each in found.likely) == lines and found.compared > 200


def test_there_are_never_many_likely_lines() -> None:
    found = explained("".join(f"ERROR {chr(97 + number)}\n" for number in range(20)) + "AssertionError\n")
    assert len(found.likely) == MOST_LIKELY and found.likely[-1].line == "AssertionError"
