"""Scores of boxes and points in an answer against those in the accepted answer. Both are in the coordinates of the model, in any way of writing."""

from collections.abc import Callable, Sequence

from trainer.data.grounding.box_text import Numbers, boxes_of

THRESHOLD = 0.5  # of the intersection over union: a box is found above it, as in RefCOCO's accuracy (Yu et al., arXiv 1608.00272)


def iou_50(got: str, accepted: str) -> float | None:
    """The share of boxes that are found: pairs with an intersection over union of at least THRESHOLD, the largest first, each box in one pair;
    of the boxes of the answer or of the accepted answer, whichever are more. None if the accepted answer has no box."""
    wanted, found = (tuple(box for box in boxes_of(text) if len(box) == 4) for text in (accepted, got))
    return count_pairs(wanted, found) / max(len(wanted), len(found)) if wanted else None


def point_in_box(got: str, accepted: str) -> float | None:
    """1 if the first point of the answer, or the middle of its first box, is in one of the accepted boxes: the click accuracy of ScreenSpot
    (Cheng et al., SeeClick, arXiv 2401.10935, section 4). None if the accepted answer has no box."""
    wanted = [box for box in boxes_of(accepted) if len(box) == 4]
    if not wanted:
        return None
    given = next(iter(boxes_of(got)), None)
    return float(given is not None and any(is_inside(middle_of(given), box) for box in wanted))


def count_pairs(wanted: Sequence[Numbers], found: Sequence[Numbers]) -> int:
    overlaps = [(overlap(one, other), row, column) for row, one in enumerate(wanted) for column, other in enumerate(found)]
    rows: set[int] = set()
    columns: set[int] = set()
    for share, row, column in sorted(overlaps, key=lambda entry: -entry[0]):
        if share >= THRESHOLD and row not in rows and column not in columns:
            rows.add(row)
            columns.add(column)
    return len(rows)


def overlap(first: Numbers, second: Numbers) -> float:
    """Intersection over union of two boxes; 0 for boxes without area."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    common = max(0.0, width) * max(0.0, height)
    whole = area(first) + area(second) - common
    return common / whole if whole > 0 else 0.0


def area(box: Numbers) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def middle_of(numbers: Numbers) -> tuple[float, float]:
    return (numbers[0], numbers[1]) if len(numbers) == 2 else ((numbers[0] + numbers[2]) / 2, (numbers[1] + numbers[3]) / 2)


def is_inside(point: tuple[float, float], box: Numbers) -> bool:
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


BOX_METRICS: dict[str, Callable[[str, str], float | None]] = {"iou_50": iou_50, "point_in_box": point_in_box}


def rate_boxes(metric: str, got: str, accepted: Sequence[str]) -> float | None:
    """The score against the accepted answer that fits best; None if none of them has a box."""
    return max((score for answer in accepted if (score := BOX_METRICS[metric](got, answer)) is not None), default=None)


def as_shares(text: str, size: tuple[int, int]) -> list[list[float]]:
    """The boxes and points of a text as shares of width and height, to draw them, cut at the borders. `size`: what the numbers of the lower
    right corner are. Numbers that are all from 0 to 1 are shares already."""
    return [[as_share(number, 1 if max(box) <= 1 else size[place % 2]) for place, number in enumerate(box)] for box in boxes_of(text)]


def as_share(number: float, whole: int) -> float:
    return round(min(max(number / whole, 0.0), 1.0), 4)
