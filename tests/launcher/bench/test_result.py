"""Published lines: their content, how they are read, and how a rerun is judged by them."""

import gc
import json
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.bench.matrix import BEGIN, END, describe_matrix, describe_row, put_matrix
from launcher.bench.measure import measure_run, publish, shape_of
from launcher.bench.restore import restore, restore_config
from launcher.bench.result import (
    PublishedResult,
    Repeat,
    Span,
    append_result,
    digest,
    find_result,
    is_unsteady,
    read_results,
    require_writable,
    results_file,
)
from launcher.bench.verdict import describe_reproduction, judge, with_all_facts
from launcher.cli import main
from launcher.commands import bench as bench_action, bench_rerun
from launcher.config.compose import compose
from launcher.errors import ConfigRefused, RecordRefused
from launcher.plan.plan import LocalContext
from launcher.record.comparison import Level
from launcher.record.recorded_run import load_recorded_run
from launcher.record.source import SourceState, SourceTree
from tests.launcher.bench.test_cell import CELL, CONF
from trainer.contract import SPEC_FILE, decode

PROJECT = Path(__file__).resolve().parents[3]
REAL = PROJECT / "tests/golden/record/2"
MADE = datetime(2026, 11, 21, tzinfo=UTC)
BANDS = {"loss": 0.01, "throughput": 0.05, "memory": 0.05, "evaluation": 0.01}


@pytest.fixture
def result(tmp_path: Path) -> PublishedResult:
    """The result of five runs with 100 to 104 samples per second."""
    for number in range(1, 6):
        shutil.copytree(REAL, tmp_path / f"runs/x-{number}")
    folders = sorted((tmp_path / "runs").iterdir())
    repeats = [replace(measure_run(folder, load=0.5), samples_per_s=99.0 + number) for number, folder in enumerate(folders, start=1)]
    made = publish("x-20261121-000000-0000", "x", repeats, [load_recorded_run(folder) for folder in folders], dirty="", made_at=MADE)
    return replace(made, config=made.config | {"run": made.config["run"] | {"bands": BANDS}})


@pytest.fixture
def path(tmp_path: Path, result: PublishedResult) -> Path:
    append_result(results_file(tmp_path / "results", "x"), result)
    append_result(results_file(tmp_path / "results", "x"), replace(result, result_id="x-20261122-000000-0000"))
    return results_file(tmp_path / "results", "x")


def test_median_lowest_and_highest(result: PublishedResult) -> None:
    span = result.summary["samples_per_s"]
    assert (span.median, span.lowest, span.highest) == (102.0, 100.0, 104.0)
    assert result.summary["step_s"].median == measure_run(REAL).step_s and "evaluation.exact_match" in result.summary
    assert result.rows_equal and result.weights_equal


def test_one_different_bit_is_reported(result: PublishedResult, tmp_path: Path) -> None:
    folders = sorted((tmp_path / "runs").iterdir())
    repeats = [*result.repeats[:4], replace(result.repeats[4], rows_sha256="0")]
    other = publish("y", "x", repeats, [load_recorded_run(folder) for folder in folders], dirty="", made_at=MADE)
    assert (other.rows_equal, other.weights_equal) == (False, True)


def test_a_line_has_no_folder_of_the_machine(path: Path, result: PublishedResult) -> None:
    plan = json.loads((REAL / "plan.json").read_text())
    text = path.read_text()
    names = (plan["spec"]["output"], plan["spec"]["data"]["root"], plan["commands"][0]["start"][0], str(path.parents[1]), '"localhost"')
    assert all("/" in name for name in names[:3]) and not [name for name in names if name in text]
    assert len(text.splitlines()[0]) < 40_000, "small enough for git"


