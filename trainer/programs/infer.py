"""Answers to one question, or to those of a file: prepared ahead, in batches of like length, over all ranks, and resumable."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint.journal import Journal, Row, find_mark, gather, open_journal, write_rows
from trainer.contract import ANSWERS_FILE, SCHEMA, STREAM_FILE, Inference, InputRefused, RunFailed, TrainResult, TrainSpec
from trainer.contract.weight_files import hash_weights
from trainer.data.batch.cache import Cache
from trainer.data.batch.collate import Features
from trainer.data.batch.load import prefetch
from trainer.data.media.image import hash_file, open_image, read_size
from trainer.data.rows.parsed_row import Turn
from trainer.data.rows.request import Request, place_images, read_requests
from trainer.data.rows.sample import Message
from trainer.device.rank import Rank
from trainer.generation.answerer import Answerer, Prepared, Question
from trainer.generation.sampling import check_sampling
from trainer.models.family import Processor
from trainer.observe.memory import Gauge
from trainer.train.run import BuiltModel, open_model

WINDOW = 16  # batches whose rows are sorted by length together
SHOWN = 3  # rows that could not be answered, in a message
TOLD_S = 10.0  # between two lines that say how far it is

Batch = tuple[int, tuple[Request, ...]]
Ready = list[tuple[Request, Prepared | str]]  # the text says why a row cannot be answered


@dataclass(frozen=True, kw_only=True)
class Tally:
    rows: int
    failed: tuple[Row, ...]
    tokens: int


def carry_out(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Write answers.jsonl, a row for each of the input in its order. Raises InputRefused before anything is answered, and RunFailed at the
    end where rows could not be answered, which the file says of each."""
    began = time.perf_counter()
    options = require_options(spec)
    requests = find_requests(spec, options)
    gauge = Gauge(rank.device)
    made = open_model(spec, rank, environ, spread=options.spread == "auto")
    gauge.enter("evaluation")
    tally = answer_all(spec, options, rank, made, requests)
    if tally.failed:
        raise RunFailed(describe_failed(tally, options, Path(spec.output) / ANSWERS_FILE))
    seconds = time.perf_counter() - began
    return TrainResult(
        schema=SCHEMA,
        status="finished",
        steps=0,
        seconds=seconds,
        samples_per_s=tally.rows / seconds,
        final_loss=None,
        checkpoint="",
        weights_sha256=hash_weights(Path(made.origin.path)) if rank.number == 0 and made.origin.path else "",
        evaluation={"count": float(tally.rows), "new_tokens": float(tally.tokens)},
        peaks=gauge.report(),
    )


# ------------------------------------------------------------------------------------------------------------ what is asked


def require_options(spec: TrainSpec) -> Inference:
    options = spec.stage.inference
    if options is None:
        raise InputRefused("stage.inference is not set\n    choose stage=infer, and stage.inference.prompt or stage.inference.input")
    if bool(options.input) == bool(options.prompt):
        said = "both are set" if options.input else "neither is set"
        raise InputRefused(
            f"stage.inference.prompt and stage.inference.input: {said}\n    set prompt, and perhaps image, for one question, or input=FILE.jsonl"
        )
    check_sampling(options.sampling, "stage.inference.sampling")
    if options.batch < 1:
        raise InputRefused(f"stage.inference.batch is {options.batch}: it can be 1 or more")
    return options


def find_requests(spec: TrainSpec, options: Inference) -> tuple[Request, ...]:
    """Those of the file, or the one. Raises InputRefused."""
    if options.input:
        file = Path(options.input)
        return read_requests(file, Path(spec.data.images) if spec.data.images else file.parent)
    images = (Path(options.image),) if options.image else ()
    turns = (Turn(role="user", content=options.prompt, field="stage.inference.prompt"),)
    asked = place_images(turns, len(images), refuse_prompt)
    return (Request(row=1, messages=tuple(Message(role=turn.role, content=turn.content) for turn in asked), images=images),)


def refuse_prompt(field: str, problem: str, fix: str) -> None:
    raise InputRefused(f"{field}: {problem}\n    {fix}")


# --------------------------------------------------------------------------------------------------------------- the answers


def answer_all(spec: TrainSpec, options: Inference, rank: Rank, made: BuiltModel, requests: Sequence[Request]) -> Tally:
    """Every rank answers its batches; the rows of all are put together by the first."""
    asked = hash_file(Path(options.input)) if options.input else ""
    answerer = Answerer(made.staged.model, made.processor, spec, rank.place)
    journal = open_journal(spec, ANSWERS_FILE, rank.number, *find_mark(made.origin), asked)
    own = (batch for batch in cut_batches(requests, made.processor, options.batch) if batch[0] % rank.world_size == rank.number)
    answered = {row["row"] for rows in journal.done.values() for row in rows}
    todo = (batch for batch in own if not all(request.row in answered for request in batch[1]))
    say = Teller(Path(spec.output) / STREAM_FILE) if options.prompt and options.stream and rank.number == 0 else None
    progress = tell_progress(len(requests)) if rank.number == 0 and options.input else None
    prepare = make_preparer(answerer, options, spec.seed)
    with closing(prefetch(prepare, todo, min(options.prefetch, 1), options.prefetch)) as prepared:
        for ready in prepared:
            rows = answer_batch(answerer, ready, say)
            if options.prompt and "error" in rows[0]:
                raise InputRefused(str(rows[0]["error"]))
            keep(journal, rows)
            if progress is not None:
                progress(sum(map(len, journal.done.values())))
    if options.prompt and rank.number == 0:
        print("" if say is not None else rows_of(journal)[0]["answer"], flush=True)
    return finish(spec, rank, journal)


