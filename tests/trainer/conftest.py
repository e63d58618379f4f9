"""Specs of a tiny LLaVA on the digits, a process group of one rank, and torchrun."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from trainer.contract import (
    SCHEMA,
    SPEC_FILE,
    Batch,
    DataSpec,
    DeviceSpec,
    Evaluation,
    ModelSpec,
    Optimizer,
    Precision,
    Source,
    StageSpec,
    Template,
    TrainSpec,
    write,
)

# Inside an image the packages of tests are pure Python, which the openai client is not: these two ask a server with it.
collect_ignore = [] if find_spec("openai") else ["serving/test_serve.py", "programs/test_image_form.py"]

ROOT = Path(__file__).resolve().parents[2]
GROUPS = {
    "vision": r"^model\.vision_tower\.",
    "projector": r"^model\.multi_modal_projector\.",
    "lm": r"^model\.language_model\.",
    "head": r"^lm_head\.",
}
PRECISIONS = {
    "fp32": Precision(name="fp32", weights="float32", compute="float32", optimizer="float32", gradients="float32"),
    "bf16": Precision(name="bf16", weights="bfloat16", compute="bfloat16", optimizer="float32", gradients="float32"),
    "pure_bf16": Precision(
        name="pure_bf16", weights="bfloat16", compute="bfloat16", optimizer="bfloat16", gradients="bfloat16", rounding="stochastic"
    ),
}
ELEMENT_TYPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    "pure_bf16": {
        "bf16": {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True},
        "data_types": {"grad_accum_dtype": "bf16"},
        "zero_allow_untested_optimizer": True,
    },
}


def render_deepspeed(precision: str, batch: Batch, *, stage: int, clip_norm: float) -> dict[str, Any]:
    """The dict that DeepSpeed takes for a precision. 16 bit needs a ZeRO stage >= 1, one rank or many."""
    return {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro_batch,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": clip_norm,
        "zero_optimization": {"stage": stage},
        **ELEMENT_TYPES[precision],
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }


def architecture(width: int, layers: int) -> dict[str, Any]:
    sizes = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": layers, "num_attention_heads": 4}
    return {
        "vision": {**sizes, "patch_size": 8, "image_size": 32, "options": {}},
        "text": {
            **sizes,
            "num_key_value_heads": 4,
            "vocab_size": 384,
            "tie_word_embeddings": False,
            "max_position_embeddings": 128,
            "head_dim": None,
            "options": {},
        },
        "audio": {},
        "options": {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"},
    }


def make_spec(
    output: Path,
    data: Path,
    *,
    width: int = 32,
    precision: str = "fp32",
    zero: int = 0,
    micro: int = 8,
    accumulation: int = 1,
    ranks: int = 1,
) -> TrainSpec:
    """A few steps of a small model; replace what a test is about. `width` 96 with 3 layers is conf/model/tiny_llava.yaml."""
    batch = Batch(global_batch=micro * accumulation * ranks, micro_batch=micro, accumulation=accumulation)
    optimizer = Optimizer(lr=2e-3, schedule="linear", warmup=20 if width == 96 else 0)
    return TrainSpec(
        schema=SCHEMA,
        run_id="test",
        output=str(output),
        seed=0,
        deterministic=False,
        steps=4,
        save_every=0,
        keep_checkpoints=2,
        gradient_checkpointing=False,
        model=ModelSpec(
            name="tiny_llava",
            family="llava",
            source=Source(kind="random"),
            architecture=architecture(width, 3 if width == 96 else 2),
            groups=GROUPS,
            image_token="<image>",
            template=Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>"),
            attention="sdpa",
        ),
        stage=StageSpec(name="full", kind="train", trainable=("vision", "projector", "lm", "head")),
        precision=PRECISIONS[precision],
        optimizer=optimizer,
        batch=batch,
        data=DataSpec(name="digits", builtin="digits", root=str(data), train="", evaluation="", images="", max_length=128, workers=0),
        device=DeviceSpec(accelerator="cpu", backend="gloo", world_size=ranks, devices_per_node=ranks, threads=1, timeout_s=120),
        evaluation=Evaluation(batch=16, max_new_tokens=4, limit=24),
        deepspeed=render_deepspeed(precision, batch, stage=zero, clip_norm=optimizer.clip_norm),
    )


THIRD_PARTY = (
    "ignore:.*_tensor. is deprecated:FutureWarning",  # DeepSpeed 0.19.8 calls two collectives by the names before torch 2.13
    "ignore:.torch.jit.script:DeprecationWarning",  # torch 2.13 itself, when DeepSpeed imports torch._inductor
    "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning",  # peft 0.21.2 asks transformers 5.23 by the old name
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The warnings of others that our tests of engine, stages and runs cannot help."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in THIRD_PARTY:
                item.add_marker(pytest.mark.filterwarnings(warning))


def fuses_grouped_heads() -> bool:
    """Whether attention on this CPU keeps no square of scores where several query heads share a key: not yet in torch 2.7."""
    import torch

    query, key = torch.randn(1, 4, 8, 16, requires_grad=True), torch.randn(1, 2, 8, 16)
    result = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True)
    return "Flash" in type(result.grad_fn).__name__


@pytest.fixture(autouse=True)
def linear_as_it_was() -> Iterator[None]:
    """DeepSpeed's ZeRO 3 puts a linear of its own in the place of torch's and leaves it there, which the next test's memory would show."""
    import torch

    before = torch.nn.functional.linear
    yield
    torch.nn.functional.linear = before


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For the server that forks the ranks of tests.trainer.mortal, before it imports torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("DS_ACCELERATOR", "cpu")
        yield


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the digits written into it."""
    from trainer.data.digits import write_digits

    root = tmp_path_factory.mktemp("data")
    write_digits(root)
    return root


@pytest.fixture
def tiny_spec(tmp_path: Path, digits: Path) -> Callable[..., TrainSpec]:
    """`make_spec` with the run's folder made; `changes` replaces fields of the spec, `name` tells runs of one test apart."""

    def make(name: str = "run", changes: dict[str, Any] | None = None, **arguments: Any) -> TrainSpec:
        output = tmp_path / name
        output.mkdir()
        return replace(make_spec(output, digits, **arguments), **(changes or {}))

    return make


