"""The runs of a folder are listed, tagged, measured and pruned."""

import gc
import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.cli import main
from launcher.errors import ConfigRefused, RunEnded
from launcher.record.index import list_entries, parse_filter, read_entry, size_bytes, tag_run
from launcher.record.lock import lock_run
from launcher.record.prune_runs import Rule, choose, parse_age, remove_runs
from tests.launcher.planted import Change, copy_run, set_value

NOW = datetime(2026, 11, 30, tzinfo=UTC)


@pytest.fixture(autouse=True)
def collecting() -> Iterator[None]:
    """`main` switches the garbage collector off for the whole process."""
    yield
    gc.enable()


def ended(day: int) -> Change:
    return set_value("result.json", "ended_at", f"2026-11-{day:02}T01:00:00.000+00:00")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """a..e, which ended on the 1st to the 5th."""
    for day, name in enumerate("abcde", start=1):
        copy_run(tmp_path / "runs", name, ended(day))
    return tmp_path / "runs"


def names(entries: object) -> list[str]:
    return [entry.run_id for entry in entries]  # type: ignore[attr-defined]


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ----------------------------------------------------------------------------------------------------------------- listing


def test_a_file_named_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0 and "start one with: omnilaunch launch" in capsys.readouterr().out
    (tmp_path / "runs").write_text("")
    assert main(["runs"]) == 2
    printed = capsys.readouterr().err
    assert "runs is a file" in printed and "cluster.root" in printed


def test_filters(runs: Path) -> None:
    set_value("result.json", "status", "failed")(runs / "b")
    set_value("config.json", "run.seed", 7)(runs / "c")
    (runs / "d" / "result.json").unlink()
    tag_run(read_entry(runs / "e"), ["best"], remove=False)

    def listed(*words: str, status: str = "", model: str = "", tag: str = "") -> list[str]:
        chosen = parse_filter(words, status=status, model=model, tag=tag)
        return names(entry for entry in list_entries(runs) if chosen.takes(entry))

    assert listed() == list("abcde") and listed(status="failed") == ["b"] and listed(status="open") == ["d"]
    assert listed("run.seed=7") == ["c"] and listed("run.seed=1", "stage=full") == list("abde") and listed("stage=lora") == []
    assert listed(model="tiny_llava") == list("abcde") and listed(model="x") == [] and listed(tag="best") == ["e"]
    assert listed("run.deterministic=false") == list("abcde") and listed("hardware.name=cpu", tag="none") == []


