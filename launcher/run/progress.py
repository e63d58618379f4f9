"""What a user sees while steps go by: a bar on a terminal, plain lines elsewhere; of a server, where it listens. Reads what the trainer
writes for it, never its log."""

import codecs
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.record.metrics import parse_rows
from trainer.contract import METRICS_FILE, SERVING_FILE, STREAM_FILE, ServingReport, SpecError, StepRow, read

PLAIN_INTERVAL_S = 5.0
RATE_WINDOW = 50  # steps


class Tail:
    """New whole rows of a growing metrics.jsonl since the last call."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0

    def rows(self) -> tuple[StepRow, ...]:
        if not self.path.exists():
            return ()
        with self.path.open("rb") as file:
            file.seek(self.offset)
            whole, _, _ = file.read().rpartition(b"\n")
        self.offset += len(whole) + 1 if whole else 0
        return parse_rows(whole.decode("utf-8", errors="replace").split("\n"))


class Stream:
    """New text of a growing file since the last call; a character that is cut waits for its end."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset = path, 0
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def text(self) -> str:
        if not self.path.exists():
            return ""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        self.offset += len(new)
        return self.decoder.decode(new)


class Rate:
    """Samples, tokens and seconds over the last steps."""

    def __init__(self) -> None:
        self.window: deque[StepRow] = deque(maxlen=RATE_WINDOW)

    def describe(self, row: StepRow) -> dict[str, str]:
        self.window.append(row)
        seconds = sum(r.seconds for r in self.window) or 1e-9
        left_s = (row.steps - row.step) * seconds / len(self.window)
        return {
            "loss": f"{row.loss:.4f}",
            "samples_per_s": f"{sum(r.samples for r in self.window) / seconds:,.0f} samples/s",
            "tokens_per_s": f"{sum(r.tokens for r in self.window) / seconds:,.0f} tokens/s",
            "memory": f"{row.peak_bytes / 2**30:.2f} GiB",
            "left": f"{int(left_s // 60)}:{int(left_s % 60):02d} left",
        }


class ProgressView:
    """`with Progress(folder, print) as progress:` and then `progress.tick()` as often as one likes."""

    def __init__(self, folder: Path, say: Callable[[str], None], *, terminal: bool) -> None:
        self.tail, self.rate, self.say, self.terminal = Tail(folder / METRICS_FILE), Rate(), say, terminal
        self.said_at = time.monotonic()
        self.serving = folder / SERVING_FILE
        self.listens = False
        self.answer, self.answering = Stream(folder / STREAM_FILE), False
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> "ProgressView":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.answering:
            self.tell("\n")

    def tick(self) -> None:
        if not self.listens and self.serving.exists():
            self.tell_server()
        if text := self.answer.text():
            self.answering = True
            self.tell(text)
        rows = self.tail.rows()
        for row in rows:
            facts = self.rate.describe(row)
        if rows:
            self.draw(rows[-1], facts) if self.terminal else self.write(rows[-1], facts)

    def tell(self, text: str) -> None:
        with suppress(OSError):  # nobody listens any more
            print(text, end="", flush=True)

    def tell_server(self) -> None:
        with suppress(SpecError):  # on its way here from another node: the next tick sees the whole
            report: ServingReport = read(ServingReport, self.serving)
            self.listens = True
            self.say(f"serving {report.model} at {report.url} (Ctrl-C ends it)")
            self.say(f"  {report.example}")

    def write(self, row: StepRow, facts: dict[str, str]) -> None:
        if row.step in (1, row.steps) or time.monotonic() - self.said_at >= PLAIN_INTERVAL_S:
            self.said_at = time.monotonic()
            self.say(
                f"step {row.step}/{row.steps}  loss {facts['loss']}  {facts['samples_per_s']}  {facts['tokens_per_s']}  {facts['memory']}  {facts['left']}"
            )

    def draw(self, row: StepRow, facts: dict[str, str]) -> None:
        if self.bar is None:
            self.bar, self.task = open_bar(row.steps)
        self.bar.update(self.task, completed=row.step, **facts)


def open_bar(steps: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn

    names = ("samples_per_s", "tokens_per_s", "memory", "left")
    bar = Bar(
        TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        *(TextColumn("{task.fields[" + name + "]}") for name in names),
    )  # fmt: skip
    bar.start()
    return bar, bar.add_task("training", total=steps, loss="", samples_per_s="", tokens_per_s="", memory="", left="")
