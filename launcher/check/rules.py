"""Every reason why a config cannot work that its own numbers decide: what the chip can do, counts, ranges, memory.

The target is judged by the hardware table, never by what this machine has. All problems are reported together, each with overrides that
would pass. Every such override is applied and judged again by its rule before it is offered. Whether paths exist and nodes answer is
checked elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from launcher.check.adapters import ADAPTER_RULES, write_token_notes
from launcher.check.docker import CONTAINER_RULES
from launcher.check.evaluation import EVALUATION_RULES
from launcher.check.hardware import HARDWARE_RULES
from launcher.check.inference import INFERENCE_RULES
from launcher.check.learning import LEARNING_RULES
from launcher.check.nodes import CLUSTER_RULES
from launcher.check.override import Compose, apply_override
from launcher.check.precision import PRECISION_RULES, write_cast_notes
from launcher.check.problem import Problem, Rule
from launcher.check.recipe import RECIPE_RULES
from launcher.check.row_count import DATA_RULES, write_row_notes
from launcher.check.source import SOURCE_RULES, write_source_notes
from launcher.check.start import START_RULES, write_start_notes
from launcher.check.strategy import Resolved, resolve
from launcher.check.strings import TEXT_RULES
from launcher.check.suggestions import MEMORY_RULES, check_memory, find_roomier, write_memory_notes
from launcher.config.fact import may_set
from launcher.config.schema import Config
from launcher.image.stack import Stack
from launcher.memory.states import world_size

RULES = (
    *(*PRECISION_RULES, *HARDWARE_RULES, *CLUSTER_RULES, *CONTAINER_RULES, *TEXT_RULES, *RECIPE_RULES, *MEMORY_RULES, *ADAPTER_RULES),
    *INFERENCE_RULES,
    *EVALUATION_RULES,
    *LEARNING_RULES,
    *SOURCE_RULES,
    *START_RULES,
    *DATA_RULES,
)
RULES_BUT_MEMORY = tuple(rule for rule in RULES if rule not in MEMORY_RULES)  # for a plan whose memory a traced step decides


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`ok`: a plan can be made. `launchable`: it can be launched too. `problems` prevent that; those in `forced` would, if `run.force` did
    not override them; `notes` refuse nothing. `tight`: the peak fits by less than the estimate may be off, so that a run that is launched may
    end for lack of memory; `roomier`: overrides that leave that margin."""

    ok: bool
    launchable: bool
    problems: tuple[Problem, ...]
    forced: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    tight: bool = False
    roomier: tuple[str, ...] = ()


def check(
    config: Config,
    stacks: Mapping[str, Stack],
    *,
    rules: tuple[Rule, ...] = RULES,
    resolved: Resolved | None = None,
    compose: Compose | None = None,
) -> Verdict:
    """Check a config against every rule. `stacks`: rows of images/versions.yaml by name. `resolved`: resolve(config), where it is known
    already. `compose`: needed to judge offered overrides that choose a whole axis; without it they are offered unjudged. Raises nothing."""
    resolved = resolved or resolve(config)
    found: list[Problem] = []
    for rule in rules:
        problems = tuple(run_rule(rule, resolved, stacks))
        found += (
            problem if rule in MEMORY_RULES else keep_working(problem, problems, rule, resolved, stacks, compose) for problem in problems
        )
    forced = tuple(problem for problem in found if config.run.force and problem.forcible)
    standing = tuple(problem for problem in found if problem not in forced)
    tight = resolved.memory is not None and resolved.memory.is_tight and bool(set(rules) & set(MEMORY_RULES))
    ok = all(problem.launch_only for problem in standing)
    return Verdict(
        ok=ok,
        launchable=not standing,
        problems=standing,
        forced=forced,
        notes=tuple(write_notes(resolved)),
        tight=tight,
        roomier=find_roomier(resolved, stacks) if tight and ok else (),
    )


def offering(verdict: Verdict, accepts: Callable[[str], bool]) -> Verdict:
    """The verdict with those changes alone that the command can carry out."""
    problems = (replace(problem, changes=tuple(filter(accepts, problem.changes))) for problem in verdict.problems)
    return replace(verdict, problems=tuple(problems))


def run_rule(rule: Rule, resolved: Resolved, stacks: Mapping[str, Stack]) -> Iterator[Problem]:
    return check_memory(resolved, stacks) if rule in MEMORY_RULES else rule(resolved.config, stacks)


def keep_working(
    problem: Problem, problems: tuple[Problem, ...], rule: Rule, resolved: Resolved, stacks: Mapping[str, Stack], compose: Compose | None
) -> Problem:
    """The problem with only those changes that remove it and bring no new problem of the same rule. `problems`: all of that rule. Those of
    memory are not judged here: launcher.check.suggestions has estimated each of them."""
    known = {other.key for other in problems}
    source = resolved.asked.model.source.kind

    def works(change: str) -> bool:
        if not all(may_set(part.partition("=")[0], source) for part in change.split()):
            return False  # a fact: only its file can be changed
        try:
            changed = apply_override(resolved.asked, change, compose)
        except ValueError:
            return True
        if changed is None:
            return False
        left = {other.key for other in run_rule(rule, resolve(changed), stacks)}
        return problem.key not in left and left <= known

    return replace(problem, changes=tuple(filter(works, problem.changes)))


def write_notes(resolved: Resolved) -> Iterator[str]:
    """What a reader of the plan should know, though it refuses nothing."""
    config = resolved.config
    licence, source = config.model.licence, config.model.source
    if licence.commercial != "yes":
        yield f"licence of {config.model.title}: {licence.name} (commercial use: {licence.commercial}; {licence.source})"
    if source.kind == "hub" and not source.revision and not config.stage.checkpoint:
        yield f"model.source.revision is empty: the main branch of {source.id} may change between two runs"
    if config.stage.kind == "train" and config.run.save_every == 0 and source.kind != "random":
        yield "run.save_every=0: nothing is saved before the end, and a run that is killed is lost; run.save_every=N saves every Nth step"
    yield from write_token_notes(config)
    yield from write_start_notes(config)
    yield from write_source_notes(config)
    yield from write_memory_notes(resolved)
    yield from write_cast_notes(config)
    yield from write_row_notes(config)
    yield from (note for note in (*config.hardware.notes, *config.model.notes) if applies(note, config))


# What a note of conf/hardware or conf/model may begin with -> whether it applies to a config.
SUBJECTS: dict[str, Callable[[Config], bool]] = {
    "bfloat16": lambda config: "bfloat16" in (config.precision.weights, config.precision.compute),
    "devices_per_node": lambda config: config.cluster.devices_per_node is None,
    "several devices": lambda config: world_size(config) > 1,
    "training": lambda config: config.stage.kind == "train",
}


def applies(note: str, config: Config) -> bool:
    """Whether a note of conf/ says something about this config: without a subject before its first colon, always."""
    subject, colon, _ = note.partition(": ")
    return not colon or subject not in SUBJECTS or SUBJECTS[subject](config)
