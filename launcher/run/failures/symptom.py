"""What a row of the tables of known failures says. The tables are ascend_symptom, cuda_symptom and host_symptom; meaning reads them."""

from dataclasses import dataclass
from typing import Literal

# How much a line says about why a run failed, the most first. cause: it names what is wrong. layer: it names the part that failed, not
# why. consequence: what a sound rank says when another one has gone or hangs. wrapper: something below failed, and has its own line.
Kind = Literal["cause", "layer", "consequence", "wrapper"]
KINDS: tuple[Kind, ...] = ("cause", "layer", "consequence", "wrapper")


@dataclass(frozen=True, kw_only=True)
class Symptom:
    """`pattern`: found in the log, line by line where it has no newline of its own; `codes`: exit codes that say the same where no line
    does. `fix`: what to do next. `source`: where the meaning was read. The more specific row stands first in its table."""

    name: str
    kind: Kind
    pattern: str
    codes: tuple[int, ...] = ()
    means: str
    fix: str
    source: str
