from collections.abc import Callable

import pytest
import torch

from tests.trainer.models.conftest import Made, to_arguments
from trainer.data.batch.collate import collate
from trainer.data.rows.sample import Sample


@pytest.mark.parametrize("name", ["tiny_qwen2_5_omni", "tiny_minicpm_v_4_6"])
def test_logits_at_selected_positions(name: str, make_tiny: Callable[[str], Made], samples: tuple[Sample, ...]) -> None:
    """The head gets only the selected hidden states. Without a selection all positions have logits, also right after a call with one."""
    made = make_tiny(name)
    batch = to_arguments(collate(samples, made.processor, made.spec), "labels")
    chosen = batch["attention_mask"].bool() & (torch.arange(batch["input_ids"].shape[1]) % 3 == 0)
    seen: list[torch.Size] = []
    handle = made.model.lm_head.register_forward_hook(lambda _, inputs, output: seen.append(output.shape))
    with torch.no_grad():
        some = made.model(**batch, logits_to_keep=chosen).logits
        every = made.model(**batch).logits
    handle.remove()
    assert seen == [(int(chosen.sum()), 384), (*chosen.shape, 384)]
    assert torch.allclose(some, every[chosen], atol=1e-6)
