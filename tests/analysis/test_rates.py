"""The best rate by rank, against optima that were planted."""

import math
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from rankscope.analysis.rates import judge_rates

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
RANKS = (4, 16, 64)


def results(
    best: Callable[[int], float], seeds: int = 3, noise: float = 0.0, curvature: float = 0.02, random: int = 0
) -> pd.DataFrame:
    """Trials whose loss is a parabola in log rate around `best(rank)`, with a level of each seed and noise."""
    generator = np.random.default_rng(random)
    level = generator.normal(2, 0.1, seeds)
    rows = [
        {
            "rank": rank, "learning_rate": rate, "lora_alpha": 16.0, "seed": seed, "status": "done",
            "eval_loss": level[seed] - 0.01 * math.log(rank) + curvature * math.log(rate / best(rank)) ** 2
            + noise * generator.normal(),
        }
        for rank in RANKS for rate in RATES for seed in range(seeds)
    ]  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("exponent", "same", "inverse"), [(0.0, True, False), (-1.0, False, True), (-0.5, False, False)]
)
def test_planted_optima_are_found(exponent: float, same: bool, inverse: bool) -> None:
    found = judge_rates(results(lambda rank: 1e-3 * (rank / 16) ** exponent, noise=1e-5), 0.95)
    assert found is not None
    assert found["exponent"] == pytest.approx(exponent, abs=0.01)
    assert (found["same"], found["inverse"], found["curved"], found["seeds"]) == (same, inverse, True, 3)
    for row in found["ranks"]:
        assert row["optimum"] == pytest.approx(1e-3 * (row["rank"] / 16) ** exponent, rel=0.01)
        assert row["low"] < row["optimum"] < row["high"]
        assert row["edge"] is None


def test_an_optimum_at_the_edge_is_not_one() -> None:
    found = judge_rates(results(lambda rank: {4: 5e-2, 16: 1e-3, 64: 5e-6}[rank]), 0.95)
    assert found is not None
    assert [row["edge"] for row in found["ranks"]] == ["highest", None, "lowest"]
    assert [row["tried"] for row in found["ranks"]] == [1e-2, 1e-3, 1e-4]
    assert [row["optimum"] is None for row in found["ranks"]] == [True, False, True]
    assert found["exponent"] is None, "one rank is no trend"


def test_one_seed_has_no_interval() -> None:
    found = judge_rates(results(lambda rank: 1e-3 * (16 / rank) ** 0.5, seeds=1), 0.95)
    assert found is not None
    assert found["exponent"] == pytest.approx(-0.5)
    assert [found[name] for name in ("exponent_low", "exponent_high", "same", "inverse")] == [None] * 4
    assert all(row["low"] is None and row["optimum"] is not None for row in found["ranks"])


def test_two_rates_have_no_parabola_and_a_hill_no_optimum() -> None:
    table = results(lambda _: 1e-3)
    assert judge_rates(table[table["learning_rate"] > 2e-3], 0.95) is None
    table["eval_loss"] = np.where(table["learning_rate"] == 1e-3, 1.0, 2.0) + np.where(table["seed"] == 1, 0, 3) * (
        table["learning_rate"] == 1e-3
    )
    found = judge_rates(table, 0.95)
    assert found is not None
    assert found["curved"] is False
    assert all(row["optimum"] is None for row in found["ranks"])


def test_a_rate_at_which_a_seed_diverged_is_left_out_and_the_best_alpha_counts() -> None:
    table = results(lambda _: 1e-3)
    table.loc[(table["learning_rate"] == 1e-2) & (table["seed"] == 0), ["status", "eval_loss"]] = ["diverged", math.nan]
    worse = table.assign(lora_alpha=64.0, eval_loss=table["eval_loss"] + (table["learning_rate"] * 100).clip(upper=1))
    found, alone = (judge_rates(one, 0.95) for one in (pd.concat([table, worse]), table))
    assert found == alone
    assert found is not None
    assert [row["optimum"] for row in found["ranks"]] == pytest.approx([1e-3] * 3)


@pytest.mark.slow
def test_intervals_cover_what_was_planted() -> None:
    """At the noise of a study (an optimum's error of a third of the distance between rates)."""
    truth, covered, same = -0.5, 0, 0
    for number in range(120):
        table = results(lambda rank: 1e-3 * (rank / 16) ** truth, noise=4e-3, random=number)
        found = judge_rates(table, 0.9)
        if found is None or found["exponent_low"] is None:
            continue
        covered += found["exponent_low"] <= truth <= found["exponent_high"]
        same += 1
    assert same >= 100
    assert covered / same >= 0.83
