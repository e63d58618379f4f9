"""Many images that are not there usually have one cause: their folder. What the missing paths have in common, where files of the same names are, and
the override with which they would be found, if there is one."""

import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from trainer.contract import DataProblem
from trainer.data.rows.row_check import is_file, missing_file

FEW = 2  # missing images of a file from which a common cause is looked for
TRIED = 2000  # paths of which an answer is tested, evenly spread
FOLDERS = 200  # that are looked into beside those that are named
READ_BYTES = 2**20


def name_roots(problems: Sequence[DataProblem], images_of: Mapping[str, Path], found: Iterable[Path]) -> tuple[DataProblem, ...]:
    """The problems, of which those of missing images have a fix for all of their file. `images_of`: annotation file -> the folder that its image
    paths start at. `found`: images that are there."""
    missing: dict[str, list[str]] = {}
    for problem in problems:
        if (path := missing_file(problem.problem)) and "…" not in path:  # a shortened one is no path
            missing.setdefault(problem.file, []).append(path)
    there = list(found)
    shared = {file: list(dict.fromkeys(paths)) for file, paths in missing.items() if file in images_of}
    fixes = {file: explain(Path(file), images_of[file], paths, there) for file, paths in shared.items() if len(paths) >= FEW}
    return tuple(replace(each, fix=fixes[each.file]) if missing_file(each.problem) and each.file in fixes else each for each in problems)


def explain(file: Path, folder: Path, paths: Sequence[str], found: Sequence[Path]) -> str:
    """One fix for all of them. `paths`: without repetitions."""
    common = os.path.commonpath([str(Path(path).parent) for path in paths])
    what = f"all {len(paths):,} missing paths are in {common}" + ("" if Path(common).is_dir() else ", which is no folder here")
    tried = [Path(path) for path in paths[:: max(1, len(paths) // TRIED)]]
    for way in find_ways(file, folder, tried, found):
        return f"{what}; {way}"
    places = " and ".join(map(str, dict.fromkeys((folder, file.parent))))
    if all(path.is_relative_to(folder) for path in tried):
        way = f"set data.images (now {folder}) to the folder of the images"
    else:
        way = "write the paths relative to the folder of the images, and set data.images to it"
    return f"{what}, and no files of these names are in {places}: put the images into {common}, or {way}"


def find_ways(file: Path, folder: Path, paths: Sequence[Path], found: Sequence[Path]) -> Iterator[str]:
    """Ways that would find all of the paths, tested on the file system."""
    relative = all(path.is_relative_to(folder) for path in paths) and not contains(file, f'"{paths[0]}"')
    own = [image.relative_to(folder) for image in found if image.is_relative_to(folder)]
    bases = list(dict.fromkeys(nearby(folder, file.parent)))
    if relative:
        wanted = [*(path.relative_to(folder) for path in paths), *own[:TRIED]]  # what is found now must be found then
        for base in bases:
            if all(is_file(base / name) for name in wanted):
                yield f"they are in {base}: set data.images={shlex.quote(str(base))}"
    for base in bases:
        for depth in range(1, len(paths[0].parts)):
            prefix = Path(*paths[0].parts[:depth])
            if relative and folder.is_relative_to(prefix):
                continue
            if is_file(base / paths[0].relative_to(prefix)) and all(
                path.is_relative_to(prefix) and is_file(base / path.relative_to(prefix)) for path in paths
            ):
                yield describe_move(file, base, prefix.relative_to(folder) if relative else prefix)
                break


def nearby(folder: Path, beside: Path) -> Iterator[Path]:
    """Folders in which images may be, instead of below `folder`: it and the annotation file's, those above, and those in them."""
    for start in (folder, beside):
        yield start
        yield from start.parents[:2]
        try:
            yield from sorted(path for path in list(start.iterdir())[: FOLDERS * 10] if path.is_dir())[:FOLDERS]
        except OSError:
            continue


def describe_move(file: Path, base: Path, prefix: Path) -> str:
    """Files of the same names without the first folders of their paths. data.images does not change whole paths, so the rows are rewritten."""
    written = f"{str(prefix).rstrip('/')}/"
    same = f"files of the same names are in {base}, without {written}"
    new = file.with_name(f"{file.stem}_here{file.suffix}")
    if "#" in written or not contains(file, f'"{written}'):
        return f"{same}: write the paths without it, and set data.images={shlex.quote(str(base))}"
    literal = re.sub(r"([.\[\]*^$\\])", r"\\\1", written)
    script = shlex.quote(f's#"{literal}#"#g')
    command = f"sed {script} {shlex.quote(str(file))} > {shlex.quote(str(new))}"
    return f"{same}: run {command} and set data.train={shlex.quote(str(new))} data.images={shlex.quote(str(base))}"


def contains(file: Path, text: str) -> bool:
    """Whether the beginning of a file has the text as it is: a JSON file may write a slash as \\/."""
    try:
        with file.open("rb") as opened:
            return text.encode() in opened.read(READ_BYTES)
    except OSError:
        return False
