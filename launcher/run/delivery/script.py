"""Reads the programs of node_scripts/."""

from pathlib import Path

FOLDER = Path(__file__).with_name("node_scripts")


def read_script(name: str) -> str:
    """The text of a file of node_scripts/, for `sh -c`, `bash -c` or `python -c` on a node."""
    return (FOLDER / name).read_text(encoding="utf-8")
