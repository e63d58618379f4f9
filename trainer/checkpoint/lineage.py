"""Where a stage's weights come from: which run and step, and what was trained before; refuses weights that do not fit the stage.

A chain of stages can be followed from the checkpoints alone: each names its run, all groups trained so far, and with an adapter the
fingerprint of its base's weights.
"""

import json
from pathlib import Path

from trainer.checkpoint.checkpoint import require_whole
from trainer.contract import LINE_FEED, ImageForm, InputRefused, Lora, TrainSpec, WeightsLineage, read
from trainer.contract.adapter_files import describe_missing_base, find_base, read_adapter_config
from trainer.contract.checkpoint_files import CheckpointState, find_state_file
from trainer.contract.weight_files import ADDED_TOKENS, TOKENIZER_CONFIG, fetched_revision, hash_weights, read_added_tokens
from trainer.models import find_family
from trainer.stages.chain import groups_before

SNAPSHOTS = "snapshots"  # in the cache of huggingface_hub: <repository>/snapshots/<commit>
SHOWN_LETTERS = 500  # of a list of tokens
FINGERPRINT_BYTES = 4096  # of each tensor: enough to tell trained weights from their start, without reading 65 GB


def find_lineage(spec: TrainSpec, folder: Path | None, base: Path | None = None) -> WeightsLineage:
    """The lineage of the weights in `folder`, a complete checkpoint, or None for a random start. `base`: the folder of an adapter's base, where it
    is another than find_base says (it was downloaded).

    Raises InputRefused for a checkpoint of another family, for one that lacks what the stage needs, for an adapter whose base is missing or
    has other weights than it was trained on, and for an adapter that this stage cannot continue.
    """
    if folder is None:
        lineage = WeightsLineage()
    else:
        file = find_state_file(folder)
        state: CheckpointState | None = read(CheckpointState, file) if file else None
        refuse_family(spec, folder, state)
        base = base or require_base(spec, folder)
        mark = fingerprint_weights(base or folder) if base is not None or spec.stage.lora is not None else ""
        lineage = WeightsLineage(
            path=str(folder),
            run_id=state.run_id if state else "",
            step=state.step if state else 0,
            stage=str(state.spec.get("stage.name", "")) if state else "",
            weights_sha256=state.weights_sha256 if state else "",
            trained=state.trained if state else tuple(spec.model.groups),  # all groups of a published model are trained
            base=str(base or ""),
            mark=mark,
            images=find_images(spec, folder),
            revision=folder.name if folder.parent.name == SNAPSHOTS else fetched_revision(folder),
        )
        if base is not None:
            refuse_base(lineage, state)
            refuse_tokens(spec, folder, base)
            refuse_adapter(spec, folder)
    refuse_untrained(spec, lineage)
    return lineage


def require_base(spec: TrainSpec, folder: Path) -> Path | None:
    """The folder of the base of an adapter, whole; None if `folder` holds a full model. Raises InputRefused."""
    base = find_base(folder, spec)
    if not base:
        if (folder / "adapter_config.json").is_file():
            raise InputRefused(f"stage.checkpoint: {describe_missing_base(folder, base)}.")
        return None
    if not Path(base).is_dir():
        raise InputRefused(f"stage.checkpoint: {describe_missing_base(folder, base)}.")
    require_whole(Path(base), "stage.base" if spec.stage.base else f"adapter_config.json of {folder}, base_model_name_or_path")
    if (Path(base) / "adapter_config.json").is_file():
        raise InputRefused(
            f"stage.checkpoint: the base of {folder} is itself an adapter, {base}. Merge that one first with stage=merge, and name the result in stage.base."
        )
    return Path(base)


def find_images(spec: TrainSpec, folder: Path | None) -> ImageForm:
    """How the questions that the weights in `folder` were trained on show images: `find_lineage(spec, folder).images`, from the state alone."""
    if folder is None:
        return LINE_FEED
    if (file := find_state_file(folder)) is not None:
        state: CheckpointState = read(CheckpointState, file)
        return state.images
    return find_family(spec.model.family).images


