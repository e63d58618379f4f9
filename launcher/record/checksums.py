"""seal.json: the hash of every file of a record, written when the run has ended. It shows whether a record was cut short or edited later.

It protects against accidents, not against a person who writes a new seal.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path

from launcher.record.source import RECORD_SCHEMA

SEAL_FILE = "seal.json"
# The files of a record, as patterns below the run's folder. Logs, checkpoints and the files of trackers are not parts of it.
PARTS = (
    *("plan.json", "config.json", "spec.json", "Dockerfile", "lock.txt", "source.json", "source.diff"),
    *(
        "data.json",
        "data_left_out.jsonl",
        "inputs.json",
        "environment.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "samples.jsonl",
        "best.json",
    ),
    *("train_result.json", "failure-rank*.json", "result.json", "images.json"),
    *("attempts/*/*.json", "attempts/*/*.jsonl"),
)


@dataclass(frozen=True, kw_only=True)
class RecordPart:
    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Seal:
    """`schema`: RECORD_SCHEMA of the version that wrote it. `parts`: path below the run's folder -> hash. `sha256`: over all parts."""

    schema: int
    run_id: str
    parts: dict[str, RecordPart]
    sha256: str


def make_seal(folder: Path, run_id: str, *, unwritten: Mapping[str, bytes]) -> Seal:
    """Of all parts that exist, and of `unwritten`: name -> content of parts that will be written afterwards. Raises OSError."""
    parts = {name: hash_part(folder / name) for name in find_parts(folder)}
    parts |= {name: RecordPart(sha256=sha256(content).hexdigest(), bytes=len(content)) for name, content in unwritten.items()}
    ordered = dict(sorted(parts.items()))
    return Seal(schema=RECORD_SCHEMA, run_id=run_id, parts=ordered, sha256=hash_all(ordered))


def find_parts(folder: Path) -> tuple[str, ...]:
    return tuple(sorted({path.relative_to(folder).as_posix() for pattern in PARTS for path in folder.glob(pattern) if path.is_file()}))


def hash_part(path: Path) -> RecordPart:
    with path.open("rb") as file:
        return RecordPart(sha256=file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def hash_all(parts: Mapping[str, RecordPart]) -> str:
    return sha256("".join(f"{part.sha256} {part.bytes} {name}\n" for name, part in sorted(parts.items())).encode()).hexdigest()


def find_breaks(seal: Seal, folder: Path) -> tuple[str, ...]:
    """Each difference between the folder and its seal as one line; () if the record is as it was. Raises OSError."""
    found_parts = set(find_parts(folder))
    broken = [f"{SEAL_FILE} itself was edited"] if hash_all(seal.parts) != seal.sha256 else []
    broken += [f"{name} is missing" for name in seal.parts if name not in found_parts]
    broken += [f"{name} was added" for name in sorted(found_parts - seal.parts.keys())]
    for name, part in seal.parts.items():
        if name not in found_parts:
            continue
        found = hash_part(folder / name)
        if found.bytes < part.bytes:
            broken.append(f"{name} was cut short: {found.bytes:,} of {part.bytes:,} bytes")
        elif found != part:
            broken.append(f"{name} was edited")
    return tuple(broken)
