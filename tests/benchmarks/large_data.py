"""Large annotation files, compared with json.loads of all lines of the same file: opening one by its index, and its whole data check.

    python -m tests.benchmarks.large_data [--rows 10000000] [--checked 200000]

The first file has `--rows` short rows: the time of making the index, of opening it again, and of reading rows in random order. The second one has
`--checked` rows of about 600 bytes, in the shape of a public report: `omnilaunch data check` as a user runs it, the processor seconds and the peak
memory of its processes, and those of a second check of the unchanged file.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.rows.indexed_samples import index_samples

ROOT = Path(__file__).parents[2]
BLOCK = 10_000  # rows that differ; the first file repeats them
READ = 20_000  # rows in random order


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--checked", type=int, default=200_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="omnilaunch-large-") as name:
        measure_check(write_checked(Path(name), arguments.checked), arguments.checked)
        measure_index(write_short(Path(name), arguments.rows), arguments.rows)


def talk(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}) + "\n"


def write_short(folder: Path, rows: int) -> Path:
    block = "".join(talk(f"What is {number}?", str(number * number)) for number in range(BLOCK)).encode()
    with (folder / "short.jsonl").open("wb") as file:
        for _ in range(max(1, rows // BLOCK)):
            file.write(block)
    return folder / "short.jsonl"


def write_checked(folder: Path, rows: int) -> Path:
    with (folder / "checked.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(talk(f"Count from {number} on. " + "word " * 60, "one two three " * 20) for number in range(rows))
    return folder / "checked.jsonl"


@contextmanager
def timed(found: dict[str, float], name: str, who: int = resource.RUSAGE_SELF) -> Iterator[None]:
    """Adds wall and processor seconds, of this process or of those that it waited for."""
    wall, before = time.perf_counter(), resource.getrusage(who)
    yield
    after = resource.getrusage(who)
    found[f"{name}_s"] = time.perf_counter() - wall
    found[f"{name}_cpu_s"] = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def load_lines(file: Path) -> None:
    with file.open(encoding="utf-8") as opened:
        for line in opened:
            json.loads(line)


def measure_check(file: Path, rows: int) -> None:
    found: dict[str, float] = {}
    words = ("data=files", f"data.train={file}", "data.max_length=1024", "model=tiny_llava", f"cluster.root={file.parent}")
    for name in ("first", "again"):
        with timed(found, name, resource.RUSAGE_CHILDREN):
            argv = (sys.executable, "-m", "launcher.cli", "data", "check", *words)
            done = subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
        if name == "first":
            found["peak_mib"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        assert f"{rows:,} to train on" in done.stdout and "problems   none" in done.stdout, done.stdout
    with timed(found, "bare"):
        load_lines(file)
    ratio = found["first_cpu_s"] / found["bare_cpu_s"]
    print(
        f"check of {rows:,} rows: {found['first_cpu_s']:.1f} processor-seconds, {ratio:.1f} times json.loads; {found['peak_mib']:.0f} MiB"
    )
    print(f"check again, unchanged: {found['again_cpu_s']:.1f} processor-seconds, {found['again_s']:.1f} s")
    print(json.dumps({"rows": rows, "bytes": file.stat().st_size} | {name: round(value, 3) for name, value in found.items()}))


def measure_index(file: Path, rows: int) -> None:
    found: dict[str, float] = {}
    (file.parent / "index").mkdir()
    with timed(found, "make"):
        assert len(index_samples(file, file.parent, file.parent / "index")) == rows - rows % BLOCK
    with timed(found, "open"):
        samples = index_samples(file, file.parent, file.parent / "index")
    chosen = random.Random(1).sample(range(len(samples)), min(READ, len(samples)))
    with timed(found, "read"):
        for number in chosen:
            samples[number]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with timed(found, "bare"):
        load_lines(file)
    made, opened = found["make_s"] / found["bare_s"], found["open_s"] / found["bare_s"]
    print(f"index of {len(samples):,} rows: made in {found['make_s']:.1f} s, {made:.3f} times json.loads of all lines; peak {peak:.0f} MiB")
    print(
        f"opened again in {found['open_s']:.4f} s, {opened:.5f} times; a row in random order takes {1e6 * found['read_s'] / len(chosen):.0f} us"
    )
    print(json.dumps({"rows": len(samples), "bytes": file.stat().st_size} | {name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
