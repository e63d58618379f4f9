"""What is asked and what comes of it: a conversation, the same as the model takes it, and its answer."""

from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from trainer.contract import InputRefused, Sampling
from trainer.data.batch.collate import Features
from trainer.data.rows.sample import MARK, Message

Ended = Literal["stop", "length", "halted"]


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that ends with a question. MARK stands in the user's messages for each of `images`, in their order: RGB and upright
    (trainer.data.media.image). `stop`: texts that end the answer besides the template's end mark. `name`: what a refusal calls it."""

    messages: tuple[Message, ...]
    images: tuple[Image.Image, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    stop: tuple[str, ...] = ()
    name: str = "the question"


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A question as the model takes it, on the CPU. `most`: new tokens, as asked for or as many as the context has room for."""

    input_ids: list[int]
    features: tuple[Features, ...]
    sampling: Sampling
    seed: int
    marks: tuple[str, ...]
    most: int

    @property
    def length(self) -> int:
        """In tokens, those of its images included."""
        return len(self.input_ids)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`text` has no blanks at its ends. `new_tokens` counts the one that ended it. `ended`: by itself, for want of room, or `halted`."""

    text: str
    prompt_tokens: int
    new_tokens: int
    ended: Ended


def check_messages(question: Question, images: int) -> None:
    """Raises InputRefused for a conversation that cannot be asked."""
    roles = [message.role for message in question.messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2) + ["user"]:
        raise InputRefused(
            f"{question.name}: its messages are {', '.join(roles) or 'none'}\n    ask by one of the user, after as many pairs of user and "
            "assistant as there are; a system message may stand before them"
        )
    marks = sum(message.content.count(MARK) for message in question.messages if message.role == "user")
    if marks != images:
        raise InputRefused(
            f"{question.name}: {marks} {MARK} marks in its text for {images} images\n    write {MARK} once for each image, where it stands"
        )
