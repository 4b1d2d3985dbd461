"""The verdict on made-up studies whose truth is known."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rankscope.analysis.comparison import best_rates, compare, t_interval
from rankscope.analysis.verdict import conclude
from rankscope.spec import resolve_spec
from rankscope.study import Evidence


def examples(losses: Mapping[tuple[int, float], Sequence[float]], count: int = 40, noise: float = 0.0) -> pd.DataFrame:
    """Held-out examples whose mean for each (rank, learning rate) and seed is as given."""
    rng = np.random.default_rng(0)
    frames = []
    for (rank, rate), by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            spread = rng.normal(0, noise, count) if noise else np.linspace(-0.5, 0.5, count)
            name = f"r{rank:03d}-lr{rate}"
            frames.append(
                pd.DataFrame(
                    {
                        "trial": f"{name}-s{seed}", "candidate": name, "rank": rank, "learning_rate": rate,
                        "seed": seed, "example": range(count), "loss": loss + spread - spread.mean(),
                        "label_tokens": 10, "correct_tokens": 5,
                    }
                )
            )  # fmt: skip
    return pd.concat(frames, ignore_index=True)


def verdict_on(losses: Mapping[tuple[int, float], Sequence[float]], **verdict: float) -> dict:
    frame = examples(losses)
    spec = resolve_spec(
        {
            "model": {"id": "m"}, "data": {"id": "d"}, "verdict": verdict,
            "ranks": sorted({rank for rank, _ in losses}), "learning_rates": sorted({rate for _, rate in losses}),
            "seeds": list(range(len(next(iter(losses.values()))))),
        }
    )  # fmt: skip
    empty = pd.DataFrame()
    results = pd.DataFrame({"status": ["done"] * frame["trial"].nunique()})
    return conclude(Evidence(spec, results, empty, empty, empty, frame, {}, {}))


def test_the_smallest_rank_within_the_margin_is_recommended() -> None:
    verdict = verdict_on({(8, 1e-3): [2.1, 2.12, 2.11], (64, 1e-3): [2.01, 2.0, 2.005], (256, 1e-3): [2.0, 2.0, 2.0]})
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 64)
    assert [row["within_margin"] for row in verdict["comparison"]] == [False, True, True]
    assert verdict["caveats"] == ["one_learning_rate"]


def test_equal_ranks_recommend_the_smallest() -> None:
    verdict = verdict_on({(8, 1e-3): [2.001, 2.0, 2.001], (256, 1e-3): [2.0, 2.001, 2.0]})
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 8)


def test_no_difference_within_narrow_intervals_is_not_distinguishable() -> None:
    verdict = verdict_on({(8, 1e-3): [2.015, 1.995, 2.005], (256, 1e-3): [2.0, 2.0, 2.0]})
    assert verdict["comparison"][0]["regret_low"] < 0 < 0.02 < verdict["comparison"][0]["regret_high"]
    assert (verdict["outcome"], verdict["rank"]) == ("not_distinguishable", 8)


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_much_noise_is_not_evidence_of_no_difference(shift: float) -> None:
    """Neither for calling ranks alike, nor for the rank that happens to be the best of the sample."""
    verdict = verdict_on({(8, 1e-3): [2.0 + shift, 2.2 + shift, 1.95 + shift], (256, 1e-3): [2.1, 1.95, 2.06]})
    assert (verdict["outcome"], verdict["rank"]) == ("not_enough_evidence", None)


def test_a_candidate_that_fails_takes_no_evidence_from_the_others() -> None:
    losses = {(8, 1e-3): [2.1, 2.1, 2.1], (64, 1e-3): [2.0, 2.01, 2.0], (256, 1e-3): [1.9, 9.0, 9.0]}
    frame = examples(losses)
    frame = frame[~((frame["rank"] == 256) & (frame["seed"] > 0))]
    comparison = compare(frame, 0.95)
    assert [row.rank for row in comparison] == [8, 64]
    assert len(comparison[0].regret_by_seed) == 3


def test_a_rate_is_not_chosen_from_nothing() -> None:
    """No seed was finished by every candidate; each rank's best rate is still the better one."""
    frame = examples({(8, 1e-4): [2.0, 2.0], (8, 1e-3): [1.0, 1.0], (64, 1e-4): [2.0, 2.0], (64, 1e-3): [1.0, 1.0]})
    frame = frame[~((frame["learning_rate"] == 1e-4) & (frame["rank"] == 8) & (frame["seed"] == 0))]
    frame = frame[~((frame["learning_rate"] == 1e-4) & (frame["rank"] == 64) & (frame["seed"] == 1))]
    assert best_rates(frame) == ["r008-lr0.001", "r064-lr0.001"]


