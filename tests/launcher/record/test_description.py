"""What a person reads of a finished run: where its files are, and no next command that cannot work."""

import json
import shlex
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from launcher.plan.plan import Plan
from launcher.record.checkpoint_reference import ON_NODE
from launcher.record.description import command_from_weights, describe_record, next_commands
from launcher.record.metrics import read_rows
from launcher.record.record import AttemptOutcome, NodeResult, Record, SourceState, Status, close_run, open_run
from launcher.record.report.summary import list_figures
from launcher.record.run_files import read_run_files
from launcher.record.verdict import speeds_of
from launcher.run.progress import Rate
from tests.launcher.planted import set_value
from trainer.contract import RESULT_FILE, SCHEMA, TrainResult, write

PROJECT = Path(__file__).resolve().parents[3]
SOURCE = SourceState(commit="", dirty=False)
NOW = datetime(2026, 11, 21, 1, 2, 3, tzinfo=UTC)
ENDED = NodeResult(host="localhost", node_rank=0, code=0, seconds=1.0, killed=False)


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def end(plan: Plan, status: Status = "finished", *, checkpoint: bool = True, nodes: tuple[NodeResult, ...] = (ENDED,)) -> Record:
    folder = open_run(plan, SOURCE)
    if checkpoint:
        (folder / "checkpoints/step-000300").mkdir(parents=True)
    return close_run(plan, SOURCE, AttemptOutcome(status=status, code=0, nodes=nodes), started=NOW, ended=NOW + timedelta(seconds=2))


# ------------------------------------------------------------------------------------------------------------- next commands


def commands(plan: Plan, tmp_path: Path) -> list[list[str]]:
    return [shlex.split(line)[1:] for line in next_commands(end(plan), plan).splitlines()]


