"""What a server counts, for Prometheus."""

from collections.abc import Callable
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# cut_off: taken, and not answered when the time to drain was over.
OUTCOMES = ("answered", "refused", "turned_away", "timeout", "gone", "failed", "cut_off")
BY_STATUS = {429: "turned_away", 503: "turned_away", 504: "timeout", 408: "timeout"}
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, kw_only=True)
class Meters:
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
    """Of a request that was not answered."""
    return BY_STATUS.get(status, "failed" if status >= 500 else "refused")


def make_meters(waiting: Callable[[], float], inside: Callable[[], float]) -> Meters:
    """A registry of its own: two servers of one process share nothing."""
    registry = CollectorRegistry()
    for name, text, value in (
        ("omnilaunch_waiting", "Requests that wait for a batch", waiting),
        ("omnilaunch_inside", "Requests that were taken and are not answered yet", inside),
    ):
        Gauge(name, text, registry=registry).set_function(value)
    requests = Counter("omnilaunch_requests", "Requests for an answer, by what became of them", ("outcome",), registry=registry)
    for outcome in OUTCOMES:
        requests.labels(outcome)
    return Meters(
        registry=registry,
        requests=requests,
        batch=Histogram("omnilaunch_batch_size", "Requests answered together", registry=registry, buckets=SIZES),
        first_token=Histogram("omnilaunch_first_token_seconds", "From the headers to the first text", registry=registry, buckets=SECONDS),
        seconds=Histogram("omnilaunch_request_seconds", "From the headers to the last byte", registry=registry, buckets=SECONDS),
        prompt_tokens=Counter("omnilaunch_prompt_tokens", "Tokens of questions that were answered", registry=registry),
        new_tokens=Counter("omnilaunch_new_tokens", "Tokens of answers", registry=registry),
    )
