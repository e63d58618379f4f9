"""Complete runs through the real command: torchrun, DeepSpeed, real digits. They are short; what a long run learns is a benchmark."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from launcher.cli import main
from launcher.plan.commands import FOLDER_VARIABLE, RUN_VARIABLE
from launcher.ssh.transport import processes_with
from tests.launcher.planted import result_of, rows_of

PROJECT = Path(__file__).resolve().parents[3]
LIMIT_S = 300
SHORT = ("run.steps=3", "stage.optimizer.warmup=1", "run.evaluation.limit=8", "stage.global_batch=8")
OPEN = """
import sys
from transformers import AutoTokenizer, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
print(sum(p.numel() for p in model.parameters()), tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index)
"""


def command(folder: Path, *overrides: str, name: str = "r") -> tuple[str, ...]:
    return (sys.executable, "-m", "launcher.cli", "launch", "--run-id", name, f"cluster.root={folder}", *overrides)


def launch(folder: Path, *overrides: str, name: str = "r") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(folder, *overrides, name=name), cwd=PROJECT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One short run for the tests below."""
    folder = tmp_path_factory.mktemp("finished")
    done = launch(folder, *SHORT)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_files_of_a_finished_run(finished: Path) -> None:
    run = finished / "runs/r"
    record = result_of(finished, "r")
    assert (record["status"], record["steps"], record["exit_code"]) == ("finished", 3, 0)
    assert record["evaluation"]["count"] == 8 and 0 <= record["evaluation"]["exact_match"] <= 1  # type: ignore[index]
    assert len(str(record["data_sha256"])) == 64 and len(str(record["weights_sha256"])) == 64
    assert [row["step"] for row in rows_of(finished, "r")] == [1, 2, 3]
    environment = json.loads((run / "environment.json").read_text())
    assert environment["threads"] == 2 and environment["packages"]["deepspeed"] and environment["environment"]["OMP_NUM_THREADS"] == "2"
    assert environment["deepspeed"]["taken"]["train_batch_size"] == 8
    assert len((run / "samples.jsonl").read_text().splitlines()) == 8


def test_the_checkpoint_opens_in_transformers(finished: Path) -> None:
    checkpoint = finished / "runs/r" / str(result_of(finished, "r")["checkpoint"])
    done = subprocess.run((sys.executable, "-c", OPEN, str(checkpoint)), capture_output=True, text=True)
    assert done.stdout.split() == ["614400", "True"], done.stderr


@pytest.mark.slow
def test_the_same_seed_gives_bitwise_identical_runs(finished: Path) -> None:
    assert launch(finished, *SHORT, name="again").returncode == 0
    assert launch(finished, *SHORT, "run.seed=2", name="other").returncode == 0
    assert rows_of(finished, "again") == rows_of(finished, "r") != rows_of(finished, "other")
    assert (
        result_of(finished, "again")["weights_sha256"]
        == result_of(finished, "r")["weights_sha256"]
        != result_of(finished, "other")["weights_sha256"]
    )


def test_evaluating_and_tuning_a_run_by_its_id(finished: Path) -> None:
    done = launch(finished, "stage=evaluate", "stage.checkpoint=r", "run.evaluation.limit=8", name="evaluated")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(finished, "evaluated")["evaluation"] == result_of(finished, "r")["evaluation"]
    tuned = launch(finished, *SHORT, "stage=lora", "stage.checkpoint=r", "data.max_length=128", name="tuned")
    assert tuned.returncode == 0, tuned.stdout + tuned.stderr
    checkpoint = finished / "runs/tuned" / str(result_of(finished, "tuned")["checkpoint"])
    assert (checkpoint / "adapter_model.safetensors").is_file()


def test_two_ranks_under_zero_2(tmp_path: Path) -> None:
    done = launch(tmp_path, *SHORT, "cluster.devices_per_node=2", "strategy=zero2", "hardware.threads=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert result_of(tmp_path, "r")["steps"] == 3
    environment = json.loads((tmp_path / "runs/r/environment.json").read_text())
    assert environment["world_size"] == 2 and environment["deepspeed"]["taken"]["zero_stage"] == 2


@pytest.mark.parametrize("number", [pytest.param(signal.SIGINT, marks=pytest.mark.slow), signal.SIGTERM], ids=lambda number: number.name)
def test_a_stopped_run_leaves_no_process_and_a_record(tmp_path: Path, number: signal.Signals) -> None:
    name = f"stop-{tmp_path.name}"
    rows = tmp_path / "runs" / name / "metrics.jsonl"
    process = subprocess.Popen(
        command(tmp_path, "run.steps=100000", name=name), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while not (rows.exists() and rows.stat().st_size) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(number)
        output, _ = process.communicate(timeout=LIMIT_S)  # a busy machine needs a minute for a step
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130 and b"is being finished and saved. This may take up to" in output, output
    assert processes_with(RUN_VARIABLE, name) == ()
    record = result_of(tmp_path, name)
    assert record["status"] == "stopped" and (tmp_path / "runs" / name / str(record["checkpoint"]) / "model.safetensors").is_file()


# --------------------------------------------------------------------------------------------------------------- bad input


def row(answer: str = "7", mark: str = "<image>\n", image: str = "good.png") -> dict[str, object]:
    turns = [{"from": "human", "value": f"{mark}Which digit?"}, *([{"from": "gpt", "value": answer}] if answer else [])]
    return {"id": "1", "image": image, "conversations": turns}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    Image.effect_noise((64, 64), 50).save(folder / "good.png")
    (folder / "text.png").write_text("not an image")
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:600])
    return folder


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (row(image="missing.png"), ("row 2", "missing.png", "image")),
        pytest.param(row(image="text.png"), ("row 2", "text.png", "image"), marks=pytest.mark.slow),
        pytest.param(row(image="cut.png"), ("row 2", "cut.png", "truncated"), marks=pytest.mark.slow),
        pytest.param(row(answer=""), ("row 2", "conversations"), marks=pytest.mark.slow),
        (row(mark="<image><image>"), ("row 2", "<image>", "2")),
    ],
    ids=["missing", "not-an-image", "truncated", "no-answer", "mark-too-many"],
)
def test_bad_data_is_refused_with_file_and_row(tmp_path: Path, images: Path, bad: dict[str, object], said: tuple[str, ...]) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row(), bad, *(row() for _ in range(6))]))
    done = launch(tmp_path, "data=files", f"data.train={file}", f"data.images={images}", "data.max_length=128", *SHORT)
    assert done.returncode == 2, done.stdout + done.stderr
    for part in ("rows.json", *said):
        assert part in done.stderr
    assert "Traceback" not in done.stderr
    assert result_of(tmp_path, "r")["status"] == "refused"
    assert not (tmp_path / "runs/r/metrics.jsonl").exists(), "no step was taken"
    assert processes_with(FOLDER_VARIABLE, str(tmp_path / "runs/r")) == ()


