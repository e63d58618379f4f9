"""The golden files: what each peer made of its rows. One folder a set:

    meta.yaml       model (of model.py), rows (the file), what (the peer and its settings), also_trained (beside the answers), data (options)
    the rows        in their own container, with images of our own
    expected.jsonl  a line a row: {"row", "ids", "trained": [[start, end], …]}, or {"row", "refused": why}

An image is one token in `ids`, whatever the number of its patches.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

GOLDEN = Path(__file__).parents[2] / "golden" / "peers"
EXPECTED = "expected.jsonl"
META = "meta.yaml"
IGNORED = -100

Spans = tuple[tuple[int, int], ...]


@dataclass(frozen=True, kw_only=True)
class Expected:
    """`refused`: why the peer has no ids for the row, else ''. `trained`: [start, end) of the tokens in the loss."""

    ids: tuple[int, ...] = ()
    trained: Spans = ()
    refused: str = ""


@dataclass(frozen=True, kw_only=True)
class PeerSet:
    """`options`: of the data, with which the rows are read as by the peer. `header`, `separator`: whether the peer also trains the opening of an
    answer, and what follows its end mark, up to the next message."""

    folder: Path
    model: str
    rows: str
    header: bool
    separator: bool
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.folder.parent.name}/{self.folder.name}"

    @property
    def file(self) -> Path:
        return self.folder / self.rows


def find_sets(golden: Path = GOLDEN) -> tuple[PeerSet, ...]:
    return tuple(read_set(file.parent) for file in sorted(golden.glob(f"*/*/{META}")))


def read_set(folder: Path) -> PeerSet:
    meta = yaml.safe_load((folder / META).read_text(encoding="utf-8"))
    also = meta.get("also_trained", ())
    return PeerSet(
        folder=folder,
        model=meta["model"],
        rows=meta["rows"],
        header="header" in also,
        separator="separator" in also,
        options=meta.get("data", {}),
    )


def read_expected(each: PeerSet) -> dict[int, Expected]:
    """By number of the row, from 1."""
    lines = (each.folder / EXPECTED).read_text(encoding="utf-8").splitlines()
    return {row["row"]: as_expected(row) for row in map(json.loads, lines)}


def as_expected(row: Mapping[str, Any]) -> Expected:
    if "refused" in row:
        return Expected(refused=row["refused"])
    return Expected(ids=tuple(row["ids"]), trained=tuple((start, end) for start, end in row["trained"]))


def write_expected(folder: Path, rows: Iterator[tuple[int, Expected]]) -> None:
    with (folder / EXPECTED).open("w", encoding="utf-8") as opened:
        for number, made in rows:
            content = {"refused": made.refused} if made.refused else {"ids": made.ids, "trained": made.trained}
            opened.write(json.dumps({"row": number, **content}, ensure_ascii=False) + "\n")


# ---------------------------------------------------------------------------------------------------------- ids and labels


def fold(ids: Sequence[int], labels: Sequence[int], image: int) -> Expected:
    """Each run of image tokens as one token, and the labels as the places that are trained. Raises ValueError for a label that is another token."""
    kept = [place for place, token in enumerate(ids) if token != image or place == 0 or ids[place - 1] != image]
    if any(labels[place] not in (IGNORED, ids[place]) for place in kept):
        raise ValueError("a label is not the token at its place")
    learned = [labels[place] != IGNORED for place in kept]
    return Expected(ids=tuple(ids[place] for place in kept), trained=spans_of(learned))


def spans_of(learned: Sequence[bool]) -> Spans:
    edges = [
        place for place in range(len(learned) + 1) if (learned[place - 1] if place else False) != (place < len(learned) and learned[place])
    ]
    return tuple(zip(edges[::2], edges[1::2], strict=True))


def answers_only(made: Expected, header: Sequence[int], end: int, separator: Sequence[int]) -> Expected:
    """Without the header of an answer and without what follows its end mark, where a peer trains them too."""
    found = []
    for start, stop in made.trained:
        if made.ids[start : start + len(header)] == tuple(header) and header:
            start += len(header)
        if separator and made.ids[stop - len(separator) : stop] == tuple(separator) and made.ids[stop - len(separator) - 1] == end:
            stop -= len(separator)
        found.append((start, stop))
    return Expected(ids=made.ids, trained=tuple(found), refused=made.refused)
