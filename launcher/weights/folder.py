"""Whether a folder of weights is whole: config, index, weight files, tokenizer, image processor. Reads headers, and hashes if it is asked to."""

import json
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from launcher.errors import ConfigRefused
from launcher.weights.identity import ADAPTER_CONFIG_FILE, CONFIG_FILE, Identity, identify, part_of, read_object
from launcher.weights.manifest import find_difference, read_manifest
from launcher.weights.selection import is_plain_path
from trainer.contract import InputRefused, SpecError, read
from trainer.contract.checkpoint_files import CheckpointState, describe_missing, find_state_file, missing_files
from trainer.contract.listing import list_some
from trainer.contract.weight_files import INDEX, PICKLED_INDEX, is_safetensors, read_header, weight_files
from trainer.contract.wording import plural

POINTER = b"version https://git-lfs"  # begins a file that git wrote in place of the content
UNFINISHED_ENDINGS = (".part", ".incomplete", ".aria2", ".crdownload", ".____temp")
TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("tokenizer.model",))
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
WITHOUT_PROCESSOR = ("omnilmm", "omnilmm_3b")  # families whose published repositories have no file of an image processor
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
LEAST_SHARE = 0.99  # of the parameters in conf/model; some files lack what is computed, such as fixed positions
SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class FolderReport:
    """`problems`: why the folder cannot be used, in a line each. `notes`: what else a user should know. `dtypes`: dtype -> elements.
    `parameters`: elements of all tensors, 0 where no header could be read. `source`: of the manifest.
    `ours`: a run of ours wrote it."""

    folder: str
    adapter: bool
    problems: tuple[str, ...]
    notes: tuple[str, ...]
    identity: Identity | None
    files: int
    size_bytes: int
    tensors: int
    parameters: int
    dtypes: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    ours: bool = False


@dataclass(frozen=True, kw_only=True)
class Tensors:
    """What the headers of the weight files hold. `numbers`: tensor -> elements; `files`: tensor -> file name."""

    numbers: dict[str, int] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)


def check_folder(folder: Path, models: Mapping[str, Mapping[str, Any]], *, hashes: bool = False) -> FolderReport:
    """Raises ConfigRefused only where there is no such folder."""
    if not folder.is_dir():
        raise ConfigRefused(f"{folder}: there is no such folder. Name the one that holds config.json and the weight files")
    adapter = (folder / ADAPTER_CONFIG_FILE).is_file() and not (folder / CONFIG_FILE).is_file()
    problems, notes = list(find_broken_files(folder)), list[str]()
    tensors, broken = read_tensors(folder)
    problems += broken
    identity, unknown = find_identity(folder, models)
    problems += unknown
    problems += [*find_missing(folder, identity, adapter=adapter), *check_state(folder), *check_manifest(folder, hashes=hashes)]
    if identity is not None and identity.model and not adapter and not broken:
        lacks, said = compare_numbers(folder, models[identity.model], tensors)
        problems, notes = problems + lacks, notes + said
    notes += find_notes(folder)
    files = [path for path in folder.iterdir() if path.is_file()]
    elements: Counter[str] = Counter()
    for name, number in tensors.numbers.items():
        elements[DTYPES.get(tensors.dtypes[name], tensors.dtypes[name])] += number
    return FolderReport(
        folder=str(folder),
        adapter=adapter,
        problems=tuple(dict.fromkeys(problems)),
        notes=tuple(notes),
        identity=identity,
        files=len(files),
        size_bytes=sum(path.stat().st_size for path in files),
        tensors=len(tensors.numbers),
        parameters=sum(tensors.numbers.values()),
        dtypes=dict(elements.most_common()),
        source=describe_source(folder),
        ours=find_state_file(folder) is not None,
    )


def find_identity(folder: Path, models: Mapping[str, Mapping[str, Any]]) -> tuple[Identity | None, list[str]]:
    try:
        return identify(folder, models), []
    except ConfigRefused as error:
        return None, [str(error)]


# ------------------------------------------------------------------------------------------------------------------ files


def find_broken_files(folder: Path) -> Iterator[str]:
    """Files of another kind than their names say, at the top of the folder."""
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not path.exists():
            yield f"{path.name} is a link to {path.readlink()}, which does not exist. Copy the folder with its links followed: cp -rL, rsync -L"
        elif path.is_file() and path.name.endswith(UNFINISHED_ENDINGS):
            yield f"{path.name} is an unfinished download. Continue it, or remove it"
        elif path.is_file():
            yield from check_begin(path)
    if (folder / ".fetch" / "pending.json").is_file():
        yield f"the fetch into this folder has not ended. Run again: omnilaunch model fetch MODEL --to {folder}"


def check_begin(path: Path) -> Iterator[str]:
    with path.open("rb") as stream:
        begin = stream.read(64)
    if begin.startswith(POINTER):
        yield f"{path.name} is a pointer of git LFS ({path.stat().st_size} bytes), not the content. Run: git lfs pull, or omnilaunch model fetch"
    elif path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            what = "is an HTML page" if begin.lstrip()[:1] == b"<" else f"is no JSON file ({str(error)[:80]})"
            yield f"{path.name} {what}. Copy it again"


def read_tensors(folder: Path) -> tuple[Tensors, list[str]]:
    """The tensors of all weight files, and what is wrong with the files."""
    found, wrong = Tensors(), []
    try:
        files = weight_files(folder)
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return found, ["the index of the weights cannot be read: it has no object weight_map. Copy it again"]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        wrong.append(f"{len(missing)} of {plural(len(files), 'weight file')} missing: {list_some(missing, SHOWN)}")
    for file in (file for file in files if file.is_file()):
        if ".." in file.parts or not file.is_relative_to(folder):
            wrong.append(f"the index names {file.name}, outside of the folder")
        elif is_safetensors(file):
            wrong += read_file(file, found)
        elif not zipfile.is_zipfile(file) and file.stat().st_size:
            wrong.append(f"{file.name} is no file of torch, or is truncated. Copy it again")
    if not missing and not wrong:
        wrong += compare_index(folder, found)
    return found, wrong


