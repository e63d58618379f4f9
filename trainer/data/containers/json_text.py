"""JSON text to values, from text that is read in parts.

Values are those of json.loads. Of a key that an object has twice, json.loads takes the last in silence: `RowDecoder` names it.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

LIST_BYTES = 2**20  # characters that are read at a time; a longer row is read whole
MOST_CHARACTERS = 2**30  # of a value: a compressed file of a few megabytes may hold more than the memory does
NUMBER_GOES_ON = 4  # characters after 1 that may show it to be a part of 1e-5
BLANK = re.compile(r"[ \t\n\r]*")  # JSON's white space
LINE_END = re.compile(r"\r\n?|\n")

Read = Callable[[int], str]


class RowDecoder:
    """`repeated`: the first such key of the value that was decoded last, '' if it has none."""

    def __init__(self) -> None:
        self.repeated = ""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._make_object)

    def decode(self, text: str) -> Any:
        """Raises ValueError and RecursionError, as json.loads."""
        self.repeated = ""
        return self._decoder.decode(text)

    def raw_decode(self, text: str, place: int) -> tuple[Any, int]:
        """The value that begins at `place`, and where it ends. Raises ValueError and RecursionError."""
        self.repeated = ""
        return self._decoder.raw_decode(text, place)

    def _make_object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs) and not self.repeated:
            self.repeated = next((key for key, value in pairs if made[key] != value), "")
        return made


def describe(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"is not valid JSON: {error.msg} at line {error.lineno} column {error.colno}"
    if isinstance(error, RecursionError):
        return "is not usable JSON: nested too deeply"
    return f"is not usable JSON: {error}"


def scan_list(text: str, read: Read, decoder: RowDecoder | None = None) -> Iterator[tuple[int, int, Any]]:
    """(start, end, value) of each value of a JSON list, in characters from the beginning of `text`, which `read` continues. Raises ValueError and
    RecursionError for what json.loads would refuse, without its line and column."""
    decoder = decoder or RowDecoder()
    before, place, expects = 0, text.index("[") + 1, "value or end"
    while True:
        place = BLANK.match(text, place).end()  # type: ignore[union-attr]  # it matches an empty text
        if place == len(text):
            before, text, place = before + place, read(LIST_BYTES), 0
            if not text:
                break
        elif expects == "comma or end":
            raise_unless(text[place] in ",]")
            expects, place = "value" if text[place] == "," else "nothing", place + 1
        elif expects == "value or end" and text[place] == "]":
            expects, place = "nothing", place + 1
        else:
            raise_unless(expects != "nothing")
            value, start, end, text = decode_value(decoder, text, place, read)
            before += place - start
            yield before + start, before + end, value
            place, expects = end, "comma or end"
    raise_unless(expects == "nothing")


def scan_objects(text: str, read: Read, line: int = 1, decoder: RowDecoder | None = None) -> Iterator[tuple[int, int, int, Any]]:
    """(start, end, line, value) of each value of several, one after the other; `line`: of the first one, then the number of the line that each begins
    on. Raises as `scan_list`; a JSONDecodeError has the line of the file."""
    decoder, before, place = decoder or RowDecoder(), 0, 0
    while True:
        begin = place
        place = BLANK.match(text, place).end()  # type: ignore[union-attr]
        line += count_lines(text[begin:place])
        if place == len(text):
            before, text, place = before + place, read(LIST_BYTES), 0
            if not text:
                return
            continue
        try:
            value, start, end, text = decode_value(decoder, text, place, read)
        except json.JSONDecodeError as error:
            error.lineno += line - 1
            raise
        before += place - start
        yield before + start, before + end, line, value
        line += count_lines(text[start:end])
        place = end


def count_lines(text: str) -> int:
    return text.count("\n") if "\r" not in text else len(LINE_END.findall(text))


def decode_value(decoder: RowDecoder, text: str, place: int, read: Read) -> tuple[Any, int, int, str]:
    """The value at `place`, where it starts and ends, and the text of these places: continued as far as the value needs it, without what is before
    the value. The place of an error counts from the value."""
    while True:
        try:
            value, end = decoder.raw_decode(text, place)
        except ValueError as error:
            more = read(max(LIST_BYTES, len(text) - place))
            if not more and isinstance(error, json.JSONDecodeError):
                raise json.JSONDecodeError(error.msg, text[place:], error.pos - place) from error
            if not more:
                raise
        else:
            more = read(LIST_BYTES) if len(text) - end < NUMBER_GOES_ON else ""
            if not more:
                return value, place, end, text
        text, place = text[place:] + more, 0
        if len(text) > MOST_CHARACTERS:
            raise ValueError(f"a value is longer than {MOST_CHARACTERS:,} characters, or not JSON")


def raise_unless(valid: bool) -> None:
    if not valid:
        raise ValueError("not a list of JSON values")