def test_runs_with_other_packages_are_not_repeats(tmp_path: Path, result: PublishedResult) -> None:
    recorded_runs = [load_recorded_run(folder) for folder in sorted((tmp_path / "runs").iterdir())]
    environment = recorded_runs[3].environment
    assert environment is not None
    other = replace(recorded_runs[3], environment=replace(environment, packages={**environment.packages, "peft": "0.0.1"}))
    with pytest.raises(ConfigRefused, match=r"runs x-1 and x-4 are not repeats of each other(.|\n)*package peft: .* and 0\.0\.1"):
        publish("y", "x", result.repeats, [*recorded_runs[:3], other, recorded_runs[4]], dirty="", made_at=MADE)


# ------------------------------------------------------------------------------------------------------------------ lines


def test_lines_are_added_and_found(path: Path, result: PublishedResult) -> None:
    found = read_results(path)
    assert [one.result_id for one in found] == ["x-20261121-000000-0000", "x-20261122-000000-0000"]
    assert replace(found[0], sha256="") == decode(PublishedResult, json.loads(json.dumps(to_plain(result))))
    assert find_result("x", path.parent).result_id == "x-20261122-000000-0000"
    assert find_result("x-20261121-000000-0000", path.parent) == found[0]
    assert find_result("x-20261121", path.parent) == found[0] and find_result("last", path.parent) == found[1]
    with pytest.raises(ConfigRefused, match=r"'x-2026' is the beginning of 2 results: x-20261121-000000-0000, x-20261122-000000-0000"):
        find_result("x-2026", path.parent)
    with pytest.raises(ConfigRefused, match=r"no result 'y'.*valid are: x, x-20261121"):
        find_result("y", path.parent)
    with pytest.raises(ConfigRefused, match=r"no result 'last'.*nothing is published yet"):
        find_result("last", path.parent / "empty")


def to_plain(result: PublishedResult) -> Any:
    from dataclasses import asdict

    return asdict(result)


def cut(text: str) -> str:
    return text[: len(text) // 2 + 40]


def without_end(text: str) -> str:
    return text.removesuffix("\n")


def edited(text: str) -> str:
    return text.replace('"median": 102.0', '"median": 202.0', 1)


def newer(text: str) -> str:
    data = json.loads(text.splitlines()[0]) | {"schema": 2, "more": 1}
    return text + json.dumps(data | {"sha256": digest(data)}) + "\n"


def extended(text: str) -> str:
    data = json.loads(text.splitlines()[0]) | {"more": 1}
    return text + json.dumps(data | {"sha256": digest(data)}) + "\n"


def planted(key: str, value: Any) -> Callable[[str], str]:
    def spoil(text: str) -> str:
        data = json.loads(text.splitlines()[0]) | {key: value}
        return text + json.dumps(data | {"sha256": digest(data)}) + "\n"

    return spoil


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (planted("result_id", "../../../tmp/x"), r"x\.jsonl, line 3 has no repeats, or an invalid id"),
        (planted("repeats", []), r"x\.jsonl, line 3 has no repeats, or an invalid id"),
        (cut, r"x\.jsonl, line 2 was cut short or edited: .*git checkout -- docs/results"),
        (without_end, r"x\.jsonl, line 2 has no end: the file was cut short"),
        (edited, r"x\.jsonl, line 1 was edited: its hash"),
        (newer, r"x\.jsonl, line 3: written with result schema 2, this version reads 1 to 1"),
        (extended, r"x\.jsonl, line 3 cannot be read by this version: .*more"),
        (lambda text: text + "{}\n", r"x\.jsonl, line 3 is not a result: it has no schema number"),
        (lambda text: text + '{"schema": 1, "more": "\\ud800"}\n', r"x\.jsonl, line 3 was cut short or edited: .*surrogates"),
        (planted("experiment", "y"), r"x\.jsonl, line 3 is a result of y, and belongs to y\.jsonl"),
        (lambda text: text + "[" * 100_000 + "\n", r"x\.jsonl, line 3 was cut short or edited"),
    ],
)
def test_a_changed_line_is_refused(path: Path, spoil: Callable[[str], str], said: str) -> None:
    path.write_text(spoil(path.read_text()))
    with pytest.raises(RecordRefused, match=said):
        read_results(path)


