"""What is sent to nodes that build their own image, with a docker client that records it. tests/images builds with a real engine."""

import os
import stat
from pathlib import Path

import pytest

from launcher.config.schema import Delivery
from launcher.errors import ImageFailed, NodeFailed
from launcher.image.stack import Image, context_files, load_stacks, render
from launcher.run.delivery.remote_build import build_on, refuse_unsendable
from launcher.run.run_folder import WorkingNode
from launcher.ssh.transport import Local
from tests.launcher.engine import Engine, command

ROOT = Path(__file__).resolve().parents[4]
# Records its arguments, its folder and its proxy. Then it fails with the text of the file `fails` in its home, or has the image.
DOCKER = """#!/bin/sh
if [ "$2" = --help ]; then echo "      --secret stringArray"; exit; fi
if [ "$1" = image ]; then
  [ -f "$HOME/label" ] || { echo "Error: No such image" >&2; exit 1; }
  printf '{"Id":"sha256:1","Config":{"Labels":{"io.omnilaunch.fingerprint":"%s"}}}\\n' "$(cat "$HOME/label")"; exit
fi
printf '%s\\n' "$@" >"$HOME/argv"; echo "$DOCKER_BUILDKIT $https_proxy" >"$HOME/said"; cp -a . "$HOME/work"
if [ -f "$HOME/fails" ]; then cat "$HOME/fails" >&2; exit 1; fi
for word; do case "$word" in io.omnilaunch.fingerprint=*) echo "${word#*=}" >"$HOME/label" ;; esac; done
"""
SECRET = "hunter2"


class BuildCluster:
    """Two nodes, a copy of the project, and the lines that were reported."""

    def __init__(self, folder: Path) -> None:
        (folder / "programs").mkdir()
        (folder / "programs" / "docker").write_text(DOCKER, encoding="utf-8")
        (folder / "programs" / "docker").chmod(0o755)
        self.homes = [folder / "n0", folder / "n1"]
        for home in self.homes:
            home.mkdir()
        self.project, self.root, self.said = folder / "project", folder / "srv" / "omnilaunch", list[str]()
        self.image = render(load_stacks(ROOT / "images")["cpu"], architecture="x86_64", root=ROOT)
        for path in context_files(ROOT, self.image.lock).values():
            target = self.project / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
        engines = [Engine(f"host{rank}", home, folder / "programs") for rank, home in enumerate(self.homes)]
        self.nodes = tuple(WorkingNode(command=command(engine.host, rank), transport=engine) for rank, engine in enumerate(engines))

    def build(self, delivery: Delivery, image: Image | None = None) -> None:
        source = Local({"PATH": os.environ["PATH"]})
        build_on(
            image or self.image, self.nodes, project=self.project, root=str(self.root), delivery=delivery, source=source, say=self.said.append
        )  # fmt: skip


@pytest.fixture
def cluster(tmp_path: Path) -> BuildCluster:
    return BuildCluster(tmp_path)


