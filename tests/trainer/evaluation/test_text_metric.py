import random
from functools import cache

import pytest

from trainer.evaluation.text_metric import anls, common, contains, exact_match, levenshtein, rate, rouge_l


@pytest.mark.parametrize(
    ("metric", "got", "accepted", "expected"),
    [
        (exact_match, " 7 ", "7", 1.0),
        (exact_match, "Seven", "seven", 0.0),
        (contains, "It is SEVEN.", "seven", 1.0),
        (contains, "It is 7.", "seven", 0.0),
        (contains, "anything", " ", 0.0),
        (anls, "coca cola", "Coca  Cola", 1.0),
        (anls, "hello", "hallo", 0.8),
        (anls, "abcd", "abxy", 0.0),  # a distance of exactly half of the length
        (anls, "abcde", "abcxy", 0.6),
        (anls, "", "", 1.0),
        (anls, "", "a", 0.0),
        (rouge_l, "police kill the gunman", "police killed the gunman", 0.75),  # Lin 2004, section 3.1: S2 against S1
        (rouge_l, "the gunman kill police", "police killed the gunman", 0.5),  # and S3
        (rouge_l, "The, gunman!", "the gunman", 1.0),
        (rouge_l, "the cat", "the big cat", 0.8),
        (rouge_l, "今天天气很好", "今天天气好", 10 / 11),
        (rouge_l, "型号 X100 手机", "型号 x100", 2 * 3 / 8),
        (rouge_l, "", "", 1.0),
        (rouge_l, "?", "word", 0.0),
    ],
)
def test_a_figure(metric: object, got: str, accepted: str, expected: float) -> None:
    assert metric(got, accepted) == pytest.approx(expected, abs=1e-12)  # type: ignore[operator]


def test_the_answer_that_fits_best_counts() -> None:
    assert rate("anls", "NY", ("New York", "ny")) == 1.0
    assert rate("exact_match", "NY", ("New York", "ny")) == 0.0


def test_distance_and_subsequence_are_those_of_their_definitions() -> None:
    numbers = random.Random(1)
    for _ in range(300):
        first, second = ("".join(numbers.choice("abc") for _ in range(numbers.randrange(9))) for _ in range(2))

        @cache
        def far(i: int, j: int, first: str = first, second: str = second) -> int:
            if not i or not j:
                return i + j
            return min(far(i - 1, j) + 1, far(i, j - 1) + 1, far(i - 1, j - 1) + (first[i - 1] != second[j - 1]))

        @cache
        def shared(i: int, j: int, first: str = first, second: str = second) -> int:
            if not i or not j:
                return 0
            return shared(i - 1, j - 1) + 1 if first[i - 1] == second[j - 1] else max(shared(i - 1, j), shared(i, j - 1))

        assert levenshtein(first, second) == far(len(first), len(second))
        assert common(first, second) == shared(len(first), len(second))
