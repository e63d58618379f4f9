"""The cost of run.deterministic=true: the same run with and without it, alternately. Prints samples/s and the ratio of the medians.

python tests/benchmarks/deterministic_cost.py [--rounds 5] [--steps 60] [key=value ...]
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
SKIPPED = 10  # first steps, in which caches are filled and kernels are selected


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    rates: dict[str, list[float]] = {"false": [], "true": []}
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            for value, found in rates.items():
                found.append(measure(Path(folder), f"{value}{turn}", arguments.steps, value, arguments.overrides))
                print(f"run.deterministic={value}: {found[-1]:.1f} samples/s", flush=True)
    medians = {value: statistics.median(found) for value, found in rates.items()}
    for value, found in rates.items():
        print(f"run.deterministic={value}: median {medians[value]:.1f} samples/s, {min(found):.1f} to {max(found):.1f}")
    print(f"deterministic / not: {medians['true'] / medians['false']:.3f}")


def measure(folder: Path, name: str, steps: int, value: str, overrides: list[str]) -> float:
    """Samples/s over the steps after the first SKIPPED."""
    words = (
        f"cluster.root={folder}",
        f"run.steps={steps}",
        f"run.deterministic={value}",
        "run.evaluation.enabled=false",
        "run.trackers=[]",
    )
    warmup = "stage.optimizer.warmup=1"
    command = (sys.executable, "-m", "launcher.cli", "launch", *words, warmup, *overrides, "--run-id", name)
    subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()][SKIPPED:]
    return float(sum(row["samples"] for row in rows) / sum(row["seconds"] for row in rows))


if __name__ == "__main__":
    main()
