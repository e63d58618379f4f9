"""A folder of the user's own, searched before the project's conf/: what is found in it, what is refused, and what a plan says of it."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.cli import VERBS, main, make_parser
from launcher.commands.completion import complete
from launcher.commands.plan import PROJECT, plan_of
from launcher.config.compose import compose, compose_over, compose_with_files, options
from launcher.config.conf_folder import ConfFolder, find_conf
from launcher.config.schema import AXES
from launcher.errors import ConfigRefused

CONF = PROJECT / "conf"
LOCAL = (CONF / "cluster/local.yaml").read_text(encoding="utf-8")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With a cluster of its own, and a stage that hides the project's `full`. Its name holds what is syntax for Hydra and the shell."""
    folder = tmp_path / "ann's, [conf]"
    for name in ("cluster", "stage", ".git"):
        (folder / name).mkdir(parents=True)
    (folder / "cluster/lab.yaml").write_text(LOCAL.replace("name: local", "name: lab").replace("root: .", f"root: {tmp_path}"))
    stage = (CONF / "stage/full.yaml").read_text(encoding="utf-8")
    (folder / "stage/full.yaml").write_text(stage.replace("global_batch: ", "global_batch: 1"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OMNILAUNCH_CONF", raising=False)
    return folder


def test_its_files_are_found_before_those_of_the_project(own: Path) -> None:
    conf = find_conf(CONF, str(own), {})
    config, files = compose_with_files(("cluster=lab", "tune=null"), conf)
    before = compose(("tune=null",), CONF)
    assert config.cluster.name == "lab" and config.stage.global_batch == int(f"1{before.stage.global_batch}")
    assert config.model == before.model and config.run == before.run
    assert {own / "cluster/lab.yaml", own / "stage/full.yaml", CONF / "config.yaml", CONF / "model/tiny_llava.yaml"} <= {*files}
    assert CONF / "stage/full.yaml" not in files and all(file.is_file() for file in files)
    assert compose((), CONF).cluster.name == "local", "what was composed before leaves nothing behind"
    assert compose_over(before, ("cluster=lab",), conf).cluster.name == "lab"


def test_the_values_of_both_are_listed_and_completed(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = options(find_conf(CONF, str(own), {}))
    assert (
        groups["cluster"] == ("example", "lab", "local")
        and groups["stage"] == options(CONF)["stage"]
        and groups.keys() == options(CONF).keys()
    )
    assert main(["options", "cluster", "--conf", str(own)]) == 0
    values = [line[2:].split()[0] for line in capsys.readouterr().out.split("\n\n")[0].splitlines()[1:]]
    assert values == ["example", "lab", "local"]
    for words in (["--conf", str(own)], [f"--conf={own}"]):
        assert complete(["plan", *words, "cluster=l"], VERBS, make_parser) == ["cluster=lab", "cluster=local"]
    assert complete(["plan", "--conf", ""], VERBS, make_parser) == [], "the shell completes folders"
    monkeypatch.setenv("OMNILAUNCH_CONF", str(own))
    assert complete(["plan", "cluster=l"], VERBS, make_parser) == ["cluster=lab", "cluster=local"]


def test_the_option_counts_before_the_variable(own: Path, tmp_path: Path) -> None:
    (tmp_path / "other/cluster").mkdir(parents=True)
    assert find_conf(CONF, "other", {"OMNILAUNCH_CONF": str(own)}).own == tmp_path / "other"
    assert find_conf(CONF, "", {"OMNILAUNCH_CONF": "other"}).own == tmp_path / "other"
    assert find_conf(CONF, "", {"OMNILAUNCH_CONF": ""}).own is None


def test_a_plan_says_which_files_hide_those_of_the_project_and_its_next_command_works(own: Path) -> None:
    conf = find_conf(CONF, str(own), {})
    plan = plan_of(["cluster=lab"], "monday", conf=conf)
    note = f"stage=full is {own}/stage/full.yaml, in place of the project's file of this name"
    assert plan.verdict.notes[0] == note and sum("in place of" in one for one in plan.verdict.notes) == 1
    assert plan.conf == str(own) and f"{own}/cluster/lab.yaml" in plan.files and "conf/model/tiny_llava.yaml" in plan.files
    assert plan_of([], "monday").options == () and plan_of([], "monday").conf == ""


def test_every_printed_command_has_the_folder(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (("plan",), ("plan", "--full")):
        assert main([*verb, "cluster=lab", "--conf", str(own)]) == 0
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: "))
        assert shlex.split(line)[2:] == ["launch", "cluster=lab", "--conf", str(own)]
    assert main(["plan", "cluster=lab", "--conf", str(own), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conf"] == str(own)


FAULTS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no such folder": (lambda folder: folder / "nowhere", "--conf {}: there is no such folder"),
    "a file": (lambda folder: folder / "cluster/lab.yaml", "--conf {}: is a file; name the folder that has cluster/"),
    "the folder of an axis": (lambda folder: folder / "cluster", "--conf {}: is the folder of one axis; name the folder above it: --conf "),
    "nothing of conf": (lambda folder: folder / ".git", "--conf {}: has none of the folders hardware, model,"),
    "a primary config": (
        lambda folder: write(folder / "config.yaml", "run: {}").parent,
        "--conf {}: has a config.yaml, and only the project",
    ),
}


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


@pytest.mark.parametrize(("make", "text"), FAULTS.values(), ids=FAULTS)
def test_a_folder_in_which_nothing_would_be_found(
    own: Path, make: Callable[[Path], Path], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(own)
    for verb in ("plan", "options", "doctor", "launch", "bench"):
        assert main([verb, "--conf", str(folder)]) == 2
        assert text.format(folder) in capsys.readouterr().err
    with pytest.raises(ConfigRefused, match=r"^OMNILAUNCH_CONF="):
        find_conf(CONF, "", {"OMNILAUNCH_CONF": str(folder)})


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("name: [x", "{}/cluster/bad.yaml: cannot be composed: while parsing"),
        ("- x", 'cluster ({}/cluster/bad.yaml): ["x"] is not allowed; it must be a section'),
        ("name: bad\nnodez: 3", "cluster.nodez ({}/cluster/bad.yaml): unknown key; did you mean 'nodes'?"),
        (LOCAL.replace("root: .", "root: 3"), "cluster.root ({}/cluster/bad.yaml): 3 is not allowed; it must be text"),
    ],
)
def test_a_wrong_file_is_named_by_its_path(own: Path, content: str, text: str) -> None:
    write(own / "cluster/bad.yaml", content)
    with pytest.raises(ConfigRefused) as refused:
        compose(("cluster=bad",), find_conf(CONF, str(own), {}))
    assert text.format(own) in str(refused.value)
    assert compose(("cluster=lab",), find_conf(CONF, str(own), {})).cluster.name == "lab", "the other files can still be used"


def test_the_project_named_as_the_own_folder_is_no_second_one(own: Path) -> None:
    (own / "cluster/link.yaml").symlink_to(own / "cluster/lab.yaml")
    assert "link" in options(find_conf(CONF, str(own), {}))["cluster"]
    assert not ConfFolder(project=CONF).is_shadowing(CONF / "stage/full.yaml")


def test_a_chain_of_the_own_folder_is_found(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own / "experiment").mkdir()
    write(own / "experiment/two.yaml", "chain:\n  - {name: aligned, words: [stage=projector]}\n  - {name: adapted, words: [stage=lora]}\n")
    assert main(["plan", "experiment=two", "cluster=lab", "--conf", str(own)]) == 0
    assert shlex.split(capsys.readouterr().out.splitlines()[-1])[-2:] == ["--conf", str(own)]


@pytest.mark.parametrize("axis", AXES)
def test_a_copied_file_has_the_name_that_chooses_it(axis: str, tmp_path: Path) -> None:
    """Its `name` is often that of the file that it was copied from; `strategy` has a closed list of names."""
    source = sorted((CONF / axis).glob("*.yaml"))[-1]
    name = "single" if axis == "strategy" else "mine"
    (tmp_path / axis).mkdir()
    shutil.copy(source, tmp_path / axis / f"{name}.yaml")
    folder = ConfFolder(project=CONF, own=tmp_path)
    config = compose((f"{axis}={name}",), folder)
    assert getattr(config, axis).name == name
    assert getattr(compose_over(compose((), CONF), (f"{axis}={name}",), folder), axis).name == name
