import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trainer.contract import Sampling
from trainer.generation.sampling import RowSampler, choose

RULES = (
    Sampling(temperature=1.0),
    Sampling(temperature=0.5, top_k=5),
    Sampling(temperature=1.7, top_p=0.6),
    Sampling(temperature=1.2, top_k=12, top_p=0.8),
    Sampling(temperature=1.0, top_k=1),
)


@pytest.mark.parametrize("sampling", RULES)
def test_frequencies_equal_the_probabilities_of_transformers(sampling: Sampling) -> None:
    """An even grid of draws selects each token in proportion to its probability, and none that transformers' warpers exclude."""
    scores = torch.randn(1, 40, generator=torch.Generator().manual_seed(2)) * 2
    warped = TemperatureLogitsWarper(sampling.temperature)(None, scores)  # type: ignore[arg-type]
    warped = TopKLogitsWarper(sampling.top_k)(None, warped) if sampling.top_k else warped  # type: ignore[arg-type]
    warped = TopPLogitsWarper(sampling.top_p)(None, warped) if sampling.top_p < 1 else warped  # type: ignore[arg-type]
    expected = warped.softmax(dim=-1)[0]
    count = 20_000
    draws = (torch.arange(count) + 0.5) / count
    chosen = choose(scores.expand(count, -1), [sampling] * count, draws)
    found = torch.bincount(chosen, minlength=40) / count
    assert torch.allclose(found, expected, atol=2 / count * 40)
    assert (found[expected == 0] == 0).all()


def test_a_draw_of_one_selects_an_allowed_token() -> None:
    scores = torch.zeros(1, 1000)
    scores[0, 3:] = -50.0
    chosen = choose(scores, [Sampling(temperature=1.0, top_k=3)], torch.tensor([1.0]))
    assert int(chosen) in (0, 1, 2)


def test_greedy_rows_are_not_changed() -> None:
    scores = torch.randn(3, 9)
    before = scores.clone()
    after = RowSampler([Sampling(), Sampling(temperature=1.0), Sampling()], [0, 5, 0])(torch.zeros(3, 1), scores)
    assert torch.equal(after[0], before[0]) and torch.equal(after[2], before[2])
    assert int(torch.isfinite(after[1]).sum()) == 1


def test_a_row_draws_the_same_numbers_in_any_batch() -> None:
    torch.manual_seed(0)
    scores = torch.randn(6, 50)
    one, other = Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.9)
    alone, among = RowSampler([one], [77]), RowSampler([other, other, one], [1, 2, 77])
    for row in range(3):
        first = alone(torch.zeros(1, 1), scores[row : row + 1].clone()).argmax()
        later = among(torch.zeros(3, 1), torch.stack([scores[5], scores[4], scores[row]])).argmax(dim=-1)[2]
        assert first == later