@pytest.fixture(scope="session")
def process_group() -> Iterator[None]:
    """A world of one rank in this process, joined as the trainer does."""
    import torch

    from trainer.distributed.engine import start_distributed

    torch.set_num_threads(1)
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.update(variables)
    start_distributed(DeviceSpec(accelerator="cpu", backend="gloo", world_size=1, devices_per_node=1, threads=1, timeout_s=60))
    yield
    torch.distributed.destroy_process_group()
    for name in variables:
        del os.environ[name]


def cpu_adam_is_built() -> bool:
    """DeepSpeed's operator for an optimizer in the host's memory, for the accelerator at work: one for CUDA is not taken on a CPU."""
    from deepspeed.accelerator import get_accelerator
    from deepspeed.git_version_info import accelerator_name, installed_ops
    from torch.utils.cpp_extension import get_default_build_root

    installed = installed_ops.get("cpu_adam") and accelerator_name == get_accelerator()._name
    return bool(installed or list(Path(get_default_build_root()).glob("**/cpu_adam/cpu_adam.so")))


@dataclass(frozen=True, kw_only=True)
class Ended:
    code: int
    text: str


@pytest.fixture
def torchrun() -> Callable[..., Ended]:
    """`torchrun -m trainer run` with the spec's ranks; `stop_after` sends SIGTERM once this many steps are written."""

    def run(spec: TrainSpec, *, stop_after: int | None = None, timeout_s: float = 240) -> Ended:
        path = Path(spec.output) / SPEC_FILE
        write(spec, path)
        ranks = str(spec.device.world_size)
        command = (
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            ranks,
            "-m",
            "trainer",
            "run",
            str(path),
        )
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            if stop_after is not None:
                wait_for_rows(Path(spec.output) / "metrics.jsonl", stop_after, process, timeout_s)
                process.send_signal(signal.SIGTERM)
            text, _ = process.communicate(timeout=timeout_s)
        finally:
            process.kill()
        return Ended(code=process.returncode, text=text)

    return run


def wait_for_rows(file: Path, rows: int, process: subprocess.Popen[str], timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while process.poll() is None and time.monotonic() < until:
        if file.is_file() and len(file.read_text(encoding="utf-8").splitlines()) >= rows:
            return
        time.sleep(0.05)
    raise AssertionError(f"{rows} steps were not written in {timeout_s} s")
