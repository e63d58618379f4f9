"""A chain of stages: conf/experiment/NAME.yaml with the key `chain`. Each step starts from the result of an earlier one.

    chain:
      - {name: aligned, words: [stage=projector]}
      - {name: adapted, words: [stage=lora]}
      - {name: merged, words: [stage=merge]}

`words` are overrides, as of `launch`; those on the command line hold for all steps. A step starts from the last checkpoint of the steps
above it, or from the step that it names: `stage.checkpoint=@aligned`, `run.evaluation.base=@merged`. Step `lora` of chain `x` is run
`x-lora`, or `x-lora-2` where `x-lora` cannot be resumed. Which steps have finished is read from the records of these runs.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.config.compose import options
from launcher.config.conf_folder import ConfFolder, as_conf_folder
from launcher.config.defaults import keys_of, without_keys
from launcher.errors import ConfigRefused, suggest

GROUP = "experiment"
KEY = "chain"
STEP_NAME = re.compile(r"[a-z0-9][a-z0-9_]{0,29}")
REFERENCE = re.compile(r"@([a-z0-9_]+)$")
SAVING = ("train", "merge", "convert", "quantize")  # kinds of stages that save a checkpoint


@dataclass(frozen=True, kw_only=True)
class Step:
    """`words`: overrides, with @NAME for the run of another step."""

    name: str
    words: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Chain:
    name: str
    steps: tuple[Step, ...]


def list_chains(conf: Path | ConfFolder) -> tuple[str, ...]:
    return tuple(name for name in options(conf)[GROUP] if KEY in read_yaml(file_of(name, conf)))


def file_of(name: str, conf: Path | ConfFolder) -> Path:
    return as_conf_folder(conf).find(GROUP, name)


def read_yaml(file: Path) -> dict[str, Any]:
    """{} where the file is not a mapping. Raises ConfigRefused where it is not YAML."""
    from yaml import YAMLError, safe_load

    try:
        given = safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, YAMLError) as error:
        raise ConfigRefused(f"{file} cannot be read: {error}") from error
    return given if isinstance(given, dict) else {}


def find_chain(words: Sequence[str], conf: Path | ConfFolder) -> Chain | None:
    """The chain that `experiment=NAME` among the overrides names; None where there is none, or where it is a single run. Raises ConfigRefused
    for one that cannot be read."""
    named = [word.partition("=")[2] for word in words if word.partition("=")[0] == GROUP]
    return load_chain(named[0], conf) if len(named) == 1 and named[0] in list_chains(conf) else None


def load_chain(name: str, conf: Path | ConfFolder) -> Chain:
    """Raises ConfigRefused naming the file and the step."""
    file = as_conf_folder(conf).describe(GROUP, name)
    given = read_yaml(file_of(name, conf))
    if extra := sorted(set(given) - {KEY}):
        raise ConfigRefused(f"{file}: {', '.join(extra)} beside {KEY}: write it in the words of each step, or on the command line")
    steps = given[KEY]
    shaped = isinstance(steps, list) and steps and all(isinstance(step, dict) and set(step) == {"name", "words"} for step in steps)
    if not shaped or not all(isinstance(word, str) for step in steps for word in step["words"]):
        raise ConfigRefused(f"{file}: {KEY} is a list of {{name: NAME, words: [stage=..., KEY=VALUE]}}")
    chain = Chain(name=name, steps=tuple(Step(name=str(step["name"]), words=tuple(step["words"])) for step in steps))
    if wrong := list(find_faults(chain)):
        lines = "\n".join(f"  {what}" for what in wrong)
        raise ConfigRefused(f"{file} is not a valid chain; nothing was started:\n{lines}")
    return chain


def find_faults(chain: Chain) -> Iterator[str]:
    names = [step.name for step in chain.steps]
    for place, step in enumerate(chain.steps):
        if not STEP_NAME.fullmatch(step.name):
            yield f"step {step.name!r}: a name has 1 to 30 characters of a-z, 0-9 and '_'"
        if names.index(step.name) != place:
            yield f"step {step.name}: this name is used twice"
        if "stage" not in keys_of(step.words):
            yield f"step {step.name}: has no stage=... among its words"
        for word in step.words:
            match = REFERENCE.search(word.partition("=")[2])
            if match and match[1] not in names[:place]:
                yield f"step {step.name}: {word} does not name a step above it; {suggest(match[1], names[:place])}"


def overrides_of(chain: Chain, place: int, typed: Sequence[str], runs: Mapping[str, str], kinds: Sequence[str]) -> tuple[str, ...]:
    """The overrides of the step at `place`. `runs`: step -> the id or folder of its run; `kinds`: of the stages of the steps."""
    step = chain.steps[place]
    own = tuple(REFERENCE.sub(lambda match: runs[match[1]], word) for word in step.words)
    earlier = [other.name for other, kind in zip(chain.steps[:place], kinds, strict=False) if kind in SAVING]
    begins = "stage.checkpoint" in keys_of(own) or not earlier
    kept = without_keys(typed, (GROUP,))
    return (*kept, *own, *(() if begins else (f"stage.checkpoint={runs[earlier[-1]]}",)))
