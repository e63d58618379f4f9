"""What a stage starts with: its data and, if it does not train, its weights or model; and the result of such a stage."""

import socket
import time
from collections.abc import Mapping
from pathlib import Path

from trainer.contract import (
    DATA_PENDING_FILE,
    LINE_FEED,
    SPEC_FILE,
    ImageForm,
    InputRefused,
    RunFailed,
    TrainSpec,
    WeightsLineage,
    describe_groups,
)
from trainer.data.check import DataPaths, paths_of, prepare
from trainer.data.kept_folder import kept_folder
from trainer.data.left_out import NOTHING, Rows, Use, find_others, hash_left_out, leave_out, read_left_out, rows_left_out
from trainer.data.rows.indexed_samples import INDEX_FOLDER, open_set
from trainer.data.rows.row_choice import choose_rows
from trainer.data.rows.sample import Sample, Samples, read_set
from trainer.data.sources.data_set import DataSet, hash_data_set as hash_sources
from trainer.device.log_prefix import report_phase
from trainer.device.rank import Rank
from trainer.distributed.collective import broadcast_object
from trainer.export.derived_checkpoint import require_full_weights
from trainer.kernels.fused import use_kernels
from trainer.models import find_family
from trainer.programs.device_map import dispatch_over_cards, measure_free_memory
from trainer.programs.environment import write_environment
from trainer.stages.group import apply_stage
from trainer.train.model import CPU, BuiltModel, load_or_create, trace_weights

CHECKED_FIRST_ROWS = 50_000  # about a minute of checking on one core: 1.07 ms a row with an image (docs/benchmarks.md)
SHOWN_CAUSES = 20
CHECK_TIMEOUT_S, CHECK_POLL_S = 1800.0, 0.05


def prepare_data(spec: TrainSpec) -> DataPaths:
    """Also writes a builtin data set that this node does not have yet."""
    report_phase(2)
    prepare(spec.data)
    return paths_of(spec)


def load_samples(found: DataSet | None, form: ImageForm = LINE_FEED, left_out: Rows = NOTHING) -> tuple[Sample, ...]:
    """Raises InputRefused with every problem: skipping bad rows would silently change the data set. `form`: of images in rows to ask. `left_out`: rows
    that the data check has left out, with their problems."""
    if found is None:
        return ()
    samples, problems = read_set(found, form, choose_rows(found))
    if others := find_others(problems, left_out):
        changed = "" if not left_out else f"\n{found.name} has changed since the data check, which did not find these problems"
        raise InputRefused("\n".join(describe_groups(others, SHOWN_CAUSES)) + changed)
    return tuple(sample for sample in samples if sample.row not in left_out.get(sample.file, ()))


def load_training_samples(spec: TrainSpec, paths: DataPaths, left_out: Rows = NOTHING) -> tuple[Samples, str]:
    """The samples to train on, and the hash of their files. Rows of large files are read when they are used, and checked by the data check only.
    Raises InputRefused."""
    found = paths.rows_of("train")
    if found is None:
        return (), ""
    try:
        indexed = open_set(found, kept_folder(spec.data, INDEX_FOLDER))
        if indexed is None:
            return load_samples(found, left_out=left_out), hash_sources(found)
    except OSError as error:
        raise InputRefused(f"{found.name} cannot be read: {error}\n    set data.train to the path of a readable file") from error
    samples = leave_out(indexed, left_out)
    print(f"{Path(found.name).name}: {len(samples):,} rows, read when they are used", flush=True)
    return samples, hash_sources(found, indexed.hash_of)


def begin_samples(spec: TrainSpec, paths: DataPaths) -> tuple[Samples, str]:
    """As `load_training_samples`. With options that leave rows out no samples yet: the data check decides which, while the model is loaded."""
    return ((), hash_training_files(paths)) if spec.data.leaves_rows_out else load_training_samples(spec, paths)


def finish_samples(spec: TrainSpec, paths: DataPaths, rank: Rank, samples: Samples) -> Samples:
    """Those of `begin_samples`, or those that the data check has not left out. Every rank must call it. Raises InputRefused."""
    if not spec.data.leaves_rows_out:
        return samples
    return load_training_samples(spec, paths, find_left_out(spec, rank, "train"))[0]


def load_held_out(spec: TrainSpec, paths: DataPaths, rank: Rank, form: ImageForm) -> tuple[Sample, ...]:
    """() for a run without evaluation. Every rank must call it. Raises InputRefused."""
    if not spec.evaluation.enabled:
        return ()
    return load_samples(paths.rows_of("evaluation"), form, find_left_out(spec, rank, "evaluation"))


