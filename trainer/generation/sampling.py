"""The next token of each row by the row's own rule, so that rows of one batch may differ in it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from trainer.contract import InputRefused, Sampling


def check_sampling(sampling: Sampling, key: str = "sampling") -> None:
    """`key`: where it stands in a config. Raises InputRefused that names the value and what is allowed."""
    for name, value, holds, allowed in (
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "1 or more"),
        ("temperature", sampling.temperature, 0 <= sampling.temperature < float("inf"), "0, for the likeliest token, or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0, for all tokens, or more"),
        ("beams", sampling.beams, sampling.beams >= 1, "1 or more"),
    ):
        if not holds:
            raise InputRefused(f"{key}.{name} is {value}: it can be {allowed}")
    if sampling.beams > 1 and sampling.temperature > 0:
        raise InputRefused(
            f"{key}.beams is {sampling.beams} with {key}.temperature {sampling.temperature}: beams search the likeliest answer\n"
            f"    set {key}.temperature=0, or {key}.beams=1"
        )


class Chooser:
    """A logits processor of transformers: where a row is sampled, all but the token that was drawn get -inf, so that the greedy choice
    which follows takes that one. Other rows stay as they are.

    Each row draws one number a token from a generator of its own on the CPU, so that its answer is the same at any place of any batch."""

    def __init__(self, samplings: Sequence[Sampling], seeds: Sequence[int]) -> None:
        self.rows = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
        self.samplings = [samplings[row] for row in self.rows]
        self.generators = [torch.Generator().manual_seed(seeds[row] % 2**63) for row in self.rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, tokens) float32 to the same."""
        if not self.rows:
            return scores
        draws = torch.stack([torch.rand((), generator=generator, dtype=torch.float64) for generator in self.generators])
        places = torch.tensor(self.rows, device=scores.device)
        chosen = choose(scores[places], self.samplings, draws.to(scores.device, scores.dtype))
        scores[places] = float("-inf")
        scores[places, chosen] = 0.0
        return scores


def choose(scores: Tensor, samplings: Sequence[Sampling], draws: Tensor) -> Tensor:
    """(rows,) int64, by inverting the cumulative distribution at `draws`, from 0 to below 1: of `scores`, (rows, tokens), over the
    temperature, the `top_k` highest, and of these the fewest that together hold `top_p` (Holtzman et al., arXiv 1904.09751)."""

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
    last = (shares > 0).sum(dim=-1) - 1  # where rounding leaves a draw beyond the end
    return tokens.gather(-1, torch.minimum(drawn, last)[:, None]).squeeze(-1)
