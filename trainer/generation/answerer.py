"""Questions to answers: a batch may mix questions of any length, with any images, each with its own way of choosing and of ending."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from trainer.contract import InputRefused, TrainSpec
from trainer.data.batch.collate import Features, fill, integers, join, make_features, text_rule
from trainer.data.encode import encode_prompt
from trainer.data.media.image import check_size, flatten
from trainer.data.rows.sample import Message, Sample
from trainer.generation.batch_progress import BatchProgress, Calls, Halted, OnEnd, OnText
from trainer.generation.question import Answer as Answer, Ended as Ended, Prepared as Prepared, Question as Question, check_messages
from trainer.generation.sampling import Chooser, check_sampling
from trainer.generation.text_reader import end_ids
from trainer.models.family import Processor

NO_LIMIT = 2**62


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

    def answer(
        self,
        batch: Sequence[Prepared],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        halted: Halted | None = None,
    ) -> list[Answer]:
        """In the order of `batch`. `on_text` hears the parts of each answer's text as they come, which joined are its text; with beams all
        at the end. `on_end` hears each answer in the step that ends it, before those of its batch that go on. `halted` is asked before
        each token of rows that go on. All are called on this thread. Rows that search by beams are answered apart from the others."""
        answers: dict[int, Answer] = {}
        for rows in group(batch):
            calls = Calls(text=relay(on_text, rows), end=relay(on_end, rows), halted=relay(halted, rows))
            found = self._answer([batch[row] for row in rows], calls)
            answers |= dict(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(batch))]

    @torch.no_grad()
    def _answer(self, batch: Sequence[Prepared], calls: Calls) -> list[Answer]:
        beams = batch[0].sampling.beams
        repeated = [one for one in batch for _ in range(beams)]
        tensors = {key: value.to(self.device) for key, value in collate_prepared(repeated, self.processor).items()}
        width = tensors["input_ids"].shape[1]
        watch = BatchProgress(batch, self.processor.tokenizer, frozenset(self.ends), calls, beams=beams)
        with repeated_already(self.model):
            ids = self.model.generate(  # type: ignore[operator]  # a module of transformers
                **tensors,
                generation_config=self._config(max(one.most for one in batch), beams),
                logits_processor=LogitsProcessorList([Chooser([one.sampling for one in batch], [one.seed for one in batch])]),
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        if beams > 1:
            watch.read_whole(ids[:, width:])
        return [answer for answer in watch.answers if answer is not None]

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


def group(batch: Sequence[Prepared]) -> list[list[int]]:
    """The rows that can be answered together. A search by beams has one length and one width for all."""
    alike: dict[tuple[int, int], list[int]] = {}
    for row, one in enumerate(batch):
        alike.setdefault((one.sampling.beams, one.most if one.sampling.beams > 1 else 0), []).append(row)
    return list(alike.values())


def relay(function: Callable[..., Any] | None, rows: Sequence[int]) -> Callable[..., Any] | None:
    """With the row of the whole batch in place of that of a part."""
    return None if function is None else lambda row, *more: function(rows[row], *more)


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
