"""Two records are compared: every planted difference is found and named, and nothing is called noise without a measurement."""

import json
import random
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from launcher.config.compose import compose
from launcher.config.schema import Bands
from launcher.errors import ConfigRefused
from launcher.image.stack import load_stacks
from launcher.plan.plan import make_plan
from launcher.record.comparable import ComparableKind, collect_comparables, find_differences, kind_of
from launcher.record.comparison import Comparison, Level, Outcome, comparison_json, describe_comparison
from launcher.record.noise import interval
from launcher.record.run_files import bands_of, read_run_files
from launcher.record.verdict import compare
from tests.launcher.conftest import PLACE, PROJECT
from tests.launcher.planted import REAL, Change, copy_run, set_rows, set_value, stretch

NO_BANDS = Bands()


def held(tmp_path: Path, *changes: Change, bands: Bands = NO_BANDS, allow: Sequence[str] = (), unlike: bool = False) -> Comparison:
    """Compare the real run with a copy of it that has `changes`."""
    reference, other = copy_run(tmp_path, "before"), copy_run(tmp_path, "after", *changes)
    return compare(read_run_files(reference), [read_run_files(other)], bands=bands, allow=tuple(allow), unlike=unlike)


def other_losses(folder: Path) -> None:
    set_rows(lambda row: row | {"loss": row["loss"] * 1.01})(folder)


def both(*changes: Change) -> Change:
    def change(folder: Path) -> None:
        for one in changes:
            one(folder)

    return change


def dirty(folder: Path) -> None:
    set_value("source.json", "dirty", True)(folder)
    set_value("result.json", "source.dirty", True)(folder)


