"""`omnilaunch plan|launch experiment=CHAIN`: all steps are planned before the first starts; a chain that was interrupted is resumed."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launcher.bench.paused_run import read_paused_run
from launcher.config.chain import GROUP, Chain, overrides_of
from launcher.config.compose import compose, compose_with_files
from launcher.config.conf_folder import ConfFolder
from launcher.config.defaults import keys_of, without_keys
from launcher.config.recorded_weights import RecordedWeights
from launcher.config.schema import Config
from launcher.errors import ConfigRefused, LaunchError
from launcher.image.stack import load_stacks
from launcher.plan.local_context import context_for, for_this_machine, notes_here
from launcher.plan.plan import RUNS_FOLDER, Plan, absolute, make_plan, with_files
from launcher.plan.rows import settle_rows
from launcher.plan.short import describe_work
from launcher.plan.text import command_line, figure, gib, table
from launcher.plan.usable_rows import with_usable_rows
from launcher.plan.visible_devices import naming_devices, with_visible_devices
from launcher.plan.weights_folder import judge_weights, with_found_model
from launcher.record.checkpoint.checkpoint_config import compose_from_checkpoint
from launcher.record.checkpoint.checkpoint_data import take_data
from launcher.record.checkpoint_reference import with_full_ids
from launcher.record.metrics import read_rows
from launcher.record.reader import read_if_there, read_object
from launcher.record.record import Record, valid_run_id
from launcher.record.run_name import PLAN_FILE, RECORD_FILE, list_folders
from launcher.weights.source import with_weights_folder
from trainer.contract import METRICS_FILE, Exit
from trainer.contract.checkpoint_files import newest_resumable

Launch = Callable[[Sequence[str], str], int]  # overrides, run id -> exit code
Resume = Callable[[Path], int]  # the folder of a run -> exit code
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """The newest run of a step, '' where there is none; `status`: of its record, 'unfinished' where it has none. `overrides`: as recorded."""

    run_id: str = ""
    status: str = ""
    number: int = 0
    folder: Path = Path()
    overrides: tuple[str, ...] = ()

    @property
    def done(self) -> bool:
        return self.status == "finished"


@dataclass(frozen=True, kw_only=True)
class PlannedStep:
    """`newest`: its newest run; `run_id`: of the run that it is or will be; `plan`: as it would be made now; `overrides`: to launch it."""

    name: str
    newest: StepRun
    run_id: str
    plan: Plan
    overrides: tuple[str, ...]

    @property
    def resumes(self) -> bool:
        """Whether its newest run is continued, as `launch --resume` does."""
        return self.run_id == self.newest.run_id and not self.newest.done


@dataclass(frozen=True, kw_only=True)
class PlannedChain:
    chain: Chain
    chain_id: str
    typed: tuple[str, ...]
    folders: tuple[Path, ...]
    steps: tuple[PlannedStep, ...]

    @property
    def resume(self) -> str:
        return command_line("launch", *self.typed, "--run-id", self.chain_id, *self.steps[0].plan.options)


def plan_chain(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, conf: ConfFolder, here: Path) -> PlannedChain:
    """Plan every step. Raises ConfigRefused naming the step that cannot work, or that has finished with other overrides."""
    stacks = load_stacks(project / "images")
    first = compose(overrides_of(chain, 0, typed, {}, ()), conf)
    root = Path(absolute(first.cluster.root, here)) / RUNS_FOLDER
    folders = tuple(dict.fromkeys((root, here / RUNS_FOLDER)))
    typed = with_full_ids(typed, *folders)
    newest = {step.name: find_newest(chain_id, step.name, folders) for step in chain.steps}
    run_ids: dict[str, str] = {}
    results: dict[str, str] = {}
    kinds: list[str] = []
    steps: list[PlannedStep] = []
    for place, name in enumerate(newest):
        of_step = overrides_of(chain, place, typed, results, kinds)
        by_id = overrides_of(chain, place, typed, run_ids, kinds)  # runs by their ids, which `launch` turns into folders
        try:
            given = for_this_place(by_id, conf)
            run_ids[name] = choose_run(newest[name], f"{chain_id}-{name}", given)
            results[name] = str(root / run_ids[name])
            words = for_this_place(of_step, conf)
            with naming_devices(of_step, words, os.environ):
                config, files = compose_with_files(words, conf)
                config = compose_step(config, words, conf, here, {results[step.name]: step.plan for step in steps})
                config = with_usable_rows(with_weights_folder(for_this_machine(config, words), os.environ), keys_of(words))
                config = settle_rows(config, keys_of(words), here)
                context = context_for(config, stacks, project)
                plan = with_files(make_plan(config, stacks, context, run_id=run_ids[name], overrides=words, conf=conf), conf, files)
                if plan.spec.stage.checkpoint not in results.values():  # of a run of this chain: not there yet, or known from its plan
                    plan = judge_weights(plan, conf)
        except ConfigRefused as error:
            raise ConfigRefused(f"step {name} of {GROUP}={chain.name}: {error}") from error
        steps.append(PlannedStep(name=name, newest=newest[name], run_id=run_ids[name], plan=plan, overrides=given))
        kinds.append(plan.spec.stage.kind)
    planned = PlannedChain(chain=chain, chain_id=chain_id, typed=typed, folders=folders, steps=tuple(steps))
    refuse_other_runs(planned)
    return planned


def choose_run(newest: StepRun, first: str, overrides: Sequence[str]) -> str:
    """The id of a step's run: of the newest one where it has finished or is resumed, else of a new one. `first`: the id of its first run."""
    if newest.done or (sorted(newest.overrides) == sorted(overrides) and can_be_resumed(newest.folder)):
        return newest.run_id
    return valid_run_id(f"{first}-{newest.number + 1}" if newest.number else first)


