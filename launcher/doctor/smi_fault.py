"""What it means when nvidia-smi or npu-smi fails or warns, and what to do: a table, smi_faults.yaml. Pure."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

Tool = Literal["nvidia-smi", "npu-smi"]
TABLE = Path(__file__).with_name("smi_faults.yaml")
MOST_TEXT = 64 * 1024  # characters that are searched: a table of sixteen devices has 4,000
SHOWN = 300
NOT_NAMED = "(not named)"
MOST_GROUPS = 2  # of a pattern


@dataclass(frozen=True, kw_only=True)
class KnownFault:
    """`codes`: exit codes that mean it; with a `pattern`, either is enough. `warning`: the devices that were printed can be used."""

    name: str
    meaning: str
    fix: str
    source: str
    codes: tuple[int, ...] = ()
    pattern: str = ""
    warning: bool = False


@dataclass(frozen=True, kw_only=True)
class SmiFault:
    """`evidence`: what the tool printed, on one line. `fix` is '' where the fault is not known."""

    evidence: str
    meaning: str = ""
    fix: str = ""
    warning: bool = False

    @property
    def described(self) -> str:
        return f"{self.meaning}: {self.evidence!r}" if self.meaning and self.evidence else self.meaning or self.evidence


@cache
def known_faults(tool: Tool) -> tuple[KnownFault, ...]:
    import yaml

    table = yaml.safe_load(TABLE.read_text(encoding="utf-8"))
    return tuple(KnownFault(**{**row, "codes": tuple(row.get("codes", ()))}) for row in table[tool])


def find_faults(tool: Tool, code: int, remarks: Sequence[str]) -> tuple[SmiFault, ...]:
    """The faults that the remarks name, else that of the exit code, else one without a meaning; () for a tool that ended well and named none.
    `remarks`: the lines that are no rows of devices."""
    lines = [line.strip() for line in "\n".join(remarks)[:MOST_TEXT].splitlines() if line.strip()]
    named = tuple(dict.fromkeys(fault for line in lines if (fault := match_line(tool, line))))
    if named or not code:
        return named
    evidence = " ".join(" ".join(lines).split())[:SHOWN]
    by_code = next((fault for fault in known_faults(tool) if code in fault.codes), None)
    if by_code is None:
        return (SmiFault(evidence=evidence or f"exit code {code}"),)
    meaning = by_code.meaning.format(*(NOT_NAMED,) * MOST_GROUPS)
    return (SmiFault(evidence=evidence, meaning=meaning, fix=by_code.fix, warning=by_code.warning),)


def match_line(tool: Tool, line: str) -> SmiFault | None:
    for fault in known_faults(tool):
        if fault.pattern and (found := re.search(fault.pattern, line)):
            return SmiFault(evidence=line[:SHOWN], meaning=fault.meaning.format(*found.groups()), fix=fault.fix, warning=fault.warning)
    return None
