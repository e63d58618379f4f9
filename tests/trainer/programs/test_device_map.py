"""Where the parts of a model go, from made-up figures of free memory and real modules. No real cards were at hand."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.trainer.conftest import GROUPS, make_spec
from tests.trainer.models.conftest import model_spec
from trainer.contract import InputRefused, TrainSpec
from trainer.device.device import DEVICES
from trainer.models import find_family
from trainer.programs.device_map import (
    WEIGHT_SHARE,
    dispatch_over_cards,
    find_first_card_modules,
    make_device_map,
    measure_free_memory,
    module_bytes,
)

NAMES = ("tiny_llava", "tiny_qwen2_5_vl", "tiny_internvl", "tiny_minicpm_v_2_6", "tiny_omnilmm_3b", "tiny_omnilmm_12b")


def make(name: str, layers: int = 8) -> tuple[torch.nn.Module, dict[str, str]]:
    spec = model_spec(name)
    spec = replace(spec, architecture={**spec.architecture, "text": {**spec.architecture["text"], "num_hidden_layers": layers}})
    torch.manual_seed(0)
    return find_family(spec.family).create(spec).eval(), dict(spec.groups)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cards", [2, 3])
def test_every_parameter_has_one_card_and_no_card_holds_more_than_its_share(name: str, cards: int) -> None:
    """Layers are whole on their card, and what meets the text's embeddings is with them on the first."""
    model, groups = make(name)
    pinned = sum(module_bytes(model.get_submodule(part)) for part in find_first_card_modules(model, groups))
    layer = max(module_bytes(module) for name, module in model.named_modules() if name.rpartition(".")[2].isdigit())
    each = (module_bytes(model) - pinned) // cards + 2 * layer
    budgets: dict[int | str, int] = {card: each + (pinned if card == 0 else 0) for card in range(cards)}
    placed = make_device_map(model, groups, budgets)
    assert set(placed.values()) <= set(budgets) and len(set(placed.values())) > 1
    held = dict.fromkeys(budgets, 0)
    for parameter_name, tensor in model.named_parameters():
        owners = [part for part in placed if parameter_name == part or parameter_name.startswith(f"{part}.")]
        assert len(owners) == 1, f"{parameter_name} belongs to {owners}"
        held[placed[owners[0]]] += tensor.numel() * tensor.element_size()
        if any(parameter_name.startswith(f"{part}.") for part in find_first_card_modules(model, groups)):
            assert placed[owners[0]] == 0
    assert all(held[card] <= budgets[card] for card in budgets)
    split = {part.rsplit(".", 1)[0] for part in placed if part.split(".")[-1] in ("self_attn", "mlp", "input_layernorm")}
    assert not split, f"layers in two parts: {split}"


def test_one_card_with_room_for_all_has_all() -> None:
    model, groups = make("tiny_llava")
    assert set(make_device_map(model, groups, {0: 10**9, 1: 10**9}).values()) == {0}


def test_what_does_not_fit_is_refused_with_the_numbers() -> None:
    model, groups = make("tiny_llava")
    with pytest.raises(InputRefused, match=rf"{module_bytes(model):,} bytes do not fit.*0: 1,600,000, 1: 1,000\)") as refused:
        dispatch_over_cards(model, groups, {0: 1_600_000, 1: 1_000})
    assert "\n    free their memory" in str(refused.value)
    with pytest.raises(InputRefused, match="must be on the first card"):
        make_device_map(model, groups, {0: 1000, 1: 10**9})


@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_is_half_on_the_disk_computes_the_same(name: str, tmp_path: Path) -> None:
    """accelerate's hooks over our parts, with the processor as the only card: what has no room is read from the disk layer by layer."""
    torch.set_num_threads(1)
    model, groups = make(name)
    ids = torch.randint(5, 200, (1, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        pinned = sum(module_bytes(model.get_submodule(part)) for part in find_first_card_modules(model, groups))
        placed = dispatch_over_cards(model, groups, {"cpu": pinned + (module_bytes(model) - pinned) * 3 // 4}, offload=tmp_path)
        assert "disk" in placed.values() and "cpu" in placed.values()
        assert any(parameter.is_meta for parameter in model.parameters())
        assert torch.equal(model(input_ids=ids).logits, expected)


def test_budgets_are_a_share_of_what_each_card_says_is_free() -> None:
    """The driver is asked card by card, in the way of torch.cuda and torch.npu; the first is at work again at the end."""
    at: list[int] = []
    free = {2: 10 * 2**30, 3: 4 * 2**30}
    device = replace(DEVICES["cpu"], activate=at.append, memory=lambda: (free[at[-1]], 16 * 2**30))
    assert measure_free_memory(device, 2, 2) == {2: int(10 * 2**30 * WEIGHT_SHARE), 3: int(4 * 2**30 * WEIGHT_SHARE)}
    assert at[-1] == 2


def test_pinned_parts_are_those_of_the_groups(tmp_path: Path) -> None:
    spec: TrainSpec = make_spec(tmp_path, tmp_path)
    model = find_family("llava").create(spec.model)
    assert find_first_card_modules(model, GROUPS) == (
        "model.vision_tower",
        "model.multi_modal_projector",
        "model.language_model.embed_tokens",
    )
