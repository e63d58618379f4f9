"""Batch after batch through the model, on the thread that has its device."""

import sys
import traceback
from collections.abc import Callable

from trainer.contract import RunFailed
from trainer.generation.answerer import Answerer
from trainer.generation.question import Answer
from trainer.serving.gate import Gate
from trainer.serving.metric import Meters
from trainer.serving.queue import Queue
from trainer.serving.refusal import RequestRefused, failed, stopping, timed_out
from trainer.serving.ticket import Ticket

IDLE_S = 0.1  # after which it looks whether it is to stop


def work(queue: Queue, answerer: Answerer, gate: Gate, meters: Meters, *, limit_s: float, check: Callable[[], None]) -> None:
    """Until it was asked to stop, and all who are inside are answered or their time is over. `check`: raises RunFailed when the device or
    the listener is gone; asked when nothing waits and after a failure."""
    while True:
        batch = queue.take(IDLE_S)
        if batch:
            answer_batch(batch, answerer, gate, meters, limit_s=limit_s, check=check)
        else:
            check()
        if gate.phase == "draining" and (gate.inside == 0 or gate.closed):
            return


def answer_batch(batch: list[Ticket], answerer: Answerer, gate: Gate, meters: Meters, *, limit_s: float, check: Callable[[], None]) -> None:
    """Where a batch fails, each of its rows is answered alone, so that the one that is the cause takes no other with it."""
    meters.batch.observe(len(batch))
    try:
        run(batch, answerer, gate, limit_s)
    except Exception:
        left = [ticket for ticket in batch if not ticket.ended and not ticket.gone]
        tell_failure(len(batch))
        check_device(check, left)
        if len(batch) == 1:
            for ticket in left:
                ticket.end(failed())
        else:
            for ticket in left:
                answer_batch([ticket], answerer, gate, meters, limit_s=limit_s, check=check)


def run(batch: list[Ticket], answerer: Answerer, gate: Gate, limit_s: float) -> None:
    for ticket in batch:
        ticket.begin()

    def why_halted(ticket: Ticket) -> RequestRefused | None:
        return stopping() if gate.closed else timed_out(limit_s) if ticket.late else None

    def end(row: int, answer: Answer) -> None:
        refusal = why_halted(batch[row]) if answer.ended == "halted" else None
        batch[row].end(refusal or answer)

    answers = answerer.answer(
        [ticket.prepared for ticket in batch],
        on_text=lambda row, text: batch[row].say(text),
        on_end=end,
        halted=lambda row: batch[row].gone or why_halted(batch[row]) is not None,
    )
    for row, answer in enumerate(answers):
        end(row, answer)


def tell_failure(size: int) -> None:
    print(f"a batch of {size} could not be answered:\n{traceback.format_exc()}", file=sys.stderr, flush=True)


def check_device(check: Callable[[], None], left: list[Ticket]) -> None:
    """A device that is lost answers nobody: better to end, and be started again, than to fail each request."""
    try:
        check()
    except RunFailed:
        for ticket in left:
            ticket.end(failed())
        raise
