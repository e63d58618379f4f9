"""The checkpoint that a stage after training makes from another one: written to a hidden folder, checked, renamed. After an error nothing
half-done is left, and the source is never changed."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.checkpoint.checkpoint import MARGIN_BYTES, checkpoints_folder
from trainer.checkpoint.pending import PendingCheckpoint, begin_folder, complete
from trainer.checkpoint.retention import PARTIAL, remove
from trainer.contract import SCHEMA, InputRefused, RunFailed, TrainResult, TrainSpec, WeightsLineage
from trainer.contract.checkpoint_files import CHECKPOINT_NAME, STATE_FILES, CheckpointState, fixed_settings, whole_state
from trainer.contract.weight_files import INDEX, PICKLED_INDEX
from trainer.data.chat.saved_template import FOLDER
from trainer.models import find_family
from trainer.stages.chain import groups_trained
from trainer.tensor.stream import TensorToWrite, open_tensors, write_shards

# Files of a checkpoint beside its weights: configs, tokenizer, processor, templates, and code that a published config names.
COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".py")
NOT_COPIED = (*STATE_FILES, INDEX, PICKLED_INDEX, "adapter_config.json")
TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True, kw_only=True)
class DerivedCheckpoint:
    """`tensors`: of the new checkpoint, in order. `folders`: whose other files are copied, later ones over earlier ones. `finish(folder)` writes
    the rest and checks the result; it raises RunFailed if a check fails, and returns figures for the stage's result."""

    tensors: Sequence[TensorToWrite]
    folders: tuple[Path, ...]
    shard_bytes: int
    finish: Callable[[Path], dict[str, float]]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)


def write_derived_checkpoint(derived: DerivedCheckpoint, spec: TrainSpec, lineage: WeightsLineage) -> TrainResult:
    """Write, check and rename it. Raises RunFailed if the disk is full."""
    final = checkpoints_folder(spec) / CHECKPOINT_NAME.format(step=lineage.step)
    partial_folder = final.with_name(PARTIAL.format(name=final.name))
    pending = PendingCheckpoint(
        final=final, partial_folder=partial_folder, state=describe_state(spec, lineage), writers=0, needed=derived.nbytes + MARGIN_BYTES
    )
    if final.exists():
        remove(final)  # of an attempt that ended before it wrote its result
    try:
        begin_folder(pending)
        copy_files(derived.folders, partial_folder)
        write_shards(derived.tensors, partial_folder, derived.shard_bytes)
        figures = derived.finish(partial_folder)
        require_files(partial_folder, spec)
        complete(pending, spec)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise RunFailed(describe_write_failure(spec, lineage, pending.needed, error)) from error
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    state = whole_state(final)
    assert state is not None
    return finished_result(0.0, figures, checkpoint=state.path, weights_sha256=state.weights_sha256)


def finished_result(seconds: float, figures: dict[str, float], **fields: Any) -> TrainResult:
    """The result of a stage that does not train. `fields`: further fields of TrainResult, whose defaults are for a stage without them."""
    empty: dict[str, Any] = {"samples_per_s": 0.0, "checkpoint": "", "weights_sha256": ""}
    return TrainResult(schema=SCHEMA, status="finished", steps=0, seconds=seconds, final_loss=None, evaluation=figures, **(empty | fields))


def describe_state(spec: TrainSpec, lineage: WeightsLineage) -> CheckpointState:
    return CheckpointState(
        schema=SCHEMA,
        step=lineage.step,
        weights_sha256="",
        data_sha256="",
        world_size=0,
        spec=fixed_settings(spec),
        files={},
        run_id=spec.run_id,
        trained=groups_trained(lineage, spec.stage),
        images=lineage.images,
    )


def describe_write_failure(spec: TrainSpec, lineage: WeightsLineage, needed: int, error: Exception) -> str:
    return (
        f"stage {spec.stage.name}: the checkpoint could not be written to {checkpoints_folder(spec)}: {error}. The incomplete folder was removed, "
        f"and {lineage.base or lineage.path} is not changed. It needs {needed / 2**30:.2f} GiB: free that much, or put the run on another disk "
        "with cluster.root=FOLDER, and start again."
    )


def copy_files(folders: Sequence[Path], partial_folder: Path) -> None:
    """Everything except weights and files that belong to the old checkpoint only."""
    for folder in folders:
        for file in sorted(folder.iterdir()):
            if file.is_file() and file.suffix in COPIED and file.name not in NOT_COPIED and not file.name.startswith("."):
                shutil.copyfile(file, partial_folder / file.name)
        if (folder / FOLDER).is_dir():
            shutil.copytree(folder / FOLDER, partial_folder / FOLDER, dirs_exist_ok=True)


def require_files(partial_folder: Path, spec: TrainSpec) -> None:
    """Raises InputRefused if the new checkpoint lacks a file that is needed to load it, or still contains parts of an adapter."""
    if not (partial_folder / "config.json").is_file():
        raise InputRefused(f"stage.checkpoint: there is no config.json beside the weights of {spec.stage.checkpoint}. Copy it again.")
    find_family(spec.model.family).load_processor(partial_folder, spec.model)  # raises if tokenizer or image processor is missing
    left = [file.name for file in partial_folder.glob("adapter_*")] + [name for name in open_tensors(partial_folder) if "lora_" in name]
    if left:
        raise InputRefused(f"stage.checkpoint: {', '.join(left[:3])} belong to an adapter. Merge it first with stage=merge.")
    settings = partial_folder / "tokenizer_config.json"
    inside = settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    if not inside and not any((partial_folder / name).is_file() for name in TEMPLATES):
        print(f"note: the model has no chat template beside its weights, which a server needs; conf/model/{spec.model.name}.yaml has one")


def require_full_weights(spec: TrainSpec, lineage: WeightsLineage, *, adapter: bool) -> Path:
    """The folder of full weights that the stage works on: those of the base if an `adapter` is wanted. Raises InputRefused if it finds the
    other kind, for a random start, and for weights that are quantized already."""
    kind = spec.stage.kind
    if not lineage.path:
        raise InputRefused(f"stage {kind}: there are no weights, only a random start. Name them with stage.checkpoint=RUN_ID or a folder.")
    if adapter and not lineage.base:
        raise InputRefused(
            f"stage.checkpoint: {lineage.path} holds full weights and no adapter: there is nothing to merge. Name the checkpoint of a LoRA "
            "run, or use these weights as they are."
        )
    if lineage.base and not adapter:
        raise InputRefused(
            f"stage.checkpoint: {lineage.path} is an adapter, and {kind} needs full weights. Merge it first: omnilaunch launch "
            f"stage=merge stage.checkpoint={lineage.path}"
        )
    folder = Path(lineage.base or lineage.path)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if how := config.get("quantization_config"):
        raise InputRefused(
            f"stage {kind}: {folder} is quantized already ({how.get('quant_method', 'unknown')}). Use the weights that it was made from."
        )
    return folder
