"""What a user sees during a run: a bar on a terminal, plain lines elsewhere; for a server its address, for inference its answers. It is read from the
files that the trainer writes for this, never from its log."""

import codecs
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from launcher.plan.text import duration, figure, size
from launcher.record.metrics import count_warm_up, measure_speed, parse_rows
from launcher.redact import show
from trainer.contract import IMAGES_FILE, METRICS_FILE, SERVING_FILE, STREAM_FILE, ServingReport, SpecError, StepRow, read

PLAIN_INTERVAL_S = 5.0
RATE_WINDOW = 50  # steps


class Growing:
    """What was added to a file since the last call. A row or a character that is cut at the end is returned when the rest of it is there."""

    def __init__(self, path: Path) -> None:
        self.path, self.offset, self.decoder = path, 0, codecs.getincrementaldecoder("utf-8")(errors="replace")

    def read(self, keep: Callable[[bytes], int] = len) -> bytes:
        """Up to the position that `keep` returns for the new bytes; the rest is left for the next call."""
        if not self.path.exists():
            return b""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            new = file.read()
        new = new[: keep(new)]
        self.offset += len(new)
        return new

    def rows(self) -> tuple[StepRow, ...]:
        """Of metrics.jsonl."""
        whole = self.read(keep=lambda new: new.rfind(b"\n") + 1)
        return parse_rows(whole.decode("utf-8", errors="replace").split("\n"))

    def text(self) -> str:
        return self.decoder.decode(self.read())


class Rate:
    """The speed of the last steps, as that of a run: by the median step time, without the warm-up as soon as there are other steps."""

    def __init__(self) -> None:
        self.window: deque[StepRow] = deque(maxlen=RATE_WINDOW)

    def describe(self, row: StepRow) -> dict[str, str]:
        self.window.append(row)
        counted = [each for each in self.window if each.step > count_warm_up(row.steps)] or list(self.window)
        seconds, samples, tokens = zip(*((each.seconds, each.samples, each.tokens) for each in counted), strict=True)
        speed = measure_speed(seconds, samples, tokens, row.peak_bytes)
        left_s = (row.steps - row.step) * sum(seconds) / len(counted)
        return {
            "loss": figure(row.loss),
            "samples_per_s": f"{figure(speed.samples_per_s)} samples/s" if speed else "",
            "tokens_per_s": f"{figure(speed.tokens_per_s)} tokens/s" if speed else "",
            "memory": size(row.peak_bytes),
            "left": f"{duration(left_s)} left" if row.step < row.steps else "",
        }


class ProgressView:
    """`with ProgressView(folder, print, terminal=True) as progress:` and then `progress.tick()` at any interval."""

    def __init__(self, folder: Path, say: Callable[[str], None], *, terminal: bool) -> None:
        self.rows, self.rate, self.say, self.terminal = Growing(folder / METRICS_FILE), Rate(), say, terminal
        self.printed_at = time.monotonic()
        self.server: Path | None = folder / SERVING_FILE  # until its address was printed
        self.images: Path | None = folder / IMAGES_FILE  # until its sentence was printed
        self.answers, self.answering = Growing(folder / STREAM_FILE), False
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> "ProgressView":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()
        if self.answering:
            self.print_answer("\n")

    def tick(self) -> None:
        if self.server is not None and self.server.exists():
            self.show_server(self.server)
        if self.images is not None and (sentence := read_line(self.images)):
            self.images = None
            self.say(sentence)
        if text := self.answers.text():
            self.answering = True
            self.print_answer(text)
        rows = self.rows.rows()
        for row in rows:
            values = self.rate.describe(row)
        if rows:
            self.draw(rows[-1], values) if self.terminal else self.print_step(rows[-1], values)

    def print_answer(self, text: str) -> None:
        with suppress(OSError):  # the reader of a pipe is gone
            show(text, end="")

    def show_server(self, file: Path) -> None:
        with suppress(SpecError):  # still being copied from another node: complete at the next tick
            report: ServingReport = read(ServingReport, file)
            self.server = None
            self.say(f"serving {report.model} at {report.url} (Ctrl-C stops it)")
            self.say(f"  {report.example}")
            if report.images:
                self.say(f"  {report.images}")

    def print_step(self, row: StepRow, values: dict[str, str]) -> None:
        if row.step in (1, row.steps) or time.monotonic() - self.printed_at >= PLAIN_INTERVAL_S:
            self.printed_at = time.monotonic()
            self.say(f"step {row.step}/{row.steps}  loss {'  '.join(filter(None, values.values()))}")

    def draw(self, row: StepRow, values: dict[str, str]) -> None:
        if self.bar is None:
            self.bar, self.task = open_bar(row.steps)
        self.bar.update(self.task, completed=row.step, **values)


def read_line(file: Path) -> str:
    """'' until the file is there, and whole."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.strip() if text.endswith("\n") else ""


def open_bar(steps: int) -> tuple[Any, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress as Bar, TextColumn

    names = ("samples_per_s", "tokens_per_s", "memory", "left")
    bar = Bar(
        TextColumn("training"), BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
        *(TextColumn("{task.fields[" + name + "]}") for name in names),
    )  # fmt: skip
    bar.start()
    return bar, bar.add_task("training", total=steps, loss="", samples_per_s="", tokens_per_s="", memory="", left="")
