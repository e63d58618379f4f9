"""Where a sample of too many tokens is cut, for data.too_long=cut: at its end, never within the tokens of an image, nor before the first token that
is trained on. The images behind the cut are left out with it."""

from collections.abc import Sequence
from itertools import chain

IGNORED = -100  # torch.nn.functional.cross_entropy's ignore_index
Span = tuple[int, int]  # the first token of an image, and the one after its last


def find_spans(pieces: Sequence[Sequence[int]], image: int, spans: Sequence[Sequence[int]], start: int) -> list[Span]:
    """Where the tokens of each image are in the whole sample. `pieces`: the ids with one `image` token for each image, which the ids in `spans`
    replace. `start`: tokens before the first piece."""
    found: list[Span] = []
    place, remaining = start, iter(spans)
    for token in chain.from_iterable(pieces):
        length = len(next(remaining)) if token == image else 1
        if token == image:
            found.append((place, place + length))
        place += length
    return found


def count_cut_images(images: Sequence[Span], labels: Sequence[int], limit: int) -> int:
    """How many images are behind the first `limit` tokens. Raises ValueError, which says why the sample cannot be cut there."""
    if any(first < limit < end for first, end in images):
        raise ValueError(f"token {limit} belongs to an image, and no image is cut")
    if all(label == IGNORED for label in labels[:limit]):
        raise ValueError(f"no trained token of an answer is among the first {limit}")
    return sum(first >= limit for first, _ in images)