def test_a_run_is_followed_by_what_was_typed_with_another_stage(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    kept = (f"cluster.root={tmp_path}", "run.seed=3", "precision=bf16")
    plan = plan_for("stage=full", "stage.optimizer.lr=1e-3", *kept)
    assert commands(plan, tmp_path) == [
        ["launch", *kept, "stage=evaluate", "stage.checkpoint=R"],
        ["launch", *kept, "stage=lora", "stage.checkpoint=R"],
        ["launch", *kept, "stage=serve", "stage.checkpoint=R"],
        ["runs"],
    ]


def test_what_only_a_training_stage_reads_is_left_out_for_the_others(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    steps = ("run.steps=300", "run.save_every=10", "run.evaluation.every=10", "run.early_stop.patience=2", "data.augmentation.colour=0.2")
    kept = (f"cluster.root={tmp_path}", "run.force=it's fine")
    assert commands(plan_for(*kept, *steps), tmp_path)[:-1] == [
        ["launch", *kept, "stage=evaluate", "stage.checkpoint=R"],
        ["launch", *kept, *steps, "stage=lora", "stage.checkpoint=R"],
        ["launch", *kept, "stage=serve", "stage.checkpoint=R"],
    ]


def test_a_projector_run_is_followed_by_the_language_model(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    kept = (f"cluster.root={tmp_path}", "run.force=for a test", "run.steps=300")
    found = commands(plan_for(*kept, "stage=projector"), tmp_path)
    assert ["launch", *kept, "stage=lm", "stage.checkpoint=R"] in found
    assert ["launch", *kept, "stage=lora", "stage.checkpoint=R"] in found


def test_figures_of_derived_weights_have_labels_that_say_what_they_are(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    record = replace(end(plan), evaluation={"size_of_16_bits": 1.633, "logit_agreement": 1.0, "probes": 4.0, "exact_match": 0.5})
    text = describe_record(record, plan)
    assert "size, × 16-bit weights  1.633" in text and "same next token, share" in text and "inputs compared" in text
    assert "exact match" in text and "probes" not in text


def test_a_run_is_named_so_that_the_command_works_from_here(
    plan_for: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    record = end(plan)
    monkeypatch.chdir("/")
    assert f"stage.checkpoint={plan.folder}" in next_commands(record, plan) and "=last" not in next_commands(record, plan)


def test_a_next_command_stays_true_when_another_run_begins(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    record = end(plan)
    before = next_commands(record, plan)
    newer = Path(shutil.copytree(plan.folder, tmp_path / "runs/newer"))
    set_value("result.json", "started_at", "2026-11-22T00:00:00+00:00")(newer)
    assert next_commands(record, plan) == before and "stage.checkpoint=R" in before and "=last" not in before


def test_the_next_commands_find_the_users_own_folder(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "my conf/cluster").mkdir(parents=True)
    text = (PROJECT / "conf/cluster/local.yaml").read_text(encoding="utf-8")
    (tmp_path / "my conf/cluster/lab.yaml").write_text(text.replace("name: local", "name: lab"))
    plan = replace(plan_for(f"cluster.root={tmp_path}"), overrides=("cluster=lab",), conf=str(tmp_path / "my conf"))
    assert commands(plan, tmp_path)[0] == [
        *("launch", "cluster=lab", "stage=evaluate", "stage.checkpoint=R", "--conf", str(tmp_path / "my conf"))
    ]


def row(step: int, seconds: float) -> str:
    values = {"step": step, "steps": 20, "loss": 1.23456, "lr": 1e-3, "grad_norm": 1.0, "samples": 8, "tokens": 80, "seconds": seconds}
    return json.dumps(values | {"peak_bytes": 2**29}) + "\n"


def test_a_run_has_one_speed(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    """At its end, in its record, in a report, in a comparison and while it runs: the median, without the warm-up."""
    plan = plan_for(f"cluster.root={tmp_path}", "run.steps=200")
    folder = open_run(plan, SOURCE)
    rows = [row(step, 9.0 if step <= 2 else 0.1 if step % 5 else 0.5) for step in range(1, 21)]
    (folder / "metrics.jsonl").write_text("".join(rows))
    outcome = AttemptOutcome(status="finished", code=0, nodes=(ENDED,))
    record = close_run(plan, SOURCE, outcome, started=NOW, ended=NOW + timedelta(seconds=3781))
    speed = "80 samples/s, 800 tokens/s (the median of 18 steps, the first 2 not counted)"
    text, run = describe_record(record, plan), read_run_files(folder)
    assert f"throughput  {speed}" in text and "final loss  1.235" in text and "took        1 h 03 min" in text
    assert dict(list_figures(run))["throughput"] == speed and dict(list_figures(run))["duration"] == "1 h 03 min"
    assert record.samples_per_s == speeds_of(run)["throughput"] == 80.0
    rate = Rate()
    for each in read_rows(folder / "metrics.jsonl"):
        shown = rate.describe(each)
    assert (shown["samples_per_s"], shown["tokens_per_s"], shown["memory"], shown["loss"]) == (
        "80 samples/s",
        "800 tokens/s",
        "512 MiB",
        "1.235",
    )


def test_what_cannot_follow_is_not_offered(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    """LoRA's 16 samples cannot be cut into micro-batches of 64, and an evaluation that is switched off does nothing."""
    root = f"cluster.root={tmp_path}"
    assert [words[2:] for words in commands(plan_for(root, "tune=null", "strategy.micro_batch=64"), tmp_path)[:-1]] == [
        ["tune=null", "strategy.micro_batch=64", f"stage={stage}", "stage.checkpoint=R"] for stage in ("evaluate", "serve")
    ]
    assert [
        words[2:] for words in commands(replace_folder(plan_for(root, "run.evaluation.enabled=false"), tmp_path / "b"), tmp_path)[:-1]
    ] == [["run.evaluation.enabled=false", f"stage={stage}", f"stage.checkpoint={tmp_path / 'b'}"] for stage in ("lora", "serve")]


def replace_folder(plan: Plan, folder: Path) -> Plan:
    return replace(plan, folder=str(folder))


# ------------------------------------------------------------------------------------------------------------------ records


def test_a_killed_run_that_saved_nothing_says_why(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    record = end(plan, "stopped", checkpoint=False, nodes=(replace(ENDED, code=-9, killed=True),))
    assert "checkpoint  none: it ended before its first step" in describe_record(record, plan)
    text = describe_record(replace(record, steps=4), plan)
    assert "none: the ranks were killed before they had saved, at a second Ctrl-C or signal, or because they took too long" in text
    limited = plan_for(f"cluster.root={tmp_path}", "run.stop_timeout_s=8")
    assert "at a second Ctrl-C, or after run.stop_timeout_s=8" in describe_record(replace(record, steps=4), limited)


@pytest.mark.parametrize(
    ("saved", "said"),
    [
        (0, ["nothing was saved: it starts again from the beginning, and repeats steps 1 to 41"]),
        (40, ["saved up to step 40: steps 41 to 41 are repeated"]),
        (41, []),
    ],
)
def test_the_last_lines_say_what_a_resumption_repeats(plan_for: Callable[..., Plan], tmp_path: Path, saved: int, said: list[str]) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    record = end(plan, "stopped", checkpoint=False)
    folder = Path(plan.folder)
    (folder / "metrics.jsonl").write_text("".join(row(step, 14.0) for step in range(1, 42)))
    if saved:
        (folder / f"checkpoints/step-{saved:06d}").mkdir(parents=True)
    lines = describe_record(replace(record, steps=41), plan).splitlines()
    assert lines[lines.index("") + 1 :] == [*said, "to go on: omnilaunch launch --resume R"]


def test_a_new_run_from_the_weights_of_another_is_of_its_stage(plan_for: Callable[..., Plan]) -> None:
    plan = replace(plan_for(), overrides=("stage=lora", "stage.checkpoint=base", "run.steps=40", "data=digits_even"))
    words = "omnilaunch launch stage=lora run.steps=40 data=digits_even stage.checkpoint=R"
    assert command_from_weights(plan) == words
    assert command_from_weights(plan, "run.steps=9") == "omnilaunch launch stage=lora data=digits_even stage.checkpoint=R run.steps=9"


@pytest.mark.parametrize(("checkpoint", "killed"), [(True, True), (False, False)])
def test_a_run_that_saved_or_was_not_killed_says_no_such_thing(
    plan_for: Callable[..., Plan], tmp_path: Path, checkpoint: bool, killed: bool
) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    assert "before they had saved" not in describe_record(
        end(plan, "stopped", checkpoint=checkpoint, nodes=(replace(ENDED, killed=killed),)), plan
    )


def elsewhere(plan: Plan, tmp_path: Path) -> Plan:
    return replace(plan, folder=str(tmp_path / "runs/R"))


def saved(plan: Plan, host: str) -> Record:
    return replace(end(plan, nodes=(replace(ENDED, host=host),)), checkpoint="checkpoints/step-000300")


TWO = "cluster.nodes=[{host: a, user: ann, port: 2222, jump: gate}, {host: b, user: ann}, {host: c, user: ann, spare: true}]"
REMOTE = ("cluster.runtime=docker", "cluster.root=/srv/omnilaunch")


def test_a_node_without_a_name_is_written_as_scp_and_the_next_stage_take_it(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = elsewhere(plan_for(*REMOTE, "cluster.nodes=[{host: 'fd00::5'}, {host: 'fd00::6'}]"), tmp_path)
    record = saved(plan, "fd00::5")
    place = "[fd00::5]:/srv/omnilaunch/runs/R/checkpoints/step-000300"
    assert f"checkpoint  {place}" in describe_record(record, plan) and ON_NODE.fullmatch(place)
    assert shlex.split(next_commands(record, plan).splitlines()[0])[2] == "[fd00::5]:/srv/omnilaunch/runs/R/checkpoints"


def test_a_node_that_a_stop_could_not_clear_is_named(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    record = end(plan, "stopped", nodes=(replace(ENDED, host="dark", left="dark: no answer\n  Next: look"),))
    assert "not cleared  dark: dark: no answer; when it answers: omnilaunch stop R" in describe_record(record, plan)


@pytest.mark.parametrize("host", ["a", "c"])
def test_a_checkpoint_on_a_node_is_named_by_its_node(plan_for: Callable[..., Plan], tmp_path: Path, host: str) -> None:
    """The first one of the last attempt: a spare may have taken the place."""
    plan = elsewhere(plan_for(*REMOTE, TWO), tmp_path)
    record = saved(plan, host)
    assert f"checkpoint  {host}:/srv/omnilaunch/runs/R/checkpoints/step-000300" in describe_record(record, plan)
    way = ["-J", "gate", "-P", "2222"] if host == "a" else []
    first = shlex.split(next_commands(record, plan).splitlines()[0])
    assert first == ["scp", "-r", *way, f"ann@{host}:/srv/omnilaunch/runs/R/checkpoints", "runs/R"]


@pytest.mark.parametrize("words", [("cluster.nodes=[{host: a}]",), (TWO, "cluster.shared=true")])
def test_where_every_node_sees_it_nothing_is_copied(plan_for: Callable[..., Plan], tmp_path: Path, words: tuple[str, ...]) -> None:
    plan = elsewhere(plan_for(*REMOTE, *words), tmp_path)
    first, *_ = next_commands(saved(plan, "a"), plan).splitlines()
    assert "stage=evaluate stage.checkpoint=R" in first


def test_why_a_run_ended_early_is_in_its_record_and_in_the_text(plan_for: Callable[..., Plan], tmp_path: Path) -> None:
    plan = plan_for(f"cluster.root={tmp_path}")
    why = "stopped early at step 40: exact_match did not improve over 3 evaluations"
    folder = open_run(plan, SOURCE)
    result = TrainResult(
        schema=SCHEMA,
        status="finished",
        steps=40,
        seconds=1.0,
        samples_per_s=1.0,
        final_loss=1.0,
        checkpoint="",
        weights_sha256="",
        evaluation={},
        ended=why,
    )
    write(result, folder / RESULT_FILE)
    record = close_run(plan, SOURCE, AttemptOutcome(status="finished", code=0, nodes=(ENDED,)), started=NOW, ended=NOW)
    assert (record.status, record.steps, record.ended) == ("finished", 40, why)
    said = describe_record(record, plan)
    assert "40 of 300" in said and why in said
    assert dict(list_figures(read_run_files(folder)))["ended"] == why
