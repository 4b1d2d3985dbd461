"""Coverage of intervals and error rates of claims on simulated studies: benchmarks/simulate.py on a small scale."""

from types import ModuleType

import pytest

from scripts import load_benchmark

STUDIES = 400
MOST_FALSE = 0.05 + 3 * (0.05 * 0.95 / STUDIES) ** 0.5
"""Largest share of false claims: 5% and three standard errors (the benchmark, with more studies: 6.5%)."""


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    return load_benchmark("simulate")


SETTINGS = ((0, 0.97), (1, 0.98), (2, 0.97))
SAMPLES = ((2, 50), (3, 100), (5, 200))
EFFECTS = ("none", "at the margin", "beyond")


CASES = [
    pytest.param(setting, most, effects, seeds, examples, marks=[] if (i + j + k) % 3 == 0 else [pytest.mark.slow])
    for i, (setting, most) in enumerate(SETTINGS)
    for j, effects in enumerate(EFFECTS)
    for k, (seeds, examples) in enumerate(SAMPLES)
]
"""All 27 combinations; in the 9 that are not slow, every pair of two factors' values occurs."""


@pytest.mark.parametrize(("setting", "most", "effects", "seeds", "examples"), CASES)
def test_intervals_cover_and_claims_are_right(
    simulation: ModuleType, setting: int, most: float, effects: str, seeds: int, examples: int
) -> None:
    """Where seeds hardly differ (the second setting) intervals cover somewhat too much."""
    truth = simulation.SETTINGS[setting], simulation.EFFECTS[effects]
    found = simulation.simulate(*truth, seeds, examples, STUDIES, (setting, seeds, len(effects)))
    assert 0.93 <= found["covered"].mean() <= most
    assert found["regret_covered"].mean() >= 0.95
    assert found["falsely_worse"].mean() <= MOST_FALSE
    assert found["falsely_recommended"].mean() <= MOST_FALSE


GAIN_CASES = [
    pytest.param(setting, gain, seeds, examples, marks=[] if (i + j + k) % 8 == 0 else [pytest.mark.slow])
    for i, setting in enumerate((0, 1, 2))
    for j, gain in enumerate(("none", "harmful", "tiny, at the margin", "large, at the margin"))
    for k, (seeds, examples) in enumerate(SAMPLES)
]


@pytest.mark.parametrize(("setting", "gain", "seeds", "examples"), GAIN_CASES)
def test_planted_gains_are_told(simulation: ModuleType, setting: int, gain: str, seeds: int, examples: int) -> None:
    planted, effects = simulation.GAINS[gain]
    truth = simulation.SETTINGS[setting], simulation.EFFECTS[effects], seeds, examples
    found = simulation.simulate(*truth, STUDIES, (setting, seeds, 7), planted, shares=True)
    assert found["wrong"].mean() <= MOST_FALSE
    widths = planted / simulation.half_width(simulation.SETTINGS[setting], seeds, examples)
    if widths < 1:
        assert found["untold"].mean() >= 0.95
    if widths > 10:
        assert found["untold"].mean() <= 0.05
    assert found["kept"].mean() >= 1 - MOST_FALSE


def test_large_effects_are_found(simulation: ModuleType) -> None:
    """A verdict that claimed nothing would never be wrong."""
    found = simulation.simulate(simulation.SETTINGS[0], simulation.EFFECTS["large"], 5, 200, studies=100)
    assert found["recommended"].mean() >= 0.95


def test_six_ranks_do_not_make_claims_wrong_more_often(simulation: ModuleType) -> None:
    found = simulation.simulate(simulation.SETTINGS[0], simulation.EFFECTS["six ranks"], 5, 200, STUDIES)
    assert found["falsely_recommended"].mean() <= MOST_FALSE
    assert found["falsely_worse"].mean() <= MOST_FALSE


def test_a_bootstrap_of_few_seeds_covers_too_little(simulation: ModuleType) -> None:
    """Why the intervals are no bootstrap."""
    covered = simulation.bootstrap_coverage(simulation.SETTINGS[0], simulation.EFFECTS["small"], 2, 500, studies=100)
    assert covered < 0.8
