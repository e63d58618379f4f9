"""Turns a published result back into the record that a rerun needs: the line gives the config and the spec, git gives the code.

The ranks of such a rerun are not refused for another environment, as in a rerun of a run's own record: differences are listed beside the
figures afterwards.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.bench.measure import PATH_IN_TEXT
from launcher.bench.result import PublishedResult
from launcher.bench.worktree import Tree, changed_files, list_files, open_worktree
from launcher.config.schema import Cluster, Config
from launcher.errors import ConfigRefused, ImageFailed, RecordRefused
from launcher.image.stack import Image, find_stack, load_stacks, render
from launcher.plan.plan import DATA_FOLDER, LocalContext, Plan, absolute, make_plan
from launcher.record.record import Record
from launcher.record.recorded_run import RecordedRun
from launcher.record.source import RECORD_SCHEMA, SourceState
from trainer import contract
from trainer.contract import SCHEMA, Inputs, SpecError, TrainSpec
from trainer.contract.wording import plural

UNKNOWN_FILES = ("what the image is made of",)


def restore(result: PublishedResult, cluster: Cluster, place: LocalContext, scratch: Path) -> tuple[RecordedRun, Tree]:
    """`cluster`: where it will run now. `scratch`: the folder for worktrees, and for the spec in the form that an older trainer reads. Raises
    ConfigRefused for another number of nodes, and for a line that this version cannot plan from."""
    config = restore_config(result, cluster)
    stacks = load_stacks(place.project / "images")
    plan = make_plan(config, stacks, place, run_id=result.repeats[0].run_id, overrides=(f"experiment={result.experiment}",))
    folder = scratch / "results" / result.result_id
    recorded = make_recorded_run(result, restore_plan(result, plan, place), folder)
    folder.mkdir(parents=True, exist_ok=True)
    # With the published keys only: an older trainer refuses a spec with keys that it does not know.
    published = result.spec | {"run_id": plan.run_id, "output": plan.spec.output}
    contract.write_text(json.dumps(published, indent=2) + "\n", folder / contract.SPEC_FILE)
    tree, image = find_code(recorded, result, place.project, scratch)
    return replace(recorded, plan=replace(recorded.plan, image=image)), tree


def restore_config(result: PublishedResult, cluster: Cluster) -> Config:
    """The published config on the nodes of `cluster`."""
    site = result.site
    if len(cluster.working) != site.nodes:
        raise ConfigRefused(
            f"result {result.result_id} was made on {plural(site.nodes, 'node')}, cluster={cluster.name} has {len(cluster.working)}: "
            "choose a cluster with the same number of nodes with cluster=NAME"
        )
    paths = {name: value for name, value in cluster.environment.items() if PATH_IN_TEXT.search(value)}
    changes: dict[str, Any] = {
        "runtime": site.runtime,
        "devices_per_node": site.devices_per_node,
        "environment": merge(paths, site.environment),
    }
    restored: Config = decode_part(Config, {**result.config, "cluster": replace(cluster, **changes)}, "config", result)
    return restored


def restore_plan(result: PublishedResult, plan: Plan, place: LocalContext) -> Plan:
    """The plan of this version with the published spec and environment variables."""
    root = absolute(plan.config.cluster.root, place.here)
    filled: dict[str, Any] = result.spec | {"run_id": plan.run_id, "output": plan.spec.output}
    filled["data"] = filled["data"] | {"root": f"{root}/{DATA_FOLDER}"}
    spec: TrainSpec = decode_part(TrainSpec, filled, "spec", result)
    commands = tuple(replace(command, environment=merge(command.environment, result.variables)) for command in plan.commands)
    return replace(plan, spec=spec, commands=commands)


def decode_part(cls: Any, data: Any, name: str, result: PublishedResult) -> Any:
    try:
        return contract.decode(cls, data, name)
    except SpecError as error:
        raise RecordRefused(f"the {name} of result {result.result_id} cannot be read by this version: {error}") from error


def merge(planned: Mapping[str, str], published: Mapping[str, str]) -> dict[str, str]:
    """Variables with a path are not published, and keep their planned values."""
    return dict(sorted({**planned, **published}.items()))


def make_recorded_run(result: PublishedResult, plan: Plan, folder: Path) -> RecordedRun:
    """The record of the first repeat, as far as the line knows it. The image's id is left out: each engine gives the same files another id."""
    code, first = result.code, result.repeats[0]
    source = SourceState(
        commit=code.commit,
        dirty=bool(code.diff_sha256),
        diff_sha256=code.diff_sha256,
        diff_lacks="all of it: a published result has only its hash" if code.diff_sha256 else "",
        record_schema=RECORD_SCHEMA,
    )
    record = Record(
        schema=SCHEMA,
        run_id=first.run_id,
        status="finished",
        exit_code=0,
        started_at=first.started_at,
        ended_at=result.made_at,
        seconds=first.seconds,
        steps=result.steps,
        train_seconds=None,
        samples_per_s=first.samples_per_s,
        final_loss=first.final_loss,
        evaluation=first.evaluation,
        checkpoint="",
        weights_sha256=first.weights_sha256,
        data_sha256=result.data_sha256,
        source=source,
        image="",
        forced="",
        nodes=(),
        failure=None,
    )
    inputs = Inputs(schema=SCHEMA, data={}, weights=result.weights)
    return RecordedRun(folder=folder, schema=RECORD_SCHEMA, record=record, plan=plan, source=source, inputs=inputs)


def find_code(recorded: RecordedRun, result: PublishedResult, project: Path, scratch: Path) -> tuple[Tree, Image]:
    """This tree if it makes the published image, else the published commit; else this tree with the files that differ."""
    base = recorded.plan.config.cluster.delivery.base or result.code.base
    here = render_image(result, project, base)
    if here.fingerprint == result.code.fingerprint:
        return Tree(project=project), here
    try:
        folder = open_worktree(recorded, project, scratch)
        there = render_image(result, folder, base)
    except (ConfigRefused, ImageFailed) as error:
        return Tree(project=project, differs=UNKNOWN_FILES, why=str(error)), here
    differs = changed_files(there, here)
    if there.fingerprint == result.code.fingerprint:
        return Tree(project=folder, why=f"this tree differs in {list_files(differs)}", is_recorded=True), there
    tag = f"omnilaunch:{result.code.stack}-{result.code.fingerprint[:12]}"
    why = f"commit {recorded.source.commit[:12]} does not make the image of the result either, {tag}"
    return Tree(project=project, differs=differs or UNKNOWN_FILES, why=why), here


def render_image(result: PublishedResult, project: Path, base: str) -> Image:
    stack = find_stack(load_stacks(project / "images"), result.code.stack)
    return render(stack, architecture=result.code.architecture, root=project, base=base)
