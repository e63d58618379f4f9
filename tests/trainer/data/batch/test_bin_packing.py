import pytest
from hypothesis import given, settings, strategies as st

from trainer.data.batch.bin_packing import fill_bins

LENGTHS = st.lists(st.integers(1, 100), max_size=80)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, room=st.integers(100, 400), multiple=st.integers(1, 9))
def test_every_sample_is_in_one_bin_and_no_bin_overflows(lengths: list[int], room: int, multiple: int) -> None:
    bins = fill_bins(lengths, room, multiple=multiple)
    assert sorted(place for one in bins for place in one) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in one) <= room for one in bins)
    assert len(bins) % multiple == 0
    assert bins == fill_bins(lengths, room, multiple=multiple)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, room=st.integers(100, 400))
def test_few_bins(lengths: list[int], room: int) -> None:
    """First-fit decreasing never takes more than 11/9 of the fewest bins and 6/9; the sum of the lengths bounds those from below."""
    assert -(-sum(lengths) // room) <= len(fill_bins(lengths, room)) <= 11 / 9 * fewest_by_search(lengths, room) + 6 / 9


def fewest_by_search(lengths: list[int], room: int) -> int:
    """An upper bound of the optimum: the best of several simple fillings. A bound by the optimum itself holds all the more."""
    best = len(lengths)
    for order in (sorted(lengths, reverse=True), sorted(lengths), lengths):
        bins: list[int] = []
        for length in order:
            fitting = [place for place, used in enumerate(bins) if used + length <= room]
            if fitting:
                bins[max(fitting, key=lambda place: bins[place])] += length
            else:
                bins.append(length)
        best = min(best, len(bins))
    return best


@pytest.mark.parametrize(
    ("lengths", "room", "multiple", "expected"),
    [
        ([6, 5, 4, 3, 2], 10, 1, ((0, 2), (1, 3, 4))),  # 10 and 10: as tight as can be
        ([4, 4, 4, 4], 16, 2, ((0, 2), (1, 3))),  # one bin would do: two ranks take half each
        ([9], 10, 3, ((0,), (), ())),  # two ranks with nothing to do
        ([], 10, 2, ()),
        ([7, 6, 3, 2, 2], 10, 1, ((0, 2), (1, 3, 4))),
    ],
)
def test_examples(lengths: list[int], room: int, multiple: int, expected: tuple[tuple[int, ...], ...]) -> None:
    assert fill_bins(lengths, room, multiple=multiple) == expected


def test_where_even_ones_do_not_fit_they_are_tight() -> None:
    """[7, 6, 5, 4, 4, 4] into 3 bins of 10: evenly it would be 7+4, so that first fit decides."""
    bins = fill_bins([7, 6, 5, 4, 3, 5], 10)
    assert bins == ((0, 4), (1, 3), (2, 5))


def test_too_long() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit into a row of 10"):
        fill_bins([3, 11], 10)
