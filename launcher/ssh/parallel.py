"""Many nodes in parallel: no node waits for another, and all failures are reported together."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from launcher.config.schema import Node
from launcher.errors import NodeFailed
from launcher.ssh.node import Ssh
from launcher.ssh.pool import ConnectionPool

Item = TypeVar("Item")
Answer = TypeVar("Answer")
LOOK_S = 0.05
UNANSWERED = "no answer yet; stopped waiting"
FAN_OUT = 140  # connections that are opened at once: enough for 128 nodes and some spares


def reach_all(nodes: Sequence[Node], pool: ConnectionPool) -> tuple[Ssh | NodeFailed, ...]:
    """An open connection to every node, in their order, or the failure in the place of a node that cannot be reached."""

    def connect(node: Node) -> Ssh:
        ssh = Ssh(node, pool)
        ssh.connect()
        return ssh

    return attempt_each(connect, nodes, fan_out=FAN_OUT)


def each(function: Callable[[Item], Answer], items: Sequence[Item], *, fan_out: int | None = None) -> tuple[Answer, ...]:
    """`function` of every item in parallel, answers in their order. One NodeFailed reports every failure."""
    answers = attempt_each(function, items, fan_out=fan_out)
    failures = [answer for answer in answers if isinstance(answer, NodeFailed)]
    if failures:
        raise together(failures, len(items))
    return tuple(answer for answer in answers if not isinstance(answer, NodeFailed))


def together(failures: Sequence[NodeFailed], count: int) -> NodeFailed:
    if len(failures) == 1:
        return failures[0]
    return NodeFailed(f"{len(failures)} of {count} nodes failed:\n" + "\n".join(str(failure) for failure in failures))


def attempt_each(
    function: Callable[[Item], Answer], items: Sequence[Item], *, fan_out: int | None = None, until: Callable[[], bool] | None = None
) -> tuple[Answer | NodeFailed, ...]:
    """`function` of every item: its answer, or its NodeFailed. Any other exception is a bug and is raised as it is. Each item has a
    thread of its own, since calls may wait for each other (pipes that are filled together, nodes that connect to each other); with
    `fan_out` at most that many run at the same time, which is for independent calls only. When `until` becomes true, items without an
    answer are not waited for any longer; their calls continue in the background."""
    workers = Workers(function, items)
    for _ in range(min(fan_out or len(items), len(items))):
        # a daemon: a call that hangs must not keep the program from ending
        threading.Thread(target=workers.work, name="omnilaunch-worker", daemon=True).start()
    with workers.changed:
        while not workers.changed.wait_for(lambda: len(workers.outcomes) == len(items), None if until is None else LOOK_S):
            if until is not None and until():
                workers.places = iter(())
                break
        outcomes = dict(workers.outcomes)
    answers: list[Answer | NodeFailed] = []
    for place in range(len(items)):
        outcome = outcomes.get(place, NodeFailed(UNANSWERED))
        if isinstance(outcome, BaseException) and not isinstance(outcome, NodeFailed):
            raise outcome
        answers.append(outcome)  # type: ignore[arg-type]  # an answer: what `function` raised has just been sorted out
    return tuple(answers)


def after(seconds: float) -> Callable[[], bool]:
    """Comes true `seconds` from now."""
    deadline = time.monotonic() + seconds
    return lambda: time.monotonic() >= deadline


class Workers:
    """Threads that take one item after the other. `outcomes` is by place in `items`, guarded by `changed`."""

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any]) -> None:
        self.function, self.items = function, items
        self.changed = threading.Condition()
        self.places = iter(range(len(items)))
        self.outcomes: dict[int, object] = {}

    def work(self) -> None:
        while True:
            with self.changed:
                place = next(self.places, None)
            if place is None:
                return
            try:
                outcome: object = self.function(self.items[place])
            except BaseException as error:
                outcome = error
            with self.changed:
                self.outcomes[place] = outcome
                self.changed.notify_all()
