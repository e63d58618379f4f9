"""The trainer's check of the data as a process on this machine: for `omnilaunch data check`, and for run.epochs where rows are left out."""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.config.schema import Config
from launcher.errors import ConfigRefused, LaunchError
from launcher.plan.local_context import local_context
from launcher.plan.plan import train_spec
from launcher.plan.rows import asks_for_usable_rows
from launcher.redact import show
from trainer.contract import DATA_FILE, DATA_LEFT_OUT_FILE, DATA_PROBLEMS_FILE, SPEC_FILE, DataReport, Exit, TrainSpec, read, write

PROJECT = Path(__file__).resolve().parents[2]
PROGRESS = re.compile(r"data: [\d,]+ rows checked, |data: files and rules are unchanged")  # trainer.data.examination, trainer.data.check


def examine(
    spec: TrainSpec, say: Callable[[str], None] = lambda line: None
) -> tuple[DataReport, list[dict[str, Any]], list[dict[str, Any]]]:
    """The trainer's own check, in a separate process: it needs packages that the launcher does not import. `say` gets the lines that a long check
    prints about its progress. Returns the report, all problems, and the rows that are not used as they are written. Raises LaunchError."""
    with tempfile.TemporaryDirectory(prefix="omnilaunch-data-") as name, tempfile.TemporaryFile("w+", errors="replace") as errors:
        folder = Path(name)
        write(replace(spec, output=name), folder / SPEC_FILE)
        argv = (sys.executable, "-m", "trainer", "data", str(folder / SPEC_FILE))
        with subprocess.Popen(argv, cwd=PROJECT, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace") as child:
            for line in child.stdout or ():
                if PROGRESS.match(line):
                    say(line.rstrip())
        if not (folder / DATA_FILE).is_file():
            errors.seek(0)
            raise refusal(child.returncode, errors.read().strip())
        report: DataReport = read(DataReport, folder / DATA_FILE)
        return report, read_lines(folder / DATA_PROBLEMS_FILE), read_lines(folder / DATA_LEFT_OUT_FILE)


def read_lines(file: Path) -> list[dict[str, Any]]:
    """[] without the file."""
    lines = file.read_text(encoding="utf-8").split("\n") if file.is_file() else []
    return [json.loads(line) for line in lines if line]


def with_usable_rows(config: Config, typed: Set[str]) -> Config:
    """With the number of rows that run.epochs counts: those that a data check does not leave out. Its result is kept, and the launch uses it
    again. Unchanged where the check finds problems that no option leaves out: it refuses the launch. Raises LaunchError."""
    here = Path.cwd()
    if not asks_for_usable_rows(config, typed, here):
        return config
    show("data: run.epochs counts the rows that are used, and the data is checked to know them", file=sys.stderr)
    spec = train_spec(replace(config, run=replace(config.run, steps=1)), local_context(PROJECT), run_id="rows")
    alone = replace(spec, batch=replace(spec.batch, global_batch=1), data=replace(spec.data, rows=0))
    report, problems, _ = examine(alone, lambda line: show(line, file=sys.stderr))
    return config if problems else replace(config, data=replace(config.data, rows=report.train_rows))


def refusal(code: int, output: str) -> LaunchError:
    if "ModuleNotFoundError" in output:
        return ConfigRefused(
            f"{sys.executable} lacks what reads the data: {output.splitlines()[-1]}\n  Next: make setup, which installs it in .venv; or let a "
            "launch with cluster.runtime=docker check the data in the image"
        )
    if code == Exit.USAGE:
        return ConfigRefused(output)
    return LaunchError(f"the check of the data ended with exit code {code}:\n{output}")
