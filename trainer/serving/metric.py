"""Metrics of the server, for Prometheus."""

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# turned_away: too busy, loading or stopping. gone: the client disconnected. cut_off: accepted, but not answered before the drain timeout.
OUTCOMES = ("answered", "refused", "turned_away", "timeout", "gone", "failed", "cut_off")
BY_STATUS = {429: "turned_away", 503: "turned_away", 504: "timeout", 408: "timeout"}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Metrics:
    registry: CollectorRegistry
    requests: Counter
    batch: Histogram
    first_token: Histogram
    seconds: Histogram
    prompt_tokens: Counter
    new_tokens: Counter

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def count(self, outcome: str) -> float:
        return self.registry.get_sample_value("omnilaunch_requests_total", {"outcome": outcome}) or 0.0


def outcome_of(status: int) -> str:
    """The outcome of a request that was not answered, from its HTTP status."""
    return BY_STATUS.get(status, "failed" if status >= 500 else "refused")


def make_metrics(waiting: Callable[[], float], in_flight: Callable[[], float]) -> Metrics:
    """In a registry of its own, so that two servers in one process share nothing."""
    registry = CollectorRegistry()
    for name, text, value in (
        ("omnilaunch_waiting", "Requests that wait for a batch", waiting),
        ("omnilaunch_inside", "Requests that were accepted and are not answered yet", in_flight),
    ):
        Gauge(name, text, registry=registry).set_function(value)
    requests = Counter("omnilaunch_requests", "Requests for a completion, by outcome", ("outcome",), registry=registry)
    for outcome in OUTCOMES:
        requests.labels(outcome)
    return Metrics(
        registry=registry,
        requests=requests,
        batch=Histogram("omnilaunch_batch_size", "Requests answered together", registry=registry, buckets=SIZES),
        first_token=Histogram("omnilaunch_first_token_seconds", "From the headers to the first text", registry=registry, buckets=SECONDS),
        seconds=Histogram("omnilaunch_request_seconds", "From the headers to the last byte", registry=registry, buckets=SECONDS),
        prompt_tokens=Counter("omnilaunch_prompt_tokens", "Tokens of the prompts that were answered", registry=registry),
        new_tokens=Counter("omnilaunch_new_tokens", "Tokens of the answers", registry=registry),
    )
