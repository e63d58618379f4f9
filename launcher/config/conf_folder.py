"""Where the files of the axes are: conf/ of the project, and before it a folder of the user's own (`--conf DIR`, or OMNILAUNCH_CONF).

A folder of the user has the same folders as conf/, as many of them as it needs: DIR/cluster/lab.yaml is `cluster=lab`. A file there is taken
in place of a file of the project with the same name. The primary config, conf/config.yaml, is always the project's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from launcher.config.schema import AXES
from launcher.errors import ConfigRefused

VARIABLE = "OMNILAUNCH_CONF"
PRIMARY = "config"
OPTIONAL_GROUPS = ("tune", "experiment")
GROUPS = (*AXES, *OPTIONAL_GROUPS)


@dataclass(frozen=True, kw_only=True)
class ConfFolder:
    """`own`: the user's folder, absolute; None if there is none."""

    project: Path
    own: Path | None = None

    @cached_property
    def folders(self) -> tuple[Path, ...]:
        """In the order of the search."""
        return (self.own, self.project) if self.own else (self.project,)

    def list_groups(self) -> dict[str, tuple[str, ...]]:
        """Group -> the names of its files."""
        found = {folder.name: {*list_names(folder)} for folder in sorted(self.project.iterdir()) if folder.is_dir()}
        for group in GROUPS if self.own else OPTIONAL_GROUPS:
            found.setdefault(group, set()).update(list_names(self.own / group) if self.own else ())
        return {group: tuple(sorted(names)) for group, names in found.items()}

    def find(self, group: str, name: str) -> Path:
        """The file that is used; the project's, where there is none."""
        files = [folder / group / f"{name}.yaml" for folder in self.folders]
        return next((file for file in files if file.is_file()), files[-1])

    def describe(self, group: str, name: str) -> str:
        """The file as a person reads it: relative to the project, or the whole path of one that is the user's own."""
        return self.relative(self.find(group, name))

    def relative(self, file: Path) -> str:
        return str(file.relative_to(self.project.parent)) if file.is_relative_to(self.project.parent) else str(file)

    def is_shadowing(self, file: Path) -> bool:
        """Whether this file of the user is taken in place of one of the project."""
        return bool(self.own and file.is_relative_to(self.own) and (self.project / file.relative_to(self.own)).is_file())


def as_conf_folder(conf: Path | ConfFolder) -> ConfFolder:
    return conf if isinstance(conf, ConfFolder) else ConfFolder(project=conf)


def list_names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.stem for file in folder.glob("*.yaml")))


def find_conf(project: Path, option: str, environ: Mapping[str, str]) -> ConfFolder:
    """`project`: its conf/. `option`: of --conf, which counts before the variable; '' for none of the two. Raises ConfigRefused for a folder
    that does not exist, or in which nothing would be found."""
    text, source = (option, f"--conf {option}") if option else (environ.get(VARIABLE, ""), f"{VARIABLE}={environ.get(VARIABLE, '')}")
    if not text:
        return ConfFolder(project=project)
    own = Path(text).expanduser()
    try:
        why = find_fault(own)
    except OSError as error:
        why = f"cannot be read: {error.strerror}"
    if why:
        raise ConfigRefused(f"{source}: {why}")
    return ConfFolder(project=project, own=own.resolve() if own.resolve() != project.resolve() else None)


def find_fault(own: Path) -> str:
    """Why nothing would be found in the folder, '' if something would."""
    if not own.is_dir():
        return "is a file; name the folder that has cluster/ and other folders of conf/" if own.exists() else "there is no such folder"
    if (own / f"{PRIMARY}.yaml").exists():
        return f"has a {PRIMARY}.yaml, and only the project has one. Set its keys with KEY=VALUE, or in an experiment: {own}/experiment/NAME.yaml"
    names = sorted(path.name for path in own.iterdir())
    if any((own / group).is_dir() for group in GROUPS):
        return ""
    if own.name in GROUPS and any(name.endswith(".yaml") for name in names):
        return f"is the folder of one axis; name the folder above it: --conf {own.parent}"
    return f"has none of the folders {', '.join(GROUPS)}. A cluster file belongs into {own}/cluster/NAME.yaml"