def test_every_node_builds_the_same_context_and_nothing_stays_there(cluster: BuildCluster, tmp_path: Path) -> None:
    bundle, wheels = tmp_path / "company.pem", tmp_path / "wheels"
    bundle.write_text("certificates", encoding="utf-8")
    wheels.mkdir()
    (wheels / "deepspeed-0.19.8.tar.gz").write_bytes(b"x")
    delivery = Delivery(
        kind="build_on_nodes", index=f"https://ann:{SECRET}@mirror.example/simple", ca_bundle=str(bundle), find_links=str(wheels),
        proxy=f"http://ann:{SECRET}@proxy.example:3128",
    )  # fmt: skip
    cluster.build(delivery)
    for home in cluster.homes:
        (context,) = (path for path in (home / "work").iterdir() if path.name != "secrets")
        assert (context / "Dockerfile").read_text(encoding="utf-8") == cluster.image.dockerfile
        assert {name for name in cluster.image.files if not (context / name).is_file()} == set()
        assert (context / "wheelhouse" / "deepspeed-0.19.8.tar.gz").read_bytes() == b"x"
        assert stat.S_IMODE((context / "trainer" / "train" / "loop.py").stat().st_mode) == 0o644, "the image's user must read it"
        secrets = home / "work" / "secrets"
        assert (secrets / "ca").read_text(encoding="utf-8") == "certificates" and SECRET in (secrets / "pip.conf").read_text(
            encoding="utf-8"
        )
        assert stat.S_IMODE((home / "work").stat().st_mode) == 0o700 and stat.S_IMODE((secrets / "pip.conf").stat().st_mode) == 0o600
        argv = (home / "argv").read_text(encoding="utf-8").splitlines()
        assert SECRET not in " ".join(argv) and "id=pip,src=secrets/pip.conf" in argv and argv[-1] == context.name
        assert (home / "said").read_text(encoding="utf-8") == f"1 {delivery.proxy}\n"
    assert list(cluster.root.iterdir()) == []
    assert cluster.said[-1] == f"built on host0, host1: one fingerprint, {cluster.image.fingerprint[:12]}; the ids may differ between nodes"
    cluster.said.clear()
    (cluster.homes[1] / "label").write_text("another", encoding="utf-8")
    cluster.build(Delivery(kind="build_on_nodes"))
    assert "on host1, from" in cluster.said[0], "only the one without this fingerprint"
    cluster.said.clear()
    cluster.build(Delivery(kind="build_on_nodes"))
    assert cluster.said == []


def test_a_client_without_buildkit_is_skipped(cluster: BuildCluster, tmp_path: Path) -> None:
    other = tmp_path / "newer" / "docker"
    other.parent.mkdir()
    other.write_text("#!/bin/sh\ncase $1 in image) echo 'Error: No such image' >&2 ;; esac; exit 1\n", encoding="utf-8")
    other.chmod(0o755)
    for node in cluster.nodes:
        assert isinstance(node.transport, Local)
        node.transport.kept["PATH"] = f"{other.parent}:{node.transport.kept['PATH']}"
    with pytest.raises(NodeFailed, match="after building, host0, host1 does not have"):  # the first answers, and has no image
        cluster.build(Delivery(kind="build_on_nodes"))
    assert all((home / "label").exists() for home in cluster.homes)


def test_a_failed_build_is_reported_with_its_last_lines_and_what_to_do(cluster: BuildCluster) -> None:
    (cluster.homes[1] / "fails").write_text(
        "ERROR: No matching distribution found for torch==2.13.0+cpu\n" + "#9 more\n" * 15, encoding="utf-8"
    )
    with pytest.raises(
        NodeFailed,
        match=r"host1: receiving the context of omnilaunch:cpu\S+, and building it, failed(.|\n)*No matching(.|\n)*cluster\.delivery\.index=URL",
    ):
        cluster.build(Delivery(kind="build_on_nodes"))
    assert list(cluster.root.iterdir()) == [] and (cluster.homes[0] / "label").exists()


@pytest.mark.parametrize(
    "address", ["http://localhost:8080/simple", "https://ann:x@127.0.0.1/simple", "file:///srv/wheels", "http://[::1]:3128"]
)
def test_an_address_of_this_machine_is_refused(address: str) -> None:
    for key in ("index", "extra_index", "find_links", "proxy"):
        with pytest.raises(ImageFailed, match=rf"cluster\.delivery\.{key} is an address of this machine(.|\n)*kind=build"):
            refuse_unsendable(Delivery(kind="build_on_nodes", **{key: address}))  # type: ignore[arg-type]


def test_addresses_of_other_machines_and_folders_are_accepted() -> None:
    refuse_unsendable(Delivery(index="https://localhost.example/simple", find_links="/srv/wheels", proxy="http://10.0.0.1:3128"))


def test_what_may_not_be_built_anywhere_is_refused_before_anything_is_sent(cluster: BuildCluster) -> None:
    cuda = render(load_stacks(ROOT / "images")["cuda126"], architecture="x86_64", root=ROOT)
    with pytest.raises(ImageFailed, match=r"cluster\.delivery\.accept_licence=true"):
        cluster.build(Delivery(kind="build_on_nodes"), cuda)
    assert not cluster.root.exists()
