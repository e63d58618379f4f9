"""Colours where they are wanted, lines that fit, and wide characters counted."""

import pytest

from launcher.plan.text import measure, table, wants_colours, wrap


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


def test_lines_are_broken_at_spaces_and_indented() -> None:
    assert list(wrap("one two three", 9, first="a ", indent="  ")) == ["a one two", "  three"]
    assert list(wrap("\u4e2d\u6587 \u6a21\u578b", 8)) == ["\u4e2d\u6587", "\u6a21\u578b"]
    assert list(wrap("/a/very/long/path", 5, first="at ")) == ["at /a/very/long/path"]


def test_a_table_of_wide_names_is_straight() -> None:
    first, second = table({"\u4e2d": "x", "abc": "y"}).splitlines()
    assert measure(first) == measure(second) == 6
