"""The length of every sample in tokens before a run, from the model's tokenizer and the sizes of the images, without decoding pixels.

torch is imported only together with the model's processor, because the import takes seconds that the rest of the check does not need.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract import DataProblem, InputRefused, Template, TrainSpec
from trainer.contract.adapter_files import find_base
from trainer.data.encode import NO_TOKEN_IN_LOSS, expand, image_id, opening, token_ids, tokenise, too_long
from trainer.data.rows.sample import Sample
from trainer.data.segment import Segment, cut

if TYPE_CHECKING:
    from trainer.data.processor import Processor

CHUNK = 1024  # samples whose texts and ids are in memory at a time
SLACK = 8  # tokens that tokenizing a segment separately may add
REPLACE = "use the tokenizer and processor that belong to the model"


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """`tokens` of each sample, including its `image_tokens`, in the order of the samples. A text is tokenized as a whole, which may give a
    token or two less per message than the model gets. `trained`: tokens in the loss of all samples, from the answers tokenized alone.
    `unmeasured`: the reason when there are no lengths."""

    tokens: Sequence[int] = ()
    image_tokens: Sequence[int] = ()
    trained: int = 0
    problems: tuple[DataProblem, ...] = ()
    unmeasured: str = ""


def measure(samples: Sequence[Sample], sizes: Mapping[Path, tuple[int, int]], spec: TrainSpec) -> Lengths:
    """Lengths, and samples that are too long. `sizes`: (width, height) of every image. `cut` must accept the samples."""
    try:
        processor = open_processor(spec)
        image_id(processor.tokenizer, spec.model.image_token)
    except InputRefused as error:
        problem, _, fix = str(error).partition("\n")
        return Lengths(
            problems=(
                DataProblem(file=spec.stage.checkpoint or source_of(spec), row=0, field="", problem=problem, fix=fix.strip() or REPLACE),
            )
        )
    except (ImportError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        return Lengths(unmeasured=f"the processor of the model is not available on this machine ({first})")
    return measure_with(processor, samples, sizes, spec.model.template, spec.model.image_token, max_length=spec.data.max_length)


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


def measure_with(
    processor: "Processor",
    samples: Sequence[Sample],
    sizes: Mapping[Path, tuple[int, int]],
    template: Template,
    image_token: str,
    *,
    max_length: int,
) -> Lengths:
    counter = Counter(tokenizer=processor.tokenizer, template=template, image_token=image_token, max_length=max_length)
    problems = list(find_mark_problems(counter, samples))
    tokens: list[int] = []
    image_tokens: list[int] = []
    exact, trained = counter.always_exact(), 0
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        cuts, counts = counter.count(chunk)
        trained += sum(count_texts(processor.tokenizer, [segment.text for segments in cuts for segment in segments if segment.in_loss]))
        for sample, segments, count in zip(chunk, cuts, counts, strict=True):
            spans = [processor.span(sizes[path], index) for index, path in enumerate(sample.images)]
            images = sum(map(len, spans))
            length = count + images - len(spans)
            if exact or length + SLACK * len(segments) > max_length:
                length, found = counter.count_exactly(sample, segments, spans)
                problems += found
            tokens.append(length)
            image_tokens.append(images)
    return Lengths(tokens=tuple(tokens), image_tokens=tuple(image_tokens), trained=trained, problems=tuple(problems))


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Counts texts with a tokenizer and a template."""

    tokenizer: Any
    template: Template
    image_token: str
    max_length: int

    def count(self, samples: Sequence[Sample]) -> tuple[list[tuple[Segment, ...]], list[int]]:
        """The segments of each sample, and the number of tokens of its whole text, in which an image is one token."""
        cuts = [cut(sample, self.template, self.image_token) for sample in samples]
        texts = ["".join(segment.text for segment in segments) for segments in cuts]
        first = len(opening(self.tokenizer))
        return cuts, [first + count for count in count_texts(self.tokenizer, texts)]

    def count_exactly(self, sample: Sample, segments: tuple[Segment, ...], spans: Sequence[Sequence[int]]) -> tuple[int, list[DataProblem]]:
        """The exact length, as of `trainer.data.encode.encode`, and the problems that it would refuse."""
        images = sum(map(len, spans))
        try:
            pieces = expand(sample, tokenise(self.tokenizer, segments), image_id(self.tokenizer, self.image_token), spans)
        except InputRefused:
            problem = f"the tokenizer does not find exactly one {self.image_token!r} for each of the {len(spans)} images"
            return images, [self.problem(sample, problem, "write <image> once for each image, and no text that looks like the image token")]
        length = len(opening(self.tokenizer)) + sum(map(len, pieces))
        if length > self.max_length:
            return length, [self.problem(sample, *too_long(length, images, self.max_length))]
        if not any(piece for segment, piece in zip(segments, pieces, strict=True) if segment.in_loss):
            return length, [self.problem(sample, *NO_TOKEN_IN_LOSS)]
        return length, []

    def always_exact(self) -> bool:
        """Whether an answer could have no token at all. With an end mark it always has one."""
        mark = self.template.end_mark
        return not mark or not token_ids(self.tokenizer, mark)

    @staticmethod
    def problem(sample: Sample, problem: str, fix: str) -> DataProblem:
        return DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix)


def count_texts(tokenizer: Any, texts: list[str]) -> list[int]:
    """Tokens of each text; in parallel on all cores with a fast tokenizer (tokenizers library)."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return [len(token_ids(tokenizer, text)) for text in texts]
    fast.no_padding(), fast.no_truncation()
    return [len(encoding.ids) for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]


def find_mark_problems(counter: Counter, samples: Sequence[Sample]) -> Iterator[DataProblem]:
    """An end mark that is not a single token: the model would learn pieces of it, and a server would not recognize the end of an answer."""
    mark, tokenizer = counter.template.end_mark.strip(), counter.tokenizer
    ids = token_ids(tokenizer, mark) if mark else []
    if samples and (len(ids) > 1 or (mark and tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids)):
        problem = f"the end mark {mark!r} of the model's template is {len(ids)} tokens of the tokenizer, not a single special token"
        fix = "use the tokenizer that belongs to the model, or set model.template.end_mark to the token that ends its answers"
        yield DataProblem(file=samples[0].file, row=0, field="", problem=problem, fix=fix)
