"""A spec, the tiny tokenizer and a minimal processor: 4 tokens and 8x8 pixels per image."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.contract import (
    SCHEMA,
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
)
from trainer.data.processor import count_up, no_inputs
from trainer.models.tiny_tokenizer import tiny_tokenizer

VICUNA = Template(user="USER: {content} ", assistant_open="ASSISTANT: ", end_mark="</s>")
CHATML = Template(
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant_open="<|im_start|>assistant\n",
    end_mark="<|im_end|>",
    separator="\n",
)
TOKENS = 4


@dataclass(frozen=True, kw_only=True)
class FakeProcessor:
    tokenizer: Any
    image_features: Callable[[Image.Image], dict[str, torch.Tensor]]
    span: Callable[[tuple[int, int], int], tuple[int, ...]]
    axes: Mapping[str, int] = field(default_factory=dict)
    text_inputs: Callable[[torch.Tensor], dict[str, torch.Tensor]] = no_inputs
    position_ids: Callable[[torch.Tensor, Sequence[dict[str, torch.Tensor]]], torch.Tensor] = count_up
    scaled: None = None
    template: Any = None


def image_features(image: Image.Image) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.from_numpy(np.asarray(image.resize((8, 8)), dtype=np.float32)).permute(2, 0, 1)[None]}


@pytest.fixture(scope="session")
def processor() -> FakeProcessor:
    tokenizer = tiny_tokenizer("<image>", VICUNA)
    image = tokenizer.convert_tokens_to_ids("<image>")
    return FakeProcessor(tokenizer=tokenizer, image_features=image_features, span=lambda size, index: (image,) * TOKENS)


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    """Training on tmp_path/train.json with images beside it: 3 steps of 4 samples, 2 ranks, 2 micro-batches of 1."""
    return TrainSpec(
        schema=SCHEMA,
        run_id="test",
        output=str(tmp_path / "run"),
        seed=1,
        deterministic=True,
        steps=3,
        save_every=0,
        keep_checkpoints=1,
        gradient_checkpointing=False,
        model=ModelSpec(
            name="tiny",
            family="llava",
            source=Source(kind="random"),
            architecture={},
            groups={},
            image_token="<image>",
            template=VICUNA,
            attention="sdpa",
        ),
        stage=StageSpec(name="full", kind="train", trainable=("vision", "projector", "lm", "head")),
        precision=Precision(name="fp32", weights="float32", compute="float32", optimizer="float32", gradients="float32"),
        optimizer=Optimizer(lr=1e-3),
        batch=Batch(global_batch=4, micro_batch=1, accumulation=2),
        data=DataSpec(
            name="files",
            builtin="",
            root=str(tmp_path),
            train="train.json",
            evaluation="",
            images="",
            max_length=256,
            workers=0,
        ),
        device=DeviceSpec(accelerator="cpu", backend="gloo", world_size=2, devices_per_node=2, threads=1, timeout_s=60),
        evaluation=Evaluation(),
        deepspeed={},
    )


@pytest.fixture
def write_data(tmp_path: Path) -> Callable[..., Path]:
    """Writes `rows` rows "<image>\\nquestion" -> number, each with an image of a different colour, to tmp_path/<name>."""

    def write(rows: int, name: str = "train.json") -> Path:
        content = [conversation(f"{index}.png", index) for index in range(rows)]
        for index in range(rows):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(tmp_path / f"{index}.png")
        (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
        return tmp_path / name

    return write


def conversation(image: str, number: int) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\nWhich is it?"}, {"from": "gpt", "value": f"number {number}"}]
    return {"id": number, "image": image, "conversations": turns}


def with_data(spec: TrainSpec, **changes: Any) -> TrainSpec:
    return replace(spec, data=replace(spec.data, **changes))
