"""The rows of a batch while their answers grow: read, told, and ended one by one."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.generation.question import Answer, Ended, Prepared
from trainer.generation.text_reader import Reader

OnText = Callable[[int, str], None]  # row of the batch, new text
OnEnd = Callable[[int, Answer], None]
Halted = Callable[[int], bool]  # whether nobody waits for that row of the batch any more


@dataclass(frozen=True, kw_only=True)
class Calls:
    """What a caller wants to hear of and to say, None where nothing."""

    text: OnText | None = None
    end: OnEnd | None = None
    halted: Halted | None = None


class BatchProgress:
    """A stopping criterion of transformers: reads the rows of a batch while they grow, and says which of them are done."""

    def __init__(self, batch: Sequence[Prepared], tokenizer: Any, ends: frozenset[int], calls: Calls, *, beams: int) -> None:
        self.batch, self.ends, self.calls, self.beams = batch, ends, calls, beams
        self.readers = [Reader(tokenizer, one.marks) for one in batch]
        self.answers: list[Answer | None] = [None] * len(batch)
        self.unwanted: set[int] = set()  # rows of beams

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(rows,) bool. With beams, whose rows may still change, only whether all of them are wanted no more."""
        if self.beams > 1:
            self.unwanted |= {row for row in range(len(self.batch)) if row not in self.unwanted and self._is_halted(row)}
            done = [len(self.unwanted) == len(self.batch)] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if self.answers[row] is None:
                    self._take(row, token)
            done = [answer is not None for answer in self.answers]
        return torch.tensor(done, device=input_ids.device)

    def read_whole(self, new: Tensor) -> None:
        """(rows, tokens): every row to its end, for those that could not be read before."""
        for row, ids in enumerate(new.tolist()):
            for token in ids:
                if self.answers[row] is None:
                    self._take(row, token)
            if self.answers[row] is None:
                self._end(row, "length")

    def _take(self, row: int, token: int) -> None:
        reader = self.readers[row]
        self._say(row, reader.take(token))
        if token in self.ends or reader.ended:
            self._end(row, "stop")
        elif row in self.unwanted or (self.beams == 1 and self._is_halted(row)):
            self._end(row, "halted")
        elif len(reader.ids) >= self.batch[row].most:
            self._end(row, "length")

    def _end(self, row: int, ended: Ended) -> None:
        reader = self.readers[row]
        text, rest = reader.finish()
        self._say(row, rest)
        answer = Answer(text=text, prompt_tokens=self.batch[row].length, new_tokens=len(reader.ids), ended=ended)
        self.answers[row] = answer
        if self.calls.end is not None:
            self.calls.end(row, answer)

    def _say(self, row: int, text: str) -> None:
        if text and self.calls.text is not None:
            self.calls.text(row, text)

    def _is_halted(self, row: int) -> bool:
        return self.calls.halted is not None and self.calls.halted(row)
