"""The published schema matches the dataclasses, and the golden records match the schema."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from launcher.record.checksums import PARTS
from launcher.record.schema import FILES, to_text

ROOT = Path(__file__).resolve().parents[3]
GOLDEN = sorted(path for path in (ROOT / "tests/golden/record").iterdir() if path.is_dir())
KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
    "null": type(None),
}


def test_the_published_schema_is_that_of_the_dataclasses() -> None:
    published = (ROOT / "docs/record.schema.json").read_text(encoding="utf-8")
    assert published == to_text(), "run: python -m launcher.record.schema > docs/record.schema.json"


def test_every_json_file_of_a_record_has_a_schema() -> None:
    patterns = [re.sub(r"<n>", "*", name) for name in FILES]
    named = {part for part in PARTS if part.endswith(".json") and "/" not in part} - set(patterns)
    assert not named


def faults(value: Any, schema: dict[str, Any], whole: dict[str, Any], where: str) -> list[str]:
    """Validates with the part of JSON Schema that the published schema uses."""
    if "$ref" in schema:
        return faults(value, whole["$defs"][schema["$ref"].removeprefix("#/$defs/")], whole, where)
    if "anyOf" in schema:
        found = [faults(value, each, whole, where) for each in schema["anyOf"]]
        return [] if not all(found) else found[0]
    if "enum" in schema:
        return [] if value in schema["enum"] else [f"{where}: {value!r}"]
    if "type" not in schema:
        return []
    kind = KINDS[schema["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        return [f"{where}: {value!r} is not a {schema['type']}"]
    if isinstance(value, list):
        return [fault for place, item in enumerate(value) for fault in faults(item, schema["items"], whole, f"{where}[{place}]")]
    if not isinstance(value, dict):
        return []
    known, more = schema.get("properties", {}), schema.get("additionalProperties", {})
    missing = [f"{where}: no {name}" for name in schema.get("required", []) if name not in value]
    strange = [f"{where}: {name}?" for name in value if name not in known and more is False]
    return missing + strange + [
        fault for name, item in value.items() if name in known or more for fault in faults(item, known.get(name, more), whole, f"{where}.{name}")
    ]  # fmt: skip


@pytest.mark.parametrize("folder", GOLDEN, ids=lambda path: path.name)
def test_golden_records_match_the_schema(folder: Path) -> None:
    whole = json.loads(to_text())
    looked = 0
    for name, schema in whole["properties"].items():
        path = folder / name
        if not path.is_file():
            continue
        texts = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        assert [fault for text in texts for fault in faults(json.loads(text), schema, whole, name)] == []
        looked += 1
    assert looked >= 9


def test_the_schema_refuses_what_is_wrong() -> None:
    whole = json.loads(to_text())
    row = {"step": 1, "steps": 1, "loss": "x", "lr": 1, "grad_norm": 1.0, "samples": 1, "tokens": 1, "seconds": 1.0, "more": 1}
    found = faults(row, whole["properties"]["metrics.jsonl"], whole, "row")
    assert found == ["row: no peak_bytes", "row: more?", "row.loss: 'x' is not a number"]