def hash_training_files(paths: DataPaths) -> str:
    """The hash that `load_training_samples` returns, without reading rows. Raises InputRefused."""
    found = paths.rows_of("train")
    if found is None:
        return ""
    try:
        return hash_sources(found)
    except OSError as error:
        raise InputRefused(f"{found.name} cannot be read: {error}\n    set data.train to the path of a readable file") from error


def find_left_out(spec: TrainSpec, rank: Rank, use: Use) -> Rows:
    """The rows that the data check leaves out, the same on every rank: each waits until the check has passed. Every rank must call it. Raises
    InputRefused."""
    if not spec.data.leaves_rows_out:
        return NOTHING
    folder = Path(spec.output)
    if (folder / DATA_PENDING_FILE).exists():
        print(f"waiting for the data check: it decides which rows data.{named_option(spec)} leaves out", flush=True)
    while (folder / DATA_PENDING_FILE).exists():
        time.sleep(CHECK_POLL_S)
    listed = read_left_out(folder)
    refuse_other_rows(hash_left_out(listed), rank)
    return rows_left_out(listed, use)


def named_option(spec: TrainSpec) -> str:
    return "bad_rows=skip" if spec.data.bad_rows == "skip" else f"too_long={spec.data.too_long}"


def refuse_other_rows(digest: str, rank: Rank) -> None:
    """Raises InputRefused on a rank that would leave out other rows than rank 0."""
    if rank.world_size > 1 and broadcast_object(digest) != digest:
        raise InputRefused(
            f"rank {rank.number} on {socket.gethostname()} would leave out other rows than rank 0, since the data check found other problems there. "
            "Let the nodes have the same files and images, and start again."
        )


def wait_for_data_check(folder: Path, rows: int) -> None:
    """Return when the data check that runs beside the ranks has passed, so that no step uses bad data. The launcher stops the ranks when it
    has not. A data set of more than CHECKED_FIRST_ROWS is not waited for. Raises RunFailed after CHECK_TIMEOUT_S.

    `folder`: the run's. It has DATA_PENDING_FILE while a check is under way; a run without a launcher has none."""
    pending, until = folder / DATA_PENDING_FILE, time.monotonic() + CHECK_TIMEOUT_S
    while rows <= CHECKED_FIRST_ROWS and pending.exists():
        if time.monotonic() > until:
            raise RunFailed(
                f"{pending}: the data check has not passed within {CHECK_TIMEOUT_S:g} s, and no step was taken. See the log of the check, or "
                f"check the data by hand: python -m trainer data {folder / SPEC_FILE}"
            )
        time.sleep(CHECK_POLL_S)


def open_weights(spec: TrainSpec, rank: Rank, environ: Mapping[str, str], *, adapter: bool = False) -> tuple[WeightsLineage, Path]:
    """The lineage and folder of full weights for a stage that works on files; with `adapter` the folder of the adapter's base. Writes
    environment.json. Raises InputRefused."""
    lineage = trace_weights(spec)
    folder = require_full_weights(spec, lineage, adapter=adapter)
    write_environment(spec, rank, environ, lineage=lineage)
    return lineage, folder


def open_model(spec: TrainSpec, rank: Rank, environ: Mapping[str, str], *, spread: bool = False) -> BuiltModel:
    """The model of a stage that does not train, on this rank's device or `spread` over the rank's cards. Writes environment.json. Raises
    InputRefused."""
    family = find_family(spec.model.family)
    lineage = trace_weights(spec)
    model, processor = load_or_create(spec, family, lineage, device=CPU if spread else rank.torch_device, probe=rank.number == 0)
    kernels = use_kernels(model, spec)
    staged = apply_stage(model, spec, family.unused(model))
    staged.model.eval()
    if spread and spec.device.cards > 1:
        budgets = measure_free_memory(rank.device, spec.device.cards, rank.local * spec.device.cards)
        device_map = dispatch_over_cards(staged.model, spec.model.groups, budgets)
        print(f"the model is on {len(set(device_map.values()))} of {spec.device.cards} cards", flush=True)
    else:
        staged.model.to(rank.torch_device)
    built = BuiltModel(staged=staged, processor=processor, lineage=lineage, kernels=kernels)
    write_environment(spec, rank, environ, lineage=lineage, built=built)
    return built
