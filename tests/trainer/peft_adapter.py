"""Adapters of tiny models that peft makes, as other projects save them, and what an adapter does to the logits."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.trainer.models.conftest import Made
from trainer.data.batch.probe import make_probes
from trainer.stages.adapter import merge_adapter
from trainer.stages.adapter_probe import compute, refuse_idle_logits

# What transformers named these modules before 4.52 (huggingface/transformers#37033), when most published adapters were trained.
OLDER = {
    "tiny_qwen2_5_vl": (("model.language_model.", "model."), ("model.visual.", "visual.")),
    "tiny_llava": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
    "tiny_internvl": (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ),
}
EVERYWHERE = r".*(q_proj|up_proj|qkv|fc1|linear_1|visual\.merger\.mlp\.0)"


def load(made: Made) -> torch.nn.Module:
    return made.family.load(made.folder, made.spec.model, torch.float32).eval()


def logits_of(model: torch.nn.Module, made: Made) -> torch.Tensor:
    with torch.no_grad():
        return compute(model, make_probes(made.spec, made.processor, 2))


def train_by_peft(made: Made, folder: Path, **settings: Any) -> torch.Tensor:
    """An adapter that peft made and saved, with values that are not those of its start; returns its logits."""
    torch.manual_seed(1)
    wrapped = get_peft_model(load(made), LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": EVERYWHERE, **settings}))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if any(part in name for part in (".lora_", ".modules_to_save.", ".trainable_tokens_delta.")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    wrapped.peft_config["default"].base_model_name_or_path = str(made.folder)
    wrapped.save_pretrained(folder, save_embedding_layers=False)
    return logits_of(wrapped.eval(), made)


def rename(folder: Path, *pairs: tuple[str, str]) -> None:
    def renamed(key: str) -> str:
        name = key.removeprefix("base_model.model.")
        old, new = next((pair for pair in pairs if name.startswith(pair[0])), ("", ""))
        return f"base_model.model.{new}{name.removeprefix(old)}"

    file = folder / "adapter_model.safetensors"
    save_file({renamed(key): tensor for key, tensor in load_file(file).items()}, file, metadata={"format": "pt"})


def write_config(folder: Path, **changes: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def merged_logits(made: Made, folder: Path) -> torch.Tensor:
    probe = partial(refuse_idle_logits, spec=made.spec, processor=made.processor)
    return logits_of(merge_adapter(load(made), folder, probe), made)


def assert_equal(found: torch.Tensor, wanted: torch.Tensor, base: torch.Tensor) -> None:
    assert not torch.allclose(wanted, base, atol=1e-3), "the adapter does something"
    assert torch.allclose(found, wanted, atol=2e-4)
