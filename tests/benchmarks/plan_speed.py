"""The time of `omnilaunch plan` as a process, compared with an empty Python process, and the part of the memory verdict.

python tests/benchmarks/plan_speed.py
"""

import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 7
# One that fits, and one that is refused, for which every suggestion is tried.
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
            f"memory verdict {time_verdict(words) * 1000:.1f} ms of processor time (median of {REPEATS}), {' '.join(words)}; goal <= 50 ms"
        )


def time_verdict(words: tuple[str, ...]) -> float:
    """Processor seconds for choosing a strategy, the verdict with its suggestions, the notes, and the table of the plan."""
    from launcher.check.strategy import choose_strategy
    from launcher.check.suggestions import memory_fits, write_memory_notes
    from launcher.config.compose import compose
    from launcher.image.stack import load_stacks
    from launcher.memory.estimate import estimate_memory

    config, stacks = compose(words, ROOT / "conf"), dict(load_stacks(ROOT / "images"))
    spent = []
    for _ in range(REPEATS):
        started = time.process_time()
        chosen = replace(config, strategy=choose_strategy(config))
        list(memory_fits(chosen, stacks)), list(write_memory_notes(chosen)), estimate_memory(chosen)
        spent.append(time.process_time() - started)
    return statistics.median(spent)


if __name__ == "__main__":
    main()
