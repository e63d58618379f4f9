"""Writes what is generated from images/versions.yaml and images/proven.json: the rendered Dockerfiles and docs/images.md."""

from pathlib import Path

from launcher.image.proof import Proof, lock_digest, read_proofs
from launcher.image.stack import UNPINNED, Stack, draw, load_stacks

TABLE_FILE = "docs/images.md"


def write_rendered(root: Path) -> tuple[Path, ...]:
    """Write images/rendered/<stack>/Dockerfile for every stack, and docs/images.md; return the paths."""
    stacks = load_stacks(root / "images")
    texts = {rendered_path(root, name): draw(stack, root) for name, stack in stacks.items()}
    texts[root / TABLE_FILE] = describe_stacks(stacks, root)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tuple(texts)


def rendered_path(root: Path, stack: str) -> Path:
    return root / "images" / "rendered" / stack / "Dockerfile"


def describe_stacks(stacks: dict[str, Stack], root: Path) -> str:
    """docs/images.md: the versions, what was built and tested, and the source of each value."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    packages = {name: {f"{package} {version}" for package, version in stack.packages.items()} for name, stack in stacks.items()}
    common = set.intersection(*packages.values())
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("images.md.j2").render(
        stacks=stacks.values(),
        unpinned=UNPINNED,
        common=sorted(common),
        added={name: sorted(own - common) for name, own in packages.items() if own - common},
        proven="\n".join(proof_table(stacks, root)),
    )


def proof_table(stacks: dict[str, Stack], root: Path) -> list[str]:
    proofs = read_proofs(root)
    rows: list[tuple[str, ...]] = [("stack", "architecture", "size", "built from", "shown", "not tested", "when")]
    for stack in stacks.values():
        for architecture in stack.host_architectures:
            lock = lock_digest(stack, architecture, root)
            shared = next(
                (proof for proof in proofs.values() if proof.lock == lock and not proof.base), None
            )  # of a stack with the same lock
            rows.append(proof_row(stack, architecture, proofs.get(f"{stack.name}-{architecture}", shared), lock))
    return markdown(tuple(rows))


def proof_row(stack: Stack, architecture: str, proof: Proof | None, lock: str) -> tuple[str, ...]:
    if proof is None:
        return (stack.name, architecture, "", "not built", "", "everything" if lock else "everything: the lock is not resolved yet", "")
    when = proof.date if proof.lock == lock else f"{proof.date}, with an earlier lock"
    size = f"{proof.size_bytes / 1e9:.2f} GB" + ("" if proof.base else " of packages")
    return (stack.name, architecture, size, proof.base or "not built, only fetched", "; ".join(proof.shown), proof.missing, when)


def markdown(rows: tuple[tuple[str, ...], ...]) -> list[str]:
    """The lines of a table. The first row is its head."""
    head, *body = rows
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body)]
