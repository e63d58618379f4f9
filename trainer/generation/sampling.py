"""Choose the next token of each row with its own sampling parameters, which may differ within a batch."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.contract import InputRefused, Sampling


def check_sampling(sampling: Sampling, key: str = "sampling") -> None:
    """`key`: its key in the config. Raises InputRefused with the value and the allowed range."""
    for name, value, holds, allowed in (
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "1 or more"),
        ("temperature", sampling.temperature, 0 <= sampling.temperature < float("inf"), "0 (the most likely token) or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (all tokens) or more"),
        ("beams", sampling.beams, sampling.beams >= 1, "1 or more"),
    ):
        if not holds:
            raise InputRefused(f"{key}.{name} is {value}: it must be {allowed}")
    if sampling.beams > 1 and sampling.temperature > 0:
        raise InputRefused(
            f"{key}.beams={sampling.beams} cannot be combined with {key}.temperature={sampling.temperature}: beam search does not sample\n"
            f"    set {key}.temperature=0, or {key}.beams=1"
        )


class RowSampler:
    """A logits processor for transformers: in a sampled row all tokens except the drawn one get -inf, so that the greedy choice after it
    takes the drawn one. Other rows are not changed.

    Each row has its own generator on the CPU and draws one number per token, so that its answer does not depend on the batch."""

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int]) -> None:
        self.rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        self.samplings = [samplings[row] for row in self.rows]
        self.generators = [torch.Generator().manual_seed(seeds[row] % 2**63) for row in self.rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens) float32 -> the same."""
        if not self.rows:
            return scores
        draws = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators])
        rows = torch.tensor(self.rows, device=scores.device)
        chosen = choose(scores[rows], self.samplings, draws.to(scores.device, scores.dtype))
        scores[rows] = float("-inf")
        scores[rows, chosen] = 0.0
        return scores


def choose(scores: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """(rows,) int64: inverts the cumulative distribution at `draws`, in [0, 1). The distribution is the softmax of `scores`, (rows, tokens),
    divided by the temperature, restricted to the `top_k` highest and then to the fewest that have the probability `top_p` (Holtzman et
    al., arXiv 1904.09751)."""

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, device=scores.device, dtype=scores.dtype)[:, None]

    ordered, tokens = scores.sort(dim=-1, descending=True, stable=True)
    ordered = (ordered - ordered[:, :1]) / column([sampling.temperature for sampling in samplings])
    most = column([sampling.top_k or scores.shape[-1] for sampling in samplings])
    ranks = torch.arange(scores.shape[-1], device=scores.device)
    shares = ordered.masked_fill(ranks >= most, float("-inf")).softmax(dim=-1)
    before = shares.cumsum(dim=-1) - shares
    shares = shares.masked_fill(before >= column([sampling.top_p for sampling in samplings]), 0.0)
    reached = shares.cumsum(dim=-1)
    drawn = (reached <= draws[:, None] * reached[:, -1:]).sum(dim=-1)
    last = (shares > 0).sum(dim=-1) - 1  # rounding may put a draw after the last token
    return tokens.gather(-1, torch.minimum(drawn, last)[:, None]).squeeze(-1)
