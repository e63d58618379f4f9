"""Runs that are resumed in their own folder: bitwise identical to an uninterrupted run, whatever ended them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from launcher.plan.commands import FOLDER_VARIABLE
from launcher.record.recorded_run import load_recorded_run
from launcher.ssh.transport import processes_with
from tests.launcher.planted import result_of, rows_of

PROJECT = Path(__file__).resolve().parents[3]
BASE = (
    *("run.steps=12", "stage.optimizer.warmup=1", "stage.global_batch=8", "run.evaluation.limit=8"),
    *("hardware.threads=1", "run.trackers=[]"),
)
JOB = (*BASE, "run.save_every=4")
LIMIT_S = 240
SAME = ("status", "steps", "final_loss", "weights_sha256", "evaluation", "data_sha256")


def command(folder: Path, *words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "launcher.cli", "launch", *words, *(() if "--resume" in words else (f"cluster.root={folder}",)))


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(PROJECT)}


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *words), cwd=folder, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)


def end_at_step(folder: Path, name: str, step: int, *words: str, how: Callable[["subprocess.Popen[str]"], None]) -> str:
    """Launch, and end it as soon as it has a row of `step`. What the launcher printed."""
    rows = folder / "runs" / name / "metrics.jsonl"
    given = words if "--resume" in words else ("--run-id", name, *words)
    with subprocess.Popen(
        command(folder, *given), cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        try:
            deadline = time.monotonic() + LIMIT_S
            while not (rows.exists() and rows.read_text().count("\n") >= step):
                assert run.poll() is None, run.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)
            how(run)
            said, _ = run.communicate(timeout=LIMIT_S)
        finally:
            run.kill()
    return said


def power_off(folder: Path, name: str) -> Callable[["subprocess.Popen[str]"], None]:
    """SIGKILL for the launcher and all ranks at once."""

    def end(run: "subprocess.Popen[str]") -> None:
        for pid in (run.pid, *processes_with(FOLDER_VARIABLE, str(folder / "runs" / name))):
            os.kill(pid, signal.SIGKILL)
        while processes_with(FOLDER_VARIABLE, str(folder / "runs" / name)):
            time.sleep(0.02)

    return end


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("resumed")
    done = launch(folder, "--run-id", "calm", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def assert_same(folder: Path, name: str) -> None:
    assert rows_of(folder, name) == rows_of(folder, "calm")
    mine, undisturbed = result_of(folder, name), result_of(folder, "calm")
    for key in SAME:
        assert mine[key] == undisturbed[key], key


def test_a_run_whose_machine_lost_its_power_is_resumed_bitwise(calm: Path) -> None:
    end_at_step(calm, "dark", 5, *JOB, how=power_off(calm, "dark"))
    run = calm / "runs/dark"
    saved = max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))  # 4, on all but the fastest machines
    assert not (run / "result.json").exists()
    rows = (run / "metrics.jsonl").read_bytes()
    status = subprocess.run(
        (sys.executable, "-m", "launcher.cli", "status", "dark"), cwd=calm, env=environment(), capture_output=True, text=True, timeout=60
    )
    assert status.returncode == 0 and "no record, step " in status.stdout, status.stdout + status.stderr
    assert "to go on: omnilaunch launch --resume dark" in status.stdout
    done = launch(calm, "--resume", "dark")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming run dark after step {saved} of 12, from checkpoint step-{saved:06d}" in done.stdout
    assert_same(calm, "dark")
    assert (run / "attempts/1/metrics.jsonl").read_bytes() == rows, "the rows that are repeated are kept"
    (attempt,), (resumption,) = result_of(calm, "dark")["attempts"], result_of(calm, "dark")["resumptions"]
    assert (attempt["status"], attempt["steps"]) == ("killed", rows.count(b"\n")) and (run / "attempts/1/logs/node0.log").stat().st_size
    assert (resumption["attempt"], resumption["step"], resumption["accepted"], resumption["changes"]) == (2, saved, [], [])
    load_recorded_run(run)  # sealed, and whole
    compared = subprocess.run(
        (sys.executable, "-m", "launcher.cli", "compare", "calm", "dark"), cwd=calm, env=environment(), capture_output=True, text=True
    )
    assert compared.returncode == 0 and "same" in compared.stdout, compared.stdout + compared.stderr


@pytest.mark.slow
def test_ranks_that_outlive_their_launcher_save_before_the_run_is_resumed(calm: Path) -> None:
    end_at_step(calm, "orphaned", 2, *JOB, how=lambda run: os.kill(run.pid, signal.SIGKILL))
    done = launch(calm, "--resume", "orphaned")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(calm, "orphaned")


@pytest.mark.slow
def test_a_run_that_is_stopped_twice_and_has_no_checkpoints_of_its_own_is_resumed_bitwise(calm: Path) -> None:
    """run.save_every=0: Ctrl-C saves. The last lines name the command."""
    ctrl_c: Callable[[subprocess.Popen[str]], None] = lambda run: run.send_signal(signal.SIGINT)  # noqa: E731
    said = end_at_step(calm, "paused", 2, *BASE, "run.save_every=0", how=ctrl_c)
    assert said.rstrip().endswith("to go on: omnilaunch launch --resume paused"), said
    assert result_of(calm, "paused")["status"] == "stopped"
    first = result_of(calm, "paused")["steps"]
    end_at_step(calm, "paused", first + 2, "--resume", "last", how=ctrl_c)
    assert [attempt["status"] for attempt in result_of(calm, "paused")["attempts"]] == ["stopped"]
    done = launch(calm, "--resume", "paused", "run.save_every=2", "run.stop_timeout_s=20")
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same(calm, "paused")
    ended = result_of(calm, "paused")
    assert [each["attempt"] for each in ended["resumptions"]] == [2, 3]
    assert {each["key"]: (each["new"], each["kind"]) for each in ended["resumptions"][1]["changes"]} == {
        "run.save_every": ("2", ""),
        "run.stop_timeout_s": ("20", ""),
    }
    assert (calm / "runs/paused/attempts/1/result.json").is_file() and (calm / "runs/paused/attempts/2/seal.json").is_file()
    assert ended["seconds"] == pytest.approx(
        sum(attempt["seconds"] for attempt in ended["attempts"])
        + (datetime.fromisoformat(ended["ended_at"]) - datetime.fromisoformat(ended["resumptions"][1]["started_at"])).total_seconds(),
        abs=0.01,
    )


@pytest.mark.slow
def test_a_failed_run_is_resumed_after_a_checkpoint_was_damaged(calm: Path) -> None:
    words = (*BASE, "run.save_every=2", "run.keep_checkpoints=3")
    run = calm / "runs/failed"

    def kill_rank(_: object) -> None:
        (rank,) = [
            pid
            for pid in processes_with(FOLDER_VARIABLE, str(run))
            if b"trainer\0run" in Path(f"/proc/{pid}/cmdline").read_bytes()
            and b"torch.distributed.run" not in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        os.kill(rank, signal.SIGKILL)

    said = end_at_step(calm, "failed", 7, *words, how=kill_rank)
    assert "to go on: omnilaunch launch --resume failed" in said and result_of(calm, "failed")["status"] == "failed"
    newest = max(path.name for path in (run / "checkpoints").glob("step-*"))
    with (run / "checkpoints" / newest / "model.safetensors").open("ab") as file:
        file.write(b"more")
    done = launch(calm, "--resume", "failed")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"skipping checkpoint {newest}: model.safetensors missing or not of the size" in done.stdout
    assert f"from checkpoint step-{int(newest[-6:]) - 2:06d}" in done.stdout
    assert_same(calm, "failed")
    assert result_of(calm, "failed")["attempts"][0]["failure"]["message"]


@pytest.mark.slow
def test_of_two_resumes_at_once_one_wins_and_nothing_is_lost(calm: Path) -> None:
    end_at_step(calm, "twice", 5, *JOB, how=lambda run: run.send_signal(signal.SIGINT))
    runs = [
        subprocess.Popen(
            command(calm, "--resume", "twice"), cwd=calm, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    said = [run.communicate(timeout=LIMIT_S)[0] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    lost = next(text for text, run in zip(said, runs, strict=True) if run.returncode == 2)
    assert "supervised by another launcher" in lost or "is finished" in lost, lost
    assert_same(calm, "twice")


@pytest.mark.slow
def test_more_steps_and_other_data_are_accepted_by_name(tmp_path: Path) -> None:
    file, images = tmp_path / "train.json", tmp_path / "digits"
    done = launch(tmp_path, "--run-id", "first", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    images = tmp_path / ".cache/data/digits"
    rows = json.loads((images / "train.json").read_text())
    file.write_text(json.dumps(rows[:40]))
    words = (*JOB, "data=files", f"data.train={file}", f"data.images={images}", "data.max_length=128")
    end_at_step(tmp_path, "grown", 5, *words, how=lambda run: run.send_signal(signal.SIGINT))
    file.write_text(json.dumps(rows[:60]))
    refused = launch(tmp_path, "--resume", "grown")
    assert refused.returncode == 2 and "--accept data" in refused.stderr + refused.stdout, refused.stdout + refused.stderr
    assert "have changed since" in refused.stderr, refused.stderr
    done = launch(tmp_path, "--resume", "grown", "run.steps=16", "--accept", "data,steps")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run.steps: 12 → 16; the learning rate of the remaining steps follows" in done.stdout
    assert [row["step"] for row in rows_of(tmp_path, "grown")] == list(range(1, 17))
    ended = result_of(tmp_path, "grown")
    assert [attempt["status"] for attempt in ended["attempts"]] == ["stopped", "refused"]
    assert ended["resumptions"][-1]["accepted"] == ["data", "steps"]
    finished = launch(tmp_path, "--resume", "grown")
    assert finished.returncode == 2 and "run grown is finished: all 16 steps are done" in finished.stderr