def test_the_verb_and_its_refusals(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(runs.parent)
    assert main(["runs", "--disk", "run.seed=1"]) == 0
    head, *lines, total = capsys.readouterr().out.splitlines()
    assert head.endswith(" size") and len(lines) == 5 and all(line.endswith("iB") for line in lines) and total.startswith("5 runs, ")
    assert main(["runs", "--json"]) == 0 and [run["run_id"] for run in json.loads(capsys.readouterr().out)] == list("edcba")
    assert main(["runs", "tag", "a", "good", "paper-2"]) == 0 and "#good #paper-2" in capsys.readouterr().out
    assert main(["runs", "tag", "a", "good", "--remove"]) == 0 and "a  #paper-2" in capsys.readouterr().out
    assert main(["runs", "model=x"]) == 0 and "none of 5 runs matches" in capsys.readouterr().out
    for words, said in (
        (["runs", "--status", "done"], "valid are"),
        (["runs", "--limit", "0"], "--limit 0: at least 1"),
        (["runs", "--limit", "3", "--all"], "not together with --all"),
        (["runs", "lst"], "is not KEY=VALUE"),
        (["runs", "run.sed=1"], "the config of no run has the key 'run.sed'"),
        (["runs", "--yes"], "--yes is an option of: omnilaunch runs prune"),
        (["runs", "--keep", "3"], "--keep is an option of: omnilaunch runs prune"),
        (["runs", "tag", "a"], "name a run and its tags"),
        (["runs", "tag", "z", "t"], "there is no run 'z'"),
        (["runs", "tag", "a", "../x"], "a tag is 1 to 50"),
        (["runs", "prune"], "needs a rule or a RUN"),
        (["runs", "prune", "--older-than", "soon"], "such as 36h, 30d or 8w"),
        (["runs", "prune", "--keep", "-1"], "at least 0"),
    ):
        assert main(words) == 2 and said in capsys.readouterr().err, words


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tags": 3}', '{"tags": null}'])
def test_an_unreadable_tags_file_means_no_tags(runs: Path, text: str) -> None:
    (runs / "a" / "tags.json").write_text(text)
    assert read_entry(runs / "a").tags == ()


def test_the_size_is_that_on_the_disk(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_bytes(b"x" * 100_000)
    (tmp_path / "link").symlink_to("/usr")
    assert 100_000 <= size_bytes(tmp_path) < 200_000 and size_bytes(tmp_path / "none") == 0


# ------------------------------------------------------------------------------------------------------------------- prune


@pytest.mark.parametrize(
    ("rule", "removed"),
    [
        (Rule(keep=2), "abc"),
        (Rule(keep=9), ""),
        (Rule(keep=0), "abcde"),
        (Rule(older_than=timedelta(days=27, hours=12)), "ab"),
        (Rule(keep=4, older_than=timedelta(days=1)), "a"),
    ],
)
def test_rules(runs: Path, rule: Rule, removed: str) -> None:
    every = list_entries(runs)
    assert sorted(names(choose(every, every, rule, NOW).removed)) == list(removed)


def later_plan(folder: Path, checkpoint: str) -> None:
    (folder / "attempts/2").mkdir(parents=True)
    (folder / "attempts/2/plan.json").write_text(json.dumps({"config": {"stage": {"checkpoint": checkpoint}}}))


def test_a_run_with_the_name_of_something_else_is_not_taken_for_a_reference(runs: Path) -> None:
    for name in ("cpu", "tiny_llava", "full", "process", "docker", "finished"):
        copy_run(runs, name)
    every = list_entries(runs)
    assert len(choose(every, every, Rule(keep=0), NOW).removed) == 11


# What one run says of another one, which then stays.
REFERENCES: dict[str, Change] = {
    "a stage's checkpoint": set_value("plan.json", "config.stage.checkpoint", "a"),
    "a checkpoint's folder": set_value("plan.json", "config.stage.checkpoint", "/srv/runs/a/checkpoints/step-000003"),
    "a model of its own": set_value("plan.json", "spec.model.source.path", "/srv/runs/a/checkpoints/step-000003"),
    "one on a node": set_value("plan.json", "config.stage.checkpoint", "node:/srv/runs/a/checkpoints/step-000003"),
    "what it began with": set_value("result.json", "origin.run_id", "a"),
    "what its adapter stands on": set_value("result.json", "origin.base", "/srv/runs/a/checkpoints/step-000003"),
    "what it repeats": set_value("plan.json", "rerun_of", "a"),
    "the base of an evaluation": set_value("plan.json", "config.run.evaluation.base", "a"),
    "the folder of an evaluation's base": set_value("plan.json", "spec.evaluation.base", "/srv/runs/a/checkpoints/step-000003"),
    "a folder that is synced": set_value("plan.json", "config.cluster.sync", ["/data", "/srv/runs/a/checkpoints/step-000003"]),
    "a mount of a container": set_value("plan.json", "commands.0.start", ["docker", "run", "-v", "/srv/runs/a/checkpoints:/base:ro"]),
    "data that it wrote": set_value("plan.json", "config.data.train", "runs/a/samples.jsonl"),
    "an override": set_value("plan.json", "overrides", ["stage=lora", "stage.checkpoint=../runs/a"]),
    "a model's path in the result": set_value("result.json", "origin.path", "/srv/runs/a/checkpoints/step-000003"),
    "what it was started from": set_value("source.json", "rerun_of", "a"),
    "the plan of a later attempt": lambda folder: later_plan(folder, "/srv/runs/a/checkpoints/step-000003"),
    "a plan that cannot be read": lambda folder: (folder / "plan.json").write_text('{"config": {"stage": {"checkpoint": "a"'),
}


@pytest.mark.parametrize("change", REFERENCES.values(), ids=REFERENCES)
def test_a_run_that_another_run_needs_is_kept(runs: Path, change: Change) -> None:
    change(runs / "e")
    every = list_entries(runs)
    chosen = choose(every, [entry for entry in every if entry.run_id == "a"], Rule(keep=0), NOW)
    assert chosen.removed == () and chosen.kept == {"a": "needed by e"}


def test_other_reasons_to_keep_a_run(runs: Path) -> None:
    tag_run(read_entry(runs / "a"), ["best"], remove=False)
    (runs / "b" / "result.json").unlink()
    (runs / "c" / "result.json").write_text("{")
    (runs / "link").symlink_to(runs / "d")
    every = list_entries(runs)
    with lock_run(runs / "e"):
        chosen = choose(every, every, Rule(keep=0), NOW)
    assert names(chosen.removed) == ["d"]
    assert {name: why.split(":")[0].split(" (")[0] for name, why in chosen.kept.items()} == {
        "a": "tagged best",
        "b": "it has no record",
        "c": "result.json cannot be read",
        "link": "its folder is a symbolic link",
        "e": "a launcher supervises it",
    }


def test_prune_lists_first_and_removes_with_yes(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(runs.parent)
    set_value("plan.json", "config.stage.checkpoint", "b")(runs / "e")
    assert main(["runs", "prune", "--keep", "2"]) == 0
    printed = capsys.readouterr().out
    assert "kept: b: needed by e" in printed and "nothing was removed" in printed and names_in(runs) == list("abcde")
    assert main(["runs", "prune", "--keep", "2", "--yes"]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == ["removed c", "removed a"] and names_in(runs) == list("bde")
    assert main(["runs", "prune", "--keep", "2", "--yes"]) == 0 and "there is nothing to remove" in capsys.readouterr().out


def test_a_run_that_cannot_be_removed_is_named_and_the_others_are_removed(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = list_entries(runs)
    real = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if self.name == "a":
            raise PermissionError(13, "Permission denied", str(self))
        return real(self, target)

    monkeypatch.setattr(Path, "rename", rename)
    gone = []
    with pytest.raises(RunEnded, match=r"1 run could not be removed.*\n.*/a: Permission denied"):
        for name in remove_runs(every[:2]):
            gone.append(name)
    assert gone == ["b"] and (runs / "a" / "plan.json").is_file() and not (runs / "b").exists()


@pytest.mark.parametrize(("text", "hours"), [("36h", 36), ("30d", 720), ("2w", 336)])
def test_ages(text: str, hours: int) -> None:
    assert parse_age(text) == timedelta(hours=hours)


@pytest.mark.parametrize("text", ["", "d", "-1d", "1.5d", "30", "9999999d", "1 d"])
def test_an_invalid_age_is_refused(text: str) -> None:
    with pytest.raises(ConfigRefused, match=r"36h, 30d or 8w"):
        parse_age(text)
