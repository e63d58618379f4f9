"""docs/record.schema.json: the published shape of a run's folder, made from the dataclasses that write it.

    python -m launcher.record.schema > docs/record.schema.json

A JSON Schema (draft 2020-12) of one object whose keys are the files of the folder. Keys with a default may be missing: earlier versions did
not have all of them.
"""

import json
import sys
import types
import typing
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal

from launcher.config.schema import Config
from launcher.plan.plan import Plan
from launcher.record.checksums import SEAL_FILE, Seal
from launcher.record.record import (
    ATTEMPT_FILE,
    ATTEMPTS,
    CONFIG_FILE,
    IMAGES_FILE,
    PLAN_FILE,
    RECORD_FILE,
    RESUMPTION_FILE,
    SOURCE_FILE,
    Attempt,
    Record,
    Resumption,
)
from launcher.record.source import RECORD_SCHEMA, SourceState
from trainer import contract
from trainer.contract import Best, DataReport, EnvReport, EvaluationRow, FailureReport, Inputs, LeftOutRow, StepRow, TrainResult, TrainSpec

# File -> its class; of *.jsonl, that of each line.
FILES: dict[str, Any] = {
    PLAN_FILE: Plan,
    CONFIG_FILE: Config,
    SOURCE_FILE: SourceState,
    contract.SPEC_FILE: TrainSpec,
    contract.DATA_FILE: DataReport,
    contract.DATA_LEFT_OUT_FILE: LeftOutRow,
    contract.INPUTS_FILE: Inputs,
    contract.ENVIRONMENT_FILE: EnvReport,
    IMAGES_FILE: dict[str, str],
    contract.METRICS_FILE: StepRow,
    contract.EVALUATIONS_FILE: EvaluationRow,
    contract.BEST_FILE: Best,
    contract.RESULT_FILE: TrainResult,
    contract.FAILURE_FILES.format(rank="<n>"): FailureReport,
    f"{ATTEMPTS}/<n>/{ATTEMPT_FILE}": Attempt,
    f"{ATTEMPTS}/<n>/{RESUMPTION_FILE}": Resumption,
    RECORD_FILE: Record,
    SEAL_FILE: Seal,
}
LEAVES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def record_schema() -> dict[str, Any]:
    definitions: dict[str, Any] = {}
    files = {name: describe(kind, definitions) for name, kind in FILES.items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A run's folder of omnilaunch, record schema {RECORD_SCHEMA}",
        "description": "One key a file; of *.jsonl files, one line. Files that the run did not get to are not there.",
        "type": "object",
        "properties": files,
        "$defs": dict(sorted(definitions.items())),
    }


def describe(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a type. Dataclasses are added to `definitions` by their names."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is object:
        return {}
    if kind in LEAVES:
        return {"type": LEAVES[kind]}
    if is_dataclass(kind):
        return refer(typing.cast(type, kind), definitions)
    if origin is Literal:
        return {"enum": list(inner)}
    if origin in (types.UnionType, typing.Union):
        return {"anyOf": [{"type": "null"} if each is type(None) else describe(each, definitions) for each in inner]}
    if origin is tuple:
        return {"type": "array", "items": describe(inner[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": describe(inner[1], definitions)}
    raise TypeError(f"no schema for {kind}")


def refer(kind: type, definitions: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__  # a class name is unique in launcher/ and trainer/: tests/test_house.py
    if name not in definitions:
        definitions[name] = {}  # a type may hold itself
        hints = typing.get_type_hints(kind)
        required = [each.name for each in fields(kind) if each.default is MISSING and each.default_factory is MISSING]
        definitions[name] = {
            "type": "object",
            "properties": {each.name: describe(hints[each.name], definitions) for each in fields(kind)},
            "required": required,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def to_text() -> str:
    return json.dumps(record_schema(), indent=1, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.write(to_text())