@pytest.mark.parametrize("place", ["afile/x.jsonl", "afolder"])
def test_an_unwritable_results_file_is_refused_before_the_first_run(tmp_path: Path, place: str) -> None:
    (tmp_path / "afile").touch()
    (tmp_path / "afolder").mkdir()
    with pytest.raises(ConfigRefused, match=rf"{place} cannot be written.*--results FOLDER\. No run is lost"):
        require_writable(tmp_path / place)
    require_writable(tmp_path / "new/x.jsonl")
    assert not (tmp_path / "new/x.jsonl").exists()


def test_a_read_only_results_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write anywhere, so the answer of a read-only disk is replaced."""
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigRefused, match=r"x\.jsonl cannot be written"):
        require_writable(tmp_path / "x.jsonl")


def test_a_bench_checks_its_results_file_before_it_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "afile").touch()
    try:
        words = ["bench", CELL, f"cluster.root={tmp_path}", "--dirty", "a test", "--results", str(tmp_path / "afile")]
        assert main(words) == 2
    finally:
        gc.enable()
    assert f"{CELL}.jsonl cannot be written" in capsys.readouterr().err and not (tmp_path / "runs").exists()


def test_an_older_trainer_gets_the_published_keys_only(result: PublishedResult, tmp_path: Path) -> None:
    """A spec with keys of this version would be refused by the recorded trainer."""
    spec = {key: value for key, value in result.spec.items() if key != "loss_chunk"}
    cluster = compose((), CONF).cluster
    place = LocalContext(project=PROJECT, here=tmp_path, interpreter=sys.executable, user="1000:1000")
    restore(replace(result, spec=spec), cluster, place, tmp_path / "scratch")
    written = tmp_path / "scratch" / "results" / result.result_id / SPEC_FILE
    assert json.loads(written.read_text()).keys() == spec.keys() | {"run_id", "output"}


def test_variables_with_folders_are_not_published(result: PublishedResult) -> None:
    plan = load_recorded_run(REAL).plan
    variables = {"LD_LIBRARY_PATH": "/home/somebody/lib", "NCCL_DEBUG": "WARN"}
    cluster = replace(plan.config.cluster, environment=variables)
    site = shape_of(replace(plan, config=replace(plan.config, cluster=cluster)))
    assert site.environment == {"NCCL_DEBUG": "WARN"}
    again = restore_config(replace(result, site=site), replace(cluster, environment={**variables, "NCCL_DEBUG": "INFO", "TZ": "UTC"}))
    assert again.cluster.environment == variables, "places are those of now, all else is as published"


def test_a_clean_tree_is_not_called_dirty() -> None:
    clean = SourceTree(state=SourceState(commit="abc", dirty=False, changed=("README.md",)))
    assert bench_action.refuse_dirty(clean, "a try") == ""
    for dirty, name in (({"conf": ("conf/stage/full.yaml",)}, "conf/stage/full.yaml"), ({"commit": ""}, "is not a git repository")):
        changed = SourceTree(state=replace(clean.state, dirty=True, **dirty))
        with pytest.raises(ConfigRefused, match=rf"{name}.*--dirty REASON"):
            bench_action.refuse_dirty(changed, "")


def test_the_command_to_continue_has_the_given_options() -> None:
    given = Namespace(repeats=2, reason="a short look", accept=["code", "data"], results="elsewhere", dirty="", conf="c")
    options = ("dirty", "repeats", "reason", "accept", "results", "conf")
    assert bench_action.join_command("bench-rerun", "x", ["cluster=lab"], given, *options) == (
        "omnilaunch bench-rerun x cluster=lab --repeats 2 --reason 'a short look' --accept code --accept data --results elsewhere --conf c"
    )


# ----------------------------------------------------------------------------------------------------------------- verdict


def scaled(repeats: tuple[Repeat, ...], **shares: float) -> list[Repeat]:
    return [replace(repeat, **{name: getattr(repeat, name) * share for name, share in shares.items()}) for repeat in repeats]  # type: ignore[arg-type]


def test_an_identical_rerun_is_reproduced(result: PublishedResult) -> None:
    said = with_all_facts(result)
    found = judge(said, result.repeats, said.facts, fewer="")
    assert found.reproduced and found.losses is Level.EQUAL and (found.rows_equal, found.weights_equal) == (5, 5) and not found.facts
    text = describe_reproduction(found, said)
    assert text.endswith("verdict: reproduced") and "bitwise identical in every repeat" in text
    assert "values of the environment, the code and the data are the same" in text


@pytest.mark.parametrize(
    ("shares", "name"),
    [({"samples_per_s": 0.949}, "throughput"), ({"peak_bytes": 1.051}, "memory")],
)
def test_a_figure_outside_of_its_band(result: PublishedResult, shares: dict[str, float], name: str) -> None:
    found = judge(result, scaled(result.repeats, **shares), result.facts, fewer="")
    assert not found.reproduced and [figure.name for figure in found.figures if figure.level is Level.OUTSIDE] == [name]
    assert f"verdict: not reproduced\n  outside: {name}" in describe_reproduction(found, result)
    better = {key: 2 - share for key, share in shares.items()}
    assert judge(result, scaled(result.repeats, **better), result.facts, fewer="").reproduced, "what is better is no failure"


def test_one_repeat_of_five_with_other_losses(result: PublishedResult) -> None:
    last = result.repeats[4]
    for share, wanted in ((1.02, Level.OUTSIDE), (1.005, Level.WITHIN)):
        off = replace(last, rows_sha256="0", windows=tuple(value * share for value in last.windows))
        found = judge(result, [*result.repeats[:4], off], result.facts, fewer="")
        assert found.losses is wanted and found.rows_equal == 4 and found.reproduced is (wanted is Level.WITHIN)


def test_another_score(result: PublishedResult) -> None:
    repeats = [
        replace(repeat, evaluation={**repeat.evaluation, "exact_match": repeat.evaluation["exact_match"] + 0.02})
        for repeat in result.repeats
    ]
    found = judge(result, repeats, result.facts, fewer="")
    assert [figure.name for figure in found.figures if figure.level is Level.OUTSIDE] == ["exact_match"]


def test_differences_of_the_environment_are_listed_and_do_not_decide(result: PublishedResult) -> None:
    now = {**result.facts, "package torch": "2.7.1"}
    found = judge(result, result.repeats[:2], now, fewer="a look before lunch")
    text = describe_reproduction(found, result)
    assert found.reproduced and list(found.facts) == ["package torch"] and "-> 2.7.1" in text
    assert text.endswith("verdict: reproduced, from 2 repeats in place of 5: a look before lunch")


def test_speeds_that_vary_more_than_their_band_are_reported(result: PublishedResult) -> None:
    assert not is_unsteady(result)
    wide = replace(result, summary=result.summary | {"samples_per_s": Span(median=102.0, lowest=94.0, highest=104.0)})
    assert is_unsteady(wide) and "vary more than the band" in describe_reproduction(judge(wide, result.repeats, {}, fewer=""), wide)


def test_a_line_without_bands_is_not_judged(result: PublishedResult) -> None:
    without = replace(result, config=result.config | {"run": result.config["run"] | {"bands": {"loss": 0.1}}})
    with pytest.raises(RecordRefused, match=r"no band of throughput, memory before it ran"):
        judge(without, result.repeats, result.facts, fewer="")


def test_a_line_without_bands_is_refused_before_it_is_run_again(
    result: PublishedResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    append_result(tmp_path / "results/x.jsonl", replace(result, config=result.config | {"run": result.config["run"] | {"bands": {}}}))
    monkeypatch.setattr(bench_rerun, "restore_plan", lambda *_: pytest.fail("it was planned"))
    try:
        assert main(["bench-rerun", "x", "--results", str(tmp_path / "results")]) == 2
    finally:
        gc.enable()
    assert "no band of loss, throughput, memory before it ran" in capsys.readouterr().err


@pytest.mark.parametrize(("share", "code"), [(1.0, 0), (1.1, 7)])
def test_the_exit_code_is_the_verdict(
    result: PublishedResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], share: float, code: int
) -> None:
    """No run is started: the record of the result is copied in its place."""
    speed = measure_run(REAL).samples_per_s * share
    append_result(
        tmp_path / "results/x.jsonl", replace(result, summary=result.summary | {"samples_per_s": Span(median=speed, lowest=1, highest=2)})
    )
    config = load_recorded_run(REAL).plan.config

    def plan_run(run_id: str) -> Any:
        plan = SimpleNamespace(run_id=run_id, folder=str(tmp_path / "again" / run_id), config=config)
        return SimpleNamespace(notes=(), plan=plan, project=PROJECT, original=None)

    monkeypatch.setattr(bench_rerun, "restore_plan", lambda *_: plan_run)
    monkeypatch.setattr(bench_rerun, "require_devices", lambda *_: None)

    def carry_out(plan: Any, _: object, **options: object) -> tuple[Any, Any]:
        assert options == {"project": PROJECT, "original": None}
        return shutil.copytree(REAL, plan.folder) and SimpleNamespace(status="finished"), plan

    monkeypatch.setattr(bench_rerun, "carry_out", carry_out)
    try:
        assert main(["bench-rerun", "x", "--repeats", "1", "--reason", "a test", "--results", str(tmp_path / "results")]) == code
    finally:
        gc.enable()  # which `main` turns off for the whole process
    said = capsys.readouterr().out
    assert f"verdict: {'not ' if code else ''}reproduced, from 1 repeats in place of 5: a test" in said


def test_fewer_repeats_need_a_reason(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        assert main(["bench-rerun", "x", "--repeats", "4", "--results", str(path.parent)]) == 2
    finally:
        gc.enable()
    assert "fewer than 5 repeats do not show the spread. Say why: --reason" in capsys.readouterr().err


# -------------------------------------------------------------------------------------------------------------- docs/status.md


def test_the_status_page_says_what_the_results_say() -> None:
    text = (PROJECT / "docs/status.md").read_text(encoding="utf-8")
    assert put_matrix(text, describe_matrix(CONF, PROJECT / "docs/results")) == text, "run: make matrix"


def test_a_cell_without_a_result_was_not_run(result: PublishedResult) -> None:
    from launcher.bench.cell import load_cell

    cell = load_cell(CELL, (), CONF)
    assert describe_row(cell, ())[3:] == ("not run", "", "", "", "", "")
    row = describe_row(cell, (result,))
    assert "the cell has changed since" in row[3] and "load of the machine 0.5 to 0.5" in row[3] and row[4] == "102.0 (100.0 to 104.0)"
    from launcher.bench.measure import published_config

    same = replace(result, config=published_config(cell.config), code=replace(result.code, dirty="a try"))
    assert "the cell has changed since" not in describe_row(cell, (same,))[3] and "on a tree with changes" in describe_row(cell, (same,))[3]


@pytest.mark.parametrize("words", [[CELL], ["--results", "typo"]])
def test_the_table_takes_no_cell_and_no_other_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a folder that does not exist, the table would say that nothing was run."""
    (tmp_path / "status.md").write_text(f"{BEGIN}\n{END}\n")
    monkeypatch.setattr(bench_action, "STATUS_PAGE", tmp_path / "status.md")
    try:
        assert main(["bench", "--matrix", *words]) == 2
    finally:
        gc.enable()
    assert "from docs/results alone" in capsys.readouterr().err


def test_a_page_without_its_marks() -> None:
    assert put_matrix(f"a\n{BEGIN}\nold\n{END}\nb", "| new |") == f"a\n{BEGIN}\n\n| new |\n\n{END}\nb"
    with pytest.raises(ConfigRefused, match=r"no place for the table"):
        put_matrix("a", "b")


def test_published_lines_are_whole() -> None:
    paths = sorted((PROJECT / "docs/results").glob("*.jsonl"))
    for path in paths:
        for one in read_results(path):
            assert one.experiment == path.stem and len(one.repeats) >= 5 and not one.code.dirty
