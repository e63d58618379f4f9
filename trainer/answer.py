"""Questions to answers: a batch may mix questions of any length, with any images, each with its own way of choosing and of ending."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from trainer.contract import InputRefused, Sampling, TrainSpec
from trainer.data.collate import Features, fill, integers, join, make_features, text_rule
from trainer.data.encode import encode_prompt
from trainer.data.image import check_size, flatten
from trainer.data.sample import MARK, Message, Sample
from trainer.models.family import Processor
from trainer.reader import Reader, end_ids
from trainer.sampling import Chooser, check_sampling

Ended = Literal["stop", "length", "halted"]
OnText = Callable[[int, str], None]  # row of the batch, new text
Halted = Callable[[int], bool]  # whether nobody waits for that row of the batch any more
NO_LIMIT = 2**62


@dataclass(frozen=True, kw_only=True)
class Question:
    """A conversation that ends with a question. MARK stands in the user's messages for each of `images`, in their order: RGB and upright
    (trainer.data.image). `stop`: texts that end the answer besides the template's end mark. `name`: what a refusal calls it."""

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


class Answerer:
    """`prepare` may be called from several threads; `answer` from one at a time. `device`: where the model takes its input ids."""

    def __init__(self, model: torch.nn.Module, processor: Processor, spec: TrainSpec, device: torch.device) -> None:
        self.model, self.processor, self.spec, self.device = model, processor, spec, device
        self.context = find_context(model)
        self.end_mark = spec.model.template.end_mark.strip()
        self.ends = end_ids(processor.tokenizer, self.end_mark)
        self._lock = Lock()  # a tokenizer of Rust may be borrowed by one thread at a time

    def look(self, image: Image.Image) -> Features:
        """What the model takes of an image. Raises InputRefused for one that is too large or too narrow."""
        try:
            check_size(image.size)
            return make_features(image if image.mode == "RGB" else flatten(image), self.processor)
        except ValueError as error:
            raise InputRefused(f"image: {error}\n    give a smaller one, or a part of it") from error

    def prepare(self, question: Question, features: Sequence[Features] | None = None) -> Prepared:
        """`features`: those of the question's images, where they are there already. Raises InputRefused."""
        check_sampling(question.sampling)
        check_messages(question, len(question.images) if features is None else len(features))
        found = tuple(map(self.look, question.images)) if features is None else tuple(features)
        # The answer, which is not there yet, is what the ids of a prompt end before.
        asked = Sample(
            id=question.name,
            images=(Path(),) * len(found),
            messages=(*question.messages, Message(role="assistant", content="-")),
            file=question.name,
            row=0,
        )
        rule = text_rule(self.processor, self.spec, found)[:-1]
        with self._lock:
            ids = encode_prompt(asked, *rule, NO_LIMIT).input_ids
        room = self.find_room(question.name, len(ids))
        return Prepared(
            input_ids=ids,
            features=found,
            sampling=question.sampling,
            seed=question.seed,
            marks=(self.end_mark, *question.stop),
            most=min(question.sampling.max_new_tokens, room),
        )

    def find_room(self, name: str, length: int) -> int:
        """How many tokens may follow. Raises InputRefused."""
        limit = self.spec.data.max_length
        if length >= self.context:
            raise InputRefused(
                f"{name}: {length} tokens, those of its images included, leave no room for an answer in the model's context of "
                f"{self.context}\n    ask a shorter question, with fewer or smaller images (data.max_pixels, data.max_tiles)"
            )
        if length > limit:
            raise InputRefused(
                f"{name}: {length} tokens, those of its images included, are longer than data.max_length={limit}\n    nothing is cut off: "
                f"set data.max_length={length}, which the model's context of {self.context} holds, or ask a shorter question"
            )
        return self.context - length

    def answer(self, batch: Sequence[Prepared], *, on_text: OnText | None = None, halted: Halted | None = None) -> list[Answer]:
        """In the order of `batch`. `on_text` hears the parts of each answer's text as they come, which joined are its text; with beams
        there is one part. `halted` is asked before each token. Rows that search by beams are answered apart from the others."""
        answers: dict[int, Answer] = {}
        for rows in group(batch):
            say = None if on_text is None else relay(on_text, rows)
            gone = None if halted is None else relay(halted, rows)
            found = self._answer([batch[row] for row in rows], say, gone)
            answers |= dict(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(batch))]

    @torch.no_grad()
    def _answer(self, batch: Sequence[Prepared], say: OnText | None, gone: Halted | None) -> list[Answer]:
        beams = batch[0].sampling.beams
        repeated = [one for one in batch for _ in range(beams)]
        tensors = {key: value.to(self.device) for key, value in collate_prepared(repeated, self.processor).items()}
        width = tensors["input_ids"].shape[1]
        watch = Watch(batch, self.processor.tokenizer, frozenset(self.ends), width, say, gone, beams=beams)
        with repeated_already(self.model):
            ids = self.model.generate(  # type: ignore[operator]  # a module of transformers
                **tensors,
                generation_config=self._config(max(one.most for one in batch), beams),
                logits_processor=LogitsProcessorList([Chooser([one.sampling for one in batch], [one.seed for one in batch])]),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        if beams > 1:
            watch.read_whole(ids[:, width:])
        return watch.answers()

    def _config(self, most: int, beams: int) -> GenerationConfig:
        """Each value is said: what is left out here comes from the generation config of the checkpoint."""
        return GenerationConfig(
            do_sample=False,
            num_beams=beams,
            repetition_penalty=1.0,
            max_new_tokens=most,
            eos_token_id=self.ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )


class Watch(StoppingCriteria):
    """Reads the rows of a batch while they grow, and says which of them are done."""

    def __init__(
        self,
        batch: Sequence[Prepared],
        tokenizer: Any,
        ends: frozenset[int],
        width: int,
        say: OnText | None,
        gone: Halted | None,
        *,
        beams: int,
    ) -> None:
        self.batch, self.ends, self.width, self.say, self.gone, self.beams = batch, ends, width, say, gone, beams
        self.readers = [Reader(tokenizer, one.marks) for one in batch]
        self.ended: list[Ended | None] = [None] * len(batch)

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """(rows,) bool. With beams, whose rows may still change, only whether all of them are wanted no more."""
        if self.beams > 1:
            for row in range(len(self.batch)):
                if self.gone is not None and self.gone(row):
                    self._end(row, "halted")
            done = [all(self.ended)] * len(input_ids)
        else:
            for row, token in enumerate(input_ids[:, -1].tolist()):
                if self.ended[row] is None:
                    self._take(row, token)
            done = [ended is not None for ended in self.ended]
        return torch.tensor(done, device=input_ids.device)

    def read_whole(self, new: Tensor) -> None:
        """(rows, tokens): every row to its end, for those that could not be read before."""
        for row, ids in enumerate(new.tolist()):
            ended, self.ended[row] = self.ended[row], None
            for token in ids:
                if self.ended[row] is None:
                    self._take(row, token, asks=False)
            self.ended[row] = ended or self.ended[row] or "length"

    def answers(self) -> list[Answer]:
        made = []
        for row, (one, reader) in enumerate(zip(self.batch, self.readers, strict=True)):
            text, rest = reader.finish()
            if rest and self.say is not None and self.ended[row] != "halted":
                self.say(row, rest)
            ended = self.ended[row] or "length"
            made.append(Answer(text=text, prompt_tokens=one.length, new_tokens=len(reader.ids), ended=ended))
        return made

    def _take(self, row: int, token: int, *, asks: bool = True) -> None:
        reader = self.readers[row]
        new = reader.take(token)
        if new and self.say is not None:
            self.say(row, new)
        if token in self.ends or reader.ended:
            self._end(row, "stop")
        elif len(reader.ids) >= self.batch[row].most:
            self._end(row, "length")
        elif asks and self.gone is not None and self.gone(row):
            self._end(row, "halted")

    def _end(self, row: int, how: Ended) -> None:
        self.ended[row] = self.ended[row] or how


@contextmanager
def repeated_already(model: torch.nn.Module) -> Iterator[None]:
    """Within it transformers takes the rows as they are, a row for each beam. Of a row's images it would repeat each one, where the whole
    row is to be repeated, and those that lie side by side in one tensor not at all."""

    def take(input_ids: Tensor | None = None, expand_size: int = 1, is_encoder_decoder: bool = False, **more: Any) -> Any:
        return input_ids, more

    model._expand_inputs_for_generation = take  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._expand_inputs_for_generation


def find_context(model: torch.nn.Module) -> int:
    """The positions that the model was made for, in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)  # type: ignore[union-attr,operator]


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


def group(batch: Sequence[Prepared]) -> list[list[int]]:
    """The rows that can be answered together. A search by beams has one length and one width for all."""
    alike: dict[tuple[int, int], list[int]] = {}
    for row, one in enumerate(batch):
        alike.setdefault((one.sampling.beams, one.most if one.sampling.beams > 1 else 0), []).append(row)
    return list(alike.values())


def relay(function: Callable[..., Any], rows: Sequence[int]) -> Callable[..., Any]:
    """With the row of the whole batch in place of that of a part."""
    return lambda row, *more: function(rows[row], *more)


def collate_prepared(batch: Sequence[Prepared], processor: Processor) -> dict[str, Tensor]:
    """Left-padded input_ids and attention_mask, [B, T] int64, with the images' tensors."""
    pads = [blanks for _, blanks in fill([one.input_ids for one in batch], (), processor)]
    input_ids = integers([front + one.input_ids for front, one in zip(pads, batch, strict=True)])
    return {
        "input_ids": input_ids,
        "attention_mask": integers([[0] * len(front) + [1] * one.length for front, one in zip(pads, batch, strict=True)]),
        **processor.text_inputs(input_ids),
        **join([image for one in batch for image in one.features], processor),
    }