def can_be_resumed(folder: Path) -> bool:
    """Whether `launch --resume` can continue the run from a checkpoint. Those of a run on other nodes are not looked for there: rows are enough."""
    try:
        paused = read_paused_run(folder)
    except ConfigRefused:
        return False
    local = paused.plan.is_local
    return newest_resumable(folder, paused.plan.spec.steps) is not None if local else bool(read_rows(folder / METRICS_FILE))


def for_this_place(words: Sequence[str], conf: ConfFolder) -> tuple[str, ...]:
    """The words of a step with those that its launch adds, so that a plan and a later resume have the same."""
    return with_found_model(with_visible_devices(words, conf, os.environ), conf)


def compose_step(config: Config, words: Sequence[str], conf: ConfFolder, here: Path, earlier: Mapping[str, Plan]) -> Config:
    """The config of a step, from that of its words alone. Its model, and the data where no word names it, are those of the checkpoint that it starts from: of a step
    above it, or of a run. `earlier`: by the folder of their runs, which may not exist yet."""
    checkpoint = next((word.partition("=")[2] for word in words if word.startswith("stage.checkpoint=")), "")
    if not checkpoint:
        return config
    if checkpoint in earlier:
        chosen = "model" in keys_of(words)
        config, _ = take_data(config, earlier[checkpoint].config.data, words)
        config = with_weights_of(config, earlier[checkpoint])
        return config if chosen else replace(config, model=earlier[checkpoint].config.model)
    found = compose_from_checkpoint(without_keys(words, ("run.evaluation.base",)), conf, here)
    return replace(found, run=replace(found.run, evaluation=config.run.evaluation))


def with_weights_of(config: Config, earlier: Plan) -> Config:
    """The config with what a step above it will save, where the memory depends on it: weights in fewer bits."""
    made = earlier.config.stage.quantization
    if made is None:
        return config
    stage, model = earlier.config.stage.name, earlier.config.model.name
    recorded = RecordedWeights(run_id=earlier.run_id, stage=stage, model=model, quantized=made.scheme, kept=made.keep)
    return replace(config, stage=replace(config.stage, recorded=recorded))


def refuse_other_runs(planned: PlannedChain) -> None:
    """Raises ConfigRefused for a step that has finished with other overrides or before an earlier step, or whose containers may still run."""
    waiting = ""
    for step in planned.steps:
        run_id = step.newest.run_id
        if step.newest.done and waiting:
            raise ConfigRefused(
                f"step {step.name} has finished (run {run_id}), but the earlier step {waiting} has not, so that it did not start from its "
                "result. Start the chain again with another --run-id."
            )
        if step.newest.done:
            refuse_other_overrides(step)
        waiting = waiting or ("" if step.newest.done else step.name)
        if step.newest.status == "unfinished" and step.plan.config.cluster.runtime == "docker":
            first = command_line("attach", run_id)
            raise ConfigRefused(f"step {step.name} was started as run {run_id} and has not ended. First: {first}, then this command again")


