"""How rows are read where the user has a choice: options of `data.` (trainer.contract.DataSpec)."""

from dataclasses import dataclass
from typing import Literal

from trainer.contract import DataSpec


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """`unmarked`, `turns`, `learn`: of several images without marks, of messages in another order, and of earlier answers
    (trainer.data.rows.message.turn_order). `reasoning`: of answers, kept or left out. `question`: of rows that have an image and its caption, '' = they
    are refused. `image_place`: of the images of a question (trainer.data.rows.image_form)."""

    unmarked: Literal["refuse", "first", "last"] = "refuse"
    turns: Literal["strict", "trim", "join"] = "strict"
    learn: Literal["all", "last"] = "all"
    reasoning: Literal["keep", "strip"] = "keep"
    question: str = ""
    image_place: Literal["row", "front", "bare"] = "row"


DEFAULT = RowRules()


def rules_of(data: DataSpec) -> RowRules:
    return RowRules(
        unmarked=data.unmarked,
        turns=data.turns,
        learn=data.learn,
        reasoning=data.reasoning,
        question=data.question,
        image_place=data.image_place,
    )
