"""Follow the rows of a batch while their answers are generated: read the new text, report it, end rows one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.generation.question import Answer, EndReason, Prepared
from trainer.generation.text_reader import TextReader

OnText = Callable[[int, str], None]  # row of the batch, new text
OnEnd = Callable[[int, Answer], None]
Halted = Callable[[int], bool]  # whether to cancel this row of the batch


@dataclass(frozen=True, kw_only=True)
class Callbacks:
    """The callbacks of `Answerer.answer`."""

    text: OnText | None = None
    end: OnEnd | None = None
    halted: Halted | None = None


class BatchProgress:
    """A stopping criterion for transformers: reads the new token of each row, and returns which rows are finished."""

    def __init__(self, batch: Sequence[Prepared], tokenizer: Any, ends: frozenset[int], callbacks: Callbacks, *, beams: int) -> None:
        self.batch, self.ends, self.callbacks, self.beams = batch, ends, callbacks, beams
        self.readers = [TextReader(tokenizer, one.marks) for one in batch]
        self.answers: list[Answer | None] = [None] * len(batch)
        self.cancelled: set[int] = set()  # rows with beams

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(rows,) bool. With beams, whose rows may still change, true only when all of them are cancelled."""
        if self.beams > 1:
            self.cancelled |= {row for row in range(len(self.batch)) if row not in self.cancelled and self._is_halted(row)}
            done = [len(self.cancelled) == len(self.batch)] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if self.answers[row] is None:
                    self._take(row, token)
            done = [answer is not None for answer in self.answers]
        return torch.tensor(done, device=input_ids.device)

    def read_all(self, new: Tensor) -> None:
        """Read all tokens (rows, tokens) at once; for beams, whose rows are only known at the end."""
        for row, ids in enumerate(new.tolist()):
            for token in ids:
                if self.answers[row] is None:
                    self._take(row, token)
            if self.answers[row] is None:
                self._end(row, "length")

    def _take(self, row: int, token: int) -> None:
        reader = self.readers[row]
        self._report(row, reader.take(token))
        if token in self.ends or reader.ended:
            self._end(row, "stop")
        elif row in self.cancelled or (self.beams == 1 and self._is_halted(row)):
            self._end(row, "halted")
        elif len(reader.ids) >= self.batch[row].most:
            self._end(row, "length")

    def _end(self, row: int, ended: EndReason) -> None:
        reader = self.readers[row]
        text, rest = reader.finish()
        self._report(row, rest)
        answer = Answer(text=text, prompt_tokens=self.batch[row].length, new_tokens=len(reader.ids), ended=ended)
        self.answers[row] = answer
        if self.callbacks.end is not None:
            self.callbacks.end(row, answer)

    def _report(self, row: int, text: str) -> None:
        if text and self.callbacks.text is not None:
            self.callbacks.text(row, text)

    def _is_halted(self, row: int) -> bool:
        return self.callbacks.halted is not None and self.callbacks.halted(row)
