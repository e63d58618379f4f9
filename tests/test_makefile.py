"""What `make train` sets up and starts, by its variables. Nothing is run: make prints the commands."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TRAINER = "setting up the trainer"


def commands(folder: Path, *words: str) -> str:
    """Of a tree without a .venv."""
    argv = ("make", "--dry-run", "--file", str(ROOT / "Makefile"), *words)
    for name in ("images", "conf", "pyproject.toml"):
        if not (folder / name).exists():
            (folder / name).symlink_to(ROOT / name)
    return subprocess.run(argv, cwd=folder, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    ("words", "sets_up", "starts"),
    [
        ((), True, "omnilaunch launch"),
        (("HW=cpu", "CLUSTER=local"), True, "omnilaunch launch hardware=cpu cluster=local"),
        (("HW=ascend910b",), False, "omnilaunch launch hardware=ascend910b"),
        (("HW=ascend910b", "MODEL=qwen2_5_vl_7b", "STAGE=lora"), False, "launch hardware=ascend910b model=qwen2_5_vl_7b stage=lora"),
        (("CLUSTER=lab",), False, "omnilaunch launch cluster=lab"),
        (("RESUME=last",), False, "omnilaunch launch --resume last"),
        (("ARGS=cluster.runtime=docker run.steps=3",), True, "omnilaunch launch cluster.runtime=docker run.steps=3"),
    ],
)
def test_the_packages_of_the_trainer_are_set_up_where_a_process_runs_here(
    tmp_path: Path, words: tuple[str, ...], sets_up: bool, starts: str
) -> None:
    text = commands(tmp_path, "train", *words)
    assert (TRAINER in text) is sets_up and "setting up the launcher" in text
    assert " ".join(text.splitlines()[-1].split()).endswith(starts)
    assert TRAINER not in commands(tmp_path, "plan", *words), "a plan needs the launcher alone"


def test_the_runtime_is_no_word_of_the_makefile() -> None:
    assert "runtime" not in (ROOT / "Makefile").read_text(encoding="utf-8").lower()


@pytest.mark.parametrize(
    ("words", "sets_up", "starts"),
    [
        (("bench",), False, "omnilaunch bench"),
        *(
            (("bench", f"EXP={path.stem}"), path.stem.startswith("cpu_"), f"omnilaunch bench {path.stem}")
            for path in sorted((ROOT / "conf/experiment").glob("*.yaml"))
        ),
        (("bench", "EXP=cpu_tiny_llava_full", "CLUSTER=lab"), False, "omnilaunch bench cpu_tiny_llava_full cluster=lab"),
        (("bench-rerun", "RUN=h200_qwen2_5_vl_7b_lora"), False, "omnilaunch bench-rerun h200_qwen2_5_vl_7b_lora"),
        (("bench-rerun", "RUN=cpu_tiny_llava_full"), True, "omnilaunch bench-rerun cpu_tiny_llava_full"),
        (("bench-rerun", "RUN=20261120-0101"), True, "omnilaunch bench-rerun 20261120-0101"),
    ],
)
def test_a_benchmark_sets_up_the_trainer_where_its_hardware_is_the_cpu(
    tmp_path: Path, words: tuple[str, ...], sets_up: bool, starts: str
) -> None:
    text = commands(tmp_path, *words)
    assert (TRAINER in text) is sets_up and "setting up the launcher" in text
    assert " ".join(text.splitlines()[-1].split()).endswith(starts)


@pytest.mark.parametrize("typed", ["hw=ascend910b", "MODLE=qwen2_5_vl_7b", "hardware=h200", "run.steps=3"])
def test_a_variable_that_does_not_exist_is_refused(typed: str) -> None:
    """make itself takes any NAME=VALUE, and planned the default run."""
    done = subprocess.run(("make", "--dry-run", "plan", "HW=cpu", typed), cwd=ROOT, capture_output=True, text=True, check=False)
    name = typed.partition("=")[0]
    assert done.returncode == 2 and f"no variable is called {name}; valid are HW MODEL STAGE " in done.stderr and not done.stdout


def test_every_variable_of_the_help_is_valid() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    listed = re.findall(r"^([A-Z_]+) \?=", text, re.MULTILINE)
    assert listed == re.findall(r"^VARIABLES := (.*)", text, re.MULTILINE)[0].split()
    argv = ("make", "--dry-run", "plan", *(f"{name}=a b" for name in listed))
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "hardware=a b model=a b" in done.stdout
