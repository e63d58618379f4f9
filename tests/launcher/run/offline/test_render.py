"""A run as a folder of scripts: its files, what is refused, and that each script runs docker with the argv of the plan, byte for byte."""

import json
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import ConfigRefused, ImageFailed
from launcher.plan.plan import Plan
from launcher.record.record import SourceState, open_run
from launcher.run.offline import render as bundle_module
from launcher.run.offline.node_script import assign
from launcher.run.offline.render import write_bundle
from tests.launcher.hostile import ATTACKS, hostile

PROJECT = Path(__file__).resolve().parents[4]
SOURCE = SourceState(commit="c0ffee", dirty=False)
PlanFor = Callable[..., Plan]
ASCEND = ("hardware=ascend910b", "model=tiny_llava", "cluster=example", "cluster.delivery.accept_licence=true")
DOCKER = ("cluster.runtime=docker",)
# Answers like an engine that has the image, and records its arguments, each ended by a NUL, and the files that they name.
FAKE = r"""#!/bin/bash
{ printf '%s\0' "$#" docker "$@"; } >>"$FAKE/calls"
case "$1 $2" in
  "image inspect") cat "$FAKE/image" || exit 1 ;;
  "container inspect") exit 1 ;;
  "version --format") if [[ $3 == *Arch* ]]; then echo amd64; else echo 20.10.24; fi ;;
  "exec --interactive") if [ "$4" = dd ]; then cat >"$FAKE/secrets"; fi ;;
  "inspect --format") echo "exited 0" ;;
esac
word=
for next; do
  if [ "$word" = --env-file ]; then
    cp -p -- "$next" "$FAKE/$(basename -- "$next")"
  fi
  word=$next
done
"""


