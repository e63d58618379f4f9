"""Which trackers of a run will be missing where its ranks run: a note of the plan, since the trainer refuses a tracker that it lacks."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

from launcher.config.schema import Config

IN_LOCKS = ("tensorboard",)  # of images/locks


def describe_missing(config: Config, *, named: bool, has: Callable[[str], bool] | None = None) -> tuple[str, ...]:
    """One line for each tracker that the ranks lack, () where the user named none: a default one that is missing is left out. `has`: whether
    a package is installed in this Python environment, in which a process on this machine runs."""
    has = has or is_installed
    if not named or config.stage.kind != "train":
        return ()
    return tuple(line for name in dict.fromkeys(config.run.trackers) if (line := describe_one(name, config, has)))


def describe_one(name: str, config: Config, has: Callable[[str], bool]) -> str:
    if config.cluster.runtime == "docker":
        return "" if name in IN_LOCKS else f"run.trackers: no image has the package {name}, so that the run will be refused: leave it out"
    if config.cluster.is_local:
        return (
            "" if has(name) else f"run.trackers: this Python environment lacks {name}, so that the run will be refused: pip install {name}"
        )
    return "" if name in IN_LOCKS else f"run.trackers: {name} is in no lock; it must be installed on every node: pip install {name}"


def is_installed(package: str) -> bool:
    """From its metadata alone: importing a tracker takes seconds."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False
