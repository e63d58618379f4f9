"""inputs.json: which files a run reads, each with its hash; and the refusal of others than the record of a rerun has.

Weights are hashed once and then known by size and times (`HASHES_FILE`, beside the built-in data): 65 GB take a core minutes. Images are
decoded and hashed in every check, so that nothing is taken on trust there.
"""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from trainer.contract import SCHEMA, Expectation, InputRefused, Inputs, TrainSpec, write_text
from trainer.data.check import DataPaths
from trainer.data.media.image import hash_file

HASHES_FILE = "hashes.json"
WEIGHT_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")
OF_THE_RUN = "trainer_state.json"  # says which run saved them, not what they are
NAMED = 10


def list_inputs(spec: TrainSpec, places: DataPaths, files: Mapping[Path, str]) -> Inputs:
    """`files`: those of the data with their hashes. Raises OSError for weights that cannot be read."""
    data = {name_below(path, places, spec): digest for path, digest in files.items()}
    return Inputs(schema=SCHEMA, data=dict(sorted(data.items())), weights=hash_weights_of(spec))


def name_below(path: Path, places: DataPaths, spec: TrainSpec) -> str:
    for folder in (places.images, Path(spec.data.root)):
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
        if path.is_file() and path.name != OF_THE_RUN
    }
    if known != before:
        keep_hashes(known, Path(spec.data.root) / HASHES_FILE)
    return dict(sorted(found.items()))


def weight_folders(spec: TrainSpec) -> Iterable[tuple[str, Path]]:
    """What the folders are that the stage's weights come from, those of an adapter's base besides; none of a hub's."""
    named = {"checkpoint": spec.stage.checkpoint, "model": "" if spec.stage.checkpoint else spec.model.source.path}
    for what, text in named.items():
        if text and Path(text).is_dir():
            yield what, Path(text)
            if base := read_base(Path(text)):
                yield "base", base


def read_base(folder: Path) -> Path | None:
    """Of an adapter. What is wrong with one is told by the ranks, which load it."""
    try:
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Path(named) if isinstance(named, str) and Path(named).is_dir() else None


# -------------------------------------------------------------------------------------------------------------- known hashes


def hash_known(path: Path, known: dict[str, list[int | str]]) -> str:
    """The hash, from `known` where the file's size, times and number are those of before. A file put in its place has another number or
    another time of change, whatever time of modification it was given."""
    stat = path.stat()
    mark: list[int | str] = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
    entry = known.get(str(path.resolve()), [])
    if entry[:4] == mark and len(entry) == 5:
        return str(entry[4])
    digest = hash_file(path)
    known[str(path.resolve())] = [*mark, digest]
    return digest


def read_hashes(path: Path) -> dict[str, list[int | str]]:
    """{} for a file that is not there or was damaged: all is hashed again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {key: entry for key, entry in found.items() if isinstance(entry, list)} if isinstance(found, dict) else {}


def keep_hashes(known: Mapping[str, list[int | str]], path: Path) -> None:
    """Of files that are still there. A place that cannot be written costs time alone."""
    there = {name: entry for name, entry in known.items() if Path(name).is_file()}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(there) + "\n", path)


# ------------------------------------------------------------------------------------------------------------------ reruns


def refuse_other_inputs(expects: Expectation | None, inputs: Inputs, data_sha256: str) -> None:
    """Raises InputRefused where a rerun would read other weights, or other data, than the run that it repeats."""
    if expects is None:
        return
    wrong = [f"weights {line}" for line in describe_changes(expects.weights, inputs.weights)] if expects.weights else []
    if expects.data_sha256 and expects.data_sha256 != data_sha256:
        wrong.append(f"data: {data_sha256[:12]} in place of {expects.data_sha256[:12]} (SHA-256 over all rows and images)")
    if wrong:
        said = "\n".join(f"  {line}" for line in wrong)
        raise InputRefused(f"not what run {expects.run_id} read:\n{said}")


def describe_changes(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line for each file that is another one, missing or new; the first ones."""
    names = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
    lines = [f"{name}: {'missing' if name not in found else 'new' if name not in expected else 'another file'}" for name in names]
    return lines[:NAMED] + ([f"and {len(lines) - NAMED:,} more"] if len(lines) > NAMED else [])
