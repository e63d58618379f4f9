"""Generate answers. The questions of a batch may differ in length, images, sampling and stop texts."""

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
from trainer.data.batch.collate import Features, collate_left, encode_arguments, make_features
from trainer.data.chat.system_choice import with_system
from trainer.data.encode import encode_prompt
from trainer.data.media.image import check_size, flatten
from trainer.data.processor import Processor, template_of
from trainer.data.rows.sample import Message, Sample
from trainer.generation.batch_progress import BatchProgress, Callbacks, Halted, OnEnd, OnText
from trainer.generation.question import Answer as Answer, EndReason as EndReason, Prepared as Prepared, Question as Question, check_messages
from trainer.generation.sampling import RowSampler, check_sampling
from trainer.generation.text_reader import end_ids

NO_LIMIT = 2**62
ROOM_TOKENS = 512  # for an answer, in the context that is offered to a question that is too long


class Answerer:
    """`prepare` is thread-safe; `answer` may run in one thread at a time. `device`: of the model's input ids."""

    def __init__(self, model: torch.nn.Module, processor: Processor, spec: TrainSpec, device: torch.device) -> None:
        self.model, self.processor, self.spec, self.device = model, processor, spec, device
        self.context = find_context(model)
        self.bound = find_bound(spec)
        self.end_mark = template_of(processor, spec).end_mark.strip()
        self.ends = end_ids(processor.tokenizer, self.end_mark)
        self._lock = Lock()  # a fast tokenizer raises if two threads use it at the same time

    def image_features(self, image: Image.Image) -> Features:
        """The model's inputs for an image. Raises InputRefused for one that is too large or too narrow."""
        try:
            check_size(image.size)
            return make_features(image if image.mode == "RGB" else flatten(image), self.processor)
        except ValueError as error:
            raise InputRefused(f"image: {error}\n    use a smaller image, or a part of it") from error

    def prepare(self, question: Question, features: Sequence[Features] | None = None) -> Prepared:
        """`features`: of the question's images, if they were computed before. Raises InputRefused."""
        check_sampling(question.sampling)
        check_messages(question, len(question.images) if features is None else len(features))
        found = tuple(map(self.image_features, question.images)) if features is None else tuple(features)
        # A placeholder for the answer: the ids of a prompt end before it.
        sample = Sample(
            id=question.name,
            images=(Path(),) * len(found),
            messages=(*with_system(question.messages, self.spec.data.system), Message(role="assistant", content="-")),
            file=question.name,
            row=0,
        )
        rule = encode_arguments(self.processor, self.spec, found)[:-1]
        with self._lock:
            ids = encode_prompt(sample, *rule, NO_LIMIT).input_ids
        room = self.count_free(question.name, len(ids))
        return Prepared(
            input_ids=ids,
            features=found,
            sampling=question.sampling,
            seed=question.seed,
            marks=(self.end_mark, *question.stop),
            most=min(question.sampling.max_new_tokens, room),
        )

    def count_free(self, name: str, length: int) -> int:
        """How many new tokens fit into the context. Raises InputRefused if none do."""
        limit, context = self.spec.data.max_length, min(self.context, self.bound or self.context)
        if length >= context < self.context:
            key = f"stage.{'serving' if self.spec.stage.serving else 'inference'}.context"
            raise InputRefused(
                f"{name}: {length} tokens (including images) leave no space for an answer in {key}={context}\n    use a shorter question, "
                f"fewer or smaller images, or set {key}={min(self.context, length + ROOM_TOKENS)} (the model's context is {self.context})"
            )
        if length >= self.context:
            raise InputRefused(
                f"{name}: {length} tokens (including images) leave no space for an answer in the model's context of {self.context}\n"
                "    use a shorter question, or fewer or smaller images (data.max_pixels, data.max_tiles)"
            )
        if not self.bound and length > limit:
            raise InputRefused(
                f"{name}: {length} tokens (including images) are more than data.max_length={limit}\n    questions are not truncated: "
                f"set data.max_length={length} (the model's context is {self.context}), or use a shorter question"
            )
        return context - length

    def answer(
        self,
        batch: Sequence[Prepared],
        *,
        on_text: OnText | None = None,
        on_end: OnEnd | None = None,
        halted: Halted | None = None,
    ) -> list[Answer]:
        """Answers in the order of `batch`. `on_text(row, text)` gets the text of each answer in parts as they are generated (with beams, all
        at the end). `on_end(row, answer)` gets each answer in the step that ends it. `halted(row)`, called before each token, says whether
        to cancel a row. All are called on this thread. Rows with beam search are answered separately."""
        answers: dict[int, Answer] = {}
        for rows in group_rows(batch):
            callbacks = Callbacks(text=for_batch_rows(on_text, rows), end=for_batch_rows(on_end, rows), halted=for_batch_rows(halted, rows))
            found = self._answer([batch[row] for row in rows], callbacks)
            answers |= dict(zip(rows, found, strict=True))
        return [answers[row] for row in range(len(batch))]

    @torch.no_grad()
    def _answer(self, batch: Sequence[Prepared], callbacks: Callbacks) -> list[Answer]:
        beams = batch[0].sampling.beams
        repeated = [one for one in batch for _ in range(beams)]
        images = [image for one in repeated for image in one.features]
        inputs = collate_left([one.input_ids for one in repeated], images, (), self.processor)
        tensors = {key: value.to(self.device) for key, value in inputs.items()}
        width = tensors["input_ids"].shape[1]
        progress = BatchProgress(batch, self.processor.tokenizer, frozenset(self.ends), callbacks, beams=beams)
        with rows_already_repeated(self.model):
            ids = self.model.generate(  # type: ignore[operator]  # a module of transformers
                **tensors,
                generation_config=self._config(max(one.most for one in batch), beams),
                logits_processor=LogitsProcessorList([RowSampler([one.sampling for one in batch], [one.seed for one in batch])]),
                stopping_criteria=StoppingCriteriaList([progress]),
            )
        if beams > 1:
            progress.read_all(ids[:, width:])
        return [answer for answer in progress.answers if answer is not None]

    def _config(self, most: int, beams: int) -> GenerationConfig:
        """Every value is set explicitly: missing ones would come from the generation config of the checkpoint."""
        return GenerationConfig(
            do_sample=False,
            num_beams=beams,
            repetition_penalty=1.0,
            max_new_tokens=most,
            eos_token_id=self.ends,
            pad_token_id=self.processor.tokenizer.pad_token_id,
        )


