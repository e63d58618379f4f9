"""How rows that do not say everything, or say it in another order, are read: the options `data.unmarked`, `data.turns` and `data.learn`.

Every change is an adjustment of the sample. Those of LISTED are also lines of data_left_out.jsonl.
"""

from dataclasses import replace
from itertools import dropwhile
from typing import Literal

from trainer.data.rows.parsed_row import MARK, ParsedRow, Turn
from trainer.data.rows.row_rules import RowRules

TRIMMED = "answers before the first question or questions after the last answer, left out"
JOINED = "messages of one role in a row, joined"
MARKED_FIRST, MARKED_LAST = "several images without marks, put first", "several images without marks, put last"
LEARNED_LAST = "answers before the last one, not trained on"
Done = Literal["trimmed", "joined", "marked"]
LISTED: dict[str, Done] = {TRIMMED: "trimmed", JOINED: "joined", MARKED_FIRST: "marked", MARKED_LAST: "marked"}


def order_turns(parsed: ParsedRow, rules: RowRules) -> tuple[ParsedRow, tuple[str, ...]]:
    """The row with its turns in the order that a conversation has, and what was changed. A row of which nothing would be left is unchanged."""
    if rules.turns == "strict" or parsed.turns is None:
        return parsed, ()
    trimmed = trim(parsed)
    joined = join(trimmed) if rules.turns == "join" else trimmed
    changes = ((TRIMMED, trimmed.turns != parsed.turns), (JOINED, joined.turns != trimmed.turns))
    return joined, tuple(name for name, changed in changes if changed)


def trim(parsed: ParsedRow) -> ParsedRow:
    """Without answers before the first question, as LLaVA (llava/train/train.py, preprocess_v1, where it is one answer), and without questions
    after the last answer, with the images of these. LLaMA-Factory leaves out the whole row (data/converter.py)."""
    turns = parsed.turns or ()
    system = turns[:1] if turns and turns[0].role == "system" else ()
    rest = tuple(dropwhile(lambda turn: turn.role in ("assistant", "tool"), turns[len(system) :]))
    last = max((place for place, turn in enumerate(rest) if turn.role == "assistant"), default=-1)
    kept, dropped = rest[: last + 1], rest[last + 1 :]
    if not kept:
        return parsed
    images, shown = parsed.images, count_marks(rest)
    if shown == len(images):
        images = images[: shown - count_marks(dropped)]
    return replace(parsed, turns=(*system, *kept), images=images)


def count_marks(turns: tuple[Turn, ...]) -> int:
    return sum(turn.content.count(MARK) for turn in turns if turn.role == "user")


def join(parsed: ParsedRow) -> ParsedRow:
    """Neighbours of one role as one message, with a line feed between them. ms-swift joins them with nothing between (template/base.py,
    _swift_prepare_inputs). Not those that differ in what is trained, nor those with reasoning or calls of tools."""
    turns: list[Turn] = []
    for turn in parsed.turns or ():
        if turns and fits(turns[-1], turn):
            before = turns.pop()
            turn = replace(before, content=f"{before.content}\n{turn.content}", in_parts=before.in_parts or turn.in_parts)
        turns.append(turn)
    return replace(parsed, turns=tuple(turns))


def fits(before: Turn, turn: Turn) -> bool:
    plain = not any((before.reasoning, before.calls, turn.reasoning, turn.calls))
    return before.role == turn.role != "tool" and before.in_loss == turn.in_loss and plain


def learn_last(turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
    """Only the last answer is in the loss, if the row trains it: mask_history of LLaMA-Factory (data/processor/supervised.py)."""
    last = max((place for place, turn in enumerate(turns) if turn.role == "assistant"), default=-1)
    return tuple(
        replace(turn, in_loss=False) if turn.role == "assistant" and place < last and turn.in_loss else turn
        for place, turn in enumerate(turns)
    )
