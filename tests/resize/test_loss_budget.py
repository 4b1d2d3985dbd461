"""The search for the smallest truncation, on losses that are known for every truncation."""

from collections.abc import Callable

import pytest
import torch

from rankscope.lora.saved import Factors
from rankscope.lora.svd import Decomposed, parameters
from rankscope.resize.loss_budget import MeasuredTruncation, Ranks, measure_truncations, smallest_within, truncations


def make_layers(seed: int, count: int = 4, rank: int = 8) -> list[Decomposed]:
    """Layers of random spectra and sizes."""
    generator = torch.Generator().manual_seed(seed)
    layers = []
    for number in range(count):
        values = torch.rand(rank, generator=generator, dtype=torch.float64).sort(descending=True)[0] ** 3
        factors = Factors(f"layer{number}", torch.zeros(rank, 9), torch.zeros(9 + number, rank), 1.0, ("A", "B"))
        layers.append(Decomposed(factors, torch.zeros(9 + number, rank), values, torch.zeros(rank, 9)))
    return layers


def search(
    layers: list[Decomposed], loss: Callable[[Ranks], float], max_increase: float, uniform: bool = False
) -> list[MeasuredTruncation]:
    return list(measure_truncations(layers, uniform, loss, 1.0, max_increase))


def lost_energy(layers: list[Decomposed], weights: list[float]) -> Callable[[Ranks], float]:
    """A loss that rises with each layer's lost energy, by a weight that the search does not know."""
    return lambda ranks: (
        1.0
        + sum(
            weight * float((layer.values[ranks[layer.factors.layer] :] ** 2).sum())
            for weight, layer in zip(weights, layers, strict=True)
        )
    )


@pytest.mark.parametrize("most", [1e-6, 0.003, 0.02, 0.1, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(6))
def test_the_smallest_truncation_of_the_rule_is_found(seed: int, most: float) -> None:
    layers = make_layers(seed)
    weights = torch.rand(4, generator=torch.Generator().manual_seed(seed + 50)).mul(2).tolist()
    loss = lost_energy(layers, weights)
    tried = search(layers, loss, most)
    count, ranks_at = truncations(layers, uniform=False)
    every = [ranks_at(number) for number in range(count)]
    fewest = min(parameters(layers, ranks) for ranks in every if loss(ranks) - 1 <= most)
    best = smallest_within(tried, most)
    assert best is not None
    assert best.parameters == parameters(layers, best.ranks) == fewest
    assert best.increase == pytest.approx(loss(best.ranks) - 1)
    assert len(tried) <= 9, "of 29 truncations"


@pytest.mark.parametrize("rank", range(1, 9))
def test_one_rank_for_all(rank: int) -> None:
    layers = make_layers(0)
    tried = search(layers, lambda ranks: 1.0 if min(ranks.values()) >= rank else 2.0, 0.01, uniform=True)
    best = smallest_within(tried, 0.01)
    assert best is not None
    assert set(best.ranks.values()) == {rank}


def test_a_small_truncation_within_the_budget_is_found_below_larger_ones_that_are_not() -> None:
    layers = make_layers(2)
    whole = parameters(layers, dict.fromkeys((layer.factors.layer for layer in layers), 8))

    def loss(ranks: Ranks) -> float:
        share = parameters(layers, ranks) / whole
        return 1.0 if 0.2 < share < 0.4 or share > 0.9 else 2.0

    best = smallest_within(search(layers, loss, 0.01), 0.01)
    assert best is not None
    assert 0.2 < best.parameters / whole < 0.25


def test_where_not_even_the_whole_is_within_there_is_no_answer() -> None:
    layers = make_layers(3)
    tried = search(layers, lambda ranks: 2.0, 0.01)
    assert smallest_within(tried, 0.01) is None
    assert min(tried[-1].ranks.values()) == 8, "the whole was tried"
