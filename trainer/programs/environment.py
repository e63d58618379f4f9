"""environment.json of a stage, and the check of a rerun that its environment is that of the record."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from trainer.contract import ENVIRONMENT_FILE, EnvReport, InputRefused, TrainSpec, WeightsLineage, facts_of, kind_of, write
from trainer.contract.environment_facts import changed_facts, describe_change
from trainer.device.rank import Rank
from trainer.distributed.effective_config import read_effective_config
from trainer.distributed.engine import Engine
from trainer.observe.environment import report_environment
from trainer.stages.group import trainable_table
from trainer.train.model import BuiltModel


def write_environment(
    spec: TrainSpec,
    rank: Rank,
    environ: Mapping[str, str],
    *,
    lineage: WeightsLineage,
    built: BuiltModel | None = None,
    engine: Engine | None = None,
) -> None:
    """Write environment.json; with a model, also print what is trained and which fused kernels are used. Every rank must call it. By this
    file the launcher knows that the stage has begun, so a stage without a model in memory writes it before its long work. Raises InputRefused
    if a rerun finds another environment than that of its record."""
    deepspeed = {"config": dict(engine.handle.config), "taken": read_effective_config(engine)} if engine is not None else {}
    report = report_environment(rank.device, rank.local, built.staged.groups if built else (), deepspeed, environ)
    if report is None:
        return
    found = {"kernels": built.kernels, "chat_template": built.processor.notes} if built else {}
    write(replace(report, origin=lineage, **found), Path(spec.output) / ENVIRONMENT_FILE)
    refuse_other_environment(spec, report)
    if built is not None:
        trainable_table(built.staged.groups, print)
        for note in built.processor.notes:
            print(note)
        for name, where in built.kernels.items():
            print(f"kernel {name}: {where}")
        sys.stdout.flush()


def refuse_other_environment(spec: TrainSpec, report: EnvReport) -> None:
    """Raises InputRefused that names each changed fact."""
    if spec.expects is None:
        return
    changes = {key: change for key, change in changed_facts(spec.expects.facts, facts_of(report)).items() if key not in spec.expects.free}
    if changes:
        lines = "\n".join(f"  {describe_change(key, change)}" for key, change in changes.items())
        kinds = ",".join(dict.fromkeys(map(kind_of, changes)))
        raise InputRefused(
            f"this is not the environment of run {spec.expects.run_id}:\n{lines}\nRestore it, or allow the differences: --accept {kinds}"
        )
