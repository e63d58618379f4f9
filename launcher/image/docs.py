"""What is drawn from images/versions.yaml and images/proven.json for readers: Dockerfiles, docs/images.md. Pure but for writing."""

from pathlib import Path

from launcher.image.proof import Proof, lock_digest, read_proofs
from launcher.image.stack import UNPINNED, Stack, draw, load_stacks

TABLE_FILE = "docs/images.md"


def write_rendered(root: Path) -> tuple[Path, ...]:
    """Draw images/rendered/<stack>/Dockerfile for every stack again, and docs/images.md; the files written."""
    stacks = load_stacks(root / "images")
    drawn = {rendered_path(root, name): draw(stack, root) for name, stack in stacks.items()}
    drawn[root / TABLE_FILE] = describe_stacks(stacks, root)
    for path, text in drawn.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tuple(drawn)


def rendered_path(root: Path, stack: str) -> Path:
    return root / "images" / "rendered" / stack / "Dockerfile"


def describe_stacks(stacks: dict[str, Stack], root: Path) -> str:
    """docs/images.md: the versions, what was built and tested where, then where each pairing was read."""
    return "\n".join(
        (
            "# Images",
            "",
            "Written by `omnilaunch image render` from images/versions.yaml and images/proven.json. Do not edit.",
            "",
            *versions(stacks),
            "",
            *packages(stacks),
            "",
            "## What was built and tested",
            "",
            "Written by `make image-check ARGS=--prove`. A stand-in base is Debian 12 with its Python 3.11, made by debootstrap where no",
            "registry can be reached. No image has been run on an NPU.",
            "",
            *proven(stacks, root),
            "",
            "\n\n".join(f"## {stack.name}: {stack.title}\n\n{facts(stack)}" for stack in stacks.values()),
            "",
        )
    )


def packages(stacks: dict[str, Stack]) -> tuple[str, ...]:
    """What all stacks have, then what some have besides."""
    pinned = {name: {f"{package} {version}" for package, version in stack.packages.items()} for name, stack in stacks.items()}
    common = set.intersection(*pinned.values())
    more = {name: ", ".join(sorted(own - common)) for name, own in pinned.items() if own - common}
    return (f"In every stack: {', '.join(sorted(common))}.", *(f"In {name} besides: {own}." for name, own in more.items()))


def versions(stacks: dict[str, Stack]) -> list[str]:
    head = ("stack", "chips", "torch", "plugin", "toolkit", "host driver", "Python", "base image", "locked for", "licence to accept")
    return markdown((head, *map(version_row, stacks.values())))


def version_row(stack: Stack) -> tuple[str, ...]:
    low, high = stack.driver_minimum, stack.driver_maximum
    driver = f"{stack.driver_kind} {low or 'any'}" + (f" to {high}" if high else " or newer") if stack.driver_kind != "none" else ""
    base = f"{stack.base} (not pinned yet)" if stack.digest == UNPINNED else f"{stack.base}@{stack.digest[:19]}"
    locked = ", ".join(name if lock else f"{name} (not resolved yet)" for name, lock in stack.locks.items())
    chips = ", ".join(stack.chip_architectures)
    return (stack.name, chips, stack.torch, stack.plugin, stack.toolkit, driver, stack.python, base, locked, stack.licence)


def proven(stacks: dict[str, Stack], root: Path) -> list[str]:
    proofs = read_proofs(root)
    head = ("stack", "architecture", "size", "built from", "shown", "not tried", "when")
    rows = []
    for stack in stacks.values():
        for architecture in stack.host_architectures:
            lock = lock_digest(stack, architecture, root)
            fetched = next((proof for proof in proofs.values() if proof.lock == lock and not proof.base), None)  # of a stack that shares it
            rows.append(proof_row(stack, architecture, proofs.get(f"{stack.name}-{architecture}", fetched), lock))
    return markdown((head, *rows))


def proof_row(stack: Stack, architecture: str, proof: Proof | None, lock: str) -> tuple[str, ...]:
    if proof is None:
        return (stack.name, architecture, "", "not built", "", "everything" if lock else "everything: the lock is not resolved yet", "")
    when = proof.date if proof.lock == lock else f"{proof.date}, with an earlier lock"
    size = f"{proof.size_bytes / 1e9:.2f} GB" + ("" if proof.base else " of packages")
    return (stack.name, architecture, size, proof.base or "not built, fetched", "; ".join(proof.shown), proof.missing, when)


def markdown(rows: tuple[tuple[str, ...], ...]) -> list[str]:
    head, *body = rows
    return [f"| {' | '.join(cells)} |" for cells in (head, ("---",) * len(head), *body)]


def facts(stack: Stack) -> str:
    support = [f"- {what}: {until}" for what, until in stack.support.items()]
    sources = [f"- {what}: {source}" for what, source in stack.sources.items()]
    return "\n".join(["Support:", "", *support, "", "Sources:", "", *sources])
