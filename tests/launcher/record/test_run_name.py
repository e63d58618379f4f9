"""From the name of a run, as it is typed, to its folder: which names are taken, and what the refusals say."""

import json
import os
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.record.run_name import find_run, list_folders, typed_name


def plant(runs: Path, run_id: str, started_at: str = "", *, written_at: float = 1.0) -> Path:
    """A run that started at this time; without one, a run that has no record yet."""
    folder = runs / run_id
    folder.mkdir(parents=True)
    (folder / "plan.json").write_text("{}", encoding="utf-8")
    os.utime(folder / "plan.json", (written_at, written_at))
    if started_at:
        (folder / "result.json").write_text(json.dumps({"started_at": started_at}), encoding="utf-8")
    return folder


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    plant(folder, "monday", "2026-11-21T08:00:00.000+00:00", written_at=9e8)
    plant(folder, "monday-2", "2026-11-21T09:00:00.000+00:00")
    plant(folder, "20261120-120000-tiny_llava-full-cpu-3f0a", "2026-11-20T12:00:00.000+00:00")
    (folder / "no_plan").mkdir()
    (folder / "a_file").write_text("x", encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("monday-2", "monday-2"),
        ("monday-", "monday-2"),
        ("2026", "20261120-120000-tiny_llava-full-cpu-3f0a"),
        ("monday", "monday"),  # an exact id, though another id begins with it
        ("last", "monday-2"),  # by its start, though the plan of `monday` was written later
        ("runs/monday", "monday"),
        ("./runs/monday/", "monday"),
    ],
)
def test_names_of_runs(runs: Path, name: str, found: str) -> None:
    assert find_run(name, runs) == runs / found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("mon", r"'mon' is the beginning of 2 run ids: monday-2, monday\. Type more"),
        ("mondya", r"there is no run 'mondya' in .*runs; did you mean 'monday'\? the newest are: monday-2, monday, 2026.*omnilaunch runs"),
        ("", "there is no run ''"),
        ("no_plan", "there is no run 'no_plan'"),
        ("a_file", "there is no run 'a_file'"),
        ("..", r"there is no run '\.\.'"),
        ("../runs", r"\.\./runs is not the folder of a run: it has no plan\.json"),
        ("runs/no_plan", "not the folder of a run"),
        ("runs/../../..", "not the folder of a run"),
        ("/etc", "not the folder of a run"),
        ("/etc/passwd", "not the folder of a run"),
        ("m*", r"no run 'm\*'"),
        ("a\0b", "no run 'a.x00b'"),
        ("n" * 300, "no run 'nnn"),
        ("/" + "n" * 300, "not the folder of a run"),
    ],
)
def test_names_that_are_refused(runs: Path, name: str, text: str) -> None:
    with pytest.raises(ConfigRefused, match=text):
        find_run(name, runs)


def test_without_runs(tmp_path: Path) -> None:
    for name in ("last", "monday"):
        with pytest.raises(ConfigRefused, match=r"there are no runs (there|in .*runs)\. To start one: omnilaunch launch"):
            find_run(name, tmp_path / "runs")


def test_a_run_that_is_called_last_is_never_taken_for_the_newest(runs: Path) -> None:
    """`--run-id last` is refused; a folder of this name may come from an earlier version, or from `mv`."""
    plant(runs, "last", "2020-01-01T00:00:00.000+00:00")
    with pytest.raises(ConfigRefused, match=r"'last' means the newest run, and a run has that id: type .*/runs/last for it"):
        find_run("last", runs)
    assert find_run("runs/last", runs) == runs / "last"
    assert find_run("las", runs) == runs / "last"


def test_the_newest_of_runs_without_a_record_goes_by_the_time_in_the_id_and_then_by_the_plan(runs: Path) -> None:
    plant(runs, "20261122-010203-a", written_at=5)
    assert find_run("last", runs).name == "20261122-010203-a"
    plant(runs, "tuesday", written_at=1.9e9)  # 2030
    assert find_run("last", runs).name == "tuesday"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"started_at": 3}', '{"started_at": "noon"}', "[" * 100_000])
def test_a_record_that_cannot_be_read_does_not_stop_the_search(runs: Path, text: str) -> None:
    (plant(runs, "broken") / "result.json").write_text(text, encoding="utf-8")
    assert find_run("last", runs).name == "monday-2" and find_run("bro", runs).name == "broken"


def test_times_without_a_zone_are_utc(runs: Path) -> None:
    plant(runs, "naive", "2026-11-21T10:00:00")
    assert find_run("last", runs).name == "naive"


def test_the_first_folder_counts_for_an_id_in_two(runs: Path, tmp_path: Path) -> None:
    plant(tmp_path / "other", "monday", "2026-11-23T00:00:00+00:00")
    assert find_run("monday", runs, tmp_path / "other") == runs / "monday"
    assert find_run("last", runs, tmp_path / "other") == runs / "monday-2", "the other `monday` is hidden by the first"
    plant(tmp_path / "other", "friday", "2026-11-24T00:00:00+00:00")
    assert find_run("last", runs, tmp_path / "other") == tmp_path / "other" / "friday"


def test_a_link_is_a_run_under_its_own_name_and_a_broken_one_is_none(runs: Path, tmp_path: Path) -> None:
    """Runs are moved to larger disks and linked. What a link leads to is read as any record is, and never executed."""
    moved = plant(tmp_path / "disk", "moved", "2026-11-19T00:00:00+00:00")
    (runs / "linked").symlink_to(moved)
    (runs / "broken").symlink_to(tmp_path / "nowhere")
    (runs / "outside").symlink_to("/etc")
    assert find_run("linked", runs) == runs / "linked"
    assert not {"broken", "outside"} & set(list_folders(runs))


def test_folders_whose_names_are_no_ids_are_not_offered(runs: Path) -> None:
    """They could hold escape sequences of the terminal."""
    plant(runs, "x\x1b[2Jy")
    plant(runs, ".removing-monday")
    assert not [name for name in list_folders(runs) if "\x1b" in name or name.startswith(".")]
    with pytest.raises(ConfigRefused) as refused:
        find_run("x", runs)
    assert "\x1b" not in str(refused.value)


def test_many_runs_are_not_all_listed(runs: Path) -> None:
    for number in range(9):
        plant(runs, f"many-{number}", f"2026-12-0{number + 1}T00:00:00+00:00")
    with pytest.raises(ConfigRefused, match=r"9 run ids: many-8, many-7, many-6, many-5, many-4 and 4 more"):
        find_run("many", runs)


def test_a_command_names_a_run_by_what_stays_true_when_another_one_begins(runs: Path, tmp_path: Path) -> None:
    assert typed_name(runs / "monday-2", runs) == "monday-2", "the newest run, which `last` would name today"
    elsewhere = plant(tmp_path / "else", "tuesday", "2026-11-23T00:00:00+00:00")
    assert typed_name(elsewhere, runs) == str(elsewhere)
    for name in ("monday-2", "monday"):
        assert find_run(typed_name(runs / name, runs), runs) == runs / name
