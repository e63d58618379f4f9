"""The loop on the model's thread: take a batch from the queue, generate its answers, repeat."""

import sys
import traceback
from collections.abc import Callable

from trainer.contract import RunFailed
from trainer.generation.answerer import Answerer
from trainer.generation.question import Answer
from trainer.serving.admission import Admission
from trainer.serving.metric import Metrics
from trainer.serving.pending_request import PendingRequest
from trainer.serving.queue import Queue
from trainer.serving.refusal import RequestRefused, failed, stopping, timed_out

IDLE_S = 0.1  # how long an empty queue is waited for before checking whether to stop

Batch = list[PendingRequest]
Check = Callable[[], None]


def work(queue: Queue, answerer: Answerer, admission: Admission, metrics: Metrics, *, limit_s: float, check: Check) -> None:
    """Runs until a stop is requested and all requests in flight are answered or the drain time has expired.

    `check` raises RunFailed when the device or the listener is lost; it is called when the queue is empty and after a failed batch."""
    while True:
        batch = queue.take(IDLE_S)
        if batch:
            answer_batch(batch, answerer, admission, metrics, limit_s=limit_s, check=check)
        else:
            check()
        if admission.phase == "draining" and (admission.in_flight == 0 or admission.drain_expired):
            return


def answer_batch(batch: Batch, answerer: Answerer, admission: Admission, metrics: Metrics, *, limit_s: float, check: Check) -> None:
    """When a batch fails, each of its requests is answered alone, so that only the request that causes the failure gets an error."""
    metrics.batch.observe(len(batch))
    try:
        run(batch, answerer, admission, limit_s)
    except Exception:
        left = [pending for pending in batch if not pending.finished and not pending.abandoned]
        print(f"a batch of {len(batch)} could not be answered:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        check_device(check, left)
        if len(batch) == 1:
            for pending in left:
                pending.finish(failed())
        else:
            for pending in left:
                answer_batch([pending], answerer, admission, metrics, limit_s=limit_s, check=check)


def run(batch: Batch, answerer: Answerer, admission: Admission, limit_s: float) -> None:
    for pending in batch:
        pending.start()

    def find_refusal(pending: PendingRequest) -> RequestRefused | None:
        return stopping() if admission.drain_expired else timed_out(limit_s) if pending.expired else None

    def finish(row: int, answer: Answer) -> None:
        refusal = find_refusal(batch[row]) if answer.ended == "halted" else None
        batch[row].finish(refusal or answer)

    answers = answerer.answer(
        [pending.prepared for pending in batch],
        on_text=lambda row, text: batch[row].add_text(text),
        on_end=finish,
        halted=lambda row: batch[row].abandoned or find_refusal(batch[row]) is not None,
    )
    for row, answer in enumerate(answers):
        finish(row, answer)


def check_device(check: Check, left: Batch) -> None:
    """When the device is lost, end the process so that it can be started again, instead of failing every later request."""
    try:
        check()
    except RunFailed:
        for pending in left:
            pending.finish(failed())
        raise