@contextmanager
def rows_already_repeated(model: torch.nn.Module) -> Iterator[None]:
    """Within the block, transformers does not repeat the rows for the beams. It would repeat the images of a row one by one instead of all
    together, and not at all if they are side by side in one tensor."""

    def take(input_ids: Tensor | None = None, expand_size: int = 1, is_encoder_decoder: bool = False, **more: Any) -> Any:
        return input_ids, more

    model._expand_inputs_for_generation = take  # type: ignore[assignment]
    try:
        yield
    finally:
        del model._expand_inputs_for_generation


def find_context(model: torch.nn.Module) -> int:
    """The context length of the model, in tokens."""
    return int(model.config.get_text_config().max_position_embeddings)  # type: ignore[union-attr,operator]


def find_bound(spec: TrainSpec) -> int:
    """Tokens of a question with its answer that the stage allows; 0 = no bound of its own, as in specs of earlier versions."""
    options = spec.stage.serving or spec.stage.inference
    return options.context if options else 0


def group_rows(batch: Sequence[Prepared]) -> list[list[int]]:
    """The rows that can be generated together. With beam search, all must have the same number of beams and of new tokens."""
    groups: dict[tuple[int, int], list[int]] = {}
    for row, one in enumerate(batch):
        groups.setdefault((one.sampling.beams, one.most if one.sampling.beams > 1 else 0), []).append(row)
    return list(groups.values())


def for_batch_rows(function: Callable[..., Any] | None, rows: Sequence[int]) -> Callable[..., Any] | None:
    """`function` with rows of the whole batch instead of rows of a group."""
    return None if function is None else lambda row, *more: function(rows[row], *more)
