"""The loss in chunks beside the plain one: the same numbers, and less memory."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.kernels.cross_entropy import ChunkedCrossEntropy, sum_loss

ROOT = Path(__file__).resolve().parents[3]


class Toy(torch.nn.Module):
    """A head behind an embedding, tied to it or with a bias."""

    def __init__(self, *, tied: bool, bias: bool) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 16)
        self.head = torch.nn.Linear(16, 50, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(ids)))  # type: ignore[no-any-return]


def measure(model: Any, run: Callable[[], Tensor], targets: Tensor, chunk: int, smoothing: float = 0.0) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss = sum_loss(model, run, targets, chunk=chunk, smoothing=smoothing)
    (loss * 0.37).backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model: Any, run: Callable[[], Tensor], targets: Tensor, chunk: int, smoothing: float = 0.0) -> None:
    """1e-6 of the largest gradient that there is: chunks are summed in another order, and a bias that cancels has nothing but noise."""
    plain, chunked = (measure(model, run, targets, size, smoothing) for size in (0, chunk))
    assert chunked[0] == pytest.approx(plain[0], rel=1e-6)
    assert chunked[1].keys() == plain[1].keys() and plain[1]
    largest = max(float(gradient.abs().max()) for gradient in plain[1].values())
    for name, gradient in plain[1].items():
        assert float((chunked[1][name] - gradient).abs().max()) <= 1e-6 * largest, name


@pytest.mark.parametrize("chunk", [1, 7, 36, 37])
@pytest.mark.parametrize(("tied", "bias", "frozen"), [(False, True, False), (True, False, False), (False, True, True)])
def test_loss_and_gradients_are_those_of_the_plain_path(chunk: int, tied: bool, bias: bool, frozen: bool) -> None:
    torch.manual_seed(0)
    model = Toy(tied=tied, bias=bias)
    model.head.requires_grad_(not frozen)
    ids, targets = torch.randint(50, (37,)), torch.randint(50, (37,))
    assert_equal(model, lambda: model(ids), targets, chunk)
    assert "forward" not in vars(model.head)  # the head is itself again


@pytest.mark.parametrize("chunk", [0, 1, 7, 37])
@pytest.mark.parametrize(("tied", "bias"), [(False, True), (True, False)])
def test_smoothed_loss_is_torchs_own(chunk: int, tied: bool, bias: bool) -> None:
    torch.manual_seed(0)
    model = Toy(tied=tied, bias=bias)
    ids, targets = torch.randint(50, (37,)), torch.randint(50, (37,))
    expected = torch.nn.functional.cross_entropy(model(ids), targets, label_smoothing=0.2, reduction="sum")
    found, _ = measure(model, lambda: model(ids), targets, chunk, 0.2)
    assert found == pytest.approx(float(expected.detach()), rel=1e-6)
    assert abs(found - measure(model, lambda: model(ids), targets, chunk)[0]) > 0.01
    assert_equal(model, lambda: model(ids), targets, chunk, 0.2)


def test_the_head_is_itself_again_after_an_error() -> None:
    model = Toy(tied=False, bias=False)
    with pytest.raises(IndexError):
        sum_loss(model, lambda: model(torch.tensor([99] * 5)), torch.zeros(5, dtype=torch.int64), chunk=2)
    assert model(torch.tensor([1])).shape == (1, 50)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_its_rounding(dtype: torch.dtype) -> None:
    """The factor comes before the rounding: softmax of a large vocabulary times 1e-4 is below the smallest float16."""
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(64, 16), torch.randn(400, 16), torch.randint(400, (64,))
    found = []
    for held in (dtype, torch.float32):
        h, w = (t.detach().to(dtype).to(held).requires_grad_() for t in (hidden, weight))
        loss = ChunkedCrossEntropy.apply(h, w, None, targets, 10)
        (loss * 1e-4 * 2**16).backward()
        found.append((float(loss.detach()), h.grad.float() / 2**16, w.grad.float() / 2**16))
    (rough, *rough_gradients), (exact, *exact_gradients) = found
    assert rough == pytest.approx(exact, rel=0.01)
    for one, other in zip(rough_gradients, exact_gradients, strict=True):
        assert float((one - other).norm() / other.norm()) < 0.02


PEAK = """
import sys, torch
from trainer.device.device import resident_peak  # getrusage's peak would be that of whoever started this
from trainer.kernels.cross_entropy import sum_loss
from tests.trainer.kernels.test_cross_entropy import Wide
torch.set_num_threads(1)
model, ids = Wide(), torch.arange(2048) % 100
def step(chunk):
    sum_loss(model, lambda: model(ids), ids, chunk=chunk).backward()
    model.zero_grad()
before = resident_peak()
step(int(sys.argv[1]))
print(resident_peak() - before)
"""


class Wide(torch.nn.Module):
    """A vocabulary so large that logits are most of a step: 2,048 tokens have 256 MiB of them."""

    VOCABULARY = 32_768

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = torch.nn.Embedding(100, 8), torch.nn.Linear(8, self.VOCABULARY, bias=False)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.head

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))  # type: ignore[no-any-return]


def test_the_peak_is_that_of_a_chunk() -> None:
    peaks = {}
    for chunk in (0, 128):
        command = (sys.executable, "-c", PEAK, str(chunk))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=240)
        peaks[chunk] = int(done.stdout)
    print({chunk: f"{peak / 2**20:.0f} MiB" for chunk, peak in peaks.items()})
    assert peaks[0] > 2 * 2048 * Wide.VOCABULARY * 4  # logits, their log-softmax, their gradient: two at least at once
    assert peaks[128] < peaks[0] / 4
