"""Two clean builds of one tree have the same files, one of them built without a network."""

import json
import stat
import subprocess
import tarfile
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from tests.images.conftest import Built, copy_project, run

pytestmark = pytest.mark.docker

Layer = dict[str, tuple[str, int, int, int, str]]
# Written by apt with the time of the build; nothing reads them.
PASSING = ("var/lib/dpkg/status-old", "var/lib/apt/extended_states")


def layers(image: str) -> list[Layer]:
    """Path -> kind, mode, owner, group, content of every file of every layer, lowest layer first."""
    found: dict[str, Layer] = {}
    order: list[str] = []
    with subprocess.Popen(("docker", "save", image), stdout=subprocess.PIPE) as save, tarfile.open(fileobj=save.stdout, mode="r|") as tar:
        for member in tar:
            file = tar.extractfile(member)
            if member.name.endswith("layer.tar") and file is not None:
                with tarfile.open(fileobj=file, mode="r|") as layer:
                    found[member.name] = {entry.name: described(layer, entry) for entry in layer if entry.name not in PASSING}
            elif member.name == "manifest.json" and file is not None:
                order = json.load(file)[0]["Layers"]
    assert save.returncode == 0 and len(order) == len(found) > 3
    return [found[name] for name in order]


def described(layer: tarfile.TarFile, entry: tarfile.TarInfo) -> tuple[str, int, int, int, str]:
    file = layer.extractfile(entry) if entry.isreg() else None
    content = sha256(file.read()).hexdigest() if file is not None else entry.linkname
    return entry.type.decode(), stat.S_IMODE(entry.mode), entry.uid, entry.gid, content


def test_a_build_without_a_network_equals_the_first(
    built: Built, make: Callable[..., Built], project: Path, wheelhouse: Path, tmp_path: Path
) -> None:
    """The first build uses the cached layers of the session's build, which had a network. The second uses no cache and has no network: all
    its packages come from the wheelhouse."""
    (tmp_path / ".cache").symlink_to(project / ".cache")
    root = copy_project(tmp_path)
    with (root / "trainer" / "train" / "loop.py").open("a", encoding="utf-8") as file:
        file.write(f"# one more line, {time.time_ns()}\n")
    first = make(root)
    second = make(root, fresh=True, wheelhouse=str(wheelhouse), find_links="", index="")
    try:
        assert first.image.tag == second.image.tag and first.id != second.id
        pairs = list(zip(layers(first.id), layers(second.id), strict=True))
        for place, (one, other) in enumerate(pairs):
            differing = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
            assert not differing, f"layer {place}: {differing[:10]} and {max(0, len(differing) - 10)} more"
        print(f"\n{len(pairs)} layers with {sum(len(one) for one, _ in pairs):,} entries are equal")
    finally:
        run("docker", "image", "rm", first.id, second.id)
