"""Each of ten differences is planted where it comes from, a real run is made with it, and `compare` says different and names it.

A slowdown is planted in the rows of a real record, since no two runs of a busy machine are within 5 %; a broken record and an exchanged
checkpoint are what happens to a record, not to a run.
"""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from launcher.config.defaults import keys_of, without_keys
from tests.launcher.planted import clone_tree, omnilaunch, reseal

SHORT = (
    "run.steps=3",
    "stage.optimizer.warmup=1",
    "run.evaluation.enabled=false",
    "stage.global_batch=8",
    "run.trackers=[]",
    "hardware.threads=2",
)
pytestmark = pytest.mark.long


@dataclass(frozen=True, kw_only=True)
class Place:
    """`project`: a clone with nothing changed; `here`: the folder of the runs and of the data."""

    project: Path
    here: Path

    def launch(self, name: str, *words: str, project: Path | None = None) -> Path:
        mine = (
            f"data.train={self.here}/mine/train.json",
            f"data.evaluation={self.here}/mine/evaluation.json",
            f"data.images={self.here}/mine",
        )
        short = without_keys(SHORT, keys_of(words))
        done = omnilaunch(project or self.project, self.here, "launch", *short, "data=files", *mine, *words, "--run-id", name)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.here / "runs" / name

    def compare(self, other: str, *words: str) -> tuple[int, str]:
        done = omnilaunch(self.project, self.here, "compare", "first", other, *words)
        return done.returncode, done.stdout + done.stderr


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With the reference run, on the digits as local files."""
    place = Place(project=clone_tree(tmp_path_factory.mktemp("clone") / "project"), here=tmp_path_factory.mktemp("here"))
    checked = omnilaunch(place.project, place.here, "data", "check")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    shutil.copytree(place.here / ".cache/data/digits", place.here / "mine")
    place.launch("first")
    return place


# ------------------------------------------------------------------------------------------------- a run with the difference


def other_seed(place: Place) -> None:
    place.launch("planted", "run.seed=2")


def other_image(place: Place) -> None:
    shutil.copyfile(place.here / "mine/images/0008.png", place.here / "mine/images/0007.png")
    place.launch("planted")


def other_pixel(place: Place) -> None:
    path = place.here / "mine/images/0007.png"
    with Image.open(path) as image:
        image.putpixel((3, 3), image.getpixel((3, 3)) ^ 1)  # type: ignore[operator]
        image.save(path)
    place.launch("planted")


def other_lock(place: Place) -> None:
    """Committed, so that the tree is clean."""
    project = clone_of(place, "images/locks/cpu-x86_64.txt", "# another lock\n")
    commit = ("-c", "user.name=A", "-c", "user.email=a@b", "commit", "-q", "-a", "-m", "another lock")
    subprocess.run(("git", *commit), cwd=project, check=True)
    place.launch("planted", project=project)


def dirty_tree(place: Place) -> None:
    place.launch("planted", project=clone_of(place, "trainer/kernels/cross_entropy.py", "# an uncommitted change\n"))


def other_threads(place: Place) -> None:
    place.launch("planted", "hardware.threads=1")


def other_variable(place: Place) -> None:
    place.launch("planted", "cluster.environment.KMP_BLOCKTIME=1")


def clone_of(place: Place, file: str, line: str) -> Path:
    project = place.here / "clone"
    shutil.copytree(place.project, project, ignore=shutil.ignore_patterns("__pycache__"))
    with (project / file).open("a") as stream:
        stream.write(line)
    return project


# ------------------------------------------------------------------------------------------------- a record with the difference


def slowdown(place: Place) -> None:
    planted = copy_first(place)
    slow = [row | {"seconds": row["seconds"] / 0.95} for row in map(json.loads, (planted / "metrics.jsonl").read_text().splitlines())]
    (planted / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in slow))
    reseal(planted)


def corrupted_record(place: Place) -> None:
    """One digit of one loss."""
    rows = copy_first(place) / "metrics.jsonl"
    head, loss, tail = rows.read_text().partition('"loss": ')
    rows.write_text(f"{head}{loss}{(int(tail[0]) + 1) % 10}{tail[1:]}")


def swapped_checkpoint(place: Place) -> None:
    """In place, from the run of another seed; the checkpoint's own state still says what the record says."""
    other = place.launch("other", "run.seed=3")
    weights = "checkpoints/step-000003/model.safetensors"
    shutil.copyfile(other / weights, copy_first(place) / weights)


def copy_first(place: Place) -> Path:
    return Path(shutil.copytree(place.here / "runs/first", place.here / "runs/planted"))


# What is planted -> (how, exit code of compare, what it must name).
PLANTED: dict[str, tuple[Callable[[Place], None], int, str]] = {
    "another seed": (other_seed, 7, "config.run.seed: 1 -> 2"),
    "one changed image": (other_image, 7, "inputs.data.images/0007.png: "),
    "one changed pixel": (other_pixel, 7, "inputs.data.images/0007.png: "),
    "another lock": (other_lock, 7, "image.files.lock.txt: "),
    "another thread count": (other_threads, 7, "environment.threads: 2 -> 1"),
    "one changed environment variable": (other_variable, 7, "environment.environment.KMP_BLOCKTIME: (none) -> 1"),
    "a dirty tree": (dirty_tree, 7, "source.dirty: false -> true"),
    "a 5 % slowdown": (slowdown, 7, "throughput -5.00%, outside the stated band of 3.00%"),
    "a corrupted record": (corrupted_record, 2, "metrics.jsonl was edited"),
    "a swapped checkpoint": (swapped_checkpoint, 2, "checkpoints/step-000003 holds the weights "),
}


@pytest.fixture
def restored(place: Place) -> Iterator[Place]:
    """The files in which a difference was planted are restored for the next one."""
    image = place.here / "mine/images/0007.png"
    kept = image.read_bytes()
    yield place
    image.write_bytes(kept)
    for folder in (place.here / "runs/planted", place.here / "clone"):
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("name", PLANTED)
def test_the_planted_difference_is_found_and_named(restored: Place, name: str) -> None:
    plant, code, named = PLANTED[name]
    plant(restored)
    found, said = restored.compare("planted", "--band", "throughput=0.03" if plant is slowdown else "throughput=9")
    assert found == code, said
    assert named in (said.partition("verdict: different")[2] if code == 7 else said), said


def test_ten_differences_are_planted_and_two_unchanged_runs_are_the_same(place: Place) -> None:
    """Without one of them, two real runs are the same: what is found above is what was planted."""
    place.launch("again")
    found, said = place.compare("again", "--band", "throughput=9")
    assert (found, len(PLANTED)) == (0, 10) and "verdict: same" in said, said
