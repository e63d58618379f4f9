"""What was built and tested, and where: images/proven.json, written by `make image-check ARGS=--prove`.

A proof belongs to a lock by its sha256. After the lock has changed, it is shown as a proof of an earlier lock until the checks run again.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import ImageFailed
from launcher.image.stack import Stack, digest
from trainer.contract import SpecError, decode

PROVEN_FILE = "images/proven.json"


@dataclass(frozen=True, kw_only=True)
class Proof:
    """One stack on one architecture. `lock`: sha256; `base`: the base image, '' if the packages were only fetched; `size_bytes`: of the
    image or of the fetched files; `shown`: what was tested; `missing`: what was not available for further tests."""

    stack: str
    architecture: str
    lock: str
    base: str
    size_bytes: int
    shown: tuple[str, ...]
    missing: str
    date: str

    @property
    def key(self) -> str:
        return f"{self.stack}-{self.architecture}"


def read_proofs(root: Path) -> dict[str, Proof]:
    """<stack>-<architecture> -> proof. Raises ImageFailed for a file that `write_proof` would not write."""
    path = root / PROVEN_FILE
    try:
        rows: list[Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
        proofs: list[Proof] = [decode(Proof, row, "proof") for row in rows]
    except (ValueError, SpecError, TypeError) as error:
        raise ImageFailed(f"{path}: {error}; write it again with: make image-check ARGS=--prove") from error
    return {proof.key: proof for proof in proofs}


def write_proof(root: Path, proof: Proof) -> None:
    """Add a proof, or replace the earlier one."""
    proofs = {**read_proofs(root), proof.key: proof}
    rows = [asdict(proofs[key]) for key in sorted(proofs)]
    (root / PROVEN_FILE).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def lock_digest(stack: Stack, architecture: str, root: Path) -> str:
    lock = stack.locks.get(architecture, "")
    return digest(root / "images" / lock) if lock else ""
