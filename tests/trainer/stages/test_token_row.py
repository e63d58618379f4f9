"""Rows of new tokens beside LoRA: what is trained, and that peft opens and merges what is saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from tests.trainer.conftest import make_spec
from tests.trainer.models.conftest import Made, make_tiny, tiny  # noqa: F401  # fixtures of the models' tests
from trainer.checkpoint.resume import load_adapter
from trainer.contract import Lora, StageSpec, TrainSpec
from trainer.kernels.cross_entropy import sum_loss
from trainer.stages.group import apply_stage
from trainer.stages.token_row import TOKEN_ROWS

LORA = StageSpec(name="lora", kind="train", trainable=(), lora=Lora(r=4, alpha=8, dropout=0.0, targets=("q_proj", "v_proj")))
TOKENS = tuple(f"<l{number}>" for number in range(80))


def spec_of(made: Made, tmp_path: Path) -> TrainSpec:
    return replace(make_spec(tmp_path, tmp_path), model=replace(made.spec.model, add_tokens=TOKENS), stage=LORA)


def wrap(made: Made, spec: TrainSpec) -> torch.nn.Module:
    model = made.family.load(made.folder, spec.model, torch.float32)
    return apply_stage(model, spec, made.family.unused(model)).model


def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    kept = torch.ones_like(ids, dtype=torch.bool)
    kept[:, 0] = False
    found = model(input_ids=ids, attention_mask=torch.ones_like(ids), logits_to_keep=kept).logits
    return found[kept] if found.ndim == 3 else found  # type: ignore[no-any-return]  # peft's own layer loses our hook


def test_only_the_rows_are_trained_and_peft_merges_them(tiny: Made, tmp_path: Path) -> None:  # noqa: F811
    spec = spec_of(tiny, tmp_path)
    model = wrap(tiny, spec)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows = {name: p for name, p in trained.items() if ".lora_" not in name}
    width, tied = (
        tiny.model.get_input_embeddings().weight.shape[1],
        tiny.model.get_output_embeddings().weight is tiny.model.get_input_embeddings().weight,
    )
    assert [tuple(p.shape) for p in rows.values()] == [(80, width)] * (1 if tied else 2)
    first = len(tiny.processor.tokenizer)
    ids = torch.tensor([[first, 5, first + 79, 7], [3, 4, 5, 6]])
    with torch.no_grad():
        start = logits(tiny.family.load(tiny.folder, spec.model, torch.float32), ids)
        torch.testing.assert_close(logits(model, ids), start, msg="the rows start as those of the model")
        for parameter in trained.values():
            parameter.add_(torch.randn_like(parameter) * 0.1)
        own = logits(model, ids)
    own_rows = own.shape[0]
    assert own_rows == 6 and (own - start).abs().max() > 0.01
    model.save_pretrained(tmp_path / "adapter", state_dict=trained, save_embedding_layers=False)
    assert sum("lora_" not in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors")) == len(rows)
    opened = PeftModel.from_pretrained(tiny.family.load(tiny.folder, spec.model, torch.float32), str(tmp_path / "adapter"))
    with torch.no_grad():
        torch.testing.assert_close(logits(opened, ids), own, rtol=1e-4, atol=1e-5, msg="peft's own layers")
        torch.testing.assert_close(logits(opened.merge_and_unload(), ids), own, rtol=1e-4, atol=1e-5, msg="merged by peft")
    again = wrap(tiny, spec)
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        assert torch.equal(logits(again, ids), own), "a run that goes on"


def test_the_gradient_reaches_the_rows_that_occur(tiny: Made, tmp_path: Path) -> None:  # noqa: F811
    """Also where the loss is computed in chunks of tokens, with the same gradient."""
    spec = spec_of(tiny, tmp_path)
    model, first = wrap(tiny, spec), len(tiny.processor.tokenizer)
    ids = torch.tensor([[first, 5, 3, 7]])
    gradients = []
    for chunk in (0, 2):
        model.zero_grad()
        targets = torch.tensor([5, 3, first + 1])
        sum_loss(model, lambda: logits(model, ids), targets, chunk=chunk).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    whole, chunked = gradients
    assert whole.keys() == chunked.keys() == {name for name, p in model.named_parameters() if p.requires_grad}
    for name, gradient in whole.items():
        assert (chunked[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name
    (embeddings,) = (gradient for name, gradient in whole.items() if "embed_tokens.token_adapter" in name)
    assert embeddings[0].abs().max() > 0
    if sum("token_adapter" in name for name in whole) == 2:
        assert embeddings[1:].abs().max() == 0, "only the token that occurs"


def test_beside_modules_that_are_trained_whole(make_tiny: Callable[[str], Made], tmp_path: Path) -> None:  # noqa: F811
    """A head that is trained whole trains its new rows too, and rows have the rate of adapters."""
    made = make_tiny("tiny_llava")
    spec = spec_of(made, tmp_path)
    optimizer = replace(spec.optimizer, lr=1e-3, group_lr={"projector": 2e-3, "head": 2e-3})
    spec = replace(spec, stage=replace(LORA, trainable=("projector", "head")), optimizer=optimizer)
    model = made.family.load(made.folder, spec.model, torch.float32)
    staged = apply_stage(model, spec, made.family.unused(model))
    assert [name for name, p in staged.model.named_parameters() if TOKEN_ROWS in name and p.requires_grad] == [
        "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta.default"
    ]
    assert staged.rates and all("modules_to_save" in name for name in staged.rates)


@pytest.mark.parametrize("stage", [LORA, StageSpec(name="full", kind="train", trainable=("projector", "lm", "head"))], ids=["LoRA", "full"])
def test_without_new_tokens_the_model_is_wrapped_as_before(tiny: Made, tmp_path: Path, stage: StageSpec) -> None:  # noqa: F811
    spec = replace(spec_of(tiny, tmp_path), model=tiny.spec.model, stage=stage)
    assert not any("token_adapter" in name for name, _ in wrap(tiny, spec).named_modules())
