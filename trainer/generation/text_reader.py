"""New tokens to text: all at once, or piece by piece as they come."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

UNREADABLE = "\ufffd"  # what decoders write for bytes that are no character, such as the first half of one


def end_ids(tokenizer: Any, end_mark: str) -> list[int]:
    """What ends an answer: the end mark where it is one token, and the tokenizer's own end."""
    mark = tokenizer(end_mark.strip(), add_special_tokens=False)["input_ids"]
    ends = {mark[0]} if len(mark) == 1 else set()
    return sorted(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def read_answer(tokenizer: Any, ids: Tensor | Sequence[int], end_mark: str) -> str:
    """The text up to the end mark, which a tokenizer may spell in several tokens; special tokens are no text."""
    return cut(tokenizer.decode(ids, skip_special_tokens=True), (end_mark.strip(),))[0]


def cut(text: str, marks: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of `marks`, and whether one stands there."""
    places = [place for mark in marks if mark and (place := text.find(mark)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Reader:
    """Of one answer: takes its tokens, says which text is new and will stay.

    Kept back until more is known: bytes that are half a character, what may be the beginning of a mark, and blanks, which are no part of an
    answer at its ends. Only the tokens since the last whole piece are decoded each time, after some before them, because a decoder
    may write a token otherwise at the beginning of a text."""

    def __init__(self, tokenizer: Any, marks: Sequence[str]) -> None:
        self.tokenizer, self.marks = tokenizer, tuple(mark for mark in marks if mark)
        self.ids: list[int] = []
        self.start, self.read = 0, 0  # of self.ids: from where is decoded, and up to where the text is whole
        self.text = ""  # decoded so far
        self.said = ""
        self.ended = False

    def take(self, token: int) -> str:
        self.ids.append(token)
        known, more = self._decode(self.start, self.read), self._decode(self.start, len(self.ids))
        if more.endswith(UNREADABLE) or len(more) <= len(known):
            return ""
        self.text += more[len(known) :]
        self.start, self.read = self.read, len(self.ids)
        text, self.ended = cut(self.text, self.marks)
        return self._say(text if self.ended else text[: len(text) - self._doubtful(text)])

    def finish(self) -> tuple[str, str]:
        """(the whole answer, what of it was not said yet)"""
        whole = cut(self._decode(0, len(self.ids)), self.marks)[0].strip()
        rest = whole[len(self.said) :] if whole.startswith(self.said) else ""
        return whole, rest

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _doubtful(self, text: str) -> int:
        """How many of the last characters may be the beginning of a mark."""
        lengths = [length for mark in self.marks for length in range(1, len(mark)) if text.endswith(mark[:length])]
        return max(lengths, default=0)

    def _say(self, text: str) -> str:
        whole = text.strip()
        new = whole[len(self.said) :]
        self.said = whole if new else self.said
        return new
