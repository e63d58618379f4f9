"""The length of every sample in tokens before a run, from the model's tokenizer and the sizes of the images, without decoding pixels.

torch is imported only together with the model's processor, because the import takes seconds that the rest of the check does not need.
"""

from array import array
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract import MODEL, DataProblem, InputRefused, Template, TrainSpec
from trainer.contract.adapter_files import find_base
from trainer.data.chat.conversation import ChatTemplate, cut, writes_bos
from trainer.data.chat.prefix import cut_or_problem
from trainer.data.chat.segment import Segment
from trainer.data.chat.segment_ids import plain_backend, token_ids, tokenise
from trainer.data.cut import IGNORED, Span, count_cut_images, find_spans
from trainer.data.encode import NO_TOKEN_IN_LOSS, expand, image_id, opening, too_long
from trainer.data.grounding.placement import make_placement
from trainer.data.rows.sample import Sample
from trainer.data.special_token import SpecialTokens, tokens_of_tokenizer

if TYPE_CHECKING:
    from trainer.data.processor import Processor

CHUNK = 512  # samples whose texts and ids are in memory at a time
SLACK = 8  # tokens that tokenizing a segment separately may add
FULL = 20_000  # samples of which the tokens of every text are counted
EACH = 8  # of further ones that cannot be too long, each 8th is counted, and the others are estimated from their characters
REPLACE = "use the tokenizer and processor that belong to the model"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One sample. `tokens`, `image_tokens`: of what is used; `whole`: all tokens, more than these if its end is cut off. `trained`: tokens in the
    loss. `problem`: (problem, fix) of a sample that cannot be used. `too_long`: it has too many tokens, and nothing else is wrong."""

    tokens: int
    image_tokens: int
    whole: int
    trained: int
    problem: tuple[str, str] | None = None
    too_long: bool = False


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """`tokens` of each sample, including its `image_tokens`, in the order of the samples. A text is tokenized as a whole, which may give a
    token or two less per message than the model gets. `trained`: tokens in the loss of all samples, from the answers tokenized alone.
    `unmeasured`: the reason when there are no lengths. `warnings`: about special tokens in texts -> number of rows. `estimated`: samples whose
    tokens were not counted."""

    tokens: Sequence[int] = ()
    image_tokens: Sequence[int] = ()
    trained: int = 0
    problems: tuple[DataProblem, ...] = ()
    unmeasured: str = ""
    warnings: dict[str, int] = field(default_factory=dict)
    estimated: int = 0


class LengthTally:
    """Measures samples that are added a few at a time. `sizes`: (width, height) of every image. `cut` must accept the samples. Without a processor
    there are no lengths, and `lengths` says why."""

    def __init__(self, spec: TrainSpec, processor: "Processor | None" = None, *, unmeasured: str = "") -> None:
        self.spec, self.processor, self.unmeasured = spec, processor, unmeasured
        self.counter: Counter | None = None
        self.tokens, self.image_tokens, self.trained = array("I"), array("I"), 0
        self.problems: list[DataProblem] = []  # of the model, and of rows
        self.too_long: list[DataProblem] = []  # of rows that data.too_long leaves out
        self.cut: list[tuple[Sample, int]] = []  # and the tokens of the whole sample
        self.special: SpecialTokens | None = None
        self.warnings: Tally[str] = Tally()
        self.seen = self.estimated = 0
        self.characters = self.text_tokens = 0  # of the ASCII texts that were counted

    def add(self, samples: Sequence[Sample], sizes: Callable[[Path], tuple[int, int]], *, training: bool = True) -> None:
        """`training`: only training samples are cut; of the others the last answer must be whole."""
        if not samples or not self._begin():
            return
        assert self.counter is not None and self.processor is not None
        for start in range(0, len(samples), CHUNK):
            self._measure(self.counter, self.processor, samples[start : start + CHUNK], sizes, training=training)

    def find_template(self) -> ChatTemplate | None:
        """What the conversations will be written with. None if only a machine that has the model's files can say it."""
        begun = self._begin()
        return (
            self.counter.template
            if begun and self.counter
            else None
            if self.spec.model.chat_template and source_of(self.spec)
            else self.spec.model.template
        )

    def lengths(self) -> Lengths:
        """`unmeasured` without any sample: every row has a problem."""
        begun = self.counter is not None or self.problems
        reason = self.unmeasured or ("" if begun else "every row has a problem")
        return Lengths(
            tokens=self.tokens,
            image_tokens=self.image_tokens,
            trained=self.trained,
            problems=tuple(self.problems),
            unmeasured=reason,
            warnings=dict(self.warnings),
            estimated=self.estimated,
        )

    def _begin(self) -> bool:
        """Open the processor with the first samples. Whether there is one."""
        if self.counter is None and not self.problems and not self.unmeasured:
            model = self.spec.model
            try:
                self.processor = self.processor or open_processor(self.spec)
                image_id(self.processor.tokenizer, model.image_token)
            except InputRefused as error:
                problem, _, fix = str(error).partition("\n")
                self.problems.append(model_problem(self.spec, problem, fix.strip() or REPLACE))
            except (ImportError, OSError, ValueError) as error:
                first = str(error).strip().partition("\n")[0]
                self.unmeasured = f"the processor of the model is not available on this machine ({first})"
            else:
                tokenizer, limit = self.processor.tokenizer, self.spec.data.max_length
                template = self.processor.template or model.template
                self.counter = Counter(tokenizer=tokenizer, template=template, image_token=model.image_token, max_length=limit)
                self.special = tokens_of_tokenizer(tokenizer, model.template, model.image_token)
                self.problems += find_mark_problems(self.counter, self.spec)
        return self.counter is not None

    def _measure(
        self,
        counter: "Counter",
        processor: "Processor",
        samples: Sequence[Sample],
        sizes: Callable[[Path], tuple[int, int]],
        *,
        training: bool,
    ) -> None:
        data, exact = self.spec.data, counter.always_exact()
        placement = make_placement(self.spec, processor.scaled)
        placed = [placement.place(sample, [sizes(path) for path in sample.images]) for sample in samples]
        samples, cuts, unwritten = counter.cut(placed)
        self.problems += unwritten
        spans = [[processor.span(sizes(path), index) for index, path in enumerate(sample.images)] for sample in samples]
        chosen = [exact or self._is_counted(segments, own) for segments, own in zip(cuts, spans, strict=True)]
        counts = zip(*counter.count([segments for segments, counted in zip(cuts, chosen, strict=True) if counted]), strict=True)
        for sample, segments, own, is_counted in zip(samples, cuts, spans, chosen, strict=True):
            self._find_special(sample)
            found = self._count(segments, own, *next(counts)) if is_counted else self._estimate(segments, own)
            if exact or (is_counted and found.tokens + SLACK * len(segments) > counter.max_length):
                found = counter.count_exactly(sample, segments, own, found.trained, cuts=training and data.too_long == "cut")
            if found.problem is not None:
                skips = found.too_long and (data.too_long == "skip" or (data.too_long == "cut" and not training))
                (self.too_long if skips else self.problems).append(counter.problem(sample, *found.problem))
                if skips or data.bad_rows == "skip":
                    continue
            if found.tokens < found.whole:
                self.cut.append((sample, found.whole))
            self.tokens.append(found.tokens)
            self.image_tokens.append(found.image_tokens)
            self.trained += found.trained

    def _find_special(self, sample: Sample) -> None:
        if self.special is not None:
            wrong, counted = self.special.find(sample)
            self.problems += wrong
            self.warnings.update(counted)

    def _is_counted(self, segments: Sequence[Segment], spans: Sequence[Sequence[int]]) -> bool:
        """No tokenizer makes more tokens of ASCII text than it has characters; of other text it may, since a character has several bytes."""
        self.seen += 1
        if self.seen <= FULL or self.seen % EACH == 0:
            return True
        most = sum(len(segment.text) for segment in segments) + SLACK * len(segments) + sum(map(len, spans))
        return most > self.spec.data.max_length or not all(segment.text.isascii() for segment in segments)

    def _count(self, segments: Sequence[Segment], spans: Sequence[Sequence[int]], count: int, trained: int) -> Measured:
        """`count`: the tokens of the text, in which an image is one; `trained`: of its answers."""
        if all(segment.text.isascii() for segment in segments):  # as those that are estimated
            self.characters += sum(len(segment.text) for segment in segments)
            self.text_tokens += count
        images = sum(map(len, spans))
        length = count + images - len(spans)
        return Measured(tokens=length, image_tokens=images, whole=length, trained=trained)

    def _estimate(self, segments: Sequence[Segment], spans: Sequence[Sequence[int]]) -> Measured:
        """With as many tokens a character as in the ASCII texts that were counted."""
        self.estimated += 1
        rate, images = self.text_tokens / max(1, self.characters), sum(map(len, spans))
        length = round(rate * sum(len(segment.text) for segment in segments)) + images - len(spans)
        trained = round(rate * sum(len(segment.text) for segment in segments if segment.in_loss))
        return Measured(tokens=length, image_tokens=images, whole=length, trained=trained)


