"""NEFTune: uniform noise on the embeddings of training (Jain et al., arXiv 2310.05914, algorithm 1).

The noise of a sample depends on its key alone, and on the kind of device: not on the rank, the micro-batch or the samples beside it. It
has a generator of its own, so that dropout draws the same numbers as without it. As in the paper's code the features of images, which
replace the embeddings of their tokens later, get none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class EmbeddingNoise:
    """Adds noise to the output of `embedding`, within `adding` only."""

    def __init__(self, embedding: torch.nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.spans: list[list[int]] | None = None
        embedding.register_forward_hook(self._add)

    @contextmanager
    def adding(self, spans: Tensor | None) -> Iterator[None]:
        """`spans`: (samples, 4) int64, the row of each sample in the batch, its first position, its length and its key. None = no noise."""
        self.spans = None if spans is None else spans.tolist()
        try:
            yield
        finally:
            self.spans = None

    def _add(self, module: torch.nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
        """`output`: (rows, positions, width). A sample of L tokens gets noise between -a and a, with a = alpha / sqrt(L * width)."""
        if self.spans is None:
            return None
        noise, generator = torch.zeros_like(output, requires_grad=False), torch.Generator(device=output.device)
        for row, start, length, key in self.spans:
            bound = self.alpha / (length * output.shape[-1]) ** 0.5
            generator.manual_seed(key)
            noise[row, start : start + length].uniform_(-bound, bound, generator=generator)
        self.spans = None  # a family may use its embedding again, as for the mark of an image
        return output + noise
