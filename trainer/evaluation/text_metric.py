"""Scores of an answer against the accepted answers: text against text, 0 to 1, higher is better."""

import re
from collections.abc import Callable, Sequence

THRESHOLD = 0.5  # of ANLS: an answer at a larger distance scores 0
# Words of letters and digits; in scripts without spaces between words (Han, kana) every character is a word.
HAN_KANA = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f"
WORDS = re.compile(rf"[{HAN_KANA}]|[^\W_{HAN_KANA}]+")


def exact_match(got: str, accepted: str) -> float:
    """1 for the same text, ignoring leading and trailing whitespace."""
    return float(got.strip() == accepted.strip())


def contains(got: str, accepted: str) -> float:
    """1 if the answer contains the accepted one, ignoring case."""
    wanted = accepted.strip().casefold()
    return float(bool(wanted) and wanted in got.casefold())


def anls(got: str, accepted: str) -> float:
    """1 - NL, the Levenshtein distance over the longer length, if NL is below THRESHOLD, else 0 (Biten et al., arXiv 1905.13648,
    equation 1), in lower case with single spaces, as in the authors' evaluation of ST-VQA and DocVQA."""
    first, second = (" ".join(text.lower().split()) for text in (got, accepted))
    longest = max(len(first), len(second))
    if not longest:
        return 1.0
    if abs(len(first) - len(second)) >= THRESHOLD * longest:  # the distance is at least this
        return 0.0
    far = levenshtein(first, second) / longest
    return 1 - far if far < THRESHOLD else 0.0


def rouge_l(got: str, accepted: str) -> float:
    """F1 of the longest common subsequence (Lin, ROUGE, 2004, section 3, with beta 1) of lower-case words; Chinese and Japanese characters
    count as words, so that mixed text works too."""
    first, second = (WORDS.findall(text.lower()) for text in (got, accepted))
    if not first or not second:
        return float(first == second)
    return 2 * common(first, second) / (len(first) + len(second))


def levenshtein(first: str, second: str) -> int:
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, start=1):
        before, row[0] = row[0], place
        for column, other in enumerate(second, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (letter != other))
    return row[-1]


def common(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, with bit vectors (Hyyrö, Bit-parallel LCS-length computation revisited, 2004)."""
    places: dict[str, int] = {}
    for place, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << place
    every = (1 << len(first)) - 1
    row = every
    for word in second:
        met = row & places.get(word, 0)
        row = (row + met | row - met) & every
    return len(first) - row.bit_count()


TEXT_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "contains": contains,
    "anls": anls,
    "rouge_l": rouge_l,
}


def rate(metric: str, got: str, accepted: Sequence[str]) -> float:
    """The score against the accepted answer that fits best."""
    return max(TEXT_METRICS[metric](got, answer) for answer in accepted)
