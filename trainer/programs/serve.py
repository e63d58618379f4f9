"""The stage serve: one model behind HTTP until it is asked to stop."""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from trainer.contract import SCHEMA, SERVING_FILE, InputRefused, RunFailed, Serving, ServingReport, TrainResult, TrainSpec, write
from trainer.data.rows.image_form import describe
from trainer.device.rank import Rank
from trainer.export.derived_checkpoint import finished_result
from trainer.generation.answerer import Answerer
from trainer.generation.sampling import check_sampling
from trainer.observe.memory import MemoryPeaks
from trainer.programs.inputs import open_model
from trainer.serving.admission import Admission
from trainer.serving.app import COMPLETIONS, make_app
from trainer.serving.body import BODY_TIMEOUT_S
from trainer.serving.chat import LATE_S, ChatHandler
from trainer.serving.endpoint import Endpoint, open_endpoint
from trainer.serving.fetch import Fetcher, read_hosts
from trainer.serving.listener import Listener, listening
from trainer.serving.metric import OUTCOMES, Metrics, make_metrics
from trainer.serving.queue import Queue
from trainer.serving.worker import work
from trainer.train.loop import stop_on_signals

LAST_BYTES_S = 2.0  # for the last responses to be sent
SETTLE_S = 0.02
# torchrun passes SIGTERM on and kills its ranks 30 s later (torch 2.7 to 2.13); this process may need ten seconds to end.
TORCHRUN_DRAIN_S = 20.0
UNDER_TORCHRUN = "TORCHELASTIC_RUN_ID"
LEAST = {
    **dict.fromkeys(("max_batch", "max_waiting", "max_body_bytes", "max_image_bytes", "max_image_pixels"), 1),
    **dict.fromkeys(("wait_ms", "max_images", "drain_timeout_s"), 0),
    **dict.fromkeys(("fetch_timeout_s", "request_timeout_s"), 0.001),
}


def run_program(spec: TrainSpec, rank: Rank, environ: Mapping[str, str]) -> TrainResult:
    """Serves until SIGTERM or SIGINT, and then until all accepted requests are answered. Raises InputRefused before the model is loaded,
    RunFailed if the device or the listener fails."""
    serving = serving_of(spec, environ)
    hosts = read_hosts(serving.hosts)
    endpoint = open_endpoint(serving, environ)
    (Path(spec.output) / SERVING_FILE).unlink(missing_ok=True)  # of an earlier attempt
    began, memory = time.perf_counter(), MemoryPeaks(rank.device)
    with stop_on_signals() as stop:
        queue = Queue(most_batch=serving.max_batch, wait_s=serving.wait_ms / 1000)
        admission = Admission(lambda: stop.up, serving.drain_timeout_s)
        metrics = make_metrics(lambda: chat.waiting, lambda: admission.in_flight)
        fetcher = Fetcher(hosts=hosts, timeout_s=serving.fetch_timeout_s, most_bytes=serving.max_image_bytes)
        chat = ChatHandler(serving, serving.model_name or spec.model.name, queue, metrics, fetcher)
        app = make_app(chat, admission, metrics, endpoint, began=int(time.time()))
        with listening(app, endpoint.listener, serving.request_timeout_s + LATE_S + BODY_TIMEOUT_S) as listener:
            built = open_model(spec, rank, environ, spread=serving.spread == "auto")
            chat.images = built.lineage.images
            chat.answerer = Answerer(built.staged.model, built.processor, spec, rank.torch_device)
            admission.ready = True
            announce(spec, serving, endpoint, chat.name, describe(chat.images))
            try:
                work(queue, chat.answerer, admission, metrics, limit_s=serving.request_timeout_s, check=lambda: check(listener, rank))
            finally:
                queue.close()
            await_last(admission)
    chat.pool.shutdown(wait=False, cancel_futures=True)
    seconds = time.perf_counter() - began
    return summarise(metrics, seconds, memory)


def serving_of(spec: TrainSpec, environ: Mapping[str, str]) -> Serving:
    """Raises InputRefused for values with which no request could be answered."""
    serving = spec.stage.serving
    if serving is None:
        raise InputRefused("stage.serving is not set\n    choose stage=serve, which sets it")
    for name, least in LEAST.items():
        if getattr(serving, name) < least:
            raise InputRefused(f"stage.serving.{name} is {getattr(serving, name):g}: it must be at least {least:g}")
    try:
        check_sampling(serving.sampling)
    except InputRefused as error:
        raise InputRefused(f"stage.serving.{error}") from None
    if UNDER_TORCHRUN in environ and serving.drain_timeout_s > TORCHRUN_DRAIN_S:
        print(
            f"stage.serving.drain_timeout_s={serving.drain_timeout_s:g} is reduced to {TORCHRUN_DRAIN_S:g}: torchrun kills 30 s after SIGTERM"
        )
        return replace(serving, drain_timeout_s=TORCHRUN_DRAIN_S)
    return serving


def announce(spec: TrainSpec, serving: Serving, endpoint: Endpoint, name: str, images: str) -> None:
    """Print the address and how images are put into questions, and write both to the run's folder."""
    token = f' -H "Authorization: Bearer ${serving.token}"' if endpoint.token else ""
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello"}}]}}'
    example = f"curl {endpoint.url}{COMPLETIONS} -H 'Content-Type: application/json'{token} -d '{body}'"
    report = ServingReport(schema=SCHEMA, url=endpoint.url, model=name, token=serving.token, example=example, images=images)
    write(report, Path(spec.output) / SERVING_FILE)
    print(f"serving {name} at {endpoint.url}\n  {example}\n  {images}", flush=True)


def check(listener: Listener, rank: Rank) -> None:
    listener.check()
    try:
        torch.ones(1, device=rank.torch_device).add_(1).item()
    except RuntimeError as error:
        raise RunFailed(f"the device {rank.torch_device} stopped working ({error}). Check it, then start the run again.") from error


def await_last(admission: Admission) -> None:
    until = time.monotonic() + LAST_BYTES_S
    while admission.in_flight and time.monotonic() < until:
        time.sleep(SETTLE_S)


def summarise(metrics: Metrics, seconds: float, memory: MemoryPeaks) -> TrainResult:
    counts = {outcome: metrics.count(outcome) for outcome in OUTCOMES}
    summary = ", ".join(f"{int(count)} {outcome.replace('_', ' ')}" for outcome, count in counts.items())
    print(f"stopped after {seconds:.0f} s: {summary}", flush=True)
    return finished_result(seconds, counts, samples_per_s=counts["answered"] / seconds, peaks=memory.report())
