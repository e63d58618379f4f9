"""Turn generated tokens into text, all at once or token by token."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

UNREADABLE = "\ufffd"  # decoders write it for bytes that are not a character, such as a part of one


def end_ids(tokenizer: Any, end_mark: str) -> list[int]:
    """The tokens that end an answer: the end mark if it is one token, and the EOS token of the tokenizer."""
    mark = tokenizer(end_mark.strip(), add_special_tokens=False)["input_ids"]
    ends = {mark[0]} if len(mark) == 1 else set()
    return sorted(ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set()))


def read_answer(tokenizer: Any, ids: Tensor | Sequence[int], end_mark: str) -> str:
    """The text before the end mark, which may be several tokens. Special tokens are not part of the text."""
    return cut(tokenizer.decode(ids, skip_special_tokens=True), (end_mark.strip(),))[0]


def cut(text: str, marks: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of `marks`, and whether there is one."""
    indices = [index for mark in marks if mark and (index := text.find(mark)) >= 0]
    return (text[: min(indices)], True) if indices else (text, False)


class TextReader:
    """Reads the tokens of one answer and returns the new text that is final.

    Text is held back while it may still change: an incomplete character, the possible beginning of a mark, and whitespace at the end, which
    is not part of an answer. Each time only the tokens since the last complete piece are decoded, together with some before them, because
    a decoder may write a token differently at the beginning of a text."""

    def __init__(self, tokenizer: Any, marks: Sequence[str]) -> None:
        self.tokenizer, self.marks = tokenizer, tuple(mark for mark in marks if mark)
        self.ids: list[int] = []
        self.start, self.read = 0, 0  # indices in self.ids: where decoding starts, and where the complete text ends
        self.text = ""  # decoded so far
        self.returned = ""
        self.ended = False

    def take(self, token: int) -> str:
        self.ids.append(token)
        known, more = self._decode(self.start, self.read), self._decode(self.start, len(self.ids))
        if more.endswith(UNREADABLE) or len(more) <= len(known):
            return ""
        self.text += more[len(known) :]
        self.start, self.read = self.read, len(self.ids)
        text, self.ended = cut(self.text, self.marks)
        return self._return_new(text if self.ended else text[: len(text) - self._possible_mark(text)])

    def finish(self) -> tuple[str, str]:
        """(the whole answer, its part that was not returned before)"""
        whole = cut(self._decode(0, len(self.ids)), self.marks)[0].strip()
        rest = whole[len(self.returned) :] if whole.startswith(self.returned) else ""
        return whole, rest

    def _decode(self, start: int, end: int) -> str:
        return str(self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True))

    def _possible_mark(self, text: str) -> int:
        """The number of characters at the end that may be the beginning of a mark."""
        lengths = [length for mark in self.marks for length in range(1, len(mark)) if text.endswith(mark[:length])]
        return max(lengths, default=0)

    def _return_new(self, text: str) -> str:
        whole = text.strip()
        new = whole[len(self.returned) :]
        self.returned = whole if new else self.returned
        return new
