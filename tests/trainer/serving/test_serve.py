"""The stage serve as a process of its own with a real tiny model: a client's answers are those of evaluate, and SIGTERM loses none."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from openai import APIStatusError, OpenAI

from tests.trainer.conftest import ROOT, make_spec
from tests.trainer.serving.service import data_uri
from trainer.contract import SERVING_FILE, SPEC_FILE, Evaluation, Sampling, Serving, StageSpec, TrainResult, TrainSpec, read, write

NEW_TOKENS = 12
ROWS = 12


def launched(spec: TrainSpec, output: Path, *, environ: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """The only rank of a run, as torchrun starts one."""
    output.mkdir()
    path = output / SPEC_FILE
    write(replace(spec, output=str(output)), path)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    variables = {**os.environ, **place, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", **(environ or {})}
    command = (sys.executable, "-m", "trainer", "run", str(path))
    return subprocess.Popen(command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: "subprocess.Popen[str]", timeout_s: float = 200) -> str:
    try:
        return process.communicate(timeout=timeout_s)[0]
    finally:
        process.kill()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> TrainSpec:
    """The spec of a run of a few steps: its answers are nonsense, and long. Evaluated as such, into samples.jsonl."""
    spec = make_spec(tmp_path_factory.mktemp("run") / "trained", digits)
    spec = replace(spec, steps=2, evaluation=Evaluation(batch=4, max_new_tokens=NEW_TOKENS, limit=ROWS))
    process = launched(spec, Path(spec.output))
    text = finish(process)
    assert process.returncode == 0, text
    return spec


def serving_spec(trained: TrainSpec, **options: Any) -> TrainSpec:
    settings = {"port": 0, "sampling": Sampling(max_new_tokens=64), "max_batch": 4, "wait_ms": 20, **options}
    stage = StageSpec(
        name="serve", kind="serve", trainable=(), checkpoint=f"{trained.output}/checkpoints/step-000002", serving=Serving(**settings)
    )
    return replace(trained, stage=stage)


@contextmanager
def served(spec: TrainSpec, output: Path, **environ: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    process = launched(spec, output, environ=environ)
    try:
        until = time.monotonic() + 180
        while not (output / SERVING_FILE).exists():
            assert process.poll() is None and time.monotonic() < until, finish(process)
            time.sleep(0.05)
        yield process, json.loads((output / SERVING_FILE).read_text())["url"]
    finally:
        process.kill()
        process.wait()
        if process.stdout:
            process.stdout.close()


def rows_of(spec: TrainSpec) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(spec.output) / "samples.jsonl").read_text().splitlines()]


def messages_of(row: dict[str, Any], root: Path) -> list[Any]:
    images = [{"type": "image_url", "image_url": {"url": data_uri((root / name).read_bytes())}} for name in row["images"]]
    return [{"role": "user", "content": [*images, {"type": "text", "text": row["prompt"].removeprefix("<image>\n")}]}]


def test_the_client_library_gets_the_answers_of_evaluate(trained: TrainSpec, tmp_path: Path) -> None:
    rows, token = rows_of(trained), "a-token-of-many-characters"
    assert len(rows) == ROWS and any(len(row["got"]) > 3 for row in rows)
    with served(serving_spec(trained, token="SERVE_TOKEN"), tmp_path / "serve", SERVE_TOKEN=token) as (process, url):
        client = OpenAI(base_url=f"{url}/v1", api_key=token, max_retries=0)
        assert [model.id for model in client.models.list().data] == ["tiny_llava"]
        ask = client.chat.completions.create

        def whole(row: dict[str, Any]) -> str:
            found = ask(model="tiny_llava", messages=messages_of(row, Path(trained.data.root)), max_tokens=NEW_TOKENS)
            assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 16
            return found.choices[0].message.content.strip()

        def parts(row: dict[str, Any]) -> str:
            found = ask(
                model="tiny_llava", messages=messages_of(row, Path(trained.data.root)), max_completion_tokens=NEW_TOKENS, stream=True
            )
            return "".join(part.choices[0].delta.content or "" for part in found).strip()

        with ThreadPoolExecutor(8) as clients:
            assert list(clients.map(whole, rows)) == list(clients.map(parts, rows)) == [row["got"] for row in rows]
        hello: Any = {"model": "tiny_llava", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}
        sampled = [ask(**hello, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
        assert sampled[0] == sampled[1] and len(set(sampled)) > 1
        row = max(rows, key=lambda row: len(row["got"]))
        text, stop = row["got"], row["got"][2:4]
        stopped = ask(model="tiny_llava", messages=messages_of(row, Path(trained.data.root)), stop=[stop], max_tokens=NEW_TOKENS).choices[0]
        assert stopped.message.content == text[: text.index(stop)].strip() and stopped.finish_reason == "stop"
        for wrong, code in (
            ({"max_tokens": 65}, "invalid_value"),
            ({"messages": [{"role": "user", "content": "x" * 130}]}, "context_length_exceeded"),
        ):
            with pytest.raises(APIStatusError) as refused:
                ask(**{**hello, **wrong})
            assert (refused.value.status_code, refused.value.code) == (400, code)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert process.stdout is not None and token not in process.stdout.read()
    for file in (tmp_path / "serve").rglob("*"):
        assert not file.is_file() or token.encode() not in file.read_bytes()


def test_sigterm_under_load_loses_no_request_that_was_taken(trained: TrainSpec, tmp_path: Path) -> None:
    with served(serving_spec(trained), tmp_path / "serve") as (process, url), ThreadPoolExecutor(16) as clients:
        client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        ended = Event()

        def keep_asking(number: int) -> list[Any]:
            found: list[Any] = []
            while not ended.is_set():
                try:
                    asked = client.chat.completions.create(
                        model="tiny_llava",
                        messages=[{"role": "user", "content": f"Hello {number}"}],
                        stream=bool(number % 2),
                        max_tokens=20,
                    )
                    found.append(
                        "".join(part.choices[0].delta.content or "" for part in asked) if number % 2 else asked.choices[0].message.content
                    )
                except APIStatusError as error:
                    found.append(error.status_code)
                except Exception as error:  # the port is closed
                    found.append(type(error).__name__)
                    break
            return found

        asking = [clients.submit(keep_asking, number) for number in range(16)]
        time.sleep(3)
        process.send_signal(signal.SIGTERM)
        code = process.wait(60)
        ended.set()
        told = [answer for asked in asking for answer in asked.result()]
    result = read(TrainResult, tmp_path / "serve/train_result.json")
    answers = [answer for answer in told if isinstance(answer, str) and not answer.endswith("Error")]
    others = {answer for answer in told if not isinstance(answer, str) or answer.endswith("Error")}
    assert code == 0 and result.status == "finished"
    assert len(answers) == result.evaluation["answered"] > 16 and result.evaluation["gone"] == result.evaluation["failed"] == 0
    assert others <= {503, "APIConnectionError"}, others


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"address": "0.0.0.0"}, "stage.serving.address=0.0.0.0 can be reached from other machines"),
        ({"port": 70000}, "stage.serving.port=70000 is no port"),
        ({"hosts": ("127.0.0.1",)}, "stage.serving.hosts: '127.0.0.1' is no name of a host"),
    ],
)
def test_what_cannot_be_is_said_before_the_model_is_loaded(options: dict[str, Any], said: str, trained: TrainSpec, tmp_path: Path) -> None:
    process = launched(serving_spec(trained, **options), tmp_path / "serve")
    text = finish(process)
    assert process.returncode == 2 and said in text and "loading the model" not in text
