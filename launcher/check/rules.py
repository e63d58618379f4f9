"""Every reason why a config cannot work that its own numbers decide: the capability of the chip, counts, ranges, memory.

Judges the target from the hardware table, never from what this machine has. All problems are reported together, each with changes
that would pass it. Whether paths exist and nodes answer is asked elsewhere.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.check.adapters import STAGE_RULES
from launcher.check.docker import CONTAINER_RULES
from launcher.check.hardware import CAPABILITY_RULES
from launcher.check.inference import DEPLOYMENT_RULES, write_deployment_notes
from launcher.check.nodes import CLUSTER_RULES
from launcher.check.problem import Problem, Rule
from launcher.check.recipe import RECIPE_RULES
from launcher.check.strings import TEXT_RULES
from launcher.check.suggestions import MEMORY_RULES, write_memory_notes
from launcher.config.schema import Config
from launcher.image.stack import Stack

RULES = (
    *(*CAPABILITY_RULES, *CLUSTER_RULES, *CONTAINER_RULES, *TEXT_RULES, *RECIPE_RULES, *MEMORY_RULES, *STAGE_RULES),
    *DEPLOYMENT_RULES,
)
RULES_BUT_MEMORY = tuple(rule for rule in RULES if rule not in MEMORY_RULES)  # for a plan whose memory a traced step decides


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`ok`: a plan can be made. `launchable`: it can be carried out too. `problems` stand in the way; those in `forced` would, were it
    not for `run.force`; `notes` are for the reader."""

    ok: bool
    launchable: bool
    problems: tuple[Problem, ...]
    forced: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()


def check(config: Config, stacks: Mapping[str, Stack], *, rules: tuple[Rule, ...] = RULES, asked: Config | None = None) -> Verdict:
    """Hold a config against every rule. `stacks`: rows of images/versions.yaml by name. `asked`: the config before its strategy was chosen,
    to which changes of what does not fit are made, so that what was left open is chosen again. Raises nothing."""
    open_ = asked or config
    found = [problem for rule in rules for problem in rule(open_ if rule in MEMORY_RULES else config, stacks)]
    forced = tuple(problem for problem in found if config.run.force and problem.forcible)
    problems = tuple(problem for problem in found if problem not in forced)
    return Verdict(
        ok=all(problem.launch_only for problem in problems),
        launchable=not problems,
        problems=problems,
        forced=forced,
        notes=tuple(write_notes(config)),
    )


def write_notes(config: Config) -> Iterator[str]:
    """What a reader of the plan should know, though it stops nothing."""
    licence, source = config.model.licence, config.model.source
    if licence.commercial != "yes":
        yield f"licence of {config.model.title}: {licence.name} (commercial use: {licence.commercial}; {licence.source})"
    if source.kind == "hub" and not source.revision:
        yield f"model.source.revision is empty: the main branch of {source.id} may change between two runs"
    if config.stage.kind == "train" and config.run.save_every == 0 and source.kind != "random":
        yield "run.save_every=0: nothing is kept before the end, and a run that is killed is lost; run.save_every=N keeps every Nth step"
    yield from write_memory_notes(config)
    yield from write_deployment_notes(config)
    yield from config.hardware.notes
    yield from config.model.notes
