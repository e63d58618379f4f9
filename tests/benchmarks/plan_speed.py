"""How long `omnilaunch plan` takes as a whole process, beside the bare interpreter in the same run, and what of it the memory verdict takes.

python tests/benchmarks/plan_speed.py
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 7
# One that fits, and a refusal, which tries every change.
VERDICTS = (
    ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example"),
    ("hardware=rtx3090", "model=minicpm_o_2_6", "stage=full", "tune=null"),
)
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
    for words in VERDICTS:
        print(
            f"memory verdict {time_verdict(words) * 1000:.1f} ms of the processor (median of {REPEATS}), {' '.join(words)}; goal <= 50 ms"
        )


def time_verdict(words: tuple[str, ...]) -> float:
    """Seconds of the processor: the choice of a strategy, the verdict with its changes, the notes, and the table of the plan."""
    from launcher.check.strategy import resolve
    from launcher.check.suggestions import check_memory, write_memory_notes
    from launcher.config.compose import compose
    from launcher.image.stack import load_stacks

    config, stacks = compose(words, ROOT / "conf"), dict(load_stacks(ROOT / "images"))
    spent = []
    for _ in range(REPEATS):
        started = time.process_time()
        resolved = resolve(config)
        list(check_memory(resolved, stacks)), list(write_memory_notes(resolved))
        spent.append(time.process_time() - started)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
