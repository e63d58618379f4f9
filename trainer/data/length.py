"""Tokens of every sample before a run, as the model's own tokenizer and its rule for images count them. No pixel is looked at.

Torch is imported with the model's processor, and with nothing else here: seconds that the rest of a check does not need.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.contract import DataProblem, InputRefused, Template, TrainSpec
from trainer.data.encode import expand, image_id, opening, token_ids, tokenise
from trainer.data.rows.sample import Sample
from trainer.data.segment import Segment, cut

CHUNK = 1024  # samples whose texts and ids are in memory together
SLACK = 8  # tokens that a cut may add: what a few letters beside it become on their own


class Ruler(Protocol):
    """What lengths need of trainer.models.family.Processor. `span(size, place)`: the ids that stand for an image of (width, height)."""

    @property
    def tokenizer(self) -> Any: ...

    @property
    def span(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """`tokens` of each sample, images and all, and how many of them are `image_tokens`, in the order of the samples; a text is counted
    in one piece, which at a cut between question and answer may be a token or two less than the model reads. `unmeasured`: why there
    are none."""

    tokens: Sequence[int] = ()
    image_tokens: Sequence[int] = ()
    problems: tuple[DataProblem, ...] = ()
    unmeasured: str = ""


def measure(samples: Sequence[Sample], sizes: Mapping[Path, tuple[int, int]], spec: TrainSpec) -> Lengths:
    """Lengths and what is too long. `sizes`: (width, height) of every image of the samples, which `cut` must be able to cut."""
    try:
        ruler = open_ruler(spec)
        image_id(ruler.tokenizer, spec.model.image_token)
    except InputRefused as error:
        problem, _, fix = str(error).partition("\n")
        return Lengths(problems=(DataProblem(file=source_of(spec), row=0, field="", problem=problem, fix=fix.strip() or REPLACE),))
    except (ImportError, OSError, ValueError) as error:
        first = str(error).strip().partition("\n")[0]
        return Lengths(unmeasured=f"the model's processor cannot be opened here ({first})")
    return measure_with(ruler, samples, sizes, spec.model.template, spec.model.image_token, max_length=spec.data.max_length)


def open_ruler(spec: TrainSpec) -> Ruler:
    """The processor that the run will use, from this machine's files alone. Raises InputRefused, OSError, ValueError, ImportError."""
    from trainer.models import find_family
    from trainer.models.family import Limit

    family = find_family(spec.model.family)
    limit = Limit(max_pixels=spec.data.max_pixels, max_tiles=spec.data.max_tiles)
    folder = source_of(spec)
    if not folder:
        return family.create_processor(spec.model, limit)
    if spec.model.source.kind == "hub" and folder == spec.model.source.id:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(folder, revision=spec.model.source.revision or None, local_files_only=True)
    return family.load_processor(Path(folder), spec.model, limit)


def source_of(spec: TrainSpec) -> str:
    """A folder, or the id of a model on the hub; '' for a random start."""
    source = spec.model.source
    return spec.stage.checkpoint or {"path": source.path, "hub": source.id}.get(source.kind, "")


def measure_with(
    ruler: Ruler, samples: Sequence[Sample], sizes: Mapping[Path, tuple[int, int]], template: Template, image_token: str, *, max_length: int
) -> Lengths:
    counter = Counter(ruler=ruler, template=template, image_token=image_token, max_length=max_length)
    problems = list(find_mark_problems(counter, samples))
    tokens: list[int] = []
    image_tokens: list[int] = []
    exact = counter.exact_always()
    for start in range(0, len(samples), CHUNK):
        chunk = samples[start : start + CHUNK]
        for sample, segments, count in zip(chunk, *counter.count(chunk), strict=True):
            spans = [ruler.span(sizes[path], place) for place, path in enumerate(sample.images)]
            images = sum(map(len, spans))
            length = count + images - len(spans)
            if exact or length + SLACK * len(segments) > max_length:
                length, found = counter.judge(sample, segments, spans)
                problems += found
            tokens.append(length)
            image_tokens.append(images)
    return Lengths(tokens=tuple(tokens), image_tokens=tuple(image_tokens), problems=tuple(problems))


