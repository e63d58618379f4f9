"""A random start: which numbers it draws, and where a large model is made."""

from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import trainer.train.model
from tests.trainer.models.conftest import TINY, model_spec
from trainer.contract import InputRefused
from trainer.models import find_family
from trainer.models.weight import round_weights
from trainer.train.model import count_parameters, create_on_meta, create_random, default_dtype, reading


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_on_the_cpu_any_size_is_drawn_in_float32_and_rounded(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer.train.model, "LARGE_PARAMETERS", 0)
    spec = model_spec(name)
    family = find_family(spec.family)
    torch.manual_seed(3)
    wanted = round_weights(family.create(spec), dtype).state_dict()
    torch.manual_seed(3)
    found = create_random(spec, family, dtype, torch.device("cpu")).state_dict()
    assert all(torch.equal(tensor, wanted[key]) and tensor.dtype == dtype for key, tensor in found.items())
    assert found.keys() == wanted.keys()


@pytest.mark.parametrize("name", TINY)
def test_a_large_one_is_made_on_the_device_and_in_its_dtype(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The meta device stands for an accelerator: the same tensors in the same dtypes, none of them on the host."""
    spec, place = model_spec(name), torch.device("meta")
    family = find_family(spec.family)
    small = create_random(spec, family, torch.bfloat16, place)
    assert {parameter.device.type for parameter in small.parameters()} == {"cpu"}
    monkeypatch.setattr(trainer.train.model, "LARGE_PARAMETERS", count_parameters(spec, family) - 1)
    large = create_random(spec, family, torch.bfloat16, place)
    assert {parameter.device.type for parameter in large.parameters()} == {"meta"}
    pairs = zip(tensors(small), tensors(large), strict=True)
    assert all(name == other and one.dtype == two.dtype and one.shape == two.shape for (name, one), (other, two) in pairs)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_a_large_one_that_no_device_has_room_for_is_drawn_on_the_host_and_in_its_dtype(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer.train.model, "LARGE_PARAMETERS", 0)
    spec = model_spec("tiny_llava")
    family = find_family(spec.family)
    torch.manual_seed(3)
    with default_dtype(dtype):
        wanted = family.create(spec)
    torch.manual_seed(3)
    found = create_random(spec, family, dtype, torch.device("meta"), partitioned=True)
    for (name, one), (_, two) in zip(tensors(wanted), tensors(found), strict=True):
        assert two.device.type == "cpu" and one.dtype == two.dtype and torch.equal(one, two), name


@pytest.mark.parametrize("name", TINY)
def test_a_hollow_start_has_the_same_tensors_and_no_memory(name: str) -> None:
    spec = model_spec(name)
    family = find_family(spec.family)
    before = torch.get_rng_state()
    found = create_on_meta(spec, family, torch.bfloat16)
    assert torch.equal(torch.get_rng_state(), before)
    wanted = round_weights(family.create(spec), torch.bfloat16)
    pairs = zip(tensors(wanted), tensors(found), strict=True)
    assert all(name == other and one.dtype == two.dtype and one.shape == two.shape and two.is_meta for (name, one), (other, two) in pairs)


@pytest.mark.parametrize("name", TINY)
def test_drawing_in_bfloat16_leaves_what_must_be_float32(name: str) -> None:
    """Rotary frequencies above all. The weights are other numbers of the same spread."""
    spec = model_spec(name)
    family = find_family(spec.family)
    wanted = round_weights(family.create(spec), torch.bfloat16)
    with default_dtype(torch.bfloat16):
        found = family.create(spec)
    buffers = dict(found.named_buffers())
    assert all(torch.equal(buffer, buffers[key]) and buffer.dtype == buffers[key].dtype for key, buffer in wanted.named_buffers())
    for (key, one), (_, two) in zip(wanted.named_parameters(), found.named_parameters(), strict=True):
        assert two.dtype == torch.bfloat16
        if one.ndim >= 2 and one.numel() > 4000:  # of fewer the spread itself is uncertain by more
            assert two.float().std().item() == pytest.approx(one.float().std().item(), rel=0.1), key


def test_counting_draws_no_random_number() -> None:
    spec = model_spec("tiny_llava")
    before = torch.get_rng_state()
    assert count_parameters(spec, find_family(spec.family)) == 614400
    assert torch.equal(torch.get_rng_state(), before)


def tensors(model: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*model.named_parameters(), *model.named_buffers()]


@pytest.mark.parametrize(
    ("error", "refused"),
    [
        (KeyError("added_tokens"), True), (ValueError("no JSON"), True), (SafetensorError("header too large"), True),
        (OSError("Can't load tokenizer"), True), (OSError(28, "No space left on device"), False), (RuntimeError("out of memory"), False),
        (InputRefused("a text of ours"), False),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_folder_is_refused_with_the_next_command(error: Exception, refused: bool, tmp_path: Path) -> None:
    with pytest.raises(InputRefused if refused else type(error)) as caught, reading(tmp_path):
        raise error
    if refused:
        assert str(caught.value).startswith(f"{tmp_path}: its files cannot be read as those of a model: {type(error).__name__}")
        assert f"omnilaunch model check {tmp_path}" in str(caught.value) and caught.value.__cause__ is error
    else:
        assert caught.value is error
    with pytest.raises(type(error)) as caught, reading(None):
        raise error
    assert caught.value is error, "a random start reads no files: that is a bug"
