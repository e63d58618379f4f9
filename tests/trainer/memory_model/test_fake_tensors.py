"""Tensors without memory beside real integers."""

import torch
from torch._subclasses.fake_tensor import FakeTensor

from trainer.memory_model.allocation_tracker import AllocationTracker
from trainer.memory_model.fake_tensors import FakeTensors, empty_weights, fake_attention, kernels_of_an_accelerator

LARGE = (1024, 64)  # larger than fake_tensors.REAL_BYTES in float32


def test_large_floats_are_fake_and_integers_stay_real() -> None:
    with FakeTensors():
        weight, ids, few = torch.randn(LARGE), torch.arange(4096), torch.zeros(3)
        assert isinstance(weight, FakeTensor) and not isinstance(ids, FakeTensor) and not isinstance(few, FakeTensor)
        assert isinstance(weight.sum(dim=1) + few[0], FakeTensor)
        assert ids[-1].item() == 4095


def test_a_real_mask_chooses_as_many_rows_as_it_has_ones() -> None:
    with FakeTensors():
        hidden = torch.randn(2, 512, 64).requires_grad_()
        mask = torch.arange(1024).view(2, 512) % 4 == 0
        chosen = hidden[mask]
        assert chosen.shape == (256, 64)
        chosen.sum().backward()
        assert hidden.grad is not None and hidden.grad.shape == hidden.shape


def test_weights_become_fake_and_ties_stay() -> None:
    fakes = FakeTensors()
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    empty_weights(model, fakes, torch.bfloat16)
    assert model[1].weight is model[0].weight and isinstance(model[0].weight.data, FakeTensor)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not model[0].bias.requires_grad and model[1].bias.requires_grad


def test_attention_keeps_its_inputs_its_result_and_a_number_for_each_row() -> None:
    """Nothing that grows with the square of the length."""
    tracker = AllocationTracker()
    with FakeTensors(), tracker, tracker.during("forward", "activations"):
        query = torch.randn(2, 8, 256, 64).requires_grad_()
        key, value = (torch.randn(2, 2, 256, 64).requires_grad_() for _ in range(2))
        before = tracker.total
        result = fake_attention(query, key, value, is_causal=True, enable_gqa=True)
        assert tracker.total - before == result.nbytes + 2 * 8 * 256 * 4
        result.sum().backward()
    assert query.grad is not None and key.grad is not None and key.grad.shape == key.shape


def test_the_kernels_are_given_back() -> None:
    functional = torch.nn.functional
    before = functional.scaled_dot_product_attention, functional.dropout
    with kernels_of_an_accelerator(dropout=True):
        assert functional.scaled_dot_product_attention is fake_attention
        dropped = functional.dropout(torch.ones(1000), 0.5)
        assert 0 < int((dropped == 0).sum()) < 1000
    assert (functional.scaled_dot_product_attention, functional.dropout) == before
