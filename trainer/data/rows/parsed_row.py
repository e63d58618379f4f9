"""A row as it was understood, before it is judged: what every shape is read into."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]
Row = dict[str, Any]
Complain = Callable[[str, str, str], None]  # field, problem, fix

MARK = "<image>"
KINDS = {type(None): "null", bool: "true or false", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One message. `content` holds a MARK for each image. `in_loss`: whether an answer is learned. `field`: where it stands in the row,
    `text_key`: the key of its text there, '' where the field is the text."""

    role: Role
    content: str
    field: str
    text_key: str = ""
    in_loss: bool = True

    @property
    def text_field(self) -> str:
        return f"{self.field}.{self.text_key}" if self.text_key else self.field


@dataclass(frozen=True, kw_only=True)
class ImageReference:
    """An image's path as written; anything else that stands in its place is told later, and counted against the marks until then."""

    name: Any
    field: str


@dataclass(frozen=True, kw_only=True)
class ParsedRow:
    """`turns` is None where one of them could not be understood: their order and their marks say nothing then. `field`: of them all."""

    field: str
    turns: tuple[Turn, ...] | None
    pictures: tuple[ImageReference, ...]


def kind(value: Any) -> str:
    return KINDS.get(type(value), type(value).__name__)


def printable(text: str) -> str:
    """Without halves of surrogate pairs, which JSON may hold and no file can."""
    return text.encode("utf-8", "backslashreplace").decode()


def keys_of(item: Row) -> str:
    return ", ".join(map(repr, item)) or "none"
