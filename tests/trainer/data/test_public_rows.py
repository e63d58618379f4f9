"""What the check of the data says about rows of users, and how they are read: the tables are public_rows.yaml and case_rows.yaml."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image, ImageDraw

from tests.benchmarks.peer_rows.compare import make_spec
from tests.benchmarks.peer_rows.model import write_model
from trainer.data.check import examine_data
from trainer.data.rows.sample import Sample, read_samples

TABLES = {
    name: yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8")) for name in ("public_rows", "case_rows")
}
KEYS = {"name", "source", "wants", "images", "data", "files", "expect"}
EXPECTED = {"samples", "roles", "images", "learned", "reasoning", "calls", "text", "adjusted", "problems", "problem", "report_rows"}


@pytest.mark.parametrize("table", TABLES)
def test_the_table(table: str) -> None:
    entries = TABLES[table]
    assert len({entry["name"] for entry in entries}) == len(entries) >= 30
    for entry in entries:
        assert set(entry) <= KEYS and set(entry["expect"]) <= EXPECTED, entry["name"]
        assert table != "public_rows" or re.match(r"[\w.-]+/[\w.-]+#\d+", entry["source"]), entry["name"]
        assert ("problem" in entry["expect"]) == bool(entry["expect"].get("problems")), entry["name"]
        assert len(entry["expect"]) >= 1 + ("problem" not in entry["expect"] and "report_rows" not in entry["expect"]), entry["name"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "qwen"
    write_model("qwen", folder)
    return folder


def parameters() -> list[Any]:
    return [pytest.param(entry, id=entry["name"]) for table in TABLES.values() for entry in table]


@pytest.mark.parametrize("entry", parameters())
def test_rows_of_users(entry: dict[str, Any], model: Path, tmp_path: Path) -> None:
    train = write_files(entry, tmp_path)
    spec = make_spec("qwen", model, tmp_path, str(train.relative_to(tmp_path)))
    spec = replace(spec, data=replace(spec.data, **entry.get("data", {})))
    report, problems, _ = examine_data(spec, lambda _: None)
    samples, _ = read_samples(train, tmp_path / spec.data.images)
    expect = entry["expect"]
    said: dict[int, str] = {}
    for problem in problems:
        said[problem.row] = said.get(problem.row, "") + f"{problem.field}: {problem.problem} | {problem.fix}\n"
    assert len(said) == expect.get("problems", 0), said
    assert all(re.search(expect["problem"], lines) for lines in said.values()), said
    check_samples(samples, expect)
    assert report.train_rows == expect.get("report_rows", report.train_rows)
    if "adjusted" in expect:
        found = list(report.summary.adjustments)
        assert len(found) == len(expect["adjusted"]) and all(re.search(*pair) for pair in zip(expect["adjusted"], found, strict=True)), (
            found
        )


def check_samples(samples: tuple[Sample, ...], expect: dict[str, Any]) -> None:
    found = {
        "samples": len(samples),
        "roles": [" ".join(message.role for message in sample.messages) for sample in samples],
        "images": [len(sample.images) for sample in samples],
        "reasoning": [message.reasoning for sample in samples for message in sample.messages if message.reasoning],
        "calls": [call.name for sample in samples for message in sample.messages for call in message.calls],
        "learned": [
            message.content for sample in samples for message in sample.messages if message.role == "assistant" and message.in_loss
        ],
    }
    assert {key: value for key, value in found.items() if key in expect} == {key: expect[key] for key in found if key in expect}
    if "text" in expect:
        assert re.search(expect["text"], "\n\n".join(message.content for sample in samples for message in sample.messages))


def write_files(entry: dict[str, Any], folder: Path) -> Path:
    """The first of the files, which is the one to train on."""
    for name in entry.get("images", ()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (32, 32), "white")
        ImageDraw.Draw(picture).ellipse((8, 8, 24, 24), fill=(90, 90, 90))
        picture.save(folder / name)
    for name, content in entry["files"].items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        encoding = content.get("encoding", "utf-8") if isinstance(content, dict) else "utf-8"
        (folder / name).write_bytes(as_text(name, content).encode(encoding))
    return folder / next(iter(entry["files"]))


def as_text(name: str, content: Any) -> str:
    if isinstance(content, dict):
        return str(content["text"])
    if name.endswith(".jsonl"):
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    return json.dumps(content, ensure_ascii=False)
