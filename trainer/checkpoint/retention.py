"""Which checkpoints of a run stay: the newest and the best; the others are removed."""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from trainer.checkpoint.best import find_best
from trainer.checkpoint.checkpoint import checkpoints_folder, list_checkpoints
from trainer.contract import TrainSpec

PARTIAL = ".{name}.partial"
REMOVED = ".{name}.removed"


def prune(spec: TrainSpec) -> None:
    """Remove all but the newest `keep_checkpoints` and the best one, and what killed ranks left half-written or half-removed. Folders that
    cannot be removed are reported; the run continues."""
    best = find_best(spec)
    for old in list_checkpoints(spec)[: -max(1, spec.keep_checkpoints)]:
        if best is None or old.name != Path(best.path).name:
            remove(old)
    for pattern in (PARTIAL, REMOVED):
        for left in checkpoints_folder(spec).glob(pattern.format(name="step-*")):
            discard(left)


def remove(folder: Path) -> None:
    """Rename it first, so that a half-removed checkpoint is never mistaken for a checkpoint."""
    gone = folder.with_name(REMOVED.format(name=folder.name))
    discard(gone)
    try:
        folder.rename(gone)
    except OSError as error:
        print(f"{folder} could not be removed: {error}. It is not needed any more: remove it by hand", flush=True)
        return
    discard(gone)


def discard(folder: Path) -> None:
    """Remove as much as possible. Of a link, only the link; on NFS a file that a process has open stays under another name."""
    if folder.is_symlink():
        with suppress(OSError):
            folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
    if os.path.lexists(folder):
        print(f"{folder} could not be removed completely. It is not needed any more: remove it by hand", flush=True)
