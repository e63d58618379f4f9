"""The stage infer: answers one question, or those of a file; in batches of similar length, prepared ahead, on all ranks, resumable."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.journal import Journal, Row, gather_rows, open_journal, weights_fingerprints, write_rows
from trainer.checkpoint.lineage import find_images
from trainer.contract import (
    ANSWERS_FILE,
    IMAGES_FILE,
    STREAM_FILE,
    ImageForm,
    Inference,
    InputRefused,
    RunFailed,
    TrainResult,
    TrainSpec,
    write_text,
)
from trainer.contract.weight_files import hash_weights
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import Features, reads_truncated
from trainer.data.batch.load import prefetch
from trainer.data.media.image import hash_file, open_image, read_size
from trainer.data.media.store import store_of
from trainer.data.rows.image_form import describe
from trainer.data.rows.parsed_row import Turn
from trainer.data.rows.request import Request, place_images, read_requests
from trainer.data.rows.sample import Message
from trainer.device.rank import Rank
from trainer.export.derived_checkpoint import finished_result
from trainer.generation.answerer import Answerer, Prepared, Question
from trainer.generation.sampling import check_sampling
from trainer.models.family import Processor
from trainer.observe.memory import MemoryPeaks
from trainer.programs.inputs import open_model
from trainer.train.model import BuiltModel, weights_folder

WINDOW = 16  # batches whose rows are sorted by length together
SHOWN = 3  # failed rows in a message
REPORT_S = 10.0  # between two lines that report the progress

Batch = tuple[int, tuple[Request, ...]]
PreparedBatch = list[tuple[Request, Prepared | str]]  # the text says why a row cannot be answered


@dataclass(frozen=True, kw_only=True)
class InferenceTotals:
    rows: int
    failed: tuple[Row, ...]
    tokens: int


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Write answers.jsonl, a row for each row of the input, in its order. Raises InputRefused before anything is answered, and RunFailed at the
    end if rows could not be answered; their errors are in the file."""
    began = time.perf_counter()
    options = require_options(spec)
    form = find_images(spec, weights_folder(spec))
    requests = read_input(spec, options, form)
    if rank.number == 0 and any(request.images for request in requests):
        print(describe(form), flush=True)
        write_text(f"{describe(form)}\n", Path(spec.output) / IMAGES_FILE)
    memory = MemoryPeaks(rank.device)
    built = open_model(spec, rank, environ, spread=options.spread == "auto")
    memory.enter("evaluation")
    totals = answer_all(spec, options, rank, built, requests)
    if totals.failed:
        raise RunFailed(describe_failures(totals, options, Path(spec.output) / ANSWERS_FILE))
    seconds = time.perf_counter() - began
    sha256 = hash_weights(Path(built.lineage.path)) if rank.number == 0 and built.lineage.path else ""
    figures = {"count": float(totals.rows), "new_tokens": float(totals.tokens)}
    return finished_result(seconds, figures, samples_per_s=totals.rows / seconds, weights_sha256=sha256, peaks=memory.report())


def require_options(spec: TrainSpec) -> Inference:
    options = spec.stage.inference
    if options is None:
        raise InputRefused("stage.inference is not set\n    choose stage=infer, and set stage.inference.prompt or stage.inference.input")
    if bool(options.input) == bool(options.prompt):
        problem = "both are set" if options.input else "neither is set"
        raise InputRefused(
            f"stage.inference.prompt and stage.inference.input: {problem}\n    set prompt (and optionally image) for one question, or "
            "input=FILE.jsonl"
        )
    check_sampling(options.sampling, "stage.inference.sampling")
    if options.batch < 1:
        raise InputRefused(f"stage.inference.batch is {options.batch}: it must be at least 1")
    return options


def read_input(spec: TrainSpec, options: Inference, form: ImageForm) -> tuple[Request, ...]:
    """The questions of the file, or the one question. Raises InputRefused."""
    if options.input:
        file = Path(options.input)
        return read_requests(file, Path(spec.data.images) if spec.data.images else file.parent, form, store_of(spec))
    images = (Path(options.image),) if options.image else ()
    turns = (Turn(role="user", content=options.prompt, field="stage.inference.prompt"),)
    asked = place_images(turns, len(images), form, refuse_prompt)
    return (Request(row=1, messages=tuple(Message(role=turn.role, content=turn.content) for turn in asked), images=images),)


def refuse_prompt(field: str, problem: str, fix: str) -> None:
    raise InputRefused(f"{field}: {problem}\n    {fix}")


def answer_all(spec: TrainSpec, options: Inference, rank: Rank, built: BuiltModel, requests: Sequence[Request]) -> InferenceTotals:
    """Every rank answers its batches; the first one puts all rows together."""
    asked = hash_file(Path(options.input)) if options.input else ""
    answerer = Answerer(built.staged.model, built.processor, spec, rank.torch_device)
    journal = open_journal(spec, ANSWERS_FILE, rank.number, *weights_fingerprints(built.lineage), asked)
    own = (batch for batch in cut_batches(requests, built.processor, options.batch) if batch[0] % rank.world_size == rank.number)
    answered = {row["row"] for rows in journal.done.values() for row in rows}
    todo = (batch for batch in own if not all(request.row in answered for request in batch[1]))
    stream = AnswerStream(Path(spec.output) / STREAM_FILE) if options.prompt and options.stream and rank.number == 0 else None
    progress = report_progress(len(requests)) if rank.number == 0 and options.input else None
    prepare = make_preparer(answerer, options, spec.seed)
    with closing(prefetch(prepare, todo, min(options.prefetch, 1), options.prefetch)) as prepared:
        for ready in prepared:
            rows = answer_batch(answerer, ready, stream)
            if options.prompt and "error" in rows[0]:
                raise InputRefused(str(rows[0]["error"]))
            record_batch(journal, rows)
            if progress is not None:
                progress(sum(map(len, journal.done.values())))
    if options.prompt and rank.number == 0:
        print("" if stream is not None else rows_of(journal)[0]["answer"], flush=True)
    return finish(spec, rank, journal)


