"""What the record of a run says about a checkpoint of it: its model, what the weights are, and the limits of its images.

A checkpoint of a run is described by the run's plan.json, and, where its folder is on this machine, by the files in it. One that was copied out of
its run's folder still has omnilaunch_state.json (trainer_state.json of an earlier version). A folder without either is of no run of ours:
read_checkpoint answers None, and the config stays as it was typed.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from launcher.config.schema import Architecture, Data, Model, Stage
from launcher.config.source import RecordedWeights
from launcher.errors import ConfigRefused, RecordRefused
from launcher.record.checkpoint.checkpoint_data import DERIVED, MOST_SOURCES, data_of_state, read_data
from launcher.record.checkpoint_reference import ADAPTER_CONFIG, FoundCheckpoint, exists, run_of
from launcher.record.reader import decode_as, nested, read_object
from launcher.record.run_name import PLAN_FILE
from launcher.redact import printable
from trainer.contract import ChatTemplate, InputRefused, Lora
from trainer.contract.checkpoint_files import STATE_FILE, find_state_file
from trainer.contract.weight_files import hash_weights

ARCHITECTURE = "model.architecture."
FINGERPRINT_BYTES = 4096  # trainer.checkpoint.lineage.FINGERPRINT_BYTES
METHODS: dict[str, Literal["", "int8", "nf4"]] = {
    "compressed-tensors": "int8",
    "bitsandbytes": "nf4",
}  # quant_method of config.json -> stage.quantization.scheme


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """`model`: None where only its name is known, and perhaps its `architecture`. `max_pixels`, `max_tiles`: of an image, as its processor was
    saved; 0 = its own limit. `data`: that it was trained on, None where that is not known. `chat_template`: of a record without `model`; '' = not known."""

    weights: RecordedWeights
    model: Model | None
    architecture: Architecture | None = None
    max_pixels: int = 0
    max_tiles: int = 0
    data: Data | None = None
    chat_template: ChatTemplate = ""


def read_checkpoint(found: FoundCheckpoint, text: str) -> CheckpointRecord | None:
    """None for a folder of no run of ours. Raises ConfigRefused for a record that this version cannot read, and for an adapter without its
    base."""
    folder = Path(found.path) if not found.host else None
    try:
        record = read_plan(found.run, folder) if found.run else read_state(folder) if folder else None
    except RecordRefused as error:
        raise ConfigRefused(
            f"stage.checkpoint={text}: {error}. To use its weights alone, copy the checkpoint's folder elsewhere without {name_of_state(folder)}, and name "
            "that folder and model=NAME"
        ) from error
    if record and (exists(folder / ADAPTER_CONFIG) if folder else record.weights.adapter):
        refuse_random_base(record, found, text)
    if record and folder and record.weights.adapter:
        refuse_base(folder, found.bases, text)
    return record


def read_plan(run: Path, folder: Path | None) -> CheckpointRecord:
    """Raises RecordRefused."""
    file = run / PLAN_FILE
    plan = read_object(file)
    model: Model = decode_as(Model, nested(plan, "config", "model"), file)
    model = replace(model, name=printable(model.name))  # it is printed as the name of the user's own models is
    stage: Stage = decode_as(Stage, nested(plan, "config", "stage"), file)
    data: Data = decode_as(Data, nested(plan, "config", "data"), file)
    weights = RecordedWeights(
        run_id=printable(str(plan.get("run_id", run.name))),
        stage=printable(stage.name),
        model=model.name,
        source=name_source(str(nested(plan, "spec", "stage", "checkpoint") or "")),
        adapter=stage.lora if stage.kind == "train" else None,
        dtype=stage.conversion.dtype if stage.conversion else str(nested(plan, "spec", "precision", "weights") or ""),
        quantized=stage.quantization.scheme if stage.quantization else "",
        kept=stage.quantization.keep if stage.quantization else (),
    )
    record = CheckpointRecord(
        weights=weights, model=model, max_pixels=data.max_pixels, max_tiles=data.max_tiles, data=read_data(plan, file)
    )
    if stage.kind in DERIVED:
        record = with_limits_of_source(record, Path(str(nested(plan, "spec", "stage", "checkpoint") or "")))
    return with_files(record, folder) if folder else record


def with_limits_of_source(record: CheckpointRecord, source: Path) -> CheckpointRecord:
    """Earlier versions did not record the limits of an image with merged, converted and quantized weights: they are those of the source."""
    for _ in range(MOST_SOURCES):
        run = run_of(source)
        if record.max_pixels or record.max_tiles or run is None:
            break
        plan = read_object(run / PLAN_FILE, [])
        record = replace(
            record,
            max_pixels=int(nested(plan, "config", "data", "max_pixels") or 0),
            max_tiles=int(nested(plan, "config", "data", "max_tiles") or 0),
        )
        if nested(plan, "config", "stage", "kind") not in DERIVED:
            break
        source = Path(str(nested(plan, "spec", "stage", "checkpoint") or ""))
    return record


def name_source(path: str) -> str:
    """The run of a checkpoint's folder, by its id; else the folder."""
    run = run_of(Path(path)) if path else None
    return printable(run.name if run else path)


