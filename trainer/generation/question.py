"""The data types of generation: a question, the prepared question, and its answer."""

from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from trainer.contract import InputRefused, Sampling
from trainer.data.batch.collate import Features
from trainer.data.rows.parsed_row import ends_with_question
from trainer.data.rows.sample import MARK, Message

EndReason = Literal["stop", "length", "halted"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that ends with a question. The user's messages have one MARK for each of `images` (RGB and upright, see
    trainer.data.media.image), in order. `stop`: texts that end the answer, in addition to the end mark of the template. `name`: used in
    error messages."""

    messages: tuple[Message, ...]
    images: tuple[Image.Image, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    name: str = "the question"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question as inputs of the model, on the CPU. `most`: the maximum number of new tokens that was requested and fits into the context."""

    input_ids: list[int]
    features: tuple[Features, ...]
    sampling: Sampling
    seed: int
    marks: tuple[str, ...]
    most: int

    @property
    def length(self) -> int:
        """In tokens, including those of images."""
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`text` is stripped. `new_tokens` includes the one that ended it. `ended`: by an end mark or stop text, by the limit of tokens, or
    `halted` (cancelled)."""

    text: str
    prompt_tokens: int
    new_tokens: int
    ended: EndReason


def check_messages(question: Question, images: int) -> None:
    """Raises InputRefused for an invalid conversation."""
    roles = [message.role for message in question.messages]
    if not ends_with_question(roles):
        raise InputRefused(
            f"{question.name}: its messages are {', '.join(roles) or 'none'}\n    the order must be: an optional system message, then user "
            "and assistant alternately, ending with user"
        )
    marks = sum(message.content.count(MARK) for message in question.messages if message.role == "user")
    if marks != images:
        raise InputRefused(
            f"{question.name}: {marks} {MARK} marks in its text for {images} images\n    write {MARK} once for each image, at its position"
        )
