"""How many rows of each set are trained on and held out: arithmetic on the numbers of rows. Which rows they are is chosen in
trainer.data.rows.selection.

Of each set: the first `max_samples` rows (as LLaMA-Factory's max_samples), or `samples` that are drawn (as its num_samples, and NAME#500 of
ms-swift); of these the held-out rows of a split; the others are used `repeat` times. Interleaving then takes of each set so many rows that they
have the proportions of the weights. hiyouga/LLaMA-Factory: src/llamafactory/data/loader.py, data_utils.py; modelscope/ms-swift:
swift/llm/dataset/loader.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

from trainer.contract.annotation_file import count_repeated
from trainer.contract.spec import Entries


@dataclass(frozen=True, kw_only=True)
class SetSize:
    """The rows of a set, and what its entry says of them."""

    name: str
    rows: int
    samples: int = 0
    repeat: float = 1.0
    weight: float | None = None


@dataclass(frozen=True, kw_only=True)
class SetCount:
    """Of a set: the different rows that are used (`chosen`), those of them that are held out, and the samples of an epoch."""

    chosen: int
    held_out: int
    trained: int


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The options of trainer.contract.DataSpec with these names."""

    max_samples: int = 0
    split: float = 0.0
    mixing: str = "concat"
    mixing_stop: str = "first_exhausted"


def read_split(evaluation: Entries) -> float:
    """What data.evaluation holds out of data.train: a share below 1, or a number of rows; 0 where it names rows of its own. `0.05`, `5%`, `200`."""
    number = evaluation.removesuffix("%") if isinstance(evaluation, str) else ""
    if not number.isascii() or not number.replace(".", "", 1).isdecimal():
        return 0.0
    return float(number) / (100 if str(evaluation).endswith("%") else 1)


class CannotSelect(Exception):
    """The options of the data do not fit the rows."""


def count_selected(sizes: Sequence[SetSize], data: Choice, held_out: Sequence[int] | None = None) -> tuple[SetCount, ...]:
    """`held_out`: rows of each set that a split takes, where rows with the same image made it other than asked. Raises CannotSelect."""
    chosen = [count_chosen(size, data.max_samples) for size in sizes]
    apart = list(held_out) if held_out is not None else divide_split(sizes, chosen, data.split)
    trained = [count_trained(*each) for each in zip(sizes, chosen, apart, strict=True)]
    if data.mixing == "interleave":
        trained = interleave(sizes, trained, whole=data.mixing_stop == "all_exhausted")
    return tuple(SetCount(chosen=rows, held_out=held, trained=count) for rows, held, count in zip(chosen, apart, trained, strict=True))


def count_chosen(size: SetSize, most: int) -> int:
    rows = count_repeated(size.rows, size.repeat) if size.repeat < 1 else size.rows
    rows = min(rows, size.samples) if size.samples else rows
    return min(rows, most) if most else rows


def count_trained(size: SetSize, chosen: int, held_out: int) -> int:
    """More `samples` than rows are drawn again and again from the rows that are trained on."""
    rows = chosen - held_out
    drawn = size.samples - held_out if size.samples > size.rows and chosen == size.rows else rows
    return drawn * max(1, int(size.repeat))


def divide_split(sizes: Sequence[SetSize], chosen: Sequence[int], split: float) -> list[int]:
    """The rows to hold out of each set: in proportion to its rows, rounded so that they add up. Raises CannotSelect."""
    total = sum(chosen)
    if not split or not total:
        return [0] * len(sizes)
    wanted = round(total * split) if split < 1 else int(split)
    what = f"data.evaluation={split:g}"
    if not wanted:
        raise CannotSelect(f"{what} holds out no row of {total:,}\n    set data.evaluation=1, a number of rows, or a larger share")
    if wanted >= total:
        raise CannotSelect(f"{what} holds out all of {total:,} rows\n    set data.evaluation to less than that, or a share such as 0.05")
    shares = share_out(wanted, chosen)
    for size, rows, held in zip(sizes, chosen, shares, strict=True):
        if rows and held >= rows:
            problem = f"{what} holds out all of the {rows:,} rows of {size.name}, and none is left to train on"
            raise CannotSelect(f"{problem}\n    set a smaller data.evaluation, or leave that set out")
    return shares


def share_out(total: int, weights: Sequence[float]) -> list[int]:
    """Whole numbers in proportion to the weights that add up to `total`: the largest remainders are rounded up."""
    exact = [total * weight / sum(weights) for weight in weights]
    whole = [floor(each) for each in exact]
    order = sorted(range(len(exact)), key=lambda place: (whole[place] - exact[place], place))
    for place in order[: total - sum(whole)]:
        whole[place] += 1
    return whole


def interleave(sizes: Sequence[SetSize], trained: Sequence[int], *, whole: bool) -> list[int]:
    """The samples of each set in an epoch. `whole`: until each set was used up, so that the others repeat; else until one is. The numbers are the
    proportions themselves, where `datasets.interleave_datasets` draws the set of each row. Raises CannotSelect."""
    given = [size.weight for size in sizes]
    if any(weight is None for weight in given) and any(weight is not None for weight in given):
        lacking = next(size.name for size in sizes if size.weight is None)
        raise CannotSelect(
            f"{lacking} has no weight, and other sets have one\n    give every entry of data.train a weight, or none of them"
        )
    if not all(trained):
        empty = next(size.name for size, rows in zip(sizes, trained, strict=True) if not rows)
        raise CannotSelect(f"{empty} has no rows to mix\n    leave it out, or set data.mixing=concat")
    weights = [1.0 if weight is None else weight for weight in given]
    ratios = [rows / weight for rows, weight in zip(trained, weights, strict=True)]
    epoch = max(ratios) if whole else min(ratios)
    rounded = [max(1, floor(epoch * weight + 0.5)) for weight in weights]
    return rounded if whole else [min(rows, most) for rows, most in zip(rounded, trained, strict=True)]