def other_lock(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["image"]["files"]["lock.txt"] = "a" * 64
    (folder / "plan.json").write_text(json.dumps(plan))


def other_entrypoint(folder: Path) -> None:
    plan = json.loads((folder / "plan.json").read_text())
    plan["image"]["files"]["entrypoint.sh"] = "b" * 64
    (folder / "plan.json").write_text(json.dumps(plan))


def other_data(folder: Path) -> None:
    set_value("data.json", "sha256", "e" * 64)(folder)
    set_value("result.json", "data_sha256", "e" * 64)(folder)


def other_weights(folder: Path) -> None:
    for file in ("result.json", "train_result.json"):
        set_value(file, "weights_sha256", "f" * 64)(folder)


# What is done to the record -> what the verdict must say.
PLANTED: dict[str, tuple[Change, str]] = {
    "another seed": (both(set_value("plan.json", "config.run.seed", 2), other_losses), "config.run.seed: 1 -> 2"),
    "one changed image": (other_data, "data.sha256: 61d5b0d63e42"),
    "another lock": (other_lock, "image.files.lock.txt: ff583b4d9f48"),
    "another package": (set_value("environment.json", "packages.torch", "2.12.0"), "environment.packages.torch: 2.13.0+cpu -> 2.12.0"),
    "another thread count": (set_value("environment.json", "threads", 7), "environment.threads: "),
    "a variable": (set_value("environment.json", "environment.OMP_NUM_THREADS", "7"), "environment.environment.OMP_NUM_THREADS: "),
    "a variable more": (set_value("plan.json", "commands.0.environment.NCCL_ALGO", "Ring"), "variables.0.NCCL_ALGO: (none) -> Ring"),
    "a dirty tree": (dirty, "source.dirty: false -> true"),
    "another commit": (both(set_value("source.json", "commit", "c0ffee"), other_entrypoint), "source.commit: "),
    "a 5 % slowdown": (
        set_rows(lambda row: row | {"seconds": row["seconds"] / 0.95}),
        "throughput -5.00%, outside the stated band of 3.00%",
    ),
    "more memory": (set_rows(lambda row: row | {"peak_bytes": row["peak_bytes"] * 2}), "memory +100.00%, outside the stated band of 5.00%"),
    "exchanged weights": (other_weights, "the metrics rows are equal but the final weights are not"),
    "one row": (
        set_rows(lambda row: row | {"loss": row["loss"] + (row["step"] == 2) * 1e-15}),
        "the metrics rows differ from step 2 on (loss)",
    ),
    "a gradient": (
        set_rows(lambda row: row | {"grad_norm": row["grad_norm"] + (row["step"] == 3)}),
        "the metrics rows differ from step 3 on (grad_norm)",
    ),
    "a driver": (set_value("environment.json", "driver", "570.1"), "environment.driver:  -> 570.1"),
    "a chip": (set_value("environment.json", "devices", ["vm cuda 0: NVIDIA H200"]), "environment.devices: "),
    "an evaluation": (
        both(set_value("result.json", "evaluation.exact_match", 0.5), set_value("train_result.json", "evaluation.exact_match", 0.5)),
        "exact_match differs although the weights are equal",
    ),
}


@pytest.mark.parametrize(("change", "named"), PLANTED.values(), ids=PLANTED)
def test_a_planted_difference_is_found_and_named(tmp_path: Path, change: Change, named: str) -> None:
    comparison = held(tmp_path, change, bands=Bands(throughput=0.03, memory=0.05))
    assert comparison.outcome is Outcome.DIFFERENT
    text = describe_comparison(comparison)
    reasons = text[text.index("verdict: different") :]
    assert named in reasons and reasons.count("\n") <= 2, "that one thing and its result, nothing else"


def nothing(folder: Path) -> None:
    pass


# What a run made again elsewhere has by itself.
FREE: dict[str, Change] = {
    "nothing": nothing,
    "a folder": set_value("plan.json", "commands.0.environment.OMNILAUNCH_RUN_FOLDER", "/elsewhere"),
    "a port": set_value("environment.json", "environment.MASTER_PORT", "1"),
    "a host": set_value("environment.json", "hostname", "other"),
    "a time": set_value("result.json", "started_at", "2027-01-01T00:00:00.000+00:00"),
    "a limit": set_value("plan.json", "config.run.stop_timeout_s", 99),
    "a speed without a stated band": set_rows(lambda row: row | {"seconds": row["seconds"] * 3}),
}


@pytest.mark.parametrize("change", FREE.values(), ids=FREE)
def test_the_same_run_on_another_machine_is_the_same(tmp_path: Path, change: Change) -> None:
    comparison = held(tmp_path, change)
    assert comparison.outcome is Outcome.SAME, describe_comparison(comparison)


def test_a_host_in_the_name_of_a_device_is_no_difference(tmp_path: Path) -> None:
    def rename(folder: Path) -> None:
        devices = json.loads((folder / "environment.json").read_text())["devices"]
        set_value("environment.json", "devices", [f"other {title.partition(' ')[2]}" for title in devices])(folder)

    assert held(tmp_path, rename).outcome is Outcome.SAME


def test_a_host_in_the_report_of_a_rank_is_no_difference() -> None:
    run = read_run_files(REAL.with_name("2"))
    ranks = [rank | {"hostname": "other", "device": f"other {rank['device'].partition(' ')[2]}"} for rank in run.environment["ranks"]]
    moved = replace(run, environment={**run.environment, "ranks": ranks})
    differences = find_differences(collect_comparables(run), collect_comparables(moved))
    assert ranks and [found.key for found in differences] == ["environment.ranks.0.hostname"] and not differences[0].matters


def test_the_changed_input_file_is_named_if_the_records_have_hashes(tmp_path: Path) -> None:
    def inputs(digest: str) -> Change:
        data = {"digits/train.json": "a" * 64, "digits/images/0001.png": digest * 64}
        return lambda folder: (folder / "inputs.json").write_text(json.dumps({"schema": 1, "data": data, "weights": {}}))

    reference, other = copy_run(tmp_path, "before", inputs("b")), copy_run(tmp_path, "after", inputs("c"), other_data)
    comparison = compare(read_run_files(reference), [read_run_files(other)], bands=Bands())
    (judgement,) = comparison.judgements
    assert [found.key for found in judgement.differences if found.matters] == ["inputs.data.digits/images/0001.png", "data.sha256"]


def test_the_first_difference_of_the_environment_and_the_first_step_are_named(tmp_path: Path) -> None:
    comparison = held(
        tmp_path, set_value("environment.json", "python", "3.12.1"), set_value("environment.json", "threads", 7), other_losses
    )
    (judgement,) = comparison.judgements
    assert judgement.first_environment is not None and judgement.first_environment.key == "environment.python"
    assert (judgement.losses.first_step, judgement.losses.column) == (1, "loss")
    plain = json.loads(comparison_json(comparison))
    assert plain["outcome"] == "different" and plain["judgements"][0]["first_environment"] == "environment.python"


def test_a_non_finite_value_is_text_in_json(tmp_path: Path) -> None:
    comparison = held(tmp_path, set_rows(lambda row: row | {"loss": float("nan") if row["step"] == 2 else row["loss"]}))
    (judged,) = json.loads(comparison_json(comparison), parse_constant=lambda text: pytest.fail(text))["judgements"]
    assert judged["losses"]["right"] == "nan" and judged["losses"]["level"] == "outside"


# ----------------------------------------------------------------------------------------------- what is allowed to differ


def test_a_commit_whose_image_has_the_same_files_is_the_same_code(tmp_path: Path) -> None:
    """As for a rerun, which uses such a tree in place of the recorded one."""
    comparison = held(tmp_path, set_value("source.json", "commit", "c0ffee"))
    assert comparison.outcome is Outcome.EQUIVALENT
    assert comparison.judgements[0].reasons == ("source.commit may differ: the files of the image are the same",)


def test_an_allowed_difference_makes_runs_equivalent_at_best(tmp_path: Path) -> None:
    comparison = held(tmp_path, set_value("environment.json", "packages.torch", "2.12.0"), allow=["image"])
    assert comparison.outcome is Outcome.EQUIVALENT and "environment.packages.torch may differ (--allow)" in describe_comparison(comparison)


def test_other_hardware_is_equivalent_within_a_stated_band(tmp_path: Path) -> None:
    changes = (set_value("plan.json", "config.hardware.name", "h200"), set_value("environment.json", "driver", "570.1"), other_losses)
    assert held(tmp_path / "a", *changes, allow=["hardware"], bands=Bands(loss=0.02)).outcome is Outcome.EQUIVALENT
    outside = held(tmp_path / "b", *changes, allow=["hardware"], bands=Bands(loss=0.005))
    assert outside.outcome is Outcome.DIFFERENT and "the means of tenths of the steps differ by at most 1.00%" in describe_comparison(
        outside
    )


def test_without_band_or_repeats_nothing_is_called_noise(tmp_path: Path) -> None:
    comparison = held(tmp_path, other_losses)
    assert comparison.outcome is Outcome.DIFFERENT and comparison.judgements[0].losses.level is Level.NOT_JUDGED
    assert "state a band" in describe_comparison(comparison)


def test_two_experiments_are_refused_without_unlike(tmp_path: Path) -> None:
    change = set_value("plan.json", "config.model.name", "tiny_internvl")
    with pytest.raises(ConfigRefused, match=r"two experiments.*\n  config\.model\.name: tiny_llava and tiny_internvl\n.*--unlike"):
        held(tmp_path / "a", change)
    assert held(tmp_path / "b", change, unlike=True).outcome is Outcome.DIFFERENT


def test_a_key_that_only_one_run_recorded_is_unknown(tmp_path: Path) -> None:
    """As in a record of a version that had no such key."""

    def forget(folder: Path) -> None:
        plan = json.loads((folder / "plan.json").read_text())
        del plan["config"]["strategy"]["kernels"]
        (folder / "plan.json").write_text(json.dumps(plan))

    comparison = held(tmp_path, forget)
    assert comparison.outcome is Outcome.EQUIVALENT
    assert "config.strategy.kernels is not in both records" in describe_comparison(comparison)


def test_two_trees_with_unrecorded_changes_may_differ(tmp_path: Path) -> None:
    reference, other = copy_run(tmp_path, "before", dirty), copy_run(tmp_path, "after", dirty)
    comparison = compare(read_run_files(reference), [read_run_files(other)], bands=Bands())
    assert comparison.outcome is Outcome.EQUIVALENT and "source.diff is not in both records" in describe_comparison(comparison)


@pytest.mark.parametrize(
    "source",
    [
        {"untracked": ["notes.txt"]},
        {"untracked": []},
        {"dirty": True},  # a tracked file outside the code, or, in records that do not list them, an untracked one
    ],
)
def test_changes_outside_the_code_make_no_two_runs_different(tmp_path: Path, source: dict[str, Any]) -> None:
    def change(folder: Path) -> None:
        for key, value in source.items():
            set_value("source.json", key, value)(folder)
            set_value("result.json", f"source.{key}", value)(folder)

    runs = [
        copy_run(tmp_path, name, set_value("source.json", "record_schema", 2), *changes) for name, changes in (("a", ()), ("b", (change,)))
    ]
    facts = [collect_comparables(read_run_files(run)) for run in runs]
    assert not [found for found in find_differences(facts[0], facts[1]) if found.matters]
    assert not [found for found in find_differences(facts[1], facts[0]) if found.matters]


def test_a_key_in_an_object_that_was_empty_is_one_difference() -> None:
    (found,) = find_differences({"config.stage.optimizer.group_lr": {}}, {"config.stage.optimizer.group_lr.vision": 1e-6})
    assert found.key == "config.stage.optimizer.group_lr.vision" and found.matters


def test_an_unknown_key_must_match() -> None:
    assert kind_of("environment.something.new") is ComparableKind.ENVIRONMENT and kind_of("data.something") is ComparableKind.INPUT
    assert [found.matters for found in find_differences({"environment.x": 1}, {"environment.x": 1.0})] == [True]


# ------------------------------------------------------------------------------------------------------- repeats and bands


def repeat(runs: Path, name: str, seed: int, *, slower: float = 1.0, loss: float = 1.0, noise: float = 0.01) -> Path:
    """200 steps with a falling loss and random noise."""
    rng = random.Random(seed)
    losses = [loss * (1 + 5 / n) * (1 + rng.gauss(0, noise)) for n in range(1, 201)]
    seconds = [slower * (0.1 + abs(rng.gauss(0, 0.002))) for _ in range(200)]
    return copy_run(runs, name, stretch(200, loss=lambda n: losses[n - 1], seconds=lambda n: seconds[n - 1]), other_weights)


@pytest.mark.parametrize(
    ("changes", "outcome", "named"),
    [
        ({}, Outcome.EQUIVALENT, "within the noise of 5 repeats"),
        ({"slower": 1 / 0.95}, Outcome.DIFFERENT, "throughput -"),
        ({"loss": 1.02}, Outcome.DIFFERENT, "outside the noise of 5 repeats"),
    ],
)
def test_repeats_define_the_noise(tmp_path: Path, changes: dict[str, Any], outcome: Outcome, named: str) -> None:
    runs = [read_run_files(repeat(tmp_path, f"repeat-{seed}", seed)) for seed in range(5)]
    comparison = compare(runs[0], [*runs[1:], read_run_files(repeat(tmp_path, "judged", 99, **changes))], bands=Bands())
    last = comparison.judgements[-1]
    assert last.outcome is outcome and any(named in reason for reason in last.reasons), last.reasons


def test_a_slowdown_of_5_percent_is_found_ten_times_out_of_ten_and_no_other_is(tmp_path: Path) -> None:
    """Compared with the noise of five repeats of different speed."""
    repeats = [read_run_files(repeat(tmp_path, f"repeat-{seed}", seed)) for seed in range(5)]
    found = {1.0: 0, 1 / 0.95: 0}
    for slower in found:
        for seed in range(100, 110):
            judged = read_run_files(repeat(tmp_path, f"judged-{slower:.2f}-{seed}", seed, slower=slower))
            last = compare(repeats[0], [*repeats[1:], judged], bands=Bands()).judgements[-1]
            found[slower] += any(reason.startswith("throughput -") for reason in last.reasons)
    assert found == {1.0: 0, 1 / 0.95: 10}


def test_two_repeats_are_too_few_to_measure_noise(tmp_path: Path) -> None:
    runs = [read_run_files(repeat(tmp_path, f"repeat-{seed}", seed)) for seed in range(3)]
    assert {judgement.losses.level for judgement in compare(runs[0], runs[1:], bands=Bands()).judgements} == {Level.NOT_JUDGED}


def test_the_interval_holds_999_of_1000() -> None:
    rng, outside = random.Random(7), 0
    for _ in range(4000):
        low, high = interval([rng.gauss(3, 2) for _ in range(6)])
        outside += not low <= rng.gauss(3, 2) <= high
    assert 0 <= outside <= 12, "four are expected"
    assert interval([2.0, 2.0, 2.0]) == (2.0, 2.0)


def test_bands_are_those_that_the_run_stated(tmp_path: Path) -> None:
    stated = copy_run(tmp_path, "r", set_value("plan.json", "config.run.bands", {"loss": 0.02, "throughput": 0.05}))
    assert bands_of(read_run_files(stated)) == Bands(loss=0.02), "how fast a machine is makes no run another one"
    with pytest.raises(ConfigRefused, match=r"bands"):
        bands_of(read_run_files(copy_run(tmp_path, "bad", set_value("plan.json", "config.run.bands", {"los": 1}))))


def test_bands_are_stated_in_an_experiment_and_are_in_the_plan(tmp_path: Path) -> None:
    conf = shutil.copytree(PROJECT / "conf", tmp_path / "conf")
    (conf / "experiment").mkdir(exist_ok=True)
    (conf / "experiment" / "cell.yaml").write_text("# @package _global_\nrun:\n  bands: {loss: 0.01, throughput: 0.05}\n")
    assert compose(["experiment=cell"], conf).run.bands == Bands(loss=0.01, throughput=0.05)
    assert compose(["experiment=cell", "run.bands.memory=0.1"], conf).run.bands.memory == 0.1
    assert compose([], conf).run.bands == Bands()
    with pytest.raises(ConfigRefused, match=r"did you mean 'loss'"):
        compose(["run.bands.los=1"], conf)
    with pytest.raises(ConfigRefused, match=r"run\.bands\.loss"):
        make_plan(compose(["run.bands.loss=-1"], conf), load_stacks(PROJECT / "images"), PLACE, run_id="R")


def test_two_runs_that_failed_before_the_first_step_are_not_the_same(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        for name in ("metrics.jsonl", "train_result.json", "samples.jsonl", "evaluations.jsonl"):
            (folder / name).unlink()
        for key, value in {
            "status": "failed",
            "steps": 0,
            "weights_sha256": "",
            "checkpoint": "",
            "evaluation": {},
            "final_loss": None,
        }.items():
            set_value("result.json", key, value)(folder)

    reference, other = copy_run(tmp_path, "before", fail), copy_run(tmp_path, "after", fail)
    comparison = compare(read_run_files(reference), [read_run_files(other)], bands=Bands())
    assert comparison.outcome is Outcome.EQUIVALENT and comparison.judgements[0].reasons == ("not both runs finished",)


def test_the_compared_values_are_many_and_hold_no_folder(tmp_path: Path) -> None:
    facts = collect_comparables(read_run_files(copy_run(tmp_path, "r")))
    assert len(facts) > 300 and not any(str(tmp_path) in str(value) for value in facts.values())


def leave_out(rows: int, sha256: str) -> Change:
    def change(folder: Path) -> None:
        set_value("data.json", "left_out", {"train left out": rows} if rows else {})(folder)
        set_value("data.json", "sha256", sha256)(folder)
        set_value("result.json", "data_sha256", sha256)(folder)

    return change


@pytest.mark.parametrize(("left", "right", "said"), [(0, 3, "(none) -> 3"), (3, 5, "3 -> 5"), (3, 3, "")])
def test_runs_that_left_out_other_rows_have_other_data(tmp_path: Path, left: int, right: int, said: str) -> None:
    runs = [copy_run(tmp_path, name, leave_out(rows, f"{rows}" * 64)) for name, rows in (("a", left), ("b", right))]
    (judgement,) = compare(read_run_files(runs[0]), [read_run_files(runs[1])], bands=Bands()).judgements
    assert (judgement.outcome is Outcome.DIFFERENT) == bool(said)
    assert [reason for reason in judgement.reasons if "left out" in reason] == ([f"data.left_out.train left out: {said}"] if said else [])
