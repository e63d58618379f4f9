"""Long lists as text: the first entries, and the number of the others."""

import pytest

from trainer.contract.listing import describe_changes, keep_some, list_some


@pytest.mark.parametrize(
    ("names", "text", "lines"),
    [
        ((), "", ()),
        (("a", "b"), "a; b", ("a", "b")),
        (("a", "b", "c"), "a; b and 1 more", ("a", "b", "and 1 more")),
        (tuple(map(str, range(1502))), "0; 1 and 1,500 more", ("0", "1", "and 1,500 more")),
    ],
)
def test_a_long_list_says_how_many_more(names: tuple[str, ...], text: str, lines: tuple[str, ...]) -> None:
    assert list_some(names, 2, "; ") == text and keep_some(names, 2) == lines


def test_each_change_of_files_has_a_line() -> None:
    expected, found = {"same": "1", "gone": "2", "other": "3"}, {"same": "1", "other": "4", "added": "5"}
    assert describe_changes(expected, found, 9) == ("added: new", "gone: missing", "other: another file")
    assert describe_changes(expected, found, 1) == ("added: new", "and 2 more")
    assert describe_changes(expected, expected, 1) == ()
    lines = describe_changes({str(number): "1" for number in range(25)}, {})
    assert len(lines) == 11 and lines[-1] == "and 15 more"
