"""Makes one published result of the runs of a bench: the figures of each run, their medians and ranges. Reads records and starts nothing."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import Any

from launcher.bench.result import RESULT_SCHEMA, ClusterShape, Code, PublishedResult, Repeat, Span, canonical
from launcher.config.schema import Config
from launcher.errors import ConfigRefused
from launcher.plan.commands import FOLDER_VARIABLE, RUN_VARIABLE
from launcher.plan.plan import Plan
from launcher.record.checksums import SEAL_FILE, Seal
from launcher.record.metrics import Curve, read_curve, window_means
from launcher.record.reader import read_as
from launcher.record.recorded_run import RecordedRun, load_recorded_run
from launcher.record.source import RECORD_SCHEMA
from launcher.record.verdict import BITWISE, WINDOWS
from launcher.redact import mask_credentials
from trainer import contract
from trainer.contract import facts_of, kind_of

MEASURED = ("samples_per_s", "tokens_per_s", "step_s", "peak_bytes", "final_loss")
MOMENTARY = ("setting",)  # kinds of environment facts that may change between repeats, such as a clock rate
PATH_IN_TEXT = re.compile(r"(^|[:=,\s])[/~]")  # a folder, alone or in a list


def measure_run(folder: Path, *, load: float | None = None) -> Repeat:
    """Raises RecordRefused for a damaged record, ConfigRefused for a run without a step after its warm-up."""
    recorded, curve = load_recorded_run(folder, rows=False), read_curve(folder / contract.METRICS_FILE)
    seal: Seal = read_as(Seal, folder / SEAL_FILE, schema=RECORD_SCHEMA)
    record, speed = recorded.record, curve.speed
    if record.status != "finished" or speed is None or record.final_loss is None:
        raise ConfigRefused(
            f"run {record.run_id} is {record.status} after {len(curve.step)} steps, and has no speed that could be published"
        )
    return Repeat(
        run_id=folder.name,
        record_sha256=seal.sha256,
        started_at=record.started_at,
        seconds=record.seconds,
        samples_per_s=speed.samples_per_s,
        tokens_per_s=speed.tokens_per_s,
        step_s=speed.step_s,
        peak_bytes=speed.peak_bytes,
        final_loss=record.final_loss,
        windows=window_means(curve.loss, WINDOWS),
        evaluation=record.evaluation,
        rows_sha256=sha256(canonical([curve.column(name) for name in BITWISE])).hexdigest(),
        weights_sha256=record.weights_sha256,
        load=load,
    )


def summarise(repeats: Sequence[Repeat]) -> dict[str, Span]:
    """Median, lowest and highest of each figure; scores of the evaluation as `evaluation.<name>`."""
    columns: dict[str, list[float]] = {name: [float(getattr(repeat, name)) for repeat in repeats] for name in MEASURED}
    for name in repeats[0].evaluation:
        columns[f"evaluation.{name}"] = [repeat.evaluation[name] for repeat in repeats]
    return {name: Span(median=median(values), lowest=min(values), highest=max(values)) for name, values in columns.items()}


def publish(
    series_id: str, experiment: str, repeats: Sequence[Repeat], recorded_runs: Sequence[RecordedRun], *, dirty: str, made_at: datetime
) -> PublishedResult:
    """The result of runs of one plan. `dirty`: why a tree with changes was measured. Raises ConfigRefused if the runs did not use the same
    code, data and environment."""
    require_alike(recorded_runs)
    first = recorded_runs[0]
    plan = first.plan
    config = published_config(plan.config)
    return PublishedResult(
        schema=RESULT_SCHEMA,
        result_id=series_id,
        experiment=experiment,
        made_at=made_at.isoformat(timespec="seconds"),
        steps=plan.spec.steps,
        warm_up_steps=Curve(step=tuple(range(plan.spec.steps))).warm_up,
        summary=summarise(repeats),
        rows_equal=len({repeat.rows_sha256 for repeat in repeats}) == 1,
        weights_equal=len({repeat.weights_sha256 for repeat in repeats}) == 1,
        repeats=tuple(repeats),
        config=config,
        config_sha256=sha256(canonical(config)).hexdigest(),
        site=shape_of(plan),
        spec=published_spec(plan),
        variables=published_variables(plan),
        code=code_of(first, dirty),
        data_sha256=first.record.data_sha256,
        weights=first.inputs.weights if first.inputs else {},
        facts=facts_in(first),
    )


def require_alike(recorded_runs: Sequence[RecordedRun]) -> None:
    """Raises ConfigRefused if packages, a driver or the data were changed between two of the runs."""
    first, *others = map(identity_of, recorded_runs)
    for recorded, found in zip(recorded_runs[1:], others, strict=True):
        different = sorted(key for key in first.keys() | found.keys() if first.get(key) != found.get(key))
        if different:
            lines = "\n".join(f"  {key}: {first.get(key, 'missing')} and {found.get(key, 'missing')}" for key in different[:12])
            raise ConfigRefused(
                f"runs {recorded_runs[0].folder.name} and {recorded.folder.name} are not repeats of each other, and nothing is published:\n"
                f"{lines}\nThe runs are kept. To start a new bench: omnilaunch bench NAME --anew"
            )


def identity_of(recorded: RecordedRun) -> dict[str, str]:
    record = recorded.record
    facts = {key: value for key, value in facts_in(recorded).items() if kind_of(key) not in MOMENTARY}
    return facts | {"data": record.data_sha256, "lock": record.lock_sha256, "image": record.image_id, "commit": recorded.source.commit}


def facts_in(recorded: RecordedRun) -> dict[str, str]:
    """The environment facts that the ranks reported, without those that name a folder of the machine."""
    return without_paths(facts_of(recorded.environment)) if recorded.environment else {}


# ----------------------------------------------------------------------------------------------- without paths and secrets


def without_paths(values: dict[str, str]) -> dict[str, str]:
    """Without credentials either."""
    return {key: str(mask_credentials(value)) for key, value in values.items() if not PATH_IN_TEXT.search(value)}


def published_config(config: Config) -> dict[str, Any]:
    plain: dict[str, Any] = as_json_data(mask_credentials(asdict(config)))
    return {key: value for key, value in plain.items() if key != "cluster"}


def published_spec(plan: Plan) -> dict[str, Any]:
    """The run id and the folders are left empty, and are filled when the result is run again."""
    spec: dict[str, Any] = as_json_data(asdict(plan.spec))
    return spec | {"run_id": "", "output": "", "expects": None, "data": spec["data"] | {"root": ""}}


def published_variables(plan: Plan) -> dict[str, str]:
    own = (RUN_VARIABLE, FOLDER_VARIABLE)
    return without_paths({name: value for name, value in plan.commands[0].environment.items() if name not in own})


def shape_of(plan: Plan) -> ClusterShape:
    cluster = plan.config.cluster
    return ClusterShape(
        runtime=cluster.runtime,
        nodes=len(cluster.working),
        devices_per_node=cluster.devices_per_node,
        environment=without_paths(cluster.environment),
    )


def code_of(recorded: RecordedRun, dirty: str) -> Code:
    image, source = recorded.plan.image, recorded.source
    return Code(
        commit=source.commit,
        diff_sha256=source.diff_sha256,
        dirty=dirty,
        stack=image.stack,
        architecture=image.architecture,
        base=recorded.plan.config.cluster.delivery.base,
        fingerprint=image.fingerprint,
        image_id=recorded.record.image_id,
        lock_sha256=recorded.record.lock_sha256,
    )


def as_json_data(value: Any) -> Any:
    """With the types that JSON has: tuples become lists."""
    return json.loads(json.dumps(value))
