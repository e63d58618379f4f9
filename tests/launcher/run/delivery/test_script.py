"""The programs that run on nodes: they are installed with the launcher, and their syntax is right."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from launcher.run.delivery.script import FOLDER, read_script

ROOT = Path(__file__).resolve().parents[4]
SHELL_SCRIPTS = sorted(path.name for path in FOLDER.glob("*.sh"))


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_a_shell_reads_them(name: str) -> None:
    shell = "bash" if name in ("serve_image.sh", "receive_image.sh") else "sh"
    done = subprocess.run((shell, "-n", "-c", read_script(name)), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_they_are_installed_with_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["setuptools"]["package-data"]["launcher.run.delivery"] == ["node_scripts/*.sh"]
    assert len(SHELL_SCRIPTS) == 8