def fingerprint_weights(folder: Path) -> str:
    """A hash that tells weights apart without reading all of them."""
    return hash_weights(folder, most_bytes=FINGERPRINT_BYTES)


def refuse_family(spec: TrainSpec, folder: Path, state: CheckpointState | None) -> None:
    """If the checkpoint names its family: before anything is loaded, and for an adapter, whose config names no family."""
    family = state.spec.get("model.family", spec.model.family) if state else spec.model.family
    if family != spec.model.family:
        name = state.spec.get("model.name", family) if state else family
        raise InputRefused(
            f"stage.checkpoint: {folder} is of model {name}, family {family}, but {spec.model.name} is of family {spec.model.family}. "
            f"Set model={name}, or name another checkpoint."
        )


def refuse_base(lineage: WeightsLineage, state: CheckpointState | None) -> None:
    if state is not None and state.base and state.base != lineage.mark:
        raise InputRefused(
            f"stage.checkpoint: the adapter {lineage.path} was trained on other weights than those now in {lineage.base}. "
            "Restore that base, or name its current folder in stage.base."
        )


def refuse_tokens(spec: TrainSpec, folder: Path, base: Path) -> None:
    """The rows of new tokens have their numbers by the order of the tokens: in another order an adapter's rows would be those of other tokens."""
    known, wanted = read_added_tokens(base), read_added_tokens(folder)
    has = (*known, *(token for token in spec.model.add_tokens if token not in known))
    if has[: len(wanted)] != wanted:
        added = json.dumps([token for token in wanted if token not in known], ensure_ascii=False, separators=(",", ":"))
        shown = (
            f"model.add_tokens={added}"
            if len(added) <= SHOWN_LETTERS
            else f"the {len(wanted)} tokens of {ADDED_TOKENS} in {folder / TOKENIZER_CONFIG}"
        )
        raise InputRefused(
            f"model.add_tokens: the adapter {folder} was trained with other new tokens, or in another order, and its rows are theirs. Set {shown}; more "
            "tokens go behind them."
        )


def refuse_adapter(spec: TrainSpec, folder: Path) -> None:
    """A LoRA stage continues with the adapter that it is given; other stages merge it into its base."""
    if spec.stage.lora is None:
        return
    config = read_adapter_config(folder)
    has = {"r": config.get("r"), "alpha": config.get("lora_alpha"), "rank_stabilised": config.get("use_rslora", False)}
    wanted = {key: getattr(spec.stage.lora, key) for key in has}
    wrong = [key for key in has if has[key] != wanted[key]]
    if wrong:
        said = ", ".join(f"stage.lora.{key} is {wanted[key]}, the adapter has {has[key]}" for key in wrong)
        changes = " ".join(f"stage.lora.{key}={str(has[key]).lower()}" for key in wrong)
        raise InputRefused(
            f"stage.checkpoint: {folder} is an adapter, and a LoRA stage continues with it, but its settings differ: {said}. "
            f"Set {changes}, or start a new adapter from full weights."
        )
    if spec.stage.reset:
        raise InputRefused(
            f"stage.reset: {', '.join(spec.stage.reset)} cannot be reset in a stage that continues with an adapter, {folder}. "
            "Set stage.reset=[], or start from full weights."
        )


def refuse_untrained(spec: TrainSpec, lineage: WeightsLineage) -> None:
    lacking = [group for group in spec.stage.needs if group in spec.model.groups and group not in groups_before(lineage, spec.stage)]
    if lacking:
        names = ", ".join(lacking)
        whose = f"{lineage.path} (stage {lineage.stage} of run {lineage.run_id})" if lineage.run_id else lineage.path or "a random start"
        raise InputRefused(
            f"stage {spec.stage.name} needs a trained {names}, and no run has trained that of {whose}: images would be noise to the "
            "language model. Train it first with stage=projector and the same stage.checkpoint, and name the result in stage.checkpoint."
        )


def continues_adapter(lineage: WeightsLineage, lora: Lora | None) -> bool:
    """Whether the stage continues with the adapter that it starts from, instead of merging it."""
    return bool(lineage.base) and lora is not None
