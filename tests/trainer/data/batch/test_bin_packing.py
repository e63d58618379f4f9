import pytest
from hypothesis import given, settings, strategies as st

from trainer.data.batch.bin_packing import fill_bins

LENGTHS = st.lists(st.integers(1, 100), max_size=80)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(100, 400), multiple=st.integers(1, 9))
def test_every_sample_is_in_one_bin_and_no_bin_overflows(lengths: list[int], capacity: int, multiple: int) -> None:
    bins = fill_bins(lengths, capacity, multiple=multiple)
    assert sorted(index for one in bins for index in one) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in one) <= capacity for one in bins)
    assert len(bins) % multiple == 0
    assert bins == fill_bins(lengths, capacity, multiple=multiple)


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(100, 400))
def test_few_bins(lengths: list[int], capacity: int) -> None:
    """First-fit decreasing needs at most 11/9 OPT + 6/9 bins; the sum of the lengths is a lower bound."""
    assert -(-sum(lengths) // capacity) <= len(fill_bins(lengths, capacity)) <= 11 / 9 * fewest_by_search(lengths, capacity) + 6 / 9


def fewest_by_search(lengths: list[int], capacity: int) -> int:
    """An upper bound of the optimum: the best of several simple strategies."""
    best = len(lengths)
    for order in (sorted(lengths, reverse=True), sorted(lengths), lengths):
        bins: list[int] = []
        for length in order:
            fitting = [index for index, used in enumerate(bins) if used + length <= capacity]
            if fitting:
                bins[max(fitting, key=lambda index: bins[index])] += length
            else:
                bins.append(length)
        best = min(best, len(bins))
    return best


@pytest.mark.parametrize(
    ("lengths", "capacity", "multiple", "expected"),
    [
        ([6, 5, 4, 3, 2], 10, 1, ((0, 2), (1, 3, 4))),  # 10 and 10: as tight as possible
        ([4, 4, 4, 4], 16, 2, ((0, 2), (1, 3))),  # one bin would be enough: two ranks get half each
        ([9], 10, 3, ((0,), (), ())),  # two ranks without samples
        ([], 10, 2, ()),
        ([7, 6, 3, 2, 2], 10, 1, ((0, 2), (1, 3, 4))),
    ],
)
def test_examples(lengths: list[int], capacity: int, multiple: int, expected: tuple[tuple[int, ...], ...]) -> None:
    assert fill_bins(lengths, capacity, multiple=multiple) == expected


def test_first_fit_is_used_if_even_filling_is_impossible() -> None:
    """[7, 6, 5, 4, 4, 4] into 3 bins of 10: even filling gives 7+4, so first fit is used."""
    bins = fill_bins([7, 6, 5, 4, 3, 5], 10)
    assert bins == ((0, 4), (1, 3), (2, 5))


def test_too_long() -> None:
    with pytest.raises(ValueError, match="a sample of 11 tokens does not fit into a row of 10"):
        fill_bins([3, 11], 10)