def cut_batches(requests: Sequence[Request], processor: Processor, size: int) -> Iterator[Batch]:
    """Numbered batches of rows of like length, the longest of a window first: the same for any number of ranks and at any start."""
    number = 0
    for start in range(0, len(requests), size * WINDOW):
        window = sorted(requests[start : start + size * WINDOW], key=lambda request: -weigh(request, processor))
        for place in range(0, len(window), size):
            yield number, tuple(window[place : place + size])
            number += 1


def weigh(request: Request, processor: Processor) -> int:
    """About the tokens of a row, from the headers of its images; 0 where one cannot be read, which is told when its turn comes."""
    try:
        images = sum(len(processor.span(read_size(path), place)) for place, path in enumerate(request.images))
    except InputRefused:
        return 0
    return images + sum(len(message.content.encode()) // 4 for message in request.messages)


def make_preparer(answerer: Answerer, options: Inference, seed: int) -> Callable[[Batch], Ready]:
    """Makes a batch ready on the CPU. Of images that are shown again, told by their bytes, the latest are kept."""
    cache = Cache(options.cache_images)

    def look(path: Path) -> Features:
        try:
            key = hash_file(path)
        except OSError as error:
            raise InputRefused(f"{path}: cannot be read: {error.strerror}\n    put the image there, or correct the path") from error
        return cache.get(key, lambda: answerer.image_features(open_image(path)), lambda _: 1)

    def prepare(request: Request) -> Prepared | str:
        question = Question(
            messages=request.messages, sampling=options.sampling, seed=seed * 2**32 + request.row, name=f"row {request.row}"
        )
        try:
            return answerer.prepare(question, [look(path) for path in request.images])
        except InputRefused as error:
            return str(error)

    return lambda batch: [(request, prepare(request)) for request in batch[1]]


def answer_batch(answerer: Answerer, ready: Ready, say: Callable[[int, str], None] | None) -> list[Row]:
    """A row for each, in the order of `ready`."""
    good = [one for _, one in ready if isinstance(one, Prepared)]
    answers = iter(answerer.answer(good, on_text=say) if good else ())
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


class Teller:
    """Says the words of an answer as they come: to who reads this rank's output, and in the run's folder, from where the launcher has them."""

    def __init__(self, file: Path) -> None:
        self.file = file
        file.write_text("", encoding="utf-8")  # of an attempt that broke off

    def __call__(self, _row: int, text: str) -> None:
        print(text, end="", flush=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(text)


def tell_progress(total: int) -> Callable[[int], None]:
    """Says how many rows this rank has answered, now and then."""
    last = time.monotonic()

    def tell(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= TOLD_S:
            last = time.monotonic()
            print(f"answered {done} of {total} rows on this rank", flush=True)

    return tell


# --------------------------------------------------------------------------------------------------------------- the results


def keep(journal: Journal, rows: list[Row]) -> None:
    """A batch with a row that failed is not written down: where the run is started again, the image may be there. It is then of another
    length, and its batches hold other rows."""
    place = max(journal.done, default=-1) + 1
    if any("error" in row for row in rows):
        journal.done[place] = rows
    else:
        journal.add(place, rows)


def rows_of(journal: Journal) -> list[Row]:
    return [row for rows in journal.done.values() for row in rows]


def finish(spec: TrainSpec, rank: Rank, journal: Journal) -> Tally:
    """answers.jsonl in the order of the input: a collective."""
    by_row = {row["row"]: row for row in gather(journal, rank.world_size)}
    rows = [by_row[number] for number in sorted(by_row)]
    write_rows(rows, Path(spec.output) / ANSWERS_FILE, rank.number)
    wrong = tuple(row for row in rows if "error" in row)
    if not wrong:
        journal.remove()
    return Tally(rows=len(rows), failed=wrong, tokens=sum(int(row.get("tokens", 0)) for row in rows))


def describe_failed(tally: Tally, options: Inference, file: Path) -> str:
    named = [(f"row {row['row']}: ", str(row["error"])) for row in tally.failed[:SHOWN]]
    first = "\n".join(f"  {name}{error.removeprefix(name)}" for name, error in named)
    more = f"\n  ... and {len(tally.failed) - SHOWN} more" if len(tally.failed) > SHOWN else ""
    return (
        f"{len(tally.failed)} of {tally.rows} rows of {options.input} could not be answered; the others are in {file}, and these have an "
        f"error there\n{first}{more}\nMend these rows and ask them again."
    )
