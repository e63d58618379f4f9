"""The digits job from start to end: accuracy, speed and reproducibility.

    python tests/benchmarks/first_path.py [--seeds 0 1 2] [--steps 300]

Prints exact match per seed, wall time, the samples/s of the loop compared with a plain PyTorch loop with the same model, batch and threads
(alternately, in the same run), and whether the same seed gives equal metrics and weights. All figures are for this machine.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WARM_UP = 20  # steps that are not part of a rate
TIMING = ("seconds", "peak_bytes")  # may differ between equal runs


def launch(folder: Path, name: str, *overrides: str) -> tuple[dict[str, object], list[dict[str, object]], float]:
    """One real `omnilaunch launch`: its result, its metrics rows, and the wall seconds of the process."""
    argv = (sys.executable, "-m", "launcher.cli", "launch", "--run-id", name, f"cluster.root={folder}", *overrides)
    started = time.perf_counter()
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(argv)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    run = folder / "runs" / name
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run / "result.json").read_text()), rows, time.perf_counter() - started


def loop_rate(rows: list[dict[str, object]]) -> float:
    kept = rows[WARM_UP:]
    return sum(row["samples"] for row in kept) / sum(row["seconds"] for row in kept)  # type: ignore[misc,arg-type,return-value]


def bare_rate(spec: Path) -> float:
    done = subprocess.run(
        (sys.executable, str(Path(__file__).with_name("bare_loop.py")), str(spec)), cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


def untimed(rows: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "benchmarks" / time.strftime("%Y%m%d-%H%M%S"))
    arguments = parser.parse_args()
    ratios, results = [], {}
    for seed in arguments.seeds:
        result, rows, wall_s = launch(arguments.folder, f"seed{seed}", f"run.seed={seed}", f"run.steps={arguments.steps}")
        bare = bare_rate(arguments.folder / "runs" / f"seed{seed}" / "spec.json")
        ratios.append(loop_rate(rows) / bare)
        results[seed] = (result, rows)
        evaluation = result["evaluation"]
        print(
            f"seed {seed}: exact match {evaluation['exact_match']:.4f} of {evaluation['count']:g}, {wall_s:.1f} s in total (goal <= 90), "  # type: ignore[index]
            f"loop {loop_rate(rows):.0f} samples/s, bare loop {bare:.0f} samples/s, ratio {ratios[-1]:.3f}",
            flush=True,
        )
    print(f"loop / bare loop: median {statistics.median(ratios):.3f} (goal >= 0.9)")
    seed = arguments.seeds[0]
    again, rows, _ = launch(arguments.folder, "again", f"run.seed={seed}", f"run.steps={arguments.steps}")
    first, first_rows = results[seed]
    print(
        f"same seed again: rows equal {untimed(rows) == untimed(first_rows)}, weights equal {again['weights_sha256'] == first['weights_sha256']}"
    )


if __name__ == "__main__":
    main()
