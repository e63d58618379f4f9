"""The server with many clients, compared with one client at a time in the same run: ratio of the rates, latency, and memory.

    python tests/benchmarks/serve_load.py [--clients 64] [--requests 256] [--alone 32] [--tokens 32] [--batch 16] [--threads 1]

A tiny LLaVA with random weights on the CPU (width 96, 3 layers), which always generates the maximum number of tokens. Each question has an
image of 32x32 pixels. The server is a separate process; the clients are threads of this process and share its cores. Prints one JSON object:
requests/s of both, their ratio, the median and the 95th percentile of the seconds of a request, and the growth of the server's resident memory
from the end of the warm-up to the end of the load. Exit code 1 if the ratio is below 2 or the growth above 512 MB.
"""

import argparse
import base64
import http.client
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402  # after the path to it
from PIL import Image  # noqa: E402

from tests.trainer.conftest import make_spec  # noqa: E402
from trainer.contract import SERVING_FILE, SPEC_FILE, Sampling, Serving, StageSpec, write  # noqa: E402

WARM_UP = 8
LEAST_RATIO, MOST_GROWTH_BYTES = 2.0, 512 * 10**6
START_S = 300


def start(folder: Path, *, batch: int, tokens: int, threads: int) -> tuple["subprocess.Popen[bytes]", int]:
    """A server and its port."""
    serving = Serving(port=0, max_batch=batch, sampling=Sampling(max_new_tokens=tokens))
    spec = make_spec(folder, folder, width=96)
    spec = replace(
        spec,
        stage=StageSpec(name="serve", kind="serve", trainable=(), serving=serving),
        device=replace(spec.device, threads=threads),
    )
    write(spec, folder / SPEC_FILE)
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    variables = {**os.environ, **place, "OMP_NUM_THREADS": str(threads), "DS_ACCELERATOR": "cpu"}
    command = (sys.executable, "-m", "trainer", "run", str(folder / SPEC_FILE))
    process = subprocess.Popen(command, cwd=ROOT, env=variables, stdout=sys.stderr)
    until = time.monotonic() + START_S
    while not (folder / SERVING_FILE).exists():
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            sys.exit("the server did not start")
        time.sleep(0.1)
    return process, int(json.loads((folder / SERVING_FILE).read_text())["url"].rpartition(":")[2])


def questions(count: int, tokens: int) -> list[bytes]:
    """Each with a different image."""
    random = np.random.default_rng(0)
    bodies = []
    for number in range(count):
        file = BytesIO()
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file, "PNG")
        url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": f"Question {number}: what is this?"}]
        bodies.append(
            json.dumps({"model": "tiny_llava", "messages": [{"role": "user", "content": content}], "max_tokens": tokens}).encode()
        )
    return bodies


def asker(port: int) -> Callable[[bytes], tuple[float, int]]:
    """Seconds and new tokens of one request, on its own connection, as with most clients."""

    def ask(body: bytes) -> tuple[float, int]:
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = json.loads(response.read())
        connection.close()
        if response.status != 200:
            sys.exit(f"status {response.status}: {data}")
        return time.perf_counter() - began, data["usage"]["completion_tokens"]

    return ask


def measure(ask: Callable[[bytes], tuple[float, int]], bodies: list[bytes], clients: int) -> dict[str, float]:
    began = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(ask, bodies))
    seconds = time.perf_counter() - began
    each = np.array([took for took, _ in found])
    return {
        "requests_per_s": len(bodies) / seconds,
        "tokens_per_s": sum(tokens for _, tokens in found) / seconds,
        "p50_s": float(np.percentile(each, 50)),
        "p95_s": float(np.percentile(each, 95)),
    }


def resident_bytes(process: int) -> int:
    return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("clients", 64), ("requests", 256), ("alone", 32), ("tokens", 32), ("batch", 16), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        process, port = start(Path(folder), batch=options.batch, tokens=options.tokens, threads=options.threads)
        try:
            ask, bodies = asker(port), questions(max(options.requests, options.alone), options.tokens)
            for body in bodies[:WARM_UP]:
                ask(body)
            before = resident_bytes(process.pid)
            found: dict[str, Any] = {"alone": measure(ask, bodies[: options.alone], 1)}
            found["together"] = measure(ask, bodies[: options.requests], options.clients)
            growth = resident_bytes(process.pid) - before
        finally:
            process.terminate()
            code = process.wait(60)
    ratio = found["together"]["requests_per_s"] / found["alone"]["requests_per_s"]
    print(json.dumps({**vars(options), **found, "ratio": ratio, "growth_bytes": growth, "exit_code": code}, indent=2))
    return int(ratio < LEAST_RATIO or growth > MOST_GROWTH_BYTES or code != 0)


if __name__ == "__main__":
    sys.exit(main())
