"""How long it takes to look at records, and how large a page gets:  python -m tests.benchmarks.record_speed [--rounds N]

Two runs of 100,000 steps and a folder of 1,000 runs are made from the real record in tests/golden/record/1. The commands run as for a user,
including the start of Python. The page is opened in Chromium if it is installed. Seconds are wall time, the median of the rounds, and
processor time, which is more reliable on a machine with other load.
"""

import argparse
import json
import math
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

PROJECT = Path(__file__).resolve().parents[2]
REAL = PROJECT / "tests" / "golden" / "record" / "1"
STEPS, RUNS = 100_000, 1_000
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
GOAL_S = {"compare": 2.0, "runs": 1.0, "open the page": 2.0}
GOAL_BYTES = 3_000_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(prefix="record-speed-") as name:
        work = Path(name)
        for seed, run in enumerate(("a", "b")):
            write_long(work / "long" / "runs" / run, seed)
        for number in range(RUNS):
            shutil.copytree(REAL, work / "many" / "runs" / f"run-{number:04}")
        page = work / "long" / "page.html"
        tell("compare", rounds, work / "long", launcher("compare", "a", "b"), codes=(7,))
        tell("report", rounds, work / "long", launcher("report", "a", "b", "--out", page.name, "--replace"))
        tell("runs", rounds, work / "many", launcher("runs"))
        tell("runs run.seed=1", rounds, work / "many", launcher("runs", "run.seed=1"))
        size = page.stat().st_size
        print(f"{'the page of both':20} {size:,} bytes (goal {GOAL_BYTES:,}: {'reached' if size <= GOAL_BYTES else 'not reached'})")
        tell("python alone", rounds, work, (sys.executable, "-c", "pass"))
        open_page(page, rounds)
    return 0


def launcher(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "launcher.cli", *words)


def open_page(page: Path, rounds: int) -> None:
    """Until a browser has painted the page once, minus the start of the browser."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        print("open the page: not measured, no Chromium on PATH")
        return
    blank = page.with_name("blank.html")
    blank.write_text("<!doctype html><title>blank</title>")
    options = (
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={page.parent / 'profile'}",
        "--window-size=1280,4000",
    )
    shots = {one: (*options, f"--screenshot={page.parent / 'shot.png'}", one.as_uri()) for one in (blank, page)}
    measure(1, page.parent, shots[blank], (0,))  # creates its profile
    alone_s, _ = measure(rounds, page.parent, shots[blank], (0,))
    whole_s, _ = measure(rounds, page.parent, shots[page], (0,))
    report("open the page", whole_s - alone_s, None, f"; an empty page takes {alone_s:.2f} s")


def tell(name: str, rounds: int, folder: Path, argv: Sequence[str], codes: Sequence[int] = (0,)) -> None:
    wall_s, cpu_s = measure(rounds, folder, argv, codes)
    report(name, wall_s, cpu_s, "")


def report(name: str, wall_s: float, cpu_s: float | None, more: str) -> None:
    goal = GOAL_S.get(name)
    reached = "" if goal is None else f" (goal {goal:g} s: {'reached' if wall_s <= goal else 'not reached'})"
    print(f"{name:20} {wall_s:.2f} s" + (f", processor {cpu_s:.2f} s" if cpu_s is not None else "") + reached + more, flush=True)


def measure(rounds: int, folder: Path, argv: Sequence[str], codes: Sequence[int]) -> tuple[float, float]:
    """Medians of wall and processor seconds."""
    walls, processors = [], []
    for _ in range(rounds):
        before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            argv, cwd=folder, env={"PYTHONPATH": str(PROJECT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}, capture_output=True
        )
        walls.append(time.perf_counter() - begun)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        processors.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        if done.returncode not in codes:
            raise SystemExit(f"{argv}: exit code {done.returncode}\n{done.stderr.decode()}")
    return median(walls), median(processors)


def write_long(folder: Path, seed: int) -> None:
    """The real record with 100,000 metrics rows: a decreasing loss with noise, and steps of different duration."""
    shutil.copytree(REAL, folder)
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])
    rng, last = random.Random(seed), 0.0
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(1, STEPS + 1):
            last = 6 / math.sqrt(1 + step / 500) + rng.random()
            changed = {"step": step, "steps": STEPS, "loss": last, "grad_norm": rng.random(), "seconds": 0.1 + rng.random() / 10}
            file.write(json.dumps(row | changed) + "\n")
    for name in ("result.json", "train_result.json"):
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | {"steps": STEPS, "final_loss": last}))


if __name__ == "__main__":
    sys.exit(main())
