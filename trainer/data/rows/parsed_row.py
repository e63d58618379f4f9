"""A parsed row, before it is checked: the result of reading any row format."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

from trainer.contract.wording import shorten_values

Role = Literal["system", "user", "assistant", "tool"]
Row = dict[str, Any]
AddProblem = Callable[[str, str, str], None]  # (field, problem, fix)

MARK = "<image>"
SHOWN, SHOWN_KEYS = 80, 12  # characters of a value, and keys of an object, in a message
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


@dataclass(frozen=True, kw_only=True)
class ToolCall:
    """`arguments`: a JSON object, as text."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. `content` has a MARK for each image. `in_loss`: whether an answer is trained on. `field`: its path in the row; `text_key`:
    the key of its text there, '' if the field is the text itself. `in_parts`: the content was a list of texts and images. `reasoning`, `calls`: as
    of `trainer.data.rows.sample.Message`."""

    role: Role
    content: str
    field: str
    text_key: str = ""
    in_loss: bool = True
    in_parts: bool = False
    reasoning: str = ""
    calls: tuple[ToolCall, ...] = ()

    @property
    def text_field(self) -> str:
        return f"{self.field}.{self.text_key}" if self.text_key else self.field


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """`name`: the path of an image as written. A value of another type is kept, and reported by the checks."""

    name: Any
    field: str


@dataclass(frozen=True, kw_only=True)
class ParsedRow:
    """`turns` is None if one of them could not be parsed; their order and marks are not checked then. `field`: the key of the messages.
    `tools`: the JSON of each tool."""

    field: str
    turns: tuple[Turn, ...] | None
    images: tuple[ImageReference, ...]
    tools: tuple[str, ...] = ()


def kind(value: Any) -> str:
    """The JSON type of a value, for messages."""
    return KINDS.get(type(value), type(value).__name__)


def ends_with_question(roles: Sequence[Role]) -> bool:
    """Whether the roles are an optional system message, then user and assistant alternately, ending with user."""
    turns = list(roles[1:] if roles[:1] == ["system"] else roles)
    return turns == ["user", "assistant"] * (len(turns) // 2) + ["user"]


def printable(text: str) -> str:
    """With unpaired surrogates escaped: JSON may contain them, but they cannot be encoded as UTF-8. Long values are shortened."""
    return shorten_values(text).encode("utf-8", "backslashreplace").decode()


def quote(value: Any) -> str:
    """A value of a row, in a message."""
    return shorten(repr(value[:SHOWN] if isinstance(value, str) else value), SHOWN)


def shorten(text: str, most: int) -> str:
    """The beginning of a text of more than `most` characters."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def keys_of(item: Row) -> str:
    """The first ones: a table may have thousands of columns."""
    shown = ", ".join(quote(key) for key in islice(item, SHOWN_KEYS)) or "none"
    return f"{shown} and {len(item) - SHOWN_KEYS:,} more" if len(item) > SHOWN_KEYS else shown
