"""How long `omnilaunch plan` takes as a whole process, beside the bare interpreter in the same run.

python tests/benchmarks/plan_speed.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 7
PLAN = (sys.executable, "-m", "launcher.cli", "plan", "hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example")
MODULES = ("-X", "importtime", "-m", "launcher.cli", *PLAN[3:])


def seconds(argv: tuple[str, ...]) -> float:
    started = time.perf_counter()
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    seconds(PLAN)  # warm
    plan = statistics.median(seconds(PLAN) for _ in range(REPEATS))
    bare = statistics.median(seconds((sys.executable, "-c", "pass")) for _ in range(REPEATS))
    imports = subprocess.run((sys.executable, *MODULES), cwd=ROOT, check=True, capture_output=True, text=True).stderr
    heavy = [name for name in ("torch", "transformers", "deepspeed", "numpy") if f"| {name}\n" in imports]
    print(
        f"plan {plan:.3f} s (median of {REPEATS}), bare interpreter {bare:.3f} s, ratio {plan / bare:.1f}; heavy imports: {heavy or 'none'}; goal <= 0.7 s"
    )


if __name__ == "__main__":
    main()