@pytest.mark.slow
def test_a_sample_longer_than_max_length_is_refused_by_its_rank(tmp_path: Path, images: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([row(), row(answer="seven " * 300), *(row() for _ in range(6))]))
    done = launch(tmp_path, "data=files", f"data.train={file}", f"data.images={images}", "data.max_length=128", *SHORT)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "row 2" in done.stderr and "128" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("hardware=asend910b",), ("unknown hardware 'asend910b'", "did you mean 'ascend910b'")),
        (("model=tiny_lava",), ("unknown model 'tiny_lava'", "did you mean 'tiny_llava'")),
        (("run.step=3",), ("run.step", "did you mean 'steps'")),
        (("run.steps=three",), ("run.steps", "a whole number")),
        (("modle=x", "run.sed=1"), ("modle", "run.sed")),
        (("+run.steps=3",), ("'+' and '~' are refused",)),
        (("hardware=p4", "precision=bf16", "run.steps=0"), ("precision=fp16", "run.steps")),
        (("cluster=example", "cluster.runtime=process"), ("cluster.runtime=docker",)),
        (("stage=lora",), ("stage.checkpoint",)),
    ],
)
def test_a_bad_config_is_refused_before_anything_is_created(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: tuple[str, ...],
    said: tuple[str, ...],
) -> None:
    monkeypatch.chdir(PROJECT)
    code, printed = main(command(tmp_path, *overrides)[3:]), capsys.readouterr()
    assert code == 2, printed
    for part in said:
        assert part in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "runs").exists()


def test_all_nodes_that_cannot_be_reached_are_named_and_nothing_is_created(tmp_path: Path) -> None:
    """Two ports of this machine on which no sshd listens."""
    nodes = "cluster.nodes=[{host: 127.0.0.2, user: ann, port: 9}, {host: 127.0.0.3, user: ann, port: 9}]"
    argv = (
        sys.executable,
        "-m",
        "launcher.cli",
        "launch",
        "--run-id",
        "r",
        "cluster.runtime=docker",
        nodes,
        "cluster.root=/srv/omnilaunch",
    )
    environment = {**os.environ, "HOME": str(tmp_path), "PYTHONPATH": str(PROJECT)}
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "ann@127.0.0.2:9" in done.stderr and "ann@127.0.0.3:9" in done.stderr and "fix: ssh" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_killed_rank_is_started_again_and_the_result_is_bitwise_identical(tmp_path: Path) -> None:
    """The kernel's out-of-memory killer, twice; `run.restarts` allows it."""
    job = (
        "run.steps=12",
        "stage.optimizer.warmup=1",
        "stage.global_batch=8",
        "run.evaluation.limit=8",
        "run.save_every=3",
        "run.restarts=2",
    )
    calm = launch(tmp_path, *job, name="calm")
    assert calm.returncode == 0, calm.stdout + calm.stderr
    rows = tmp_path / "runs/shot/metrics.jsonl"
    with subprocess.Popen(
        command(tmp_path, *job, name="shot"), cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as shot:
        try:
            for step in (4, 8):
                wait_until(lambda step=step: rows.exists() and len(rows.read_text().splitlines()) >= step, shot)  # type: ignore[misc]
                ranks = [pid for pid in processes_with(FOLDER_VARIABLE, str(tmp_path / "runs/shot")) if b"trainer\0run" in words_of(pid)]
                trainers = [pid for pid in ranks if b"torch.distributed.run" not in words_of(pid)]
                assert len(trainers) == 1
                os.kill(trainers[0], signal.SIGKILL)
                attempt = tmp_path / "runs/shot/attempts" / str(step // 4) / "attempt.json"
                wait_until(attempt.exists, shot)
            said, _ = shot.communicate(timeout=240)
        finally:
            shot.kill()
    assert shot.returncode == 0, said
    assert rows_of(tmp_path, "shot") == rows_of(tmp_path, "calm")
    mine, undisturbed = result_of(tmp_path, "shot"), result_of(tmp_path, "calm")
    for key in ("status", "steps", "weights_sha256", "evaluation", "final_loss"):
        assert mine[key] == undisturbed[key]
    assert [attempt["number"] for attempt in mine["attempts"]] == [1, 2]  # type: ignore[attr-defined]
    assert (tmp_path / "runs/shot/attempts/1/logs/node0.log").stat().st_size


def words_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]", timeout_s: float = 240) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)