def read_file(file: Path, found: Tensors) -> list[str]:
    try:
        for name, entry, _ in read_header(file):
            found.numbers[name], found.dtypes[name], found.files[name] = prod(entry["shape"]), str(entry["dtype"]), file.name
            first, last = entry["data_offsets"]
            if entry["dtype"] in BYTES and last - first != prod(entry["shape"]) * BYTES[entry["dtype"]]:
                return [
                    f"{file.name}: the tensor {name} has {last - first:,} bytes, which is not its shape {entry['shape']}. Copy the file again"
                ]
    except InputRefused as error:
        pointer = file.read_bytes()[:64].startswith(POINTER) if file.stat().st_size < 1024 else False
        return [] if pointer else [str(error).replace(f"{file.parent}/", "")]
    except (KeyError, TypeError, ValueError):
        return [f"{file.name}: its header is damaged. Copy the file again"]
    return []


def compare_index(folder: Path, found: Tensors) -> list[str]:
    """The tensors that the index names are those of the files."""
    if not (folder / INDEX).is_file() or not found.numbers:
        return []
    named: dict[str, str] = read_object(folder / INDEX)["weight_map"]
    lacking = sorted(name for name, file in named.items() if found.files.get(name) != file)
    if not lacking:
        return []
    return [
        f"the files that {INDEX} names lack {plural(len(lacking), 'tensor')}, such as {lacking[0]} in {named[lacking[0]]}. Copy the folder again"
    ]


# ---------------------------------------------------------------------------------------------------------------- content


def find_missing(folder: Path, identity: Identity | None, *, adapter: bool) -> Iterator[str]:
    """The small files without which the trainer cannot start."""
    if adapter:
        base = str(read_safely(folder / ADAPTER_CONFIG_FILE).get("base_model_name_or_path") or "")
        if not Path(base).is_dir():
            yield f"the base model of the adapter, {base or 'not named'}, is not on this machine. Copy it there"
        return
    if not any(all((folder / name).is_file() for name in names) for names in TOKENIZERS):
        yield "no tokenizer: tokenizer.json, or vocab.json with merges.txt, or tokenizer.model"
    family = identity.family if identity else ""
    if family not in WITHOUT_PROCESSOR and not any((folder / name).is_file() for name in PROCESSORS):
        yield f"no image processor: {' or '.join(PROCESSORS)}"


def read_safely(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except ConfigRefused:
        return {}


def check_state(folder: Path) -> Iterator[str]:
    """The sizes that a checkpoint of ours records."""
    if (file := find_state_file(folder)) is None:
        return
    try:
        state: CheckpointState = read(CheckpointState, file)
    except SpecError as error:
        yield str(error)
        return
    if wrong := describe_missing(missing_files(folder, state), file.name):
        yield wrong


def check_manifest(folder: Path, *, hashes: bool) -> Iterator[str]:
    """Sizes, and with `hashes` contents, against what the hub listed when the folder was fetched."""
    try:
        manifest = read_manifest(folder)
    except SpecError as error:
        yield f"the manifest cannot be read: {error}"
        return
    if manifest is None:
        if hashes:
            yield "there is no manifest to compare hashes with: the folder was not made by omnilaunch model fetch"
        return
    for file in manifest.files:
        path = folder / file.path
        if not is_plain_path(file.path):
            yield f"the manifest names {file.path!r}, outside of the folder"
        elif not path.is_file():
            yield f"{file.path} is missing; the manifest names it"
        elif path.stat().st_size != file.size:
            yield f"{file.path} has {path.stat().st_size:,} bytes, the manifest says {file.size:,}"
        elif hashes and (difference := find_difference(path, file)):
            yield f"{file.path} {difference.replace('is listed', 'is in the manifest')}"


def compare_numbers(folder: Path, model: Mapping[str, Any], tensors: Tensors) -> tuple[list[str], list[str]]:
    """(problems, notes) about the number of parameters: that of conf/model counts tied embeddings once and no fixed positions."""
    total, found = int(model["parameters"]["total"]), sum(tensors.numbers.values())
    quantized = bool(read_safely(folder / CONFIG_FILE).get("quantization_config"))
    if not found or quantized:
        return [], ["quantized: its tensors are not counted against conf/model"] if quantized else []
    if found < LEAST_SHARE * total:
        return [f"{found:,} parameters, and {model['name']} has {total:,}: tensors are missing"], []
    return [], [
        f"{found - total:,} more elements than {model['name']} trains or loads: parts that are not read, or buffers"
    ] if found > total else []


def find_notes(folder: Path) -> Iterator[str]:
    content = read_safely(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else {}
    tied = content.get("tie_word_embeddings", part_of(content, "text_config").get("tie_word_embeddings"))
    if tied:
        yield "embeddings and output head are tied"
    if code := sorted(path.name for path in folder.glob("*.py")):
        yield f"{plural(len(code), 'file')} of code ({', '.join(code[:3])}{', ...' if len(code) > 3 else ''}): never run"
    if (folder / PICKLED_INDEX).is_file() and not (folder / INDEX).is_file():
        yield "weights in .bin files: read with torch's loader for tensors only"


def describe_source(folder: Path) -> str:
    try:
        manifest = read_manifest(folder)
    except SpecError:
        return ""
    return f"{manifest.id} at {manifest.revision}, fetched {manifest.date} from {manifest.endpoint}" if manifest else ""
