"""`omnilaunch plan|launch experiment=CHAIN`: all steps are planned before the first starts; a chain that was interrupted is resumed."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.config.chain import GROUP, Chain, Step, overrides_of
from launcher.config.compose import compose
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, LaunchError
from launcher.image.stack import load_stacks
from launcher.plan.description import command_line, describe_work, gib, table
from launcher.plan.local_context import local_context
from launcher.plan.plan import RUNS_FOLDER, Plan, absolute, make_plan
from launcher.record.checkpoint_reference import read_plain, with_full_ids
from launcher.record.index import figure
from launcher.record.record import PLAN_FILE, RECORD_FILE, Record, read_if_there, valid_run_id
from trainer.contract import Exit

Launch = Callable[[Sequence[str], str], int]  # overrides, run id -> exit code
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
class PlannedChain:
    """The state of a chain. For each step: its newest run, the id of the run that it is or will be, and its plan as it would be made now."""

    chain: Chain
    chain_id: str
    typed: tuple[str, ...]
    kinds: tuple[str, ...]
    attempts: tuple[StepRun, ...]
    run_ids: tuple[str, ...]
    plans: tuple[Plan, ...]
    folders: tuple[Path, ...]


def look_ahead(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, here: Path) -> PlannedChain:
    """Plan every step. Raises ConfigRefused naming the step that cannot work, or that has finished with other overrides."""
    conf, context, stacks = project / "conf", local_context(project), load_stacks(project / "images")
    first = compose(overrides_of(chain, 0, typed, {}, ()), conf)
    root = Path(absolute(first.cluster.root, here)) / RUNS_FOLDER
    folders = tuple(dict.fromkeys((root, here / RUNS_FOLDER)))
    typed = with_full_ids(typed, *folders)
    attempts = tuple(find_attempt(chain_id, step, folders) for step in chain.steps)
    run_ids = tuple(
        attempt.run_id if attempt.done else valid_run_id(name_next(chain_id, step, attempt))
        for step, attempt in zip(chain.steps, attempts, strict=True)
    )
    results = {step.name: str(root / run_id) for step, run_id in zip(chain.steps, run_ids, strict=True)}
    kinds: list[str] = []
    plans: list[Plan] = []
    for place, (step, run_id) in enumerate(zip(chain.steps, run_ids, strict=True)):
        words = overrides_of(chain, place, typed, results, kinds)
        try:
            config: Config = compose(words, conf)
            plans.append(make_plan(config, stacks, context, run_id=run_id, overrides=words))
        except ConfigRefused as error:
            raise ConfigRefused(f"step {step.name} of {GROUP}={chain.name}: {error}") from error
        kinds.append(config.stage.kind)
    planned = PlannedChain(
        chain=chain,
        chain_id=chain_id,
        typed=typed,
        kinds=tuple(kinds),
        attempts=attempts,
        run_ids=run_ids,
        plans=tuple(plans),
        folders=folders,
    )
    refuse_other_runs(planned)
    return planned


def refuse_other_runs(planned: PlannedChain) -> None:
    """Raises ConfigRefused for a step that has finished with other overrides or before an earlier step, or whose containers may still run."""
    waiting = ""
    for place, (step, attempt) in enumerate(zip(planned.chain.steps, planned.attempts, strict=True)):
        if attempt.done and waiting:
            raise ConfigRefused(
                f"step {step.name} has finished (run {attempt.run_id}), but the earlier step {waiting} has not, so that it did not start from "
                "its result. Start the chain again with another --run-id."
            )
        if attempt.done:
            refuse_other_overrides(attempt, step_overrides(planned, place), planned.folders)
        waiting = waiting or ("" if attempt.done else step.name)
        if attempt.status == "unfinished" and planned.plans[place].config.cluster.runtime == "docker":
            raise ConfigRefused(
                f"step {step.name} was started as run {attempt.run_id} and has not ended. First: {command_line('attach', attempt.run_id)}, then this "
                "command again"
            )


def step_overrides(planned: PlannedChain, place: int) -> tuple[str, ...]:
    """What is launched as the step at `place`. Earlier runs are named by their ids, which `launch` turns into folders."""
    runs = {step.name: run_id for step, run_id in zip(planned.chain.steps, planned.run_ids, strict=True)}
    return overrides_of(planned.chain, place, planned.typed, runs, planned.kinds)


def describe_chain(planned: PlannedChain) -> str:
    """For each step: its state, what it does, and the memory that it needs."""
    rows: dict[str, str] = {}
    for place, (step, attempt, plan) in enumerate(zip(planned.chain.steps, planned.attempts, planned.plans, strict=True)):
        state = f"finished: run {attempt.run_id}" if attempt.done else f"run {planned.run_ids[place]}"
        before = f" (earlier run {attempt.run_id}: {attempt.status})" if attempt.run_id and not attempt.done else ""
        need = f"; {gib(plan.memory.total_bytes).strip()} a device" if plan.memory and plan.memory.total_bytes else ""
        rows[f"{place + 1}  {step.name}"] = f"{state}{before}\n      {describe_work(plan.spec)}{need}"
    return table(rows)


def show_chain(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, say: Say) -> int:
    planned = look_ahead(chain, typed, chain_id, project, Path.cwd())
    say(f"{describe_chain(planned)}\nok\nnext: {resume_command(planned)}")
    return Exit.OK


def launch_chain(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, launch: Launch, say: Say) -> int:
    """Launch the steps that have not finished, one after the other. The first failure ends the chain, with its exit code."""
    planned = look_ahead(chain, typed, chain_id, project, Path.cwd())
    refuse_unlaunchable(planned)
    say(describe_chain(planned))
    for place, (step, attempt) in enumerate(zip(chain.steps, planned.attempts, strict=True)):
        if attempt.done:
            continue
        say(f"\n== step {place + 1} of {len(chain.steps)}: {step.name}")
        stopped = f"\nthe chain stopped at step {step.name}. When the cause is fixed: {resume_command(planned)}"
        try:
            code = launch(step_overrides(planned, place), planned.run_ids[place])
        except (LaunchError, KeyboardInterrupt):
            say(stopped)
            raise
        if code != Exit.OK:
            say(stopped)
            return code
    say(f"\nthe chain has finished:\n{describe_results(planned)}")
    return Exit.OK


def refuse_unlaunchable(planned: PlannedChain) -> None:
    """Raises ConfigRefused for what stops only a launch, such as a licence to accept: before the first step, not after hours."""
    for step, plan in zip(planned.chain.steps, planned.plans, strict=True):
        if not plan.verdict.launchable:
            problems = "\n".join(map(str, plan.verdict.problems))
            raise ConfigRefused(f"step {step.name} of {GROUP}={planned.chain.name} cannot be launched:\n{problems}")


def describe_results(planned: PlannedChain) -> str:
    rows = {}
    for step, run_id in zip(planned.chain.steps, planned.run_ids, strict=True):
        record = next(
            (read_plain(folder / run_id / RECORD_FILE) for folder in planned.folders if (folder / run_id / PLAN_FILE).is_file()), {}
        )
        scores = ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in record.get("evaluation", {}).items())
        rows[step.name] = f"run {run_id}  {scores}".rstrip()
    return table(rows)


def resume_command(planned: PlannedChain) -> str:
    return command_line("launch", *planned.typed, "--run-id", planned.chain_id)


# ------------------------------------------------------------------------------------------------------------- runs of a step


def find_attempt(chain_id: str, step: Step, folders: Sequence[Path]) -> StepRun:
    """The newest run of the step in all folders of runs."""
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


def refuse_other_overrides(attempt: StepRun, words: Sequence[str], folders: Sequence[Path]) -> None:
    """Raises ConfigRefused where the step has finished with other overrides than it would get now."""
    folder = next(folder / attempt.run_id for folder in folders if (folder / attempt.run_id / PLAN_FILE).is_file())
    before = read_plain(folder / PLAN_FILE).get("overrides", [])
    if sorted(before) != sorted(words):
        raise ConfigRefused(
            f"run {attempt.run_id} has finished with other overrides:\n  then: {' '.join(before)}\n  now:  {' '.join(words)}\n"
            "Use the same overrides again, or start the chain again with another --run-id."
        )
