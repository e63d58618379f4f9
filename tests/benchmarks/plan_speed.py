"""How much processor time `omnilaunch --help` and `omnilaunch plan` take as whole processes, next to the bare interpreter, and how much of a
plan the memory verdict takes.

python tests/benchmarks/plan_speed.py
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REPEATS = 7
# One that fits, and a refusal, which tries every suggestion.
VERDICTS = (
    ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example"),
    ("hardware=rtx3090", "model=minicpm_o_2_6", "stage=full", "tune=null"),
)
PLAN = (sys.executable, "-m", "launcher.cli", "plan", "hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "cluster=example")
HELP = (sys.executable, "-m", "launcher.cli", "--help")
COMPLETE = (sys.executable, "-m", "launcher.cli", "--complete", "plan", "run.st")
MODULES = ("-X", "importtime", "-m", "launcher.cli", *PLAN[3:])


def processor_s(argv: tuple[str, ...], environment: dict[str, str]) -> float:
    """User and system time of one process, which a busy machine changes less than its duration."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(argv, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as cache:  # with bytecode, as an installed program has it
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment |= {"PYTHONPYCACHEPREFIX": cache, "PYTHONPATH": str(ROOT)}
        bare = median_s((sys.executable, "-c", "pass"), environment)
        for name, argv, goal in (("--help", HELP, 0.15), ("--complete", COMPLETE, 0.15), ("plan", PLAN, 0.4)):
            spent = median_s(argv, environment)
            print(f"{name:10} {spent:.3f} s of the processor (median of {REPEATS}), {spent / bare:.1f} bare interpreters; goal <= {goal} s")
        imports = subprocess.run((sys.executable, *MODULES), cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stderr
    heavy = [name for name in ("torch", "transformers", "deepspeed", "numpy") if f"| {name}\n" in imports]
    print(f"heavy imports of plan: {heavy or 'none'}")
    for words in VERDICTS:
        spent = time_verdict(words) * 1000
        print(f"memory verdict {spent:.1f} ms of the processor (median of {REPEATS}), {' '.join(words)}; goal <= 50 ms")


def median_s(argv: tuple[str, ...], environment: dict[str, str]) -> float:
    processor_s(argv, environment)  # writes the bytecode
    return statistics.median(processor_s(argv, environment) for _ in range(REPEATS))


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
