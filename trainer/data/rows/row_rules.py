"""How rows are read where the user has a choice: options of `data.` (trainer.contract.DataSpec)."""

from dataclasses import dataclass
from typing import Literal

from trainer.contract import DataSpec


@dataclass(frozen=True, kw_only=True)
class RowRules:
    """`reasoning`: of answers, kept or left out. `question`: of rows that have an image and its caption, '' = they are refused."""

    reasoning: Literal["keep", "strip"] = "keep"
    question: str = ""


DEFAULT = RowRules()


def rules_of(data: DataSpec) -> RowRules:
    return RowRules(reasoning=data.reasoning, question=data.question)
