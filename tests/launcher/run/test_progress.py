"""Files that the trainer extends while they are read."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from launcher.run.progress import Growing
from trainer.contract import StepRow

ROW = StepRow(step=1, steps=2, loss=1.5, lr=0.1, grad_norm=1.0, samples=64, tokens=2048, seconds=0.1, peak_bytes=1)
TEXT = "é漢🙂\n漢字"


@pytest.mark.parametrize("size", range(1, 12))
def test_text_is_whole_wherever_a_character_is_cut(tmp_path: Path, size: int) -> None:
    file, content, found = tmp_path / "stream.txt", TEXT.encode(), ""
    stream = Growing(file)
    for end in range(size, len(content) + size, size):
        file.write_bytes(content[:end])
        found += stream.text()
    assert found == TEXT


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10_000])
def test_rows_are_whole_wherever_they_are_cut(tmp_path: Path, size: int) -> None:
    file, tail, found = tmp_path / "metrics.jsonl", Growing(tmp_path / "metrics.jsonl"), list[StepRow]()
    content = b"\n" + 2 * f"{json.dumps(asdict(ROW))}\n".encode()
    for end in range(size, len(content) + size, size):
        file.write_bytes(content[:end])
        found += tail.rows()
    assert found == [ROW, ROW]