def describe_chain(planned: PlannedChain) -> str:
    """For each step: its state, what it does, and the memory that it needs."""
    rows: dict[str, str] = {}
    for number, step in enumerate(planned.steps, start=1):
        newest, memory = step.newest, step.plan.memory
        earlier = f" (earlier run {newest.run_id}: {newest.status})" if newest.run_id and not newest.done and not step.resumes else ""
        need = f"; {gib(memory.total_bytes).strip()} per device" if memory and memory.total_bytes else ""
        began = "finished: " if newest.done else f"{newest.status}, is resumed: " if step.resumes else ""
        state = f"{began}run {step.run_id}{earlier}"
        rows[f"{number}  {step.name}"] = f"{state}\n      {describe_work(step.plan.spec)}{need}"
    return table(rows)


def show_chain(chain: Chain, typed: Sequence[str], chain_id: str, project: Path, conf: ConfFolder, say: Say) -> int:
    planned = plan_chain(chain, typed, chain_id, project, conf, Path.cwd())
    problems = dict.fromkeys(str(problem) for step in planned.steps for problem in step.plan.verdict.problems)
    tight = ", ".join(step.name for step in planned.steps if step.plan.verdict.tight)
    word = f"tight: step {tight} may end for lack of memory" if tight else "ok"
    notes = dict.fromkeys(f"note: {line}" for step in planned.steps for line in notes_here(step.plan))
    last = ("planned; a launch is refused:", *problems) if problems else (word, f"next: {planned.resume}")
    say("\n".join((describe_chain(planned), *notes, *last)))
    return Exit.OK


def launch_chain(
    chain: Chain, typed: Sequence[str], chain_id: str, project: Path, conf: ConfFolder, launch: Launch, resume: Resume, say: Say
) -> int:
    """Launch or resume the steps that have not finished, one after the other. The first failure ends the chain, with its exit code."""
    planned = plan_chain(chain, typed, chain_id, project, conf, Path.cwd())
    refuse_unlaunchable(planned)
    say(describe_chain(planned))
    for number, step in enumerate(planned.steps, start=1):
        if step.newest.done:
            continue
        say(f"\n== step {number} of {len(planned.steps)}: {step.name}")
        stopped = f"\nthe chain stopped at step {step.name}. When the cause is fixed: {planned.resume}"
        try:
            code = resume(step.newest.folder) if step.resumes else launch(step.overrides, step.run_id)
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
    for step in planned.steps:
        if not step.plan.verdict.launchable:
            problems = "\n".join(map(str, step.plan.verdict.problems))
            with naming_devices(planned.typed, step.plan.overrides, os.environ):
                raise ConfigRefused(f"step {step.name} of {GROUP}={planned.chain.name} cannot be launched:\n{problems}")


def describe_results(planned: PlannedChain) -> str:
    rows, folders = {}, list_folders(*planned.folders)
    for step in planned.steps:
        record = read_object(folders[step.run_id] / RECORD_FILE, []) if step.run_id in folders else {}
        scores = ", ".join(f"{name.replace('_', ' ')} {figure(value)}" for name, value in record.get("evaluation", {}).items())
        rows[step.name] = f"run {step.run_id}  {scores}".rstrip()
    return table(rows)


def find_newest(chain_id: str, step: str, folders: Sequence[Path]) -> StepRun:
    """The newest run of a step in all folders of runs."""
    pattern = re.compile(rf"{re.escape(chain_id)}-{step}(?:-(\d+))?")
    matches = ((pattern.fullmatch(run_id), folder) for run_id, folder in list_folders(*folders).items())
    found = {int(match[1] or 1): folder for match, folder in matches if match}
    if not found:
        return StepRun()
    number = max(found)
    folder = found[number]
    record, overrides = read_if_there(Record, folder / RECORD_FILE), read_object(folder / PLAN_FILE, []).get("overrides", [])
    status = record.status if record else "unfinished"
    return StepRun(run_id=folder.name, status=status, number=number, folder=folder, overrides=tuple(map(str, overrides)))


def refuse_other_overrides(step: PlannedStep) -> None:
    """Raises ConfigRefused where the step has finished with other overrides than it would get now."""
    then = step.newest.overrides
    if sorted(then) != sorted(step.overrides):
        raise ConfigRefused(
            f"run {step.run_id} has finished with other overrides:\n  then: {' '.join(then)}\n  now:  {' '.join(step.overrides)}\n"
            "Use the same overrides again, or start the chain again with another --run-id."
        )
