"""`omnilaunch plan|launch experiment=CHAIN`: all steps are judged before the first begins; a chain that broke off goes on where it did."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.chain import GROUP, Chain, Step, words_of
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, LaunchError
from launcher.image.stack import load_stacks
from launcher.plan.local_context import local_context
from launcher.plan.plan import RUNS_FOLDER, Plan, absolute, make_plan
from launcher.plan.short import describe_work
from launcher.plan.text import command_line, gib, table
from launcher.record.checkpoint_reference import read_plain
from launcher.record.index import figure
from launcher.record.record import PLAN_FILE, RECORD_FILE, Record, read_if_there, valid_run_id
from trainer.contract import Exit

Launch = Callable[[Sequence[str], str], int]  # words and run id -> exit code
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """The newest run of a step, '' where there is none; `status`: of its record, 'unfinished' where it has none."""

    run_id: str = ""
    status: str = ""
    number: int = 0

    @property
    def done(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """Where a chain stands. Of each step: the newest run of it, the run that it is or would be, and its plan as it would be made now."""

    chain: Chain
    chain_id: str
    typed: tuple[str, ...]
    kinds: tuple[str, ...]
    attempts: tuple[StepRun, ...]
    run_ids: tuple[str, ...]
    plans: tuple[Plan, ...]
    folders: tuple[Path, ...]


def look_ahead(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, here: Path) -> PlannedStep:
    """Plans every step. Raises ConfigRefused that names the step where one cannot work, or where a finished one was made with other words."""
    conf, placed, stacks = project / "conf", local_context(project), load_stacks(project / "images")
    first = compose(words_of(chain, 0, typed, {}, ()), conf)
    root = Path(absolute(first.cluster.root, here)) / RUNS_FOLDER
    folders = tuple(dict.fromkeys((root, here / RUNS_FOLDER)))
    attempts = tuple(find_attempt(chain_id, step, folders) for step in chain.steps)
    run_ids = tuple(
        attempt.run_id if attempt.done else valid_run_id(name_next(chain_id, step, attempt))
        for step, attempt in zip(chain.steps, attempts, strict=True)
    )
    results = {step.name: str(root / run_id) for step, run_id in zip(chain.steps, run_ids, strict=True)}
    kinds: list[str] = []
    plans: list[Plan] = []
    for place, (step, run_id) in enumerate(zip(chain.steps, run_ids, strict=True)):
        words = words_of(chain, place, typed, results, kinds)
        try:
            config: Config = compose(words, conf)
            plans.append(make_plan(config, stacks, placed, run_id=run_id, overrides=words, conf=conf))
        except ConfigRefused as error:
            raise ConfigRefused(f"step {step.name} of {GROUP}={chain.name}: {error}") from error
        kinds.append(config.stage.kind)
    outlook = PlannedStep(
        chain=chain,
        chain_id=chain_id,
        typed=tuple(typed),
        kinds=tuple(kinds),
        attempts=attempts,
        run_ids=run_ids,
        plans=tuple(plans),
        folders=folders,
    )
    refuse_mixture(outlook)
    return outlook


def refuse_mixture(outlook: PlannedStep) -> None:
    """Raises ConfigRefused for a step that was done with other words, or out of turn, or whose containers may still run."""
    waiting = ""
    for place, (step, attempt) in enumerate(zip(outlook.chain.steps, outlook.attempts, strict=True)):
        if attempt.done and waiting:
            raise ConfigRefused(
                f"step {step.name} is done (run {attempt.run_id}), and {waiting} before it is not: it did not begin with this chain's result. "
                "Begin the chain anew with another --run-id."
            )
        if attempt.done:
            refuse_other_words(attempt, launch_words(outlook, place), outlook.folders)
        waiting = waiting or ("" if attempt.done else step.name)
        if attempt.status == "unfinished" and outlook.plans[place].config.cluster.runtime == "docker":
            raise ConfigRefused(
                f"step {step.name} has begun as run {attempt.run_id} and not ended: {command_line('attach', attempt.run_id)}, then this command again"
            )


def launch_words(outlook: PlannedStep, place: int) -> tuple[str, ...]:
    """With run ids, which `launch` turns into folders, or into those of another node."""
    runs = {step.name: run_id for step, run_id in zip(outlook.chain.steps, outlook.run_ids, strict=True)}
    return words_of(outlook.chain, place, outlook.typed, runs, outlook.kinds)


def describe_chain(outlook: PlannedStep) -> str:
    """A line for each step: where it stands, what it does, what it takes."""
    rows: dict[str, str] = {}
    for place, (step, attempt, plan) in enumerate(zip(outlook.chain.steps, outlook.attempts, outlook.plans, strict=True)):
        state = f"done: run {attempt.run_id}" if attempt.done else f"run {outlook.run_ids[place]}"
        before = f" (before it {attempt.run_id}: {attempt.status})" if attempt.run_id and not attempt.done else ""
        need = f"; {gib(plan.memory.total_bytes).strip()} a device" if plan.memory and plan.memory.total_bytes else ""
        rows[f"{place + 1}  {step.name}"] = f"{state}{before}\n      {describe_work(plan.spec)}{need}"
    return table(rows)


def show_chain(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, say: Say) -> int:
    outlook = look_ahead(chain, typed, chain_id, project, Path.cwd())
    say(f"{describe_chain(outlook)}\nok\nnext: {resume_command(outlook)}")
    return Exit.OK


def launch_chain(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, launch: Launch, say: Say) -> int:
    """Step after step, those that are done left out. The first that fails ends it, with its exit code."""
    outlook = look_ahead(chain, typed, chain_id, project, Path.cwd())
    refuse_unlaunchable(outlook)
    say(describe_chain(outlook))
    for place, (step, attempt) in enumerate(zip(chain.steps, outlook.attempts, strict=True)):
        if attempt.done:
            continue
        say(f"\n== step {place + 1} of {len(chain.steps)}: {step.name}")
        stands = f"\nthe chain stands at step {step.name}; when it is mended: {resume_command(outlook)}"
        try:
            code = launch(launch_words(outlook, place), outlook.run_ids[place])
        except (LaunchError, KeyboardInterrupt):
            say(stands)
            raise
        if code != Exit.OK:
            say(stands)
            return code
    say(f"\nthe chain is through:\n{describe_results(outlook)}")
    return Exit.OK


def refuse_unlaunchable(outlook: PlannedStep) -> None:
    """What stops a launch alone, a licence to accept, is told before the first step, and not after hours."""
    for step, plan in zip(outlook.chain.steps, outlook.plans, strict=True):
        if not plan.verdict.launchable:
            problems = "\n".join(map(str, plan.verdict.problems))
            raise ConfigRefused(f"step {step.name} of {GROUP}={outlook.chain.name} cannot be launched:\n{problems}")


def describe_results(outlook: PlannedStep) -> str:
    rows = {}
    for step, run_id in zip(outlook.chain.steps, outlook.run_ids, strict=True):
        record = next((read_plain(folder / run_id / RECORD_FILE) for folder in outlook.folders if (folder / run_id / PLAN_FILE).is_file()), {})
        scores = ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in record.get("evaluation", {}).items())
        rows[step.name] = f"run {run_id}  {scores}".rstrip()
    return table(rows)


def resume_command(outlook: PlannedStep) -> str:
    return command_line("launch", *outlook.typed, "--run-id", outlook.chain_id)


# ------------------------------------------------------------------------------------------------------------- runs of a step


def find_attempt(chain_id: str, step: Step, folders: Sequence[Path]) -> StepRun:
    """The newest run of the step, in whichever of the folders of runs it lies."""
    pattern = re.compile(rf"{re.escape(chain_id)}-{step.name}(?:-(\d+))?")
    found = {
        int(match[1] or 1): path
        for folder in folders
        for path in folder.glob(f"{chain_id}-{step.name}*")
        if (match := pattern.fullmatch(path.name)) and (path / PLAN_FILE).is_file()
    }
    if not found:
        return StepRun()
    number = max(found)
    record = read_if_there(Record, found[number] / RECORD_FILE)
    return StepRun(run_id=found[number].name, status=record.status if record else "unfinished", number=number)


def name_next(chain_id: str, step: Step, before: StepRun) -> str:
    return f"{chain_id}-{step.name}" + (f"-{before.number + 1}" if before.number else "")


def refuse_other_words(attempt: StepRun, words: Sequence[str], folders: Sequence[Path]) -> None:
    """Raises ConfigRefused where the step was done with other words than it would be now: the chain would be a mixture."""
    folder = next(folder / attempt.run_id for folder in folders if (folder / attempt.run_id / PLAN_FILE).is_file())
    before = read_plain(folder / PLAN_FILE).get("overrides", [])
    if sorted(before) != sorted(words):
        raise ConfigRefused(
            f"run {attempt.run_id} was done with other words:\n  then: {' '.join(before)}\n  now:  {' '.join(words)}\n"
            "Take those words again, or begin the chain anew with another --run-id."
        )
