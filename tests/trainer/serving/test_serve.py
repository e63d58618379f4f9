"""The stage serve as a process with a real tiny model: the answers equal those of evaluate, and SIGTERM loses no accepted request."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from openai import APIConnectionError, APIStatusError, OpenAI

from tests.trainer.conftest import ROOT, make_spec
from tests.trainer.serving.service import TOKEN, data_uri
from trainer.contract import (
    RESULT_FILE,
    SERVING_FILE,
    SPEC_FILE,
    Evaluation,
    InputRefused,
    Sampling,
    Serving,
    StageSpec,
    TrainResult,
    TrainSpec,
    read,
    write,
)
from trainer.programs.serve import serving_of

NEW_TOKENS = 12
ROWS = 12


def launched(spec: TrainSpec, output: Path, *, environ: dict[str, str] | None = None) -> "subprocess.Popen[str]":
    """A run with one rank, started as torchrun starts it."""
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


CONTEXT = 110  # of a question and its answer, as planned


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, digits: Path) -> TrainSpec:
    """The spec of a run of a few steps, whose answers are long nonsense. They are evaluated into samples.jsonl."""
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


@pytest.fixture(scope="module")
def server(trained: TrainSpec, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Process, URL and folder. The last test of this module that uses the server stops it."""
    folder = tmp_path_factory.mktemp("served") / "run"
    with served(serving_spec(trained, token="SERVE_TOKEN", context=CONTEXT), folder, SERVE_TOKEN=TOKEN) as (process, url):
        yield process, url, folder


def test_openai_client_gets_the_answers_of_evaluate(trained: TrainSpec, server: Any) -> None:
    rows, root = rows_of(trained), Path(trained.data.root)
    assert len(rows) == ROWS and any(len(row["got"]) > 3 for row in rows)
    with OpenAI(base_url=f"{server[1]}/v1", api_key=TOKEN, max_retries=0) as client, ThreadPoolExecutor(8) as clients:
        assert [model.id for model in client.models.list().data] == ["tiny_llava"]
        ask = client.chat.completions.create

        def whole(row: dict[str, Any]) -> str:
            found = ask(model="tiny_llava", messages=messages_of(row, root), max_tokens=NEW_TOKENS)
            assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens > 16
            return found.choices[0].message.content.strip()

        def parts(row: dict[str, Any]) -> str:
            found = ask(model="tiny_llava", messages=messages_of(row, root), max_completion_tokens=NEW_TOKENS, stream=True)
            return "".join(part.choices[0].delta.content or "" for part in found).strip()

        assert list(clients.map(whole, rows)) == list(clients.map(parts, rows)) == [row["got"] for row in rows]
        hello: Any = {"model": "tiny_llava", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 30}
        sampled = [ask(**hello, temperature=1.0, seed=seed).choices[0].message.content for seed in (1, 1, 2, 3, 4)]
        assert sampled[0] == sampled[1] and len(set(sampled)) > 1
        row = max(rows, key=lambda row: len(row["got"]))
        text, stop = row["got"], row["got"][2:4]
        stopped = ask(model="tiny_llava", messages=messages_of(row, root), stop=[stop], max_tokens=NEW_TOKENS).choices[0]
        assert stopped.message.content == text[: text.index(stop)].strip() and stopped.finish_reason == "stop"
        long = [{"role": "user", "content": "x" * CONTEXT}]  # the model itself has a context of 128
        for wrong, code in (({"max_tokens": 65}, "invalid_value"), ({"messages": long}, "context_length_exceeded")):
            with pytest.raises(APIStatusError) as refused:
                ask(**{**hello, **wrong})
            assert (refused.value.status_code, refused.value.code) == (400, code)


def keep_asking(client: OpenAI, number: int, ended: Event) -> list[Any]:
    """Answers and exceptions, until the port is closed."""
    ask, found = client.chat.completions.create, list[Any]()
    asked: Any = {"model": "tiny_llava", "messages": [{"role": "user", "content": f"Hello {number}"}], "max_tokens": 20}
    while not ended.is_set():
        try:
            if number % 2:
                found.append("".join(part.choices[0].delta.content or "" for part in ask(**asked, stream=True)))
            else:
                found.append(ask(**asked).choices[0].message.content)
        except APIStatusError as error:
            found.append(error)
        except APIConnectionError as error:
            return [*found, error]
    return found


def test_sigterm_under_load_loses_no_accepted_request(server: Any) -> None:
    process, url, folder = server
    with OpenAI(base_url=f"{url}/v1", api_key=TOKEN, max_retries=0) as client, ThreadPoolExecutor(16) as clients:
        before, ended = answered(url), Event()
        asking = [clients.submit(keep_asking, client, number, ended) for number in range(16)]
        time.sleep(5)
        process.send_signal(signal.SIGTERM)
        code = process.wait(100)
        ended.set()
        results = [answer for asked in asking for answer in asked.result()]
    result = read(TrainResult, folder / RESULT_FILE)
    others = [answer for answer in results if not isinstance(answer, str)]
    assert code == 0 and result.status == "finished"
    assert len(results) - len(others) == result.evaluation["answered"] - before > 16
    assert all(isinstance(other, APIConnectionError) or other.status_code == 503 for other in others), others
    assert [result.evaluation[name] for name in ("gone", "failed", "cut_off", "timeout")] == [0, 0, 0, 0]
    assert process.stdout is not None and TOKEN not in process.stdout.read()
    assert not [file for file in folder.rglob("*") if file.is_file() and TOKEN.encode() in file.read_bytes()]


def answered(url: str) -> float:
    request = urllib.request.Request(f"{url}/metrics", headers={"Authorization": f"Bearer {TOKEN}"})
    with urllib.request.urlopen(request, timeout=60) as response:
        return float(re.search(r'omnilaunch_requests_total{outcome="answered"} (\S+)', response.read().decode())[1])  # type: ignore[index]


def test_invalid_settings_are_reported_before_the_model_is_loaded(trained: TrainSpec, tmp_path: Path) -> None:
    process = launched(serving_spec(trained, address="0.0.0.0"), tmp_path / "serve")
    text = finish(process)
    assert process.returncode == 2 and "stage.serving.address=0.0.0.0 can be reached from other machines" in text
    assert "loading the model" not in text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_batch": 0}, "stage.serving.max_batch is 0: it must be at least 1"),
        ({"wait_ms": -1}, "stage.serving.wait_ms is -1"),
        ({"request_timeout_s": 0.0}, "stage.serving.request_timeout_s is 0"),
        ({"sampling": Sampling(top_p=0.0)}, "stage.serving.sampling.top_p is 0.0: it must be above 0"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    spec = make_spec(tmp_path, tmp_path)
    spec = replace(spec, stage=StageSpec(name="serve", kind="serve", trainable=(), serving=Serving(**options)))
    with pytest.raises(InputRefused, match=said.replace("(", r"\(")):
        serving_of(spec, {})


def test_the_drain_timeout_is_shortened_under_torchrun(tmp_path: Path) -> None:
    spec = make_spec(tmp_path, tmp_path)
    spec = replace(spec, stage=StageSpec(name="serve", kind="serve", trainable=(), serving=Serving()))
    assert serving_of(spec, {}).drain_timeout_s == 60 and serving_of(spec, {"TORCHELASTIC_RUN_ID": "x"}).drain_timeout_s == 20
