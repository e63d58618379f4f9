"""Where a stage's weights come from: which run and step, what was trained on the way; and the refusal of those that do not fit.

A chain of stages can be followed from the checkpoints alone: each says its run, what all runs up to it have trained, and with an
adapter the mark of the weights that it stands on.
"""

import json
from pathlib import Path

from trainer.checkpoint.checkpoint import adapter_base, require_whole
from trainer.contract import InputRefused, Lora, WeightsLineage, TrainSpec, read
from trainer.contract.checkpoint_files import STATE_FILE, CheckpointState
from trainer.contract.weight_files import hash_weights
from trainer.stages.chain import groups_before

SNAPSHOTS = "snapshots"  # of huggingface_hub's cache: <repository>/snapshots/<commit>
FINGERPRINT_BYTES = 4096  # of each tensor: enough to tell weights that were trained from those they began as, and nothing to read of 65 GB


def find_lineage(spec: TrainSpec, folder: Path | None) -> WeightsLineage:
    """What is known of the weights in `folder`, a whole checkpoint or None for a random start.

    Raises InputRefused for a checkpoint of another family, for one that lacks what the stage needs, for an adapter whose base is not
    there or has other weights than it was trained on, and for an adapter that this stage cannot go on with.
    """
    if folder is None:
        origin = WeightsLineage()
    else:
        state: CheckpointState | None = read(CheckpointState, folder / STATE_FILE) if (folder / STATE_FILE).is_file() else None
        refuse_family(spec, folder, state)
        base = adapter_base(folder)
        if base is not None:
            require_whole(base, f"adapter_config.json of {folder}, base_model_name_or_path")
        mark = fingerprint_weights(base or folder) if base is not None or spec.stage.lora is not None else ""
        origin = WeightsLineage(
            path=str(folder),
            run_id=state.run_id if state else "",
            step=state.step if state else 0,
            stage=str(state.spec.get("stage.name", "")) if state else "",
            weights_sha256=state.weights_sha256 if state else "",
            trained=state.trained if state else tuple(spec.model.groups),  # a published model is trained throughout
            base=str(base or ""),
            mark=mark,
            revision=folder.name if folder.parent.name == SNAPSHOTS else "",
        )
        if base is not None:
            refuse_base(origin, state)
            refuse_adapter(spec, folder)
    refuse_untrained(spec, origin)
    return origin


def fingerprint_weights(folder: Path) -> str:
    """A hash that tells weights apart without reading them all."""
    return hash_weights(folder, most_bytes=FINGERPRINT_BYTES)


# ---------------------------------------------------------------------------------------------------------------- refusals


def refuse_family(spec: TrainSpec, folder: Path, state: CheckpointState | None) -> None:
    """Where the checkpoint says it itself: before anything is loaded, and for an adapter, whose config names no family."""
    family = state.spec.get("model.family", spec.model.family) if state else spec.model.family
    if family != spec.model.family:
        name = state.spec.get("model.name", family) if state else family
        raise InputRefused(
            f"stage.checkpoint: {folder} is of model {name}, family {family}; {spec.model.name} is of family {spec.model.family}. "
            f"Choose its own with model={name}, or another checkpoint."
        )


def refuse_base(origin: WeightsLineage, state: CheckpointState | None) -> None:
    if state is not None and state.base and state.base != origin.mark:
        raise InputRefused(
            f"stage.checkpoint: {origin.path} is an adapter for other weights than those in {origin.base}, which its adapter_config.json "
            "names: they were replaced since it was trained. Bring that base back, or name in base_model_name_or_path where it lies now."
        )


def refuse_adapter(spec: TrainSpec, folder: Path) -> None:
    """A LoRA stage goes on with the very adapter that it is given; other stages merge it into its base."""
    if spec.stage.lora is None:
        return
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    has = {"r": config["r"], "alpha": config["lora_alpha"], "rank_stabilised": config.get("use_rslora", False)}
    wanted = {key: getattr(spec.stage.lora, key) for key in has}
    wrong = [key for key in has if has[key] != wanted[key]]
    if wrong:
        said = ", ".join(f"stage.lora.{key} is {wanted[key]}, the adapter has {has[key]}" for key in wrong)
        changes = " ".join(f"stage.lora.{key}={str(has[key]).lower()}" for key in wrong)
        raise InputRefused(
            f"stage.checkpoint: {folder} is an adapter, and a LoRA stage goes on with the adapter that it is given: {said}. "
            f"Set {changes}, or begin a new adapter on whole weights."
        )
    if spec.stage.reset:
        raise InputRefused(
            f"stage.reset: {', '.join(spec.stage.reset)} cannot begin anew in a stage that goes on with an adapter, {folder}. "
            "Set stage.reset=[], or begin on whole weights."
        )


def refuse_untrained(spec: TrainSpec, origin: WeightsLineage) -> None:
    lacking = [group for group in spec.stage.needs if group in spec.model.groups and group not in groups_before(origin, spec.stage)]
    if lacking:
        names = ", ".join(lacking)
        whose = f"{origin.path} (stage {origin.stage} of run {origin.run_id})" if origin.run_id else origin.path or "a random start"
        raise InputRefused(
            f"stage {spec.stage.name} needs a {names} that is trained, and no run has trained that of {whose}: images would be noise to "
            "the language model. Train it first with stage=projector and the same stage.checkpoint, and name the result in stage.checkpoint."
        )


def continues_adapter(origin: WeightsLineage, lora: Lora | None) -> bool:
    """Whether the stage goes on with the adapter that it begins from, rather than on its base."""
    return bool(origin.base) and lora is not None