def cut_batches(requests: Sequence[Request], processor: Processor, size: int) -> Iterator[Batch]:
    """Numbered batches of rows of similar length, the longest of a window first: the same on any number of ranks and in every attempt."""
    number = 0
    for start in range(0, len(requests), size * WINDOW):
        window = sorted(requests[start : start + size * WINDOW], key=lambda request: -estimate_tokens(request, processor))
        for place in range(0, len(window), size):
            yield number, tuple(window[place : place + size])
            number += 1


def estimate_tokens(request: Request, processor: Processor) -> int:
    """Approximate tokens of a row, from the headers of its images; 0 if one cannot be read, which is reported with its answer."""
    try:
        images = sum(len(processor.span(read_size(path), place)) for place, path in enumerate(request.images))
    except InputRefused:
        return 0
    return images + sum(len(message.content.encode()) // 4 for message in request.messages)


def make_preparer(answerer: Answerer, options: Inference, seed: int) -> Callable[[Batch], PreparedBatch]:
    """Prepares a batch on the CPU. The pixels of the latest images are cached, keyed by a hash of the file."""
    cache = Cache(options.cache_images)

    def features_of(path: Path) -> Features:
        try:
            key = hash_file(path)
        except OSError as error:
            raise InputRefused(f"{path}: cannot be read: {error.strerror}\n    put the image there, or correct the path") from error
        return cache.get(key, lambda: answerer.image_features(open_image(path, truncated=reads_truncated(answerer.spec))), lambda _: 1)

    def prepare(request: Request) -> Prepared | str:
        question = Question(
            messages=request.messages, sampling=options.sampling, seed=seed * 2**32 + request.row, name=f"row {request.row}"
        )
        try:
            return answerer.prepare(question, [features_of(path) for path in request.images])
        except InputRefused as error:
            return str(error)

    return lambda batch: [(request, prepare(request)) for request in batch[1]]


def answer_batch(answerer: Answerer, ready: PreparedBatch, stream: Callable[[int, str], None] | None) -> list[Row]:
    """A row for each, in the order of `ready`."""
    good = [one for _, one in ready if isinstance(one, Prepared)]
    answers = iter(answerer.answer(good, on_text=stream) if good else ())
    rows: list[Row] = []
    for request, one in ready:
        row: Row = {"row": request.row} | ({"id": request.id} if request.id is not None else {})
        if isinstance(one, str):
            rows.append(row | {"error": one})
        else:
            answer = next(answers)
            more = {"prompt_tokens": answer.prompt_tokens, "tokens": answer.new_tokens, "ended": answer.ended}
            rows.append(row | {"answer": answer.text} | more)
    return rows


class AnswerStream:
    """Prints an answer while it is generated, and writes it to a file of the run's folder, which the launcher reads."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("", encoding="utf-8")  # remove the text of an earlier attempt

    def __call__(self, _row: int, text: str) -> None:
        print(text, end="", flush=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(text)


def report_progress(total: int) -> Callable[[int], None]:
    """Returns a function that prints from time to time how many rows this rank has answered."""
    last = time.monotonic()

    def report(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= REPORT_S:
            last = time.monotonic()
            print(f"answered {done} of {total} rows on this rank", flush=True)

    return report


def record_batch(journal: Journal, rows: list[Row]) -> None:
    """A batch with a failed row is not recorded, because its image may be there in the next attempt. The row then has another length, and the
    batches hold other rows."""
    place = max(journal.done, default=-1) + 1
    if any("error" in row for row in rows):
        journal.done[place] = rows
    else:
        journal.add(place, rows)


def rows_of(journal: Journal) -> list[Row]:
    return [row for rows in journal.done.values() for row in rows]


def finish(spec: TrainSpec, rank: Rank, journal: Journal) -> InferenceTotals:
    """Write answers.jsonl in the order of the input: a collective."""
    by_row = {row["row"]: row for row in gather_rows(journal)}
    rows = [by_row[number] for number in sorted(by_row)]
    write_rows(rows, Path(spec.output) / ANSWERS_FILE, rank.number)
    wrong = tuple(row for row in rows if "error" in row)
    if not wrong:
        journal.remove()
    return InferenceTotals(rows=len(rows), failed=wrong, tokens=sum(int(row.get("tokens", 0)) for row in rows))


def describe_failures(totals: InferenceTotals, options: Inference, file: Path) -> str:
    named = [(f"row {row['row']}: ", str(row["error"])) for row in totals.failed[:SHOWN]]
    first = "\n".join(f"  {name}{error.removeprefix(name)}" for name, error in named)
    more = f"\n  ... and {len(totals.failed) - SHOWN} more" if len(totals.failed) > SHOWN else ""
    return (
        f"{len(totals.failed)} of {totals.rows} rows of {options.input} could not be answered; the others are in {file}, and these have an "
        f"error there\n{first}{more}\nFix these rows and run them again."
    )
