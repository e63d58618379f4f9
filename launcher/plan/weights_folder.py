"""The folder of weights that a plan names, where it is on this machine: does it exist, and does it hold the plan's model?"""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from launcher.check.precision import describe_cast
from launcher.check.problem import Problem
from launcher.config.conf_folder import ConfFolder
from launcher.config.schema import Config
from launcher.config.source import PATH, expand_source
from launcher.errors import ConfigRefused
from launcher.plan.plan import Plan, refuse, with_problems
from launcher.weights.folder import DTYPES, Tensors, check_folder, read_tensors
from launcher.weights.identity import find_differences, identify, load_models, read_config
from trainer.contract import SpecError
from trainer.contract.checkpoint_files import STATE_FILE
from trainer.contract.weight_files import fetched_revision
from trainer.contract.wording import plural

CHECKPOINT = "stage.checkpoint"
SHOWN = 6  # differences in a message


def judge_weights(plan: Plan, conf: Path | ConfFolder) -> Plan:
    """The plan; with a problem that prevents its launch where a folder of this machine is missing. Raises ConfigRefused for a folder that holds
    another model than the plan's, and offers the one that it holds. Folders that are only on the nodes are judged there."""
    problems = tuple(problem for key, path in named_folders(plan) for problem in judge_folder(plan.config, key, Path(path), conf))
    if any(not problem.launch_only for problem in problems):
        refuse(replace(plan.verdict, problems=problems), launching=False, overrides=plan.overrides)
    notes = tuple(note for _, path in named_folders(plan) for note in note_cast(plan.config, Path(path)))
    return with_problems(replace(plan, verdict=replace(plan.verdict, notes=(*plan.verdict.notes, *notes))) if notes else plan, problems)


def note_cast(config: Config, folder: Path) -> Iterator[str]:
    """For a folder of no run of ours, by the headers of its weight files; by conf/model where a folder of the model is only on the nodes."""
    if config.stage.recorded is not None or config.precision.weights != "float16":
        return
    try:
        found = read_tensors(folder)[0] if folder.is_dir() else Tensors()
    except OSError:  # a folder of another user
        found = Tensors()
    elements = Counter[str]()
    for name, dtype in found.dtypes.items():
        elements[DTYPES.get(dtype, "")] += found.numbers[name]
    (saved, _), *_ = elements.most_common(1) or [(config.model.source.dtype if not config.stage.checkpoint else "", 0)]
    if saved:
        yield from describe_cast(config, str(folder), saved)


def with_found_model(overrides: Sequence[str], conf: Path | ConfFolder) -> tuple[str, ...]:
    """The overrides, with `model=NAME` in front where they name a folder but no model, and the folder holds one of ours."""
    given = {key.strip(): text.strip().strip("'\"") for key, _, text in map(partition, overrides)}
    place = given.get(PATH) or given.get(CHECKPOINT, "")
    folder = Path(place)
    if not place or {"model", "experiment"} & set(given) or (folder / STATE_FILE).exists():  # which says more than config.json
        return tuple(overrides)
    try:
        found = identify(folder, load_models(conf)).model if folder.is_dir() else ""
    except (ConfigRefused, OSError):
        found = ""
    return (f"model={found}", *overrides) if found else tuple(overrides)


def partition(override: str) -> tuple[str, str, str]:
    try:
        return expand_source(override).partition("=")
    except ConfigRefused:  # reported when the config is composed
        return override.partition("=")


def named_folders(plan: Plan) -> Iterator[tuple[str, str]]:
    """(key, folder) of what the stage starts from."""
    if plan.spec.stage.checkpoint:
        yield ("stage.base", plan.spec.stage.base) if plan.spec.stage.base else ("stage.checkpoint", plan.spec.stage.checkpoint)
    elif plan.spec.model.source.path:
        yield "model.source.path", plan.spec.model.source.path


def judge_folder(config: Config, key: str, folder: Path, conf: Path | ConfFolder) -> Iterator[Problem]:
    try:
        if not folder.is_dir():
            if key == "model.source.path" and config.cluster.is_local:
                fetch = f". To download the weights: omnilaunch model fetch {config.model.source.id} --to {shlex.quote(str(folder))}"
                what = f"there is no folder {folder} on this machine{fetch if config.model.source.id else ''}"
                yield Problem(key=key, what=what, launch_only=True)
            return
        content = read_config(folder)
    except OSError:  # a folder of another user, such as root's on a shared disk
        return
    except (ConfigRefused, SpecError) as error:
        yield Problem(key=key, what=f"{error}. {see(folder)}")
        return
    if content is None:
        if key == PATH:  # the trainer checks a checkpoint, which may be an adapter
            yield Problem(key=key, what=f"{folder} holds no model: it has no config.json. {see(folder)}", launch_only=True)
        return
    model: dict[str, Any] = asdict(config.model)
    if lines := find_differences(model, content):
        yield another_model(config, key, folder, content, lines, conf)
        return
    if key == PATH:
        yield from find_broken(folder, conf)
    if key == "model.source.path" and (wanted := config.model.source.revision) and (found := fetched_revision(folder)) and found != wanted:
        yield Problem(
            key="model.source.revision",
            what=f"is {wanted}, but {folder} was fetched at {found}",
            changes=(f"model.source.revision={found}",),
        )


def find_broken(folder: Path, conf: Path | ConfFolder) -> Iterator[Problem]:
    """What is wrong with the files of a folder with the right config.json: `omnilaunch model check` lists all of it."""
    try:
        wrong = check_folder(folder, load_models(conf)).problems
    except OSError:
        return
    if wrong:
        more = f", and {plural(len(wrong) - 1, 'more problem')}" if len(wrong) > 1 else ""
        yield Problem(key=PATH, what=f"{folder} cannot be used: {wrong[0].rstrip('.')}{more}. {see(folder)}", launch_only=True)


def see(folder: Path) -> str:
    return f"See: omnilaunch model check {shlex.quote(str(folder))}"


def another_model(config: Config, key: str, folder: Path, content: dict[str, Any], lines: list[str], conf: Path | ConfFolder) -> Problem:
    fitting = [name for name, model in load_models(conf).items() if not find_differences(model, content)]
    listed = "".join(f"\n    {line}" for line in lines[:SHOWN])
    held = fitting[0] if fitting else "none of the models of conf/model"
    changes = tuple(f"model={name}" for name in fitting)
    return Problem(key=key, what=f"{folder} holds {held}, not {config.model.name}:{listed}", changes=changes or (f"{key}=FOLDER",))
