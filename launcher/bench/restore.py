"""A published result as the record that it was made from, as far as a rerun needs one: out of its line, and out of git.

The recorded commit gives the code, file by file the same (its fingerprint says so); the line gives the rest. What the ranks find is
not held against the line before they start, as a rerun of a run's own record does, but told beside the figures afterwards.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from launcher.bench.measure import PLACE
from launcher.bench.result import PublishedResult
from launcher.bench.worktree import Tree, changed_files, list_files, open_worktree
from launcher.config.schema import Cluster, Config
from launcher.errors import ConfigRefused, ImageFailed, RecordRefused
from launcher.image.stack import Image, Stack, find_stack, load_stacks, render
from launcher.plan.plan import DATA_FOLDER, LocalContext, Plan, absolute, make_plan
from launcher.record.record import Record
from launcher.record.recorded_run import RecordedRun
from launcher.record.source import RECORD_SCHEMA, SourceState
from trainer import contract
from trainer.contract import SCHEMA, Inputs, SpecError, TrainSpec

LACKS = "them all: a published result has only their hash"


def restore(result: PublishedResult, cluster: Cluster, place: LocalContext, scratch: Path) -> tuple[RecordedRun, Tree]:
    """`cluster`: where it is to run now; `scratch`: where worktrees, and the spec as an older trainer reads it, lie. Raises ConfigRefused for
    other nodes than it had, and for a line that this version cannot plan from."""
    config = restore_config(result, cluster)
    stacks = load_stacks(place.project / "images")
    plan = make_plan(config, stacks, place, run_id=result.repeats[0].run_id, overrides=(f"experiment={result.experiment}",))
    folder = scratch / "results" / result.result_id
    recorded = make_recorded_run(result, restore_plan(result, plan, place), folder)
    folder.mkdir(parents=True, exist_ok=True)
    contract.write(recorded.plan.spec, folder / contract.SPEC_FILE)
    tree, image = find_code(recorded, result, place.project, scratch)
    return replace(recorded, plan=replace(recorded.plan, image=image)), tree


def restore_config(result: PublishedResult, cluster: Cluster) -> Config:
    """The published one, on the nodes of now."""
    site = result.site
    if len(cluster.working) != site.nodes:
        raise ConfigRefused(
            f"result {result.result_id} was made on {site.nodes} node(s), cluster={cluster.name} has {len(cluster.working)}: "
            "name one that has as many with cluster=NAME"
        )
    places = {name: value for name, value in cluster.environment.items() if PLACE.search(value)}
    environment = given(places, site.environment)
    named = replace(cluster, runtime=site.runtime, devices_per_node=site.devices_per_node, environment=environment)  # type: ignore[arg-type]
    try:
        config: Config = contract.decode(Config, {**result.config, "cluster": named}, "config")
    except SpecError as error:
        raise RecordRefused(f"the config of result {result.result_id} is not what this version reads: {error}") from error
    return config


def restore_plan(result: PublishedResult, plan: Plan, place: LocalContext) -> Plan:
    """What this version would plan, with the spec and the variables of then in their place."""
    root = absolute(plan.config.cluster.root, place.here)
    filled: dict[str, Any] = result.spec | {"run_id": plan.run_id, "output": plan.spec.output}
    filled["data"] = filled["data"] | {"root": f"{root}/{DATA_FOLDER}"}
    try:
        spec: TrainSpec = contract.decode(TrainSpec, filled, "spec")
    except SpecError as error:
        raise RecordRefused(f"the spec of result {result.result_id} is not what this version reads: {error}") from error
    commands = tuple(replace(command, environment=given(command.environment, result.variables)) for command in plan.commands)
    return replace(plan, spec=spec, commands=commands)


def given(planned: Mapping[str, str], published: Mapping[str, str]) -> dict[str, str]:
    """Those that a line may not hold, since they name places, are those of now."""
    return dict(sorted({**planned, **published}.items()))


def make_recorded_run(result: PublishedResult, plan: Plan, folder: Path) -> RecordedRun:
    code = result.code
    source = SourceState(
        commit=code.commit,
        dirty=bool(code.diff_sha256),
        diff_sha256=code.diff_sha256,
        diff_lacks=LACKS if code.diff_sha256 else "",
        record_schema=RECORD_SCHEMA,
    )
    return RecordedRun(
        folder=folder,
        schema=RECORD_SCHEMA,
        record=make_record(result, source),
        plan=plan,
        source=source,
        inputs=Inputs(schema=SCHEMA, data={}, weights=result.weights),
    )


def make_record(result: PublishedResult, source: SourceState) -> Record:
    """Of the first repeat. The image's id is left out: the same files make another one on every engine."""
    first = result.repeats[0]
    return Record(
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


# ------------------------------------------------------------------------------------------------------------------- code


def find_code(recorded: RecordedRun, result: PublishedResult, project: Path, scratch: Path) -> tuple[Tree, Image]:
    """This tree where it makes the published image, else the published commit; else this tree with what it differs in."""
    base = recorded.plan.config.cluster.delivery.base or result.code.base
    here = draw(result, project, base)
    if here.fingerprint == result.code.fingerprint:
        return Tree(project=project), here
    try:
        folder = open_worktree(recorded, project, scratch)
        there = draw(result, folder, base)
    except (ConfigRefused, ImageFailed) as error:
        return Tree(project=project, differs=("what the image is made of",), why=str(error)), here
    differs = changed_files(there, here)
    if there.fingerprint == result.code.fingerprint:
        return Tree(project=folder, why=f"this tree differs in {list_files(differs)}", is_recorded=True), there
    why = f"neither does commit {recorded.source.commit[:12]} make the image of the result, omnilaunch:{result.code.stack}-{result.code.fingerprint[:12]}"
    return Tree(project=project, differs=differs or ("what the image is made of",), why=why), here


def draw(result: PublishedResult, project: Path, base: str) -> Image:
    stack: Stack = find_stack(load_stacks(project / "images"), result.code.stack)
    return render(stack, architecture=result.code.architecture, root=project, base=base)