def open_processor(spec: TrainSpec) -> "Processor":
    """The processor that the run will use, from local files only. Raises InputRefused, OSError, ValueError, ImportError."""
    from trainer.models.family import Limit
    from trainer.models.registry import find_family

    family = find_family(spec.model.family)
    limit = Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles)
    folder = source_of(spec)
    if not folder:
        return family.create_processor(spec.model, limit)
    if spec.model.source.kind == "hub" and folder == spec.model.source.id:
        from huggingface_hub import snapshot_download

        try:
            folder = snapshot_download(folder, revision=spec.model.source.revision or None, local_files_only=True)
        except OSError as error:
            advice = f"fetch it: omnilaunch model fetch {folder}; or name its folder: model.source.path=FOLDER"
            raise OSError(f"{folder} has not been downloaded; {advice}") from error
    return family.load_processor(Path(folder), spec.model, limit)


def source_of(spec: TrainSpec) -> str:
    """The folder of the model, or its id on the hub; '' for a random start. An adapter has the tokenizer and image processor of its base, as
    trainer.train.model.load_or_create."""
    source = spec.model.source
    if spec.stage.checkpoint:
        return find_base(Path(spec.stage.checkpoint), spec) or spec.stage.checkpoint
    return {"path": source.path, "hub": source.id}.get(source.kind, "")


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Counts texts with a tokenizer and a template."""

    tokenizer: Any
    template: ChatTemplate
    image_token: str
    max_length: int

    def cut(self, samples: Sequence[Sample]) -> tuple[list[Sample], list[tuple[Segment, ...]], list[DataProblem]]:
        """The samples that the template can express, the segments of each, and the problems of the others. The template of the spec can express all:
        its problems were found before."""
        if isinstance(self.template, Template):
            return list(samples), [cut(sample, self.template, self.image_token) for sample in samples], []
        found = [(sample, cut_or_problem(sample, self.template)) for sample in samples]
        kept = [(sample, each) for sample, each in found if not isinstance(each, DataProblem)]
        return [sample for sample, _ in kept], [each for _, each in kept], [each for _, each in found if isinstance(each, DataProblem)]

    def count(self, cuts: Sequence[tuple[Segment, ...]]) -> tuple[list[int], list[int]]:
        """Of each sample: the number of tokens of its whole text, in which an image is one token, and the trained tokens. `cuts`: the segments of
        each."""
        texts = ["".join(segment.text for segment in segments) for segments in cuts]
        first = len(opening(self.tokenizer)) * (not (cuts and writes_bos(self.template, cuts[0])))
        answers = [[segment.text for segment in segments if segment.in_loss] for segments in cuts]
        distinct = list(dict.fromkeys(chain.from_iterable(answers)))  # often a few words that occur many times
        trained = dict(zip(distinct, count_texts(self.tokenizer, distinct), strict=True))
        counts = [first + count for count in count_texts(self.tokenizer, texts)]
        return counts, [sum(trained[answer] for answer in own) for own in answers]

    def count_exactly(
        self, sample: Sample, segments: tuple[Segment, ...], spans: Sequence[Sequence[int]], trained: int, *, cuts: bool = False
    ) -> Measured:
        """The exact length, as of `trainer.data.encode.encode`, and the problem that it would refuse."""
        images = sum(map(len, spans))
        whole = Measured(tokens=images, image_tokens=images, whole=images, trained=trained)
        unexpanded, image = tokenise(self.tokenizer, segments), image_id(self.tokenizer, self.image_token)
        try:
            pieces = expand(sample, unexpanded, image, spans)
        except InputRefused:
            problem = f"the tokenizer does not find exactly one {self.image_token!r} for each of the {len(spans)} images"
            return replace(whole, problem=(problem, "write <image> once for each image, and no text that looks like the image token"))
        start = 0 if writes_bos(self.template, segments) else len(opening(self.tokenizer))
        length = start + sum(map(len, pieces))
        whole = replace(whole, tokens=length, whole=length)
        if length > self.max_length and cuts:
            labels = [IGNORED] * start
            for segment, piece in zip(segments, pieces, strict=True):
                labels += piece if segment.in_loss else [IGNORED] * len(piece)
            return self.shorten(whole, find_spans(unexpanded, image, spans, start), labels)
        if length > self.max_length:
            return replace(whole, problem=too_long(length, images, self.max_length), too_long=True)
        if not any(piece for segment, piece in zip(segments, pieces, strict=True) if segment.in_loss):
            return replace(whole, problem=NO_TOKEN_IN_LOSS)
        return whole

    def shorten(self, whole: Measured, images: Sequence[Span], labels: Sequence[int]) -> Measured:
        """What is left of a sample within `max_length`."""
        limit = self.max_length
        try:
            count_cut_images(images, labels, limit)
        except ValueError as error:
            problem, fix = too_long(whole.whole, whole.image_tokens, limit)
            return replace(whole, problem=(f"{problem}, and cannot be cut: {error}", fix))
        trained = sum(label != IGNORED for label in labels[:limit])
        return replace(whole, tokens=limit, image_tokens=sum(end - first for first, end in images if end <= limit), trained=trained)

    def always_exact(self) -> bool:
        """Whether an answer could have no token at all. With an end mark it always has one."""
        mark = self.template.end_mark
        return not mark or not token_ids(self.tokenizer, mark)

    @staticmethod
    def problem(sample: Sample, problem: str, fix: str) -> DataProblem:
        return DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix)


def count_texts(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text; in parallel on all cores with a fast tokenizer (tokenizers library)."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return [len(token_ids(tokenizer, text)) for text in texts]
    return [len(encoding) for encoding in plain_backend(tokenizer).encode_batch_fast(texts, add_special_tokens=False)]


def model_problem(spec: TrainSpec, problem: str, fix: str) -> DataProblem:
    """A fault of the model's files or template: no row is the cause."""
    at = spec.stage.checkpoint or source_of(spec)
    return DataProblem(file=f"{MODEL}{spec.model.name}{f' ({at})' if at else ''}", row=0, field="", problem=problem, fix=fix)


def find_mark_problems(counter: Counter, spec: TrainSpec) -> Iterator[DataProblem]:
    """An end mark that is not a single token: the model would learn pieces of it, and a server would not recognize the end of an answer."""
    mark, tokenizer = counter.template.end_mark.strip(), counter.tokenizer
    ids = token_ids(tokenizer, mark) if mark else []
    if len(ids) > 1 or (mark and tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
        own = isinstance(counter.template, Template)
        whose = "the model's template" if own else "the checkpoint's chat template"
        problem = f"the end mark {mark!r} of {whose} is {len(ids)} tokens of the tokenizer, not a single special token"
        other = "model.template.end_mark to the token that ends its answers" if own else "model.chat_template=conf"
        yield model_problem(spec, problem, f"use the tokenizer that belongs to the model, or set {other}")
