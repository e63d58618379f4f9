"""A row of the tables of known failures, and the tables themselves, read from the YAML files of this folder."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

# How much a line says about why a run failed, the most first. cause: it names what is wrong. layer: it names the part that failed, not why.
# consequence: a healthy rank prints it when another one has ended or hangs. wrapper: something below failed, and has its own line.
Kind = Literal["cause", "layer", "consequence", "wrapper"]
KINDS: tuple[Kind, ...] = ("cause", "layer", "consequence", "wrapper")
TABLES = {
    "ascend": "Ascend: HCCL, CANN, torch_npu",
    "cann": "Ascend: codes of CANN and of the NPU",
    "cuda": "CUDA, its driver and its containers",
    "nccl": "NCCL",
    "docker": "Docker and registries",
    "network": "Rendezvous and SSH",
    "hub": "Downloads and weights",
    "training": "Training, data and schedulers",
    "host": "Host, torch, DeepSpeed, hub",
}  # file -> title, the more specific first: of two rows that match one line the first is used


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """`pattern` is searched in the log, where ^ and $ match at each line. `codes`: exit codes that mean the same where no line matches. `example`: text
    that the pattern matches. `fix`: what to do next. `source`: where the meaning was read."""

    name: str
    kind: Kind
    pattern: str
    codes: tuple[int, ...] = ()
    example: str
    means: str
    fix: str
    source: str


@cache
def load_table(name: str) -> tuple[Symptom, ...]:
    import yaml

    text = Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8")
    return tuple(read_symptom(row) for row in yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def read_symptom(row: dict[str, Any]) -> Symptom:
    """A row with `signal: N` also matches the line of torchrun or DeepSpeed about the first rank that it saw end, by that signal, and
    the exit codes for it."""
    number = row.pop("signal", None)
    if number is not None:
        summary = rf"Root Cause [^\n]{{0,500}}\n(?:[^\n]{{0,500}}\n){{1,5}}?[ \t]{{0,40}}exitcode {{0,20}}: -{number}\b"
        ended = rf"failed \(exitcode: -{number}\)|exits with return code = -{number}\b|{summary}"
        row |= {"pattern": f"{row['pattern']}|{ended}" if "pattern" in row else ended, "codes": (128 + number, -number)}
    return Symptom(**{**row, "codes": tuple(row.get("codes", ()))})


def load_symptoms() -> tuple[Symptom, ...]:
    """All tables, in their order."""
    return tuple(symptom for name in TABLES for symptom in load_table(name))