@dataclass(frozen=True, kw_only=True)
class Counter:
    """Counts texts with a tokenizer and a template."""

    ruler: Ruler
    template: Template
    image_token: str
    max_length: int

    def count(self, samples: Sequence[Sample]) -> tuple[list[tuple[Segment, ...]], list[int]]:
        """The segments of each sample, and the tokens of its whole text, an image's mark being one."""
        cuts = [cut(sample, self.template, self.image_token) for sample in samples]
        texts = ["".join(segment.text for segment in segments) for segments in cuts]
        first = len(opening(self.ruler.tokenizer))
        return cuts, [first + count for count in count_texts(self.ruler.tokenizer, texts)]

    def judge(self, sample: Sample, segments: tuple[Segment, ...], spans: Sequence[Sequence[int]]) -> tuple[int, list[DataProblem]]:
        """The exact length, as `trainer.data.encode.encode` makes it, and what that would refuse."""
        tokenizer, images = self.ruler.tokenizer, sum(map(len, spans))
        try:
            pieces = expand(sample, tokenise(tokenizer, segments), image_id(tokenizer, self.image_token), spans)
        except InputRefused:
            problem = f"the tokenizer does not read one {self.image_token!r} for each of {len(spans)} images"
            return images, [self.problem(sample, problem, "write <image> once for each image, and nothing that looks like its token")]
        length = len(opening(tokenizer)) + sum(map(len, pieces))
        if length > self.max_length:
            problem = f"{length} tokens ({images} of them images) are longer than data.max_length={self.max_length}"
            fix = f"nothing is cut off: set data.max_length={length} if model and memory take it, or split or leave out the row"
            return length, [self.problem(sample, problem, fix)]
        if not any(piece for segment, piece in zip(segments, pieces, strict=True) if segment.in_loss):
            problem = "the tokenizer makes no token of its answers, so that nothing would be learned"
            return length, [self.problem(sample, problem, "write a visible answer")]
        return length, []

    def exact_always(self) -> bool:
        """Whether an answer could be without a token, which its end mark prevents where there is one."""
        mark = self.template.end_mark
        return not mark or not token_ids(self.ruler.tokenizer, mark)

    @staticmethod
    def problem(sample: Sample, problem: str, fix: str) -> DataProblem:
        return DataProblem(file=sample.file, row=sample.row, field="", problem=problem, fix=fix)


def count_texts(tokenizer: Any, texts: list[str]) -> list[int]:
    """All of them at once on every core, where the tokenizer is one of the tokenizers library."""
    fast = getattr(tokenizer, "backend_tokenizer", None)
    if fast is None:
        return [len(token_ids(tokenizer, text)) for text in texts]
    fast.no_padding(), fast.no_truncation()
    return [len(encoding.ids) for encoding in fast.encode_batch_fast(texts, add_special_tokens=False)]


def find_mark_problems(counter: Counter, samples: Sequence[Sample]) -> Iterator[DataProblem]:
    """A template whose end mark is no token of its own: the model would learn pieces of it, and a server never sees it end."""
    mark, tokenizer = counter.template.end_mark.strip(), counter.ruler.tokenizer
    ids = token_ids(tokenizer, mark) if mark else []
    if samples and (len(ids) > 1 or (mark and tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids)):
        problem = f"the tokenizer reads the end mark {mark!r} of the model's template as {len(ids)} tokens, not as one of its own"
        fix = "take the tokenizer that belongs to the model, or set model.template.end_mark to the mark that it ends answers with"
        yield DataProblem(file=samples[0].file, row=0, field="", problem=problem, fix=fix)


REPLACE = "take the tokenizer and processor that belong to the model"
