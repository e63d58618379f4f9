"""Colours where they are wanted, lines that fit, and wide characters counted."""

import pytest

from launcher.plan.text import duration, figure, measure, shorten, size, table, wants_colours, wrap


@pytest.mark.parametrize(
    ("environ", "terminal", "wanted"),
    [
        ({}, True, True),
        ({}, False, False),
        ({"NO_COLOR": "1"}, True, False),
        ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, True, False),
        ({"NO_COLOR": ""}, True, True),
        ({"FORCE_COLOR": "1"}, False, True),
        ({"CLICOLOR_FORCE": "1"}, False, True),
        ({"CLICOLOR_FORCE": "0"}, False, False),
        ({"CLICOLOR": "0"}, True, False),
        ({"TERM": "dumb"}, True, False),
    ],
)
def test_colours_follow_the_usual_variables(environ: dict[str, str], terminal: bool, wanted: bool) -> None:
    assert wants_colours(environ, terminal=terminal) == wanted


@pytest.mark.parametrize(("text", "columns"), [("abc", 3), ("\u4e2d\u6587\u6a21\u578b", 8), ("e\u0301", 1), ("\uff21b", 3), ("", 0)])
def test_wide_characters_take_two_columns(text: str, columns: int) -> None:
    assert measure(text) == columns


@pytest.mark.parametrize(
    ("text", "most", "shown"),
    [
        ("short  \n one", 9, "short one"),
        ("0123456789", 10, "0123456789"),
        ("0123456789", 7, "012…789"),
        ("0123456789", 6, "012…89"),
        ("中文模型中文模型", 9, "中文…模型"),
        ("中文模型中文模型", 8, "中文…型"),
        ("中a", 1, "…"),
    ],
)
def test_a_long_text_keeps_both_ends_and_its_columns(text: str, most: int, shown: str) -> None:
    assert shorten(text, most) == shown and measure(shown) <= most


def test_lines_are_broken_at_spaces_and_indented() -> None:
    assert list(wrap("one two three", 9, first="a ", indent="  ")) == ["a one two", "  three"]
    assert list(wrap("\u4e2d\u6587 \u6a21\u578b", 8)) == ["\u4e2d\u6587", "\u6a21\u578b"]
    assert list(wrap("/a/very/long/path", 5, first="at ")) == ["at /a/very/long/path"]


def test_a_table_of_wide_names_is_straight() -> None:
    first, second = table({"\u4e2d": "x", "abc": "y"}).splitlines()
    assert measure(first) == measure(second) == 6


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1.36012, "1.360"), (0.0076123, "0.007612"), (0.963, "0.9630"), (12.3456, "12.35"), (153.786, "153.8"), (-0.5, "-0.5000"),
        (5256.4, "5,256"), (1638864.0, "1,638,864"), (26078.43, "26,078"), (9999.6, "10,000"), (297.0, "297"), (0.0, "0"),
        (4.02e-7, "4.02e-07"), (0.00099, "9.90e-04"), (float("nan"), "nan"), (float("inf"), "inf"),
    ],
)  # fmt: skip
def test_figures_have_four_significant_digits(value: float, text: str) -> None:
    assert figure(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0.0 s"), (0.84, "0.8 s"), (9.94, "9.9 s"), (11.067, "11 s"), (59.4, "59 s"), (59.6, "1 min 00 s"), (200, "3 min 20 s")),
        *((3599.7, "1 h 00 min"), (3781, "1 h 03 min"), (86399, "23 h 59 min"), (86400, "1 d 00 h"), (190800, "2 d 05 h")),
    ],
)
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 MiB"), (146 * 2**20, "146 MiB"), (2**30, "1.0 GiB"), (63.25 * 2**30, "63.2 GiB"), (2**41, "2,048.0 GiB")],
)
def test_sizes(size_bytes: float, text: str) -> None:
    assert size(size_bytes) == text