def read_state(folder: Path) -> CheckpointRecord | None:
    """From omnilaunch_state.json alone, whose settings are flat: {"model.name": ...}. Raises RecordRefused."""
    file = find_state(folder)
    if file is None:
        return None
    state = read_object(file)
    found = state.get("spec")
    spec: dict[str, Any] = found if isinstance(found, dict) else {}
    if not spec.get("model.name"):
        return None
    trains = spec.get("stage.kind", "train") == "train"
    lora = {key.removeprefix("stage.lora."): value for key, value in spec.items() if key.startswith("stage.lora.")}
    adapter: Lora | None = decode_as(Lora, lora, file) if lora and trains else None
    weights = RecordedWeights(
        run_id=printable(str(state.get("run_id", ""))),
        stage=printable(str(spec.get("stage.name", ""))),
        model=printable(str(spec["model.name"])),
        adapter=adapter,
    )
    pixels, tiles = (int(spec.get(f"data.{name}") or 0) for name in ("max_pixels", "max_tiles"))
    record = CheckpointRecord(
        weights=weights,
        model=None,
        architecture=read_architecture(spec, folder / STATE_FILE),
        max_pixels=pixels,
        max_tiles=tiles,
        data=data_of_state(spec),
        chat_template=spec.get("model.chat_template") or "conf",  # earlier versions knew no other
    )
    return with_files(record, folder)


def read_architecture(spec: dict[str, Any], file: Path) -> Architecture | None:
    """From flat settings: {"model.architecture.text.hidden_size": ...}. None where they have none. Raises RecordRefused."""
    tree: dict[str, Any] = {}
    for key, value in spec.items():
        if key.startswith(ARCHITECTURE):
            *parts, last = key.removeprefix(ARCHITECTURE).split(".")
            place = tree
            for part in parts:
                place = place.setdefault(part, {})
            place[last] = value
    return decode_as(Architecture, tree, file) if tree else None


def find_state(folder: Path) -> Path | None:
    """None also where the folder may not be read."""
    try:
        return find_state_file(folder)
    except OSError:
        return None


def name_of_state(folder: Path | None) -> str:
    file = find_state(folder) if folder else None
    return file.name if file else STATE_FILE


def read_state_file(folder: Path) -> dict[str, Any]:
    file = find_state(folder)
    return read_object(file, []) if file else {}


def with_files(record: CheckpointRecord, folder: Path) -> CheckpointRecord:
    """What the files of the checkpoint say is taken before what its plan says."""
    weights, state = record.weights, read_state_file(folder)
    if not exists(folder / ADAPTER_CONFIG):
        weights = replace(weights, adapter=None)
    trained = state.get("trained")
    if isinstance(trained, list):
        weights = replace(weights, trained=tuple(printable(str(group)) for group in trained))
    config = read_object(folder / "config.json", [])
    if config:
        method = nested(config, "quantization_config", "quant_method")
        weights = replace(weights, quantized=METHODS.get(str(method), ""))
    return replace(record, weights=weights)


def refuse_random_base(record: CheckpointRecord, found: FoundCheckpoint, text: str) -> None:
    """Raises ConfigRefused for an adapter of random weights: they are on no disk, and nothing can be done with the adapter alone."""
    if found.host:
        plan = read_object(found.run / PLAN_FILE, []) if found.run else {}
        named = nested(plan, "spec", "stage", "checkpoint") or nested(plan, "config", "model", "source", "kind") != "random"
    else:
        named = read_object(Path(found.path) / ADAPTER_CONFIG, []).get("base_model_name_or_path")
    if named or found.bases:
        return
    run_id, model = record.weights.run_id, record.weights.model
    raise ConfigRefused(
        f"stage.checkpoint={text}: it is an adapter, and its base was random weights of {model}, which no disk has: it cannot be used without "
        f"them. What it scored is in the record: omnilaunch report {run_id}\n  Next: an adapter of saved weights: omnilaunch launch model={model} "
        f"stage=full --run-id {model}-base, and then omnilaunch launch stage=lora stage.checkpoint={model}-base"
    )


def refuse_base(folder: Path, bases: tuple[str, ...], text: str) -> None:
    """Raises ConfigRefused unless the base of an adapter on this machine is there, with the weights that the adapter was trained on."""
    base = next(iter(bases), "")
    if not base:
        return
    if not exists(Path(base)):
        raise ConfigRefused(
            f"stage.checkpoint={text}: it is an adapter, and its base {base} is not there. Name the folder that has it now: stage.base=FOLDER"
        )
    mark = str(read_state_file(folder).get("base", ""))
    try:
        other = bool(mark) and hash_weights(Path(base), most_bytes=FINGERPRINT_BYTES) != mark
    except (OSError, InputRefused) as error:
        raise ConfigRefused(f"stage.checkpoint={text}: it is an adapter, and its base cannot be read: {error}") from error
    if other:
        raise ConfigRefused(
            f"stage.checkpoint={text}: it is an adapter that was trained on other weights than those now in {base}. Put that base back, or name "
            "the folder that has it: stage.base=FOLDER"
        )
