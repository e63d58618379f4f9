"""Runs that are there: found, refused with what there is, their logs side by side."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from launcher.errors import ConfigRefused
from launcher.plan import Plan, to_plain
from launcher.run_action import find_run, follow, load_plan, require_containers


def write_run(folder: Path, plan: Plan) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "plan.json").write_text(json.dumps(to_plain(plan)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "overrides", [(), ("hardware=ascend910b", "model=qwen2_5_vl_32b", "stage=lora", "precision=bf16", "cluster=example")]
)
def test_a_plan_is_read_as_it_was_written(tmp_path: Path, plan_for: Callable[..., Plan], overrides: tuple[str, ...]) -> None:
    plan = plan_for(*overrides)
    assert load_plan(write_run(tmp_path / "r", plan)) == plan


def test_a_run_that_is_not_there(tmp_path: Path, plan_for: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigRefused, match=r"there are no runs"):
        find_run("monday")
    write_run(tmp_path / "runs" / "monday", plan_for())
    assert find_run("monday") == tmp_path / "runs" / "monday"
    with pytest.raises(ConfigRefused, match=r"no run 'mondy'.*did you mean 'monday'"):
        find_run("mondy")


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema": 1, "more": 2}'])
def test_a_plan_that_cannot_be_read(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigRefused, match=r"plan\.json cannot be read by this version"):
        load_plan(tmp_path)


def test_a_run_of_processes_is_its_launchers(plan_for: Callable[..., Plan]) -> None:
    with pytest.raises(ConfigRefused, match=r"cluster\.runtime=docker"):
        require_containers(plan_for(), "attach")


def test_logs_of_all_nodes_line_by_line_until_the_end(tmp_path: Path, plan_for: Callable[..., Plan]) -> None:
    folder = write_run(tmp_path / "r", plan_for())
    first, second = (folder / "logs" / f"node{number}.log" for number in (0, 1))
    first.write_text("one\ntw", encoding="utf-8")
    calls = 0

    def ended() -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            with first.open("a", encoding="utf-8") as file:
                file.write("o\n")
            second.write_bytes(b"\xffthree\n")
        return calls > 1

    assert list(follow(folder, ended=ended)) == ["[node0] one", "[node0] two", "[node1] \ufffdthree"]