def test_worse_but_perhaps_within_the_margin_asks_for_more_seeds() -> None:
    losses = {(8, 1e-3): [2.015, 2.022, 2.018], (256, 1e-3): [2.0, 2.0, 2.0]}
    verdict = verdict_on(losses)
    assert (verdict["outcome"], verdict["rank"]) == ("not_enough_evidence", None)
    regrets, n = np.array([0.015, 0.022, 0.018]), 3 + verdict["more_seeds"]
    gap = abs(0.01 * 2.0 - regrets.mean())
    assert stats.t.ppf(0.975, n - 1) * regrets.std(ddof=1) / np.sqrt(n) <= gap
    assert stats.t.ppf(0.975, n - 2) * regrets.std(ddof=1) / np.sqrt(n - 1) > gap


def test_one_seed_gives_no_interval_and_no_verdict() -> None:
    verdict = verdict_on({(8, 1e-3): [2.0], (256, 1e-3): [1.5]})
    assert (verdict["outcome"], verdict["more_seeds"]) == ("not_enough_evidence", 2)
    assert "one_seed" in verdict["caveats"]
    assert verdict["comparison"][0]["regret"] == pytest.approx(0.5)
    assert verdict["comparison"][0]["regret_high"] is None


def test_the_margin_is_the_users() -> None:
    losses = {(8, 1e-3): [2.1, 2.12, 2.11], (256, 1e-3): [2.0, 2.0, 2.0]}
    assert verdict_on(losses)["rank"] == 256
    assert verdict_on(losses, margin=0.1)["rank"] == 8


def test_pairing_by_seed_removes_what_seeds_share() -> None:
    """Seeds differ by far more than ranks do, but every seed says the same about the ranks."""
    comparison = compare(examples({(8, 1e-3): [2.3, 2.0, 2.6], (256, 1e-3): [2.2, 1.9, 2.5]}), 0.95)
    assert comparison[0].regret == pytest.approx((0.1, 0.1, 0.1))
    assert comparison[0].eval_loss.high - comparison[0].eval_loss.low > 1  # type: ignore[operator]


def test_each_rank_at_its_best_learning_rate() -> None:
    verdict = verdict_on(
        {(8, 1e-3): [2.3, 2.3], (8, 1e-2): [2.01, 2.01], (64, 1e-3): [2.0, 2.0], (64, 1e-2): [2.5, 2.5]}
    )
    assert [row["candidate"] for row in verdict["comparison"]] == ["r008-lr0.01", "r064-lr0.001"]
    assert "one_learning_rate" not in verdict["caveats"]


def test_the_rate_is_chosen_and_judged_on_different_examples() -> None:
    frame = examples({(8, 1e-3): [2.0, 2.0], (8, 1e-2): [2.0, 2.0]})
    lucky = (frame["learning_rate"] == 1e-2) & (frame["example"] % 2 == 0)
    frame.loc[lucky, "loss"] -= 1.0  # looks better on the half that chooses
    frame.loc[(frame["learning_rate"] == 1e-2) & (frame["example"] % 2 == 1), "loss"] = 3.0
    (row,) = compare(frame, 0.95)
    assert row.candidate == "r008-lr0.01"
    assert row.eval_loss.mean == pytest.approx(3.0)


def test_seeds_that_a_candidate_did_not_finish_are_left_out() -> None:
    frame = examples({(8, 1e-3): [2.1, 9.0, 2.1], (256, 1e-3): [2.0, 2.0, 9.0]})
    frame = frame[~((frame["rank"] == 256) & (frame["seed"] == 2)) & ~((frame["rank"] == 8) & (frame["seed"] == 1))]
    (rank_8, _) = compare(frame, 0.95)
    assert rank_8.regret_by_seed == pytest.approx([0.1])


def test_no_trial_finished() -> None:
    spec = resolve_spec({"model": {"id": "m"}, "data": {"id": "d"}})
    empty = pd.DataFrame()
    evidence = Evidence(spec, pd.DataFrame({"status": ["failed"]}), empty, empty, empty, empty, {}, {})
    verdict = conclude(evidence)
    assert (verdict["outcome"], verdict["comparison"]) == ("not_enough_evidence", [])
    assert "some_trials_unfinished" in verdict["caveats"]


def test_t_interval_against_scipy() -> None:
    values = np.array([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    assert t_interval(values, 0.95) == pytest.approx((values.mean(), low, high))
