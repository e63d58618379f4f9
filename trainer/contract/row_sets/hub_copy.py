"""Copies of a hub's data sets on this machine. Nothing is downloaded.

Hugging Face keeps `datasets--OWNER--NAME/snapshots/COMMIT` in its cache, ModelScope `datasets/OWNER/NAME` (huggingface_hub: file_download.py;
modelscope: hub/utils/utils.py, get_cache_dir).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = "datasets--"  # its folder in the cache of huggingface_hub: datasets--OWNER--NAME
IDENTIFIER = re.compile(r"(?:(HF|MS)::)?([\w.-]+/[\w.-]+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class HubName:
    """`hub`: 'HF' or 'MS', '' where either is meant. `name`: OWNER/NAME."""

    hub: str
    name: str


def read_name(text: str) -> HubName | None:
    found = IDENTIFIER.fullmatch(text)
    return HubName(hub=(found[1] or "").upper(), name=found[2]) if found and ".." not in found[2].split("/") else None


def find_copy(named: HubName, folders: tuple[Path, ...], environ: Mapping[str, str]) -> Path | None:
    """The first folder with the data set: below one of `folders`, in the caches of the two hubs. A cache whose variable `environ` lacks is looked
    for below its HOME."""
    found = [below for folder in folders for below in (folder / named.name, *snapshots(folder, named), *modelscope_folders(folder, named))]
    found += [below for hub in hub_caches(environ) if named.hub != "MS" for below in snapshots(hub, named)]
    found += [below for root in modelscope_caches(environ) if named.hub != "HF" for below in modelscope_folders(root, named)]
    return next((folder for folder in found if folder.is_dir()), None)


def find_repository(named: HubName, environ: Mapping[str, str]) -> Path | None:
    """The folder of a cache that, as a mirror, has the data set: that of the repository, or the whole cache of ModelScope."""
    copy = find_copy(named, (), environ)
    if copy is None:
        return None
    repository = next((above for above in copy.parents if above.name.startswith(REPOSITORY)), None)
    return repository or copy.parents[2]


def snapshots(folder: Path, named: HubName) -> tuple[Path, ...]:
    """Those of the repository, which is `folder` or in it: that of `refs/main` first, then the others, the newest first."""
    name = f"{REPOSITORY}{named.name.replace('/', '--')}"
    repository = folder if folder.name == name else folder / name
    try:
        main = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = ""
    others = sorted((repository / "snapshots").glob("*"), key=lambda path: (path.name != main, -path.stat().st_mtime_ns))
    return tuple(others)


def modelscope_folders(root: Path, named: HubName) -> tuple[Path, ...]:
    """ModelScope replaces dots in the names of its folders."""
    names = dict.fromkeys((named.name, named.name.replace(".", "___")))
    return tuple(root / "datasets" / name for name in names)


def hub_caches(environ: Mapping[str, str]) -> tuple[Path, ...]:
    if given := environ.get("HF_HUB_CACHE"):
        return (Path(given),)
    if home := environ.get("HF_HOME"):
        return (Path(home) / "hub",)
    return tuple(cache / "huggingface" / "hub" for cache in user_cache(environ))


def modelscope_caches(environ: Mapping[str, str]) -> tuple[Path, ...]:
    roots = (
        (Path(environ["MODELSCOPE_CACHE"]),) if environ.get("MODELSCOPE_CACHE") else tuple(c / "modelscope" for c in user_cache(environ))
    )
    return tuple(path for root in roots for path in (root, root / "hub"))


def user_cache(environ: Mapping[str, str]) -> tuple[Path, ...]:
    if given := environ.get("XDG_CACHE_HOME"):
        return (Path(given),)
    return (Path(environ["HOME"]) / ".cache",) if environ.get("HOME") else ()


def tell_commands(named: HubName, folder: str) -> str:
    """How a copy is made. Both tools write the files of the repository into the folder."""
    target = f"{folder.rstrip('/')}/{named.name}"
    commands = {
        "HF": f"huggingface-cli download --repo-type dataset {named.name} --local-dir {target}",
        "MS": f"modelscope download --dataset {named.name} --local_dir {target}",
    }
    return ", or ".join(command for hub, command in commands.items() if named.hub in ("", hub))
