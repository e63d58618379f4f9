"""Text of strangers: encodings, control characters, long lines and long logs, and what is no text."""

import io

import pytest

from launcher.errors import ConfigRefused
from launcher.run.failures.log_text import CHUNK_BYTES, HEAD_BYTES, OVERLAP, PIECE, TAIL_BYTES, LogText, printable_line, read_log


def read(data: bytes, most: int = 0) -> LogText:
    return read_log(io.BytesIO(data), "LOG", most=most)


# what a line holds -> what is searched and shown
LINES = {
    "plain": "plain",
    "\x1b[31mred\x1b[0m and \x1b[1;4;38;5;12mmore\x1b[m": "red and more",
    "\x1b]0;a title\x07text": "text",
    "\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\": "link",
    "\x1b[2J\x1b[1;1H\x1b[?25lmoved": "moved",
    "cut \x1b[31": "cut 31",
    "\x1bPq#0;2;0;0;0\x1b\\sixel": "sixel",
    "bell\x07 back\x08 del\x7f null\x00": "bell back del null",
    "c1 \x9b31m": "c1 31m",
    "turned \u202eexe.txt\u202c and \u2066hidden\u2069 and \u200bzero": "turned exe.txt and hidden and zero",
    "line \u2028break\x85 here": "line break here",
    "中文 错误": "中文 错误",
    "tab\tstays": "tab\tstays",
}


@pytest.mark.parametrize(("line", "shown"), LINES.items(), ids=[str(number) for number in range(len(LINES))])
def test_a_line_as_it_is_searched_and_shown(line: str, shown: str) -> None:
    assert printable_line(line) == shown
    assert read(line.encode("utf-8", "surrogatepass") + b"\nnext\n").text == f"{shown}\nnext"


ENCODED = {
    "utf-8": "错误：无法连接\nsecond\n".encode(),
    "with a mark of the byte order": "错误：无法连接\nsecond\n".encode("utf-8-sig"),
    "gb18030": "错误：无法连接\nsecond\n".encode("gb18030"),
    "utf-16, little end first": b"\xff\xfe" + "错误：无法连接\nsecond\n".encode("utf-16-le"),
    "utf-16, big end first": b"\xfe\xff" + "错误：无法连接\nsecond\n".encode("utf-16-be"),
    "with a hole": "错误：无法连接\n".encode() + bytes(5000) + b"second\n",
    "lines of Windows": "错误：无法连接\r\nsecond\r\n".encode(),
}


@pytest.mark.parametrize("data", ENCODED.values(), ids=list(ENCODED))
def test_encodings(data: bytes) -> None:
    log = read(data)
    assert log.text == "错误：无法连接\nsecond" and log.numbers == (1, 2) and log.lines == 2


def test_bytes_that_no_encoding_has_do_not_stop_the_reading() -> None:
    assert read(b"a \xff\xfe b\nRuntimeError: \xe4\xb8 cut\n").text.splitlines()[1] == "RuntimeError: \ufffd cut"


def test_the_parts_of_a_progress_bar_belong_to_one_line() -> None:
    log = read(b"one\n 1%|  \r 2%|  \rRuntimeError: x\nfour\n")
    assert log.text.split("\n") == ["one", " 1%|  ", " 2%|  ", "RuntimeError: x", "four"] and log.numbers == (1, 2, 2, 2, 3)


def test_the_rank_in_front_is_taken_off_and_kept() -> None:
    from trainer.contract import RANK_PREFIX

    log = read(f"{RANK_PREFIX.format(rank=3)}MemoryError\nMemoryError\n".encode())
    assert log.text == "MemoryError\nMemoryError" and log.ranks == (3, -1)


@pytest.mark.parametrize("place", [0, 1, PIECE - 5, PIECE, 5 * PIECE - 3, 12_345])
def test_nothing_is_lost_between_the_parts_of_a_long_line(place: int) -> None:
    needle = "n" * (OVERLAP - 1)
    log = read(b"x" * place + needle.encode() + b"x" * 40_000)
    assert any(needle in part for part in log.text.split("\n")) and {*log.numbers} == {1}
    assert max(map(len, log.text.split("\n"))) <= PIECE


def test_a_line_of_10_mb() -> None:
    log = read(b"start\n" + b"x" * 10_000_000 + b" the end\nlast\n")
    assert log.lines == 3 and log.text.startswith("start\n") and log.text.endswith("the end\nlast") and log.numbers[-1] == 3
    assert log.skipped > 10_000_000 - HEAD_BYTES - TAIL_BYTES - 2 * CHUNK_BYTES


def test_of_a_long_log_head_and_tail_are_searched_and_lines_keep_their_numbers() -> None:
    lines = [b"line %07d\n" % number for number in range(1, 1_000_001)]
    log = read(b"".join(lines))
    by_number = dict(zip(log.numbers, log.text.split("\n"), strict=True))
    assert log.lines == log.numbers[-1] == 1_000_000 and log.size == 13_000_000
    assert log.skipped == log.size - sum(len(text) + 1 for text in by_number.values() if len(text) == 12) - (HEAD_BYTES % 13)
    assert all(text == f"line {number:07}" for number, text in by_number.items() if len(text) == 12) and 500_000 not in by_number


def test_a_pipe_that_never_ends_is_read_up_to_a_limit() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int = -1) -> bytes:
            self.given += size
            return b"y\n" * (size // 2)

    endless = Endless()
    log = read_log(endless, "the input", most=4 << 20)  # type: ignore[arg-type]
    assert not log.ended and endless.given == log.size == 4 << 20


NO_TEXT = {
    "gzip": b"\x1f\x8b\x08\x00" + bytes(range(256)),
    "a program": b"\x7fELF" + bytes(500),
    "random": bytes(range(256)) * 40,
    "an image": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
}


@pytest.mark.parametrize("data", NO_TEXT.values(), ids=list(NO_TEXT))
def test_what_is_no_text_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigRefused, match=r"LOG is not text\. If it is compressed, unpack it first: zcat LOG \| omnilaunch explain -"):
        read(data)


@pytest.mark.parametrize("data", [b"", bytes(10_000)])
def test_what_is_empty_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigRefused, match="LOG is empty"):
        read(data)
