"""A rendered run, carried out by its own scripts alone: the image built, the ranks started, a secret handed over, the run saved and ended."""

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.bundle import write_bundle
from launcher.compose import compose
from launcher.image import load_stacks
from launcher.plan import Place, Plan, make_plan
from launcher.record import SourceState
from launcher.wheelhouse import local_files
from tests.images.conftest import ROOT, Built, run
from tests.images.test_train import SHORT, docker_overrides

pytestmark = pytest.mark.docker

SECRET = "s3cret $(touch C) 'with' \"all\" of it"


@pytest.fixture
def render(built: Built, project: Path, tmp_path: Path) -> Iterator[Callable[..., tuple[Plan, Path]]]:
    """A plan for this machine's engine and its bundle; containers that it leaves are removed."""
    tmp_path.chmod(0o755)  # the container's user must be able to walk to the run's folder
    plans: list[Plan] = []

    def render(*overrides: str) -> tuple[Plan, Path]:
        place = Place(project=project, here=tmp_path, interpreter="python3", user="1000:1000")
        given = {word.partition("=")[0] for word in overrides}
        short = (word for word in SHORT if word.partition("=")[0] not in given)
        words = (f"cluster.root={tmp_path}/site", *short, *docker_overrides(built), *overrides)
        plan = make_plan(compose(words, ROOT / "conf"), load_stacks(project / "images"), place, run_id=f"bundle-{os.getpid()}-{len(plans)}")
        plans.append(plan)
        return plan, write_bundle(plan, tmp_path / plan.run_id, project=project, source=SourceState(commit="", dirty=False))

    yield render
    for plan in plans:
        subprocess.run(plan.commands[0].remove, capture_output=True)


def script(bundle: Path, *words: str, code: int = 0, **environment: str) -> str:
    """What the node's script says to both streams, its exit code as expected."""
    argv = (str(bundle / "node0-localhost.sh"), *words)
    done = subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.fixture
def wheels(built: Built, project: Path, tmp_path: Path) -> tuple[str, ...]:
    """The folder that build.sh is given here, with the local packages that the launcher's own build took."""
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
    print(script(bundle, "status"))
    assert json.loads((folder / "train_result.json").read_text())["status"] == "stopped"
    script(bundle, "remove")
    script(bundle, "start", SITE_TOKEN=SECRET)
    wait_for(lambda: "going on from checkpoints/step-" in run("docker", "logs", name))


def wait_for(condition: Callable[[], bool], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)
