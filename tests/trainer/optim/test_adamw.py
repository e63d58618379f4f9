"""AdamW in bfloat16 alone: beside torch's in float32, beside rounding to nearest, and cut into parts."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.optim import adamw as optimizer
from trainer.optim.adamw import ParameterSlice, StochasticAdamW

STEPS = 3000


def make(kind: str, parameter: torch.nn.Parameter, lr: float) -> torch.optim.Optimizer:
    if kind == "stochastic":
        return StochasticAdamW([parameter], seed=0, lr=lr)
    return torch.optim.AdamW([parameter], lr=lr, weight_decay=0.0)


def regress(kind: str, lr: float) -> float:
    """The error that STEPS steps of a linear regression leave, relative to that of the start. All kinds begin and are fed alike."""
    draws = torch.Generator().manual_seed(1)
    wanted = torch.randn(32, 16, generator=draws) * 2
    start = torch.randn(32, 16, generator=draws).bfloat16().float()
    weight = torch.nn.Parameter(start.to(torch.float32 if kind == "float32" else torch.bfloat16, copy=True))
    steps = make(kind, weight, lr)
    for _ in range(STEPS):
        inputs = torch.randn(16, 32, generator=draws)
        weight.grad = (2 * inputs.T @ (inputs @ (weight.detach().float() - wanted)) / 256).to(weight.dtype)
        steps.step()
    return float((weight.detach().float() - wanted).square().sum() / (start - wanted).square().sum())


def test_small_updates_are_lost_to_nearest_and_count_stochastically() -> None:
    """lr 1e-3 moves a weight by 1/1000 a step; to nearest it takes 1/512 of it to move. Most weights never get to where they should."""
    left = {kind: regress(kind, 1e-3) for kind in ("float32", "stochastic", "nearest")}
    print({kind: f"{value:.5f}" for kind, value in left.items()}, f"nearest / float32: {left['nearest'] / left['float32']:.1f}")
    assert left["float32"] < 0.35
    assert left["stochastic"] == pytest.approx(left["float32"], rel=0.05)
    assert left["nearest"] > 2 * left["float32"]


def test_one_update_is_torchs_up_to_one_rounding() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(64, 8).bfloat16(), [torch.randn(64, 8).bfloat16() for _ in range(3)]
    mine, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.float())
    values: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    pair = StochasticAdamW([mine], seed=5, **values), torch.optim.AdamW([theirs], **values)
    for gradient in gradients:
        mine.grad, theirs.grad = gradient.clone(), gradient.float()
        for each in pair:
            each.step()
    assert mine.dtype == torch.bfloat16
    assert pair[0].state[mine]["step"] == 3
    assert torch.allclose(mine.detach().float(), theirs.detach(), rtol=3 * 2**-7, atol=1e-4)
    for key in ("exp_avg", "exp_avg_sq"):
        held, exact = pair[0].state[mine][key], pair[1].state[theirs][key]
        assert held.dtype == torch.bfloat16
        assert torch.allclose(held.float(), exact, rtol=3 * 2**-7, atol=2e-3)


def test_parts_round_as_the_whole_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter in two ranks' flat tensors, with padding, in chunks of another size: bit for bit the same weights and moments."""
    torch.manual_seed(0)
    start, gradient = torch.randn(100).bfloat16(), torch.randn(100).bfloat16()
    whole = run([(start, gradient)], [(ParameterSlice(name="w", offset=0, start=0, count=100),)])[0]
    monkeypatch.setattr(optimizer, "CHUNK", {"cpu": 7})
    pad = torch.zeros(3, dtype=torch.bfloat16)
    ranks = [
        (torch.cat([pad, start[:41]]), torch.cat([pad, gradient[:41]])),
        (torch.cat([start[41:], pad]), torch.cat([gradient[41:], pad])),
    ]
    first, second = run(
        ranks, [(ParameterSlice(name="w", offset=3, start=0, count=41),), (ParameterSlice(name="w", offset=0, start=41, count=59),)]
    )
    for key, tensor in whole.items():
        assert torch.equal(torch.cat([first[key][3:], second[key][:59]]), tensor), key
    assert not first["weight"][:3].any()


def run(tensors: list[tuple[Tensor, Tensor]], stretches: list[tuple[ParameterSlice, ...]]) -> list[dict[str, Tensor]]:
    """Two updates of each."""
    held = [torch.nn.Parameter(weight.clone()) for weight, _ in tensors]
    steps = StochasticAdamW(held, seed=1, lr=0.05)
    steps.set_layout(dict(zip(held, stretches, strict=True)))
    for _ in range(2):
        for parameter, (_, gradient) in zip(held, tensors, strict=True):
            parameter.grad = gradient.clone()
        steps.step()
    return [{"weight": p.detach(), **{key: steps.state[p][key] for key in ("exp_avg", "exp_avg_sq")}} for p in held]


def test_another_dtype_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"bfloat16 tensors, not torch.float32 of \(2,\)"):
        StochasticAdamW([parameter], seed=0, lr=1.0).step()