class Site:
    """A node, which is this machine with a fake docker, and the bundle that was copied to it."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.plan, self.fake, self.bundle = plan, folder / "fake", folder / "bundle"
        self.fake.mkdir()
        (self.fake / "docker").write_text(FAKE)
        (self.fake / "docker").chmod(0o755)
        (self.fake / "image").write_text(f"sha256:1 {plan.image.fingerprint}\n")
        write_bundle(plan, self.bundle, project=PROJECT, source=SOURCE)
        (self.script,) = self.bundle.glob("node0-*.sh")

    def run(self, script: Path, *words: str, **environment: str) -> tuple[int, str]:
        """The exit code, and the output."""
        variables = {**os.environ, **environment, "FAKE": str(self.fake), "PATH": f"{self.fake}:{os.environ['PATH']}"}
        done = subprocess.run((str(script), *words), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables)
        return done.returncode, done.stdout

    def node(self, *words: str, **environment: str) -> tuple[int, str]:
        return self.run(self.script, *words, **environment)

    def calls(self, *begin: str) -> list[tuple[str, ...]]:
        """The arguments of the docker calls that begin so, in their order."""
        words = (self.fake / "calls").read_bytes().decode().split("\0")[:-1]
        found = []
        while words:
            count = int(words[0]) + 2
            found.append(tuple(words[1:count]))
            words = words[count:]
        return [call for call in found if call[: len(begin)] == begin]


@pytest.fixture
def site(plan_for: PlanFor, tmp_path: Path) -> Callable[..., Site]:
    return lambda *overrides: Site(tmp_path, plan_for(f"cluster.root={tmp_path}/root", *DOCKER, *overrides))


def render(plan: Plan, folder: Path) -> Path:
    return write_bundle(plan, folder, project=PROJECT, source=SOURCE)


# --------------------------------------------------------------------------------------------------------------- folder


@pytest.fixture
def narrow_umask() -> Iterator[None]:
    before = os.umask(0o077)
    yield
    os.umask(before)


@pytest.mark.usefixtures("narrow_umask")
def test_the_files_and_their_modes(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for(*ASCEND, "cluster.secrets=[HF_TOKEN]")
    folder = render(plan, tmp_path / "deep" / "b")
    names = {path.name for path in folder.iterdir()}
    assert names == {
        "README.txt", "build.sh", "config.json", "deepspeed.json", "errors.md", "image", "image.sha256", "node0-192.0.2.11.sh", "node0.env",
        "node1-192.0.2.12.sh", "node1.env", "pip.conf", "plan.json", "source.json", "spec.json",
    }  # fmt: skip
    for path in (folder, *folder.rglob("*")):
        wanted = 0o755 if path.is_dir() or path.suffix == ".sh" else 0o644
        assert stat.S_IMODE(path.stat().st_mode) == wanted, path
    assert json.loads((folder / "deepspeed.json").read_text()) == plan.spec.deepspeed
    assert (folder / "image" / "Dockerfile").read_text() == plan.image.dockerfile
    assert {path.relative_to(folder / "image").as_posix() for path in (folder / "image").rglob("*") if path.is_file()} == {
        "Dockerfile",
        *plan.image.files,
    }
    subprocess.run(("sha256sum", "--check", "--quiet", "--strict", "image.sha256"), cwd=folder, check=True)
    assert [path.name for path in folder.parent.iterdir()] == ["b"]


def test_files_are_those_of_the_runs_own_folder(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = replace(plan_for(*DOCKER), folder=str(tmp_path / "run"))
    folder, run = render(plan, tmp_path / "b"), open_run(plan, SOURCE)
    for name in ("plan.json", "config.json", "spec.json", "source.json"):
        assert (folder / name).read_bytes() == (run / name).read_bytes()


def test_scripts_are_good_bash(plan_for: PlanFor, tmp_path: Path) -> None:
    folder = render(plan_for(*ASCEND, "cluster.secrets=[A,B]"), tmp_path / "b")
    for script in folder.glob("*.sh"):
        subprocess.run(("bash", "-n", str(script)), check=True)
        if shutil.which("shellcheck"):
            subprocess.run(("shellcheck", str(script)), check=True)


def test_the_readme_names_what_there_is(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for(*ASCEND, "cluster.secrets=[HF_TOKEN]", "cluster.sync=[/data/set]")
    folder = render(plan, tmp_path / "b")
    text = (folder / "README.txt").read_text()
    for script in folder.glob("*.sh"):
        assert script.name in text
    for word in (
        plan.image.tag,
        plan.spec.output,
        "HF_TOKEN",
        "only read:\n\n    /data/set\n\n",
        "such as /etc/hccn.conf, come with it",
        "check",
        "data",
        "start",
        "follow",
        "stop",
        "save",
    ):
        assert word in text
    assert max(map(len, text.splitlines())) <= 120


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        ((), r"cluster\.runtime=docker"),
        (("hardware=rtx3090", *DOCKER), r"accept_licence=true"),
        ((*DOCKER, "cluster.secrets=[folder]"), "which the scripts use as a variable"),
        (("cluster=example", "cluster.nodes.1.address=''"), r"cluster\.nodes\.1\.address must be set: a launch finds the network"),
    ],
)
def test_what_cannot_be_rendered(plan_for: PlanFor, tmp_path: Path, overrides: tuple[str, ...], what: str) -> None:
    with pytest.raises(ConfigRefused, match=what):
        render(plan_for(*overrides), tmp_path / "b")
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_nothing_is_half_there(plan_for: PlanFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, target = plan_for(*DOCKER), tmp_path / "b"
    target.mkdir()
    (target / "mine").touch()
    with pytest.raises(ConfigRefused, match="not an empty folder"):
        render(plan, target)
    with pytest.raises(ConfigRefused, match="not an empty folder"):
        render(plan, target / "mine")
    with pytest.raises(ConfigRefused, match="cannot be written"):
        render(plan, target / "mine" / "below")
    (target / "mine").unlink()

    def broken(plan: Plan) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(bundle_module, "write_readme", broken)
    with pytest.raises(ConfigRefused, match="no space left"):
        render(plan, target)
    assert list(tmp_path.rglob("*")) == [target]
    monkeypatch.undo()
    assert (render(plan, target) / "README.txt").exists()


def test_a_tree_that_has_changed_since_the_plan(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for(*DOCKER)
    plan = replace(plan, image=replace(plan.image, files={**plan.image.files, "entrypoint.sh": "0" * 64}))
    with pytest.raises(ImageFailed, match=r"entrypoint\.sh in .* changed since .*commit c0ffee"):
        render(plan, tmp_path / "b")


def test_no_credential_is_in_any_file(site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hunter1")
    urls = ("cluster.delivery.index=https://ann:hunter2@mirror/simple", "cluster.delivery.proxy=http://ann:hunter3@proxy:80")
    node = site(*urls, "cluster.secrets=[HF_TOKEN]")
    for path in node.bundle.rglob("*"):
        assert path.is_dir() or "hunter" not in path.read_text(), path
    assert "# HF_TOKEN is a secret" in (node.bundle / "node0.env").read_text()
    code, said = node.run(node.bundle / "build.sh")
    assert code == 3 and "write them in place of ***" in said
    config = node.bundle / "pip.conf"
    config.write_text(config.read_text().replace("***", "ann:hunter2"))
    code, said = node.run(node.bundle / "build.sh", http_proxy="")
    assert code == 3 and "export http_proxy" in said
    assert node.run(node.bundle / "build.sh", http_proxy="http://ann:hunter3@proxy:80")[0] == 0


# -------------------------------------------------------------------------------------------------------------- scripts


def test_docker_is_told_what_the_plan_says(site: Callable[..., Site], tmp_path: Path) -> None:
    """With everything that a shell would take to be its own."""
    rows, mount = tmp_path / "it's $(touch C) `touch C`; touch C #.json", tmp_path / "a folder \\ && touch C"
    rows.write_text("[]")
    mount.mkdir()
    values = {
        f"VALUE_{number}": word
        for number, word in enumerate((*ATTACKS, " spaces ", "*", "~", "#", ""))
        if "\n" not in word and "${" not in word
    }
    node = site(
        "data=files", f"data.train={rows}", f"data.images={mount}", f"cluster.mounts=[{tmp_path}]",
        *(f"cluster.environment.{name}={value}" for name, value in values.items()), "cluster.secrets=[ONE,TWO]",
    )  # fmt: skip
    command, (one, two) = node.plan.commands[0], ("$(touch C)\n 'x' ", '\\"`')
    assert node.node(ONE=one, TWO=two) == (
        0,
        f"checking the data\nnode 0 is started, in container {command.name}; node0-localhost.sh follow shows its log\n",
    )
    assert node.calls("docker", "run")[-2:] == [command.prepare, command.start]
    assert (node.fake / "secrets").read_bytes() == f"{one}\0{two}\0".encode()

    environment = {*(node.bundle / "node0.env").read_text().splitlines()[2:]}
    assert environment == {f"{key}={value}" for key, value in command.environment.items()} and len(values) > 10
    given = node.fake / "R-node0.env"
    assert {*given.read_text().splitlines()[2:]} == {*environment, "OMNILAUNCH_SECRETS=ONE TWO"}
    assert {*(node.fake / "R-data0.env").read_text().splitlines()[2:]} == environment
    assert stat.S_IMODE(given.stat().st_mode) == 0o600
    folder = Path(node.plan.spec.output)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["R"], "no env file is left"
    assert (folder / "spec.json").read_bytes() == (node.bundle / "spec.json").read_bytes()
    assert f"{folder.stat().st_uid}:{folder.stat().st_gid}" == "1000:1000" or node.calls("docker", "run", "--rm", "--network", "none")
    assert not list(tmp_path.rglob("C"))


def test_any_words_arrive(tmp_path: Path) -> None:
    words = [word for word in (*ATTACKS, *hostile(200), "[0]=x", "(", "-n", "{a,b}", "!!", "x=~") if "\0" not in word]
    script = tmp_path / "s.sh"
    script.write_bytes((assign("words", words) + "\n" + assign("word", words[0]) + '\nprintf "%s\\0" "$word" "${words[@]}"\n').encode())
    done = subprocess.run(("bash", str(script)), cwd=tmp_path, capture_output=True, check=True)
    assert done.stdout.decode().split("\0")[:-1] == [words[0], *words]
    assert list(tmp_path.iterdir()) == [script]


def array(script: Path, name: str) -> tuple[str, ...]:
    """As bash reads it, from the assignments at the top of a script."""
    head = script.read_text().partition("\n# The body of ")[0]
    done = subprocess.run(("bash", "-c", f'{head}\nprintf "%s\\0" "${{{name}[@]}}"'), capture_output=True, text=True, check=True)
    return tuple(done.stdout.split("\0")[:-1])


def test_ascend_nodes_differ(plan_for: PlanFor, tmp_path: Path) -> None:
    plan = plan_for(*ASCEND)
    folder = render(plan, tmp_path / "b")
    first, second = scripts = [folder / f"node{rank}-192.0.2.{11 + rank}.sh" for rank in (0, 1)]
    for script, command in zip(scripts, plan.commands, strict=True):
        assert array(script, "start") == command.start and array(script, "prepare") == command.prepare
        assert array(script, "stop") == command.stop and array(script, "remove") == command.remove
        assert array(script, "devices")[::10] == ("/dev/davinci0", "/dev/hisi_hdc") and "/etc/hccn.conf" in array(script, "sources")
    assert (array(first, "ports"), array(second, "ports")) == (("29500-29500", "60000-60031"), ("60000-60031",))
    lines = [(folder / f"node{rank}.env").read_text().splitlines() for rank in (0, 1)]
    own = {"HCCL_IF_IP=192.0.2.11", "HCCL_IF_IP=192.0.2.12"} | {
        f"ASCEND_PROCESS_LOG_PATH=/srv/omnilaunch/runs/R/cann/node{rank}" for rank in (0, 1)
    }
    assert {*lines[0]} ^ {*lines[1]} == own


def test_a_check_names_all_that_is_missing(plan_for: PlanFor, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        node = Site(tmp_path, plan_for(*ASCEND, f"cluster.rendezvous_port={port}", "cluster.secrets=[HF_TOKEN]"))
        (node.fake / "image").write_text("sha256:1 another\n")
        code, said = node.node("check", HF_TOKEN="")
    assert code == 4
    missing = (f"{path} does not exist" for path in ("/dev/davinci7", "/etc/hccn.conf"))
    for what in (f"port {port} is in use", "have the address 192.0.2.11", *missing, "not the image of this run"):
        assert what in said
    assert "HF_TOKEN" not in said, "an empty variable is set"
    assert not node.calls("docker", "run") and not Path("/srv/omnilaunch/runs/R").exists()


def test_a_node_with_another_image_or_none(site: Callable[..., Site]) -> None:
    node = site()
    assert node.node("check") == (0, "node 0 (localhost) is ready\n")
    (node.bundle / "image.id").write_text("sha256:2\n")
    assert "image.id names another" in node.node("check")[1]
    (node.fake / "image").unlink()
    assert f"there is no image {node.plan.image.tag}" in node.node("check")[1]
    code, said = node.node("start", "--anyway")
    assert code == 0 and "there is no image" in said and node.calls("docker", "run")[-1] == node.plan.commands[0].start


def test_the_folder_of_another_run_is_left_alone(site: Callable[..., Site]) -> None:
    node = site()
    assert node.node("data")[0] == 0
    assert node.node("start")[0] == 0, "made by this very run"
    spec = Path(node.plan.spec.output) / "spec.json"
    (spec.parent / "train_result.json").write_text('{\n  "status": "finished"\n}')
    assert "this run is finished" in node.node("start")[1]
    spec.write_text("another's")
    for words in (("start",), ("start", "--anyway")):
        code, said = node.node(*words)
        assert code == 4 and "belongs to another run" in said and spec.read_text() == "another's"


def test_data_that_is_refused_starts_nothing(site: Callable[..., Site]) -> None:
    node = site()
    (node.fake / "docker").write_text(FAKE + 'if [ "$1 $2" = "run --rm" ]; then echo row 3 has no image; exit 2; fi\n')
    code, said = node.node()
    assert code == 2 and "row 3" in said and "nothing was started" in said
    assert not node.calls("docker", "run", "--detach") and not list(Path(node.plan.spec.output).parent.glob("*.env"))


def test_following_stopping_and_removing(site: Callable[..., Site], tmp_path: Path) -> None:
    node = site()
    command = node.plan.commands[0]
    assert node.node()[0] == 0
    assert node.node("follow") == (0, "node 0: exited, exit code 0\n") and node.calls(*command.logs)
    assert node.node("stop")[0] == 0 and node.calls(*command.stop)
    assert node.node("save", str(tmp_path / "kept"))[0] == 0
    assert (tmp_path / "kept" / "node0" / "spec.json").exists() and (tmp_path / "kept" / "node0.log").exists()
    assert node.node("remove")[0] == 0 and node.calls(*command.remove)
    assert node.node("stert")[0] == 2 and "(nothing)" in node.node("help")[1]


# ---------------------------------------------------------------------------------------------------------------- build


def test_the_image_is_built_by_the_launchers_own_words(site: Callable[..., Site], tmp_path: Path) -> None:
    wheels = tmp_path / "my wheels"
    (wheels / "system" / "run").mkdir(parents=True)
    (wheels / "a-1.whl").write_text("wheel")
    (wheels / "system" / "run" / "b.deb").write_text("package")
    node = site(f"cluster.delivery.wheelhouse={wheels}")
    build = node.bundle / "build.sh"
    assert node.run(build)[0] == 3, "without the network it needs the wheelhouse"
    code, said = node.run(build, str(wheels))
    assert code == 3 and "wheelhouse.json" in said
    sums = {name: subprocess.check_output(("sha256sum", wheels / name), text=True).split()[0] for name in ("a-1.whl", "system/run/b.deb")}
    (wheels / "wheelhouse.json").write_text(json.dumps({"stack": "cpu", "architecture": "x86_64", "files": sums}, indent=1))
    done = subprocess.run(
        (str(build), "my wheels"),
        cwd=tmp_path,
        env={"PATH": f"{node.fake}:{os.environ['PATH']}", "FAKE": str(node.fake)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (words,) = node.calls("docker", "build")
    assert words == array(build, "build") and words[-1] == "image" and "none" in words and "id=pip,src=pip.conf" in words
    assert (node.bundle / "image" / "wheelhouse" / "a-1.whl").exists() and (node.bundle / "image" / "system" / "run" / "b.deb").exists()
    assert (node.bundle / "image.id").read_text() == f"sha256:1 {node.plan.image.fingerprint}\n", "what the engine answers"
    (wheels / "a-1.whl").write_text("altered")
    assert "differs from its wheelhouse.json" in node.run(build, str(wheels))[1]
    (node.bundle / "image" / "entrypoint.sh").write_text("altered")
    assert "copy them again" in node.run(build, str(wheels))[1]


# -------------------------------------------------------------------------------------------------------- command line


def test_from_a_run_that_was_planned(
    plan_for: PlanFor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    open_run(replace(plan_for(*DOCKER), folder=str(tmp_path / "runs" / "R")), SOURCE)
    for word in ("R", "runs/R", str(tmp_path / "runs" / "R")):
        assert main(["render", word, "--to", "b"]) == 0
        assert "run R is written to" in capsys.readouterr().out
        assert (tmp_path / "b" / "source.json").read_text() == (tmp_path / "runs" / "R" / "source.json").read_text()
        shutil.rmtree(tmp_path / "b")
    assert main(["render", "S", "--to", "b"]) == 2
    assert main(["render", *DOCKER, "--run-id", "S", "--to", "b"]) == 0
    assert json.loads((tmp_path / "b" / "plan.json").read_text())["run_id"] == "S"
