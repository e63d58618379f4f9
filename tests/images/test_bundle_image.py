"""A rendered run that its own scripts carry out: they build the image, start the ranks with a secret, save the run and end it."""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.config.compose import compose
from launcher.config.defaults import keys_of, without_keys
from launcher.image.stack import load_stacks
from launcher.image.wheelhouse import local_files
from launcher.plan.plan import LocalContext, Plan, make_plan
from launcher.record.record import SourceState
from launcher.run.offline.render import write_bundle
from tests.images.conftest import ROOT, Built, run
from tests.images.test_train import SHORT, docker_overrides
from tests.launcher.sshd import free_port

pytestmark = pytest.mark.docker

SECRET = "s3cret $(touch C) 'with' \"all\" of it"


@pytest.fixture
def render(built: Built, project: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Plan, Path]]]:
    """A plan for this machine's engine and its bundle; containers that it leaves are removed."""
    tmp_path.chmod(0o755)  # the container's user must be able to walk to the run's folder
    plans: list[Plan] = []

    def render(*overrides: str) -> tuple[Plan, Path]:
        place = LocalContext(project=project, here=tmp_path, interpreter="python3", user="1000:1000")
        short = without_keys(SHORT, keys_of(overrides))
        root = () if "cluster.root" in keys_of(overrides) else (f"cluster.root={tmp_path}/site",)
        words = (*root, *short, *docker_overrides(built), *overrides)
        plan = make_plan(compose(words, ROOT / "conf"), load_stacks(project / "images"), place, run_id=f"bundle-{os.getpid()}-{len(plans)}")
        plans.append(plan)
        return plan, write_bundle(plan, tmp_path / plan.run_id, project=project, source=SourceState(commit="", dirty=False))

    yield render
    for plan in plans:
        for command in plan.commands:
            subprocess.run(command.remove, capture_output=True)


def script(bundle: Path, *words: str, code: int = 0, node: int = 0, before: tuple[str, ...] = (), **environment: str) -> str:
    """Both output streams of the node's script; its exit code must be `code`."""
    (path,) = bundle.glob(f"node{node}-*.sh")
    argv = (*before, str(path), *words)
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture
def wheels(built: Built, project: Path, tmp_path: Path) -> tuple[str, ...]:
    """The argument of build.sh: a folder with the local packages that the launcher's own build used."""
    files = local_files(project, built.image.lock, built.delivery)
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, path in files.items():
        shutil.copyfile(path, folder / name)
    return (str(folder),) if files else ()


def test_image_and_run_by_its_own_scripts(built: Built, wheels: tuple[str, ...], render: Callable[..., tuple[Plan, Path]]) -> None:
    plan, bundle = render("cluster.secrets=[SITE_TOKEN]")
    assert plan.image == built.image
    assert run(str(bundle / "build.sh"), *wheels).splitlines()[-2:] == [plan.image.tag, built.id], "the very image that the launcher builds"
    assert (bundle / "image.id").read_text() == f"{built.id}\n"

    assert "export SITE_TOKEN" in script(bundle, code=4)
    assert "is ready" in script(bundle, "check", SITE_TOKEN=SECRET)
    assert "is started" in script(bundle, SITE_TOKEN=SECRET)
    assert "exited, exit code 0" in script(bundle, "follow")
    folder = Path(plan.spec.output)
    assert json.loads((folder / "train_result.json").read_text())["status"] == "finished"
    assert (folder / "train_result.json").stat().st_uid == 1000
    assert [path.name for path in folder.parent.iterdir()] == [plan.run_id], "no env file is left beside it"
    assert "this run is finished" in script(bundle, "start", code=4, SITE_TOKEN=SECRET)
    script(bundle, "remove")
    assert run("docker", "ps", "--all", "--quiet", "--filter", f"label=omnilaunch.run={plan.run_id}") == ""
    (saved,) = (bundle / "saved").iterdir()
    assert (saved / "node0" / "metrics.jsonl").exists() and (saved / "node0.log").stat().st_size


def test_a_secret_arrives_whole_and_a_stopped_run_goes_on(render: Callable[..., tuple[Plan, Path]]) -> None:
    plan, bundle = render("cluster.secrets=[SITE_TOKEN]", "run.steps=100000")
    name, folder = plan.commands[0].name, Path(plan.spec.output)
    script(bundle, "data", SITE_TOKEN=SECRET)
    script(bundle, "start", SITE_TOKEN=SECRET)
    assert "s3cret" not in run("docker", "inspect", name)
    wait_for(lambda: (folder / "metrics.jsonl").exists())
    assert f"SITE_TOKEN={SECRET}" in run("docker", "exec", name, "cat", "/proc/1/environ").split("\0")
    assert "running" in script(bundle, "status")
    assert "exited, exit code" in script(bundle, "stop")
    assert json.loads((folder / "train_result.json").read_text())["status"] == "stopped"
    script(bundle, "remove")
    script(bundle, "start", SITE_TOKEN=SECRET)
    wait_for(lambda: "resuming from checkpoints/step-" in run("docker", "logs", name))


def own_networks() -> dict[str, str]:
    """Interface -> address of this machine, for the engine's bridge and the default route."""
    rows = [line.split() for line in run("ip", "-o", "-4", "address").splitlines()]
    own = {row[1]: row[3].split("/")[0] for row in rows}
    way = run("ip", "-o", "route", "get", "8.8.8.8").split()
    return {name: own[name] for name in (way[way.index("dev") + 1], "docker0")}


def test_two_nodes_meet(render: Callable[..., tuple[Plan, Path]]) -> None:
    """Both nodes are this machine, with two of its addresses."""
    nodes = ", ".join(f"{{host: {address}, address: {address}, interface: {name}}}" for name, address in own_networks().items())
    _, bundle = render(
        f"cluster.nodes=[{nodes}]", "cluster.shared=true", "cluster.devices_per_node=1", f"cluster.rendezvous_port={free_port()}"
    )
    for words in (("data",), ("start",)):
        for node in (0, 1):
            script(bundle, *words, node=node)
    for node in (0, 1):
        assert "exited, exit code 0" in script(bundle, "follow", node=node)


@pytest.fixture
def foreign_folder() -> Iterator[Path]:
    """A folder of another user, who can reach it; a folder of pytest is closed to others."""
    folder = Path(tempfile.mkdtemp(prefix="omnilaunch-"))
    os.chown(folder, 4321, 4321)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user")
def test_a_login_that_is_neither_root_nor_the_containers_user(render: Callable[..., tuple[Plan, Path]], foreign_folder: Path) -> None:
    plan, rendered = render(f"cluster.root={foreign_folder}/site")
    bundle = Path(shutil.copytree(rendered, foreign_folder / "bundle"))
    group = Path("/var/run/docker.sock").stat().st_gid
    before = ("setpriv", "--reuid", "4321", "--regid", "4321", "--groups", str(group))
    script(bundle, before=before, HOME=str(foreign_folder))
    script(bundle, "follow", before=before, HOME=str(foreign_folder))
    folder = Path(plan.spec.output)
    assert [path.name for path in folder.parent.iterdir()] == [plan.run_id]
    owners = {path.name: path.stat().st_uid for path in (folder.parent, folder, folder / "spec.json", folder / "metrics.jsonl")}
    assert owners == {"runs": 4321, plan.run_id: 1000, "spec.json": 1000, "metrics.jsonl": 1000}
    script(bundle, "save", str(foreign_folder / "kept"), before=before, HOME=str(foreign_folder))
    assert (foreign_folder / "kept" / "node0" / "train_result.json").exists()


def wait_for(condition: Callable[[], bool], *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
