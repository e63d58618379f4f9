"""A chain of stages, conf/experiment/NAME.yaml with the key `chain`: each step goes on with what an earlier one left.

    chain:
      - {name: aligned, words: [stage=projector]}
      - {name: adapted, words: [stage=lora]}
      - {name: merged, words: [stage=merge]}

A step's words are those of `launch`; typed ones hold for all steps. What a step begins with is the last checkpoint before it, or the result
of another step where it says so: `stage.checkpoint=@aligned`, `run.evaluation.base=@merged`. Step `lora` of chain `x` is run `x-lora`, or
`x-lora-2` where the first was tried before: where a chain stands is told by these runs' records alone.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.compose import options
from launcher.errors import ConfigRefused, suggest

GROUP = "experiment"
KEY = "chain"
STEP_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,29}")
REFERENCE = re.compile(r"@([a-z0-9_]+)$")
LEAVING = ("train", "merge", "convert", "quantize")  # kinds of stages that leave a checkpoint


@dataclass(frozen=True, kw_only=True)
class Step:
    """`words`: as of `launch`, with @NAME where a run id comes."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chain:
    name: str
    steps: tuple[Step, ...]


# -------------------------------------------------------------------------------------------------------------------- reading


def list_chains(conf: Path) -> tuple[str, ...]:
    return tuple(name for name in options(conf)[GROUP] if KEY in read_yaml(file_of(name, conf)))


def file_of(name: str, conf: Path) -> Path:
    return conf / GROUP / f"{name}.yaml"


def read_yaml(file: Path) -> dict[str, Any]:
    """{} for what is no mapping. Raises ConfigRefused for what is no YAML."""
    from yaml import YAMLError, safe_load

    try:
        given = safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigRefused(f"{file} cannot be read: {error}") from error
    return given if isinstance(given, dict) else {}


def find_chain(words: Sequence[str], conf: Path) -> Chain | None:
    """The chain that `experiment=NAME` among the words names; None where they name none, or a cell. Raises ConfigRefused for one that cannot
    be read."""
    named = [word.partition("=")[2] for word in words if word.partition("=")[0] == GROUP]
    return load_chain(named[0], conf) if len(named) == 1 and named[0] in list_chains(conf) else None


def load_chain(name: str, conf: Path) -> Chain:
    """Raises ConfigRefused that names the file and the step."""
    file = f"{conf.name}/{GROUP}/{name}.yaml"
    given = read_yaml(file_of(name, conf))
    if extra := sorted(set(given) - {KEY}):
        raise ConfigRefused(f"{file}: {', '.join(extra)} beside {KEY}: what holds for every step is written in each step's words, or typed")
    steps = given[KEY]
    shaped = isinstance(steps, list) and steps and all(isinstance(step, dict) and set(step) == {"name", "words"} for step in steps)
    if not shaped or not all(isinstance(word, str) for step in steps for word in step["words"]):
        raise ConfigRefused(f"{file}: {KEY} is a list of {{name: NAME, words: [stage=..., KEY=VALUE]}}")
    chain = Chain(name=name, steps=tuple(Step(name=str(step["name"]), words=tuple(step["words"])) for step in steps))
    if wrong := list(find_faults(chain)):
        told = "\n".join(f"  {what}" for what in wrong)
        raise ConfigRefused(f"{file} is no chain yet, and nothing was started:\n{told}")
    return chain


def find_faults(chain: Chain) -> Iterator[str]:
    names = [step.name for step in chain.steps]
    for place, step in enumerate(chain.steps):
        if not STEP_NAME.fullmatch(step.name):
            yield f"step {step.name!r}: a name is 1 to 30 of a-z, 0-9 and '_'"
        if names.index(step.name) != place:
            yield f"step {step.name}: there are two of that name"
        if not any(word.startswith("stage=") for word in step.words):
            yield f"step {step.name}: names no stage=..."
        for word in step.words:
            match = REFERENCE.search(word.partition("=")[2])
            if match and match[1] not in names[:place]:
                yield f"step {step.name}: {word} is no step before it; {suggest(match[1], names[:place])}"


# ---------------------------------------------------------------------------------------------------------------------- words


def words_of(chain: Chain, place: int, typed: Sequence[str], runs: Mapping[str, str], kinds: Sequence[str]) -> tuple[str, ...]:
    """What is launched as the step at `place`. `runs`: step -> what stands for its result; `kinds`: of the stages of all steps."""
    step = chain.steps[place]
    own = tuple(REFERENCE.sub(lambda match: runs[match[1]], word) for word in step.words)
    before = [other.name for other, kind in zip(chain.steps[:place], kinds, strict=False) if kind in LEAVING]
    begins = any(word.startswith("stage.checkpoint=") for word in own) or not before
    kept = [word for word in typed if word.partition("=")[0] != GROUP]
    return (*kept, *own, *(() if begins else (f"stage.checkpoint={runs[before[-1]]}",)))
