"""inputs.json: the files that a run reads, with their hashes. A rerun is refused when its inputs differ from those of the record.

The hashes of weights are cached by size and times of the file (`HASHES_FILE`, beside the built-in data), because hashing 65 GB takes
minutes on one core. Images are hashed by the data check (trainer.data.kept_check).
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from trainer.contract import SCHEMA, Expectation, InputRefused, Inputs, TrainSpec, write_text
from trainer.contract.adapter_files import find_base
from trainer.contract.checkpoint_files import STATE_FILES
from trainer.contract.listing import describe_changes
from trainer.data.check import DataPaths
from trainer.data.media.image import hash_file
from trainer.data.media.store import MEDIA_FOLDER, store_of

HASHES_FILE = "hashes.json"
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def list_inputs(spec: TrainSpec, paths: DataPaths, files: Mapping[Path, str]) -> Inputs:
    """`files`: the data files with their hashes. Raises OSError for weights that cannot be read."""
    data = {name_below(path, paths, spec): digest for path, digest in files.items()}
    return Inputs(schema=SCHEMA, data=dict(sorted(data.items())), weights=hash_weights_of(spec))


def name_below(path: Path, paths: DataPaths, spec: TrainSpec) -> str:
    for folder in store_of(spec).folders:
        if path.is_relative_to(folder):
            return f"{MEDIA_FOLDER}/{path.relative_to(folder).as_posix()}"
    first = paths.train or paths.evaluation
    below = paths.images or (first.parent if first else Path(spec.data.root))
    for folder in (below, Path(spec.data.root)):
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return str(path)


def hash_weights_of(spec: TrainSpec) -> dict[str, str]:
    folders = dict(weight_folders(spec))
    known = read_hashes(Path(spec.data.root) / HASHES_FILE)
    before = dict(known)
    found = {
        f"{what}/{path.name}": hash_known(path, known)
        for what, folder in folders.items()
        for pattern in WEIGHT_FILES
        for path in sorted(folder.glob(pattern))
        if path.is_file() and path.name not in STATE_FILES  # they belong to the run that saved the weights
    }
    if known != before:
        write_hashes(known, Path(spec.data.root) / HASHES_FILE)
    return dict(sorted(found.items()))


def weight_folders(spec: TrainSpec) -> Iterable[tuple[str, Path]]:
    """(name, folder) of the weights that the stage starts from, including the base of an adapter. Weights from the hub have no folder."""
    named = {"checkpoint": spec.stage.checkpoint, "model": "" if spec.stage.checkpoint else spec.model.source.path}
    for what, text in named.items():
        if text and Path(text).is_dir():
            yield what, Path(text)
            if base := read_base(Path(text), spec):
                yield "base", base


def read_base(folder: Path, spec: TrainSpec) -> Path | None:
    """The folder of the base model of an adapter; None for other weights. An invalid adapter is reported by the ranks when they load it."""
    try:
        base = find_base(folder, spec)
    except InputRefused:
        return None
    return Path(base) if base and Path(base).is_dir() else None


# -------------------------------------------------------------------------------------------------------------- known hashes


def hash_known(path: Path, known: dict[str, list[int | str]]) -> str:
    """The hash; from `known` if size, times and inode of the file are unchanged. A file that replaced it has another inode or ctime, even if
    its mtime was set to the same value."""
    stat = path.stat()
    mark: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entry = known.get(str(path.resolve()), [])
    if entry[:4] == mark and len(entry) == 5:
        return str(entry[4])
    digest = hash_file(path)
    known[str(path.resolve())] = [*mark, digest]
    return digest


def read_hashes(path: Path) -> dict[str, list[int | str]]:
    """{} for a missing or damaged file: everything is hashed again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: entry for key, entry in found.items() if isinstance(entry, list)} if isinstance(found, dict) else {}


def write_hashes(known: Mapping[str, list[int | str]], path: Path) -> None:
    """Write the entries of files that still exist. A failure is ignored: the files are hashed again next time."""
    existing = {name: entry for name, entry in known.items() if Path(name).is_file()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(existing) + "\n", path)


# ------------------------------------------------------------------------------------------------------------------ reruns


def refuse_other_inputs(expects: Expectation | None, inputs: Inputs, data_sha256: str) -> None:
    """Raises InputRefused when a rerun would read other weights or other data than the run that it repeats."""
    if expects is None:
        return
    wrong = [f"weights {line}" for line in describe_changes(expects.weights, inputs.weights)] if expects.weights else []
    if expects.data_sha256 and expects.data_sha256 != data_sha256:
        wrong.append(f"data: {data_sha256[:12]} instead of {expects.data_sha256[:12]} (SHA-256 over all rows and images)")
    if wrong:
        lines = "\n".join(f"  {line}" for line in wrong)
        raise InputRefused(f"the inputs differ from those of run {expects.run_id}:\n{lines}")
