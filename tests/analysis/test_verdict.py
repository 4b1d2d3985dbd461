"""The verdict on made-up studies whose truth is known."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.made_up import evidence_of, examples, untrained_examples, verdict_on
from rankscope.analysis.comparison import best_of_each_rank, bounds, compare, estimate, judge
from rankscope.analysis.decision import level_at
from rankscope.analysis.verdict import conclude
from rankscope.data.doubts import DOUBTS
from rankscope.study.evidence import Evidence

OF_EITHER = pytest.mark.parametrize("margin_of", ["gain", "loss"])
"""5% of the gain and 1% of the loss are the same here."""


@OF_EITHER
def test_the_smallest_rank_within_the_margin_is_recommended(margin_of: str) -> None:
    losses = {(8, 1e-3): [2.1, 2.12, 2.11], (64, 1e-3): [2.01, 2.0, 2.005], (256, 1e-3): [2.0, 2.0, 2.0]}
    verdict = verdict_on(losses, margin_of=margin_of)
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 64)
    assert [row["within_margin"] for row in verdict["comparison"]] == [False, True, True]
    assert verdict["caveats"] == ["one_learning_rate"]


@OF_EITHER
def test_equal_ranks_recommend_the_smallest(margin_of: str) -> None:
    verdict = verdict_on({(8, 1e-3): [2.001, 2.0, 2.001], (256, 1e-3): [2.0, 2.001, 2.0]}, margin_of=margin_of)
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 8)


@OF_EITHER
def test_no_difference_within_narrow_intervals_is_not_distinguishable(margin_of: str) -> None:
    verdict = verdict_on({(8, 1e-3): [2.0175, 1.9925, 2.005], (256, 1e-3): [2.0, 2.0, 2.0]}, margin_of=margin_of)
    assert verdict["comparison"][0]["regret_low"] == 0.0
    assert 0.02 < verdict["comparison"][0]["regret_high"] < 0.04
    assert (verdict["outcome"], verdict["rank"]) == ("not_distinguishable", 8)
    assert [row["within_margin"] for row in verdict["comparison"]] == [None, None]


@OF_EITHER
def test_a_rank_that_is_good_enough_is_recommended_though_a_lower_one_is_open(margin_of: str) -> None:
    losses = {(8, 1e-3): [2.03, 2.01, 2.02], (64, 1e-3): [2.0, 2.001, 2.0], (256, 1e-3): [2.0, 2.0, 2.001]}
    verdict = verdict_on(losses, margin_of=margin_of)
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 64)
    assert verdict["undetermined"] == ["r008-lr0.001"]


def profiles(runtime: Mapping[int, float]) -> pd.DataFrame:
    rows = [
        {
            "candidate": f"r{rank:03d}-lr0.001", "rank": rank, "learning_rate": 1e-3, "repeat": repeat,
            "control": False, "runtime_seconds": seconds + repeat,
            "rss_mean_bytes": 1e9 + 1e6 * (rank > 8) + 1e3 * repeat,
            "gpu_allocated_mean_bytes": None, "gpu_reserved_peak_bytes": None,
        }
        for rank, seconds in runtime.items()
        for repeat in range(2)
    ]  # fmt: skip
    return pd.DataFrame(rows)


BUDGETED = {(8, 1e-3): [2.1, 2.1, 2.101], (64, 1e-3): [2.0, 2.001, 2.0], (256, 1e-3): [1.999, 2.0, 2.0]}


@pytest.mark.parametrize(
    ("limit", "outcome", "rank"),
    [("1000s", "recommended", 64), ("150s", "best_in_budget", 8), ("1min", "nothing_in_budget", None)],
)
def test_the_budget_excludes_what_is_too_slow(limit: str, outcome: str, rank: int | None) -> None:
    measured = profiles({8: 100, 64: 200, 256: 300})
    verdict = verdict_on(BUDGETED, measured, max_runtime=limit)
    assert (verdict["outcome"], verdict["rank"]) == (outcome, rank)


def test_a_budget_that_cannot_be_checked_recommends_nothing_and_says_so() -> None:
    verdict = verdict_on(BUDGETED, profiles({8: 100, 64: 200, 256: 300}), max_gpu_memory="24GB")
    assert (verdict["outcome"], "budget_unmeasured" in verdict["caveats"]) == ("nothing_in_budget", True)


def test_the_claims_of_the_original_study() -> None:
    verdict = verdict_on(BUDGETED, profiles({8: 100, 64: 200, 256: 300}))
    claims = {row["claim"]: row for row in verdict["claims"]}
    assert {name: row["outcome"] for name, row in claims.items()} == {
        "loss_falls": "held", "cpu_memory_lowest_then_flat": "held", "gpu_memory_rises": "not_measured",
        "runtime_rises": "held",
    }  # fmt: skip
    assert claims["loss_falls"]["effect"] == pytest.approx((1.9997 - 2.1003) / 2.1003, rel=1e-2)
    assert (claims["runtime_rises"]["from_rank"], claims["runtime_rises"]["to_rank"]) == (8, 256)
    falling = verdict_on(BUDGETED, profiles({8: 300, 64: 200, 256: 100}))
    assert {row["claim"]: row["outcome"] for row in falling["claims"]}["runtime_rises"] == "not_held"


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_much_noise_is_not_evidence_of_no_difference(shift: float) -> None:
    """Neither for calling ranks alike, nor for the rank that happens to be the best of the sample."""
    losses = {(8, 1e-3): [2.0 + shift, 2.2 + shift, 1.95 + shift], (256, 1e-3): [2.1, 1.95, 2.06]}
    for verdict in (verdict_on(losses, untrained=4.0), verdict_on(losses, margin_of="loss")):
        assert (verdict["outcome"], verdict["rank"]) == ("not_enough_evidence", None)


def test_a_candidate_that_fails_takes_no_evidence_from_the_others() -> None:
    losses = {(8, 1e-3): [2.1, 2.1, 2.1], (64, 1e-3): [2.0, 2.01, 2.0], (256, 1e-3): [1.9, 9.0, 9.0]}
    frame = examples(losses)
    frame = frame[~((frame["rank"] == 256) & (frame["seed"] > 0))]
    found, alone = compare(judge(frame), 0.01), compare(judge(frame[frame["rank"] < 256]), 0.01)
    assert found.eval_loss.seeds[0] == found.differences.seeds[0, 1] == 3
    assert found.differences.seeds[2, 0] == 1
    for field in ("mean", "seed_error", "example_error"):
        assert getattr(found.differences, field)[0, 1] == getattr(alone.differences, field)[0, 1]


def test_a_rate_is_not_chosen_from_nothing() -> None:
    """No seed was finished by every candidate; each rank's best rate is still the better one."""
    frame = examples({(8, 1e-4): [2.0, 2.0], (8, 1e-3): [1.0, 1.0], (64, 1e-4): [2.0, 2.0], (64, 1e-3): [1.0, 1.0]})
    frame = frame[~((frame["learning_rate"] == 1e-4) & (frame["rank"] == 8) & (frame["seed"] == 0))]
    frame = frame[~((frame["learning_rate"] == 1e-4) & (frame["rank"] == 64) & (frame["seed"] == 1))]
    assert best_of_each_rank(frame) == ["r008-lr0.001", "r064-lr0.001"]


@OF_EITHER
def test_worse_but_perhaps_within_the_margin_asks_for_more_seeds(margin_of: str) -> None:
    losses = {(8, 1e-3): [2.0125, 2.0175, 2.015], (256, 1e-3): [2.0, 2.0, 2.0]}
    verdict = verdict_on(losses, margin_of=margin_of)
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 256)
    assert verdict["undetermined"] == ["r008-lr0.001"]
    excess, examples_spread = np.array([0.0125, 0.0175, 0.015]) - 0.02, 0.01 * np.linspace(-0.5, 0.5, 40)

    def high(seeds: int) -> float:
        """Upper bound of the excess over the margin, by the definition in docs/method.md."""
        variances = np.array([excess.var(ddof=1) / seeds, examples_spread.var(ddof=1) / 40])
        t = stats.t.ppf(1 - level_at(seeds, 0.95), [seeds - 1, 39])
        return float(excess.mean() + t @ variances / np.sqrt(variances.sum()))

    assert verdict["more_seeds"] == 2, "the next planned number of seeds"
    assert high(5) <= 0 < high(3)


def test_one_seed_gives_no_interval_and_no_verdict() -> None:
    verdict = verdict_on({(8, 1e-3): [2.0], (256, 1e-3): [1.5]})
    assert (verdict["outcome"], verdict["more_seeds"]) == ("not_enough_evidence", None)
    assert "one_seed" in verdict["caveats"]
    assert verdict["comparison"][0]["regret"] == pytest.approx(0.5)
    assert verdict["comparison"][0]["regret_high"] is None


@pytest.mark.parametrize("rates", [[1e-3], [1e-3, 2e-3]])
def test_one_held_out_row_gives_no_verdict(rates: list[float]) -> None:
    """Of two rates each, none is left to judge by."""
    losses = {(rank, rate): [2.0 + rank * rate, 2.01, 2.0] for rank in (8, 256) for rate in rates}
    full = examples({(0, 1e-4): [1.6, 1.6, 1.6]}, count=1)
    evidence = evidence_of(losses)._replace(
        examples=examples(losses, count=1), untrained=untrained_examples(1), reference=full
    )
    verdict = conclude(evidence)
    assert (verdict["outcome"], verdict["rank"]) == ("not_enough_evidence", None)
    assert all(row["regret_high"] is row["within_margin"] is None for row in verdict["comparison"])


def test_the_margin_is_the_users() -> None:
    losses = {(8, 1e-3): [2.1, 2.12, 2.11], (256, 1e-3): [2.0, 2.0, 2.0]}
    assert verdict_on(losses)["rank"] == 256
    assert verdict_on(losses, margin=0.4)["rank"] == 8
    assert verdict_on(losses, margin="40%")["rank"] == 8
    assert verdict_on(losses, margin=0.1, margin_of="loss")["rank"] == 8


def test_pairing_by_seed_removes_what_seeds_share() -> None:
    """Seeds differ by far more than ranks do, but every seed says the same about the ranks."""
    comparison = compare(judge(examples({(8, 1e-3): [2.3, 2.0, 2.6], (256, 1e-3): [2.2, 1.9, 2.5]})), 0.01)
    assert [end[0, 1] for end in comparison.differences.interval(0.95)] == pytest.approx([0.1, 0.1])
    assert comparison.eval_loss.half_width(0.95)[0] > 0.5


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
    found = compare(judge(frame), 0.01)
    assert found.candidates == ["r008-lr0.01"]
    assert found.eval_loss.mean == pytest.approx([3.0])


def test_a_difference_is_of_the_seeds_that_both_finished() -> None:
    frame = examples({(8, 1e-3): [2.1, 9.0, 2.1], (256, 1e-3): [2.0, 2.0, 9.0]})
    frame = frame[~((frame["rank"] == 256) & (frame["seed"] == 2)) & ~((frame["rank"] == 8) & (frame["seed"] == 1))]
    found = compare(judge(frame), 0.01)
    assert (found.eval_loss.seeds[0], found.differences.seeds[0, 1]) == (2, 1)
    assert found.differences.mean[0, 1] == pytest.approx(0.1)


def nothing_finished(status: str) -> Evidence:
    evidence, empty = evidence_of({(8, 1e-3): [2.0, 2.0], (256, 1e-3): [2.0, 2.0]}), pd.DataFrame()
    return evidence._replace(results=evidence.results.assign(status=status), examples=empty, untrained=empty)


def test_no_trial_finished() -> None:
    verdict = conclude(nothing_finished("failed"))
    assert (verdict["outcome"], verdict["comparison"]) == ("not_enough_evidence", [])
    assert "some_trials_unfinished" in verdict["caveats"]


def test_with_equal_examples_the_interval_is_students() -> None:
    """With variation between seeds only, intervals equal scipy's paired t interval for any number of examples."""
    values = np.array([1.0, 2.0, 4.0])
    low, high = stats.t.interval(0.95, 2, values.mean(), stats.sem(values))
    found = estimate(np.repeat(values[:, None], 7, axis=1), np.ones(7))
    assert found.interval(0.95) == pytest.approx((low, high))


def test_variance_components_against_the_known_ones() -> None:
    """The errors' squares are unbiased for the variance of the mean: seeds and rest, and examples."""
    rng, seeds, examples = np.random.default_rng(0), 4, 30
    found = []
    for _ in range(2000):
        values = rng.normal(0, 0.5, (seeds, 1)) + rng.normal(0, 2.0, examples) + rng.normal(0, 1.0, (seeds, examples))
        one = estimate(values, np.ones(examples))
        assert one.seed_error is not None
        found.append((one.seed_error**2, one.example_error**2))
    expected = (0.25 / seeds + 1.0 / (seeds * examples), 4.0 / examples)
    assert np.mean(found, axis=0) == pytest.approx(expected, rel=0.05)


def test_examples_count_by_their_label_tokens() -> None:
    values = np.array([[1.0, 4.0], [1.0, 4.0]])
    assert estimate(values, np.array([30.0, 10.0])).mean == pytest.approx((30 * 1 + 10 * 4) / 40)


def test_bounds_hold_whichever_candidate_is_the_best() -> None:
    """Two are alike and a third is worse: its lower bound is to the nearer of the two that may be the best."""
    losses = {(8, 1e-3): [3.0, 3.01, 3.02], (64, 1e-3): [2.02, 2.0, 2.01], (256, 1e-3): [2.0, 2.01, 2.03]}
    compared = compare(judge(examples(losses)), 0.01)
    eight, _, _ = found = bounds(compared, 0.95)
    lows, highs = (end[0, 1:] for end in compared.differences.interval(0.95))
    assert eight == pytest.approx((min(lows), max(highs)))
    assert [low for low, _ in found[1:]] == [0.0, 0.0]


def test_a_long_example_that_follows_its_seed_is_not_an_effect_of_examples() -> None:
    """Examples of unequal weight: a seed's effect enters each part by its weight, and not the residual variance."""
    seeds = np.array([-1.0, 0.0, 1.0])
    found = estimate(np.repeat(seeds[:, None], 4, axis=1), np.array([1.0, 2.0, 3.0, 10.0]))
    assert found.example_error == 0.0
    assert found.seed_error == pytest.approx(1 / np.sqrt(3))


def test_one_candidate_has_no_interval_of_regret() -> None:
    verdict = verdict_on({(8, 1e-3): [2.0, 2.0, 2.01]})
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 8)
    assert verdict["comparison"][0]["regret_high"] is None
    assert verdict["comparison"][0]["within_margin"] is None


def test_a_budget_is_not_taken_as_kept_where_nothing_was_profiled() -> None:
    verdict = verdict_on(BUDGETED, max_runtime="2h")
    assert (verdict["outcome"], "budget_unmeasured" in verdict["caveats"]) == ("nothing_in_budget", True)


def test_full_fine_tuning_is_a_reference() -> None:
    full = examples({(0, 1e-4): [1.9, 1.9, 1.9], (0, 1e-5): [2.5, 2.5, 2.5]})
    evidence = evidence_of(BUDGETED)._replace(reference=full)
    verdict = conclude(evidence)
    rows = verdict["comparison"]
    assert verdict["reference_candidate"] == full["candidate"].iloc[0], "the better of its two rates"
    assert [row["over_full"] for row in rows] == pytest.approx([0.2, 0.1, 0.1], abs=2e-3)
    assert all(row["over_full_low"] < row["over_full"] < row["over_full_high"] for row in rows)


def test_a_seeds_effect_is_not_taken_from_that_of_examples() -> None:
    """Seeds and examples add up exactly, and examples differ in weight: nothing is left, and both are found whole."""
    seeds, effects, tokens = (
        np.array([-1.0, 0.0, 1.0]),
        np.array([0.3, -0.2, 0.4, 0.1]),
        np.array([1.0, 2.0, 3.0, 10.0]),
    )
    found = estimate(seeds[:, None] + effects, tokens)
    parts = tokens / tokens.mean() * (effects - np.average(effects, weights=tokens))
    assert found.example_error == pytest.approx(parts.std(ddof=1) / 2)


def test_with_more_open_ranks_a_claim_asks_for_more() -> None:
    """Two ranks, alone and beside four that seeds leave open: what is shown stays, and what is claimed does not."""
    two = {(8, 1e-3): [2.001, 2.007, 2.013], (256, 1e-3): [2.0, 2.0, 2.0]}
    beside = {(rank, 1e-3): [2.004, 2.02, 2.036] for rank in (16, 32, 64, 128)}
    alone, among = (verdict_on(two | more, margin=0.06)["comparison"][0] for more in ({}, beside))
    assert (alone["rank"], alone["within_margin"]) == (8, True)
    assert (among["rank"], among["within_margin"]) == (8, None)
    assert alone["regret_high"] == pytest.approx(among["regret_high"])


def claims_on(measured: pd.DataFrame) -> dict[str, str]:
    return {row["claim"]: row["outcome"] for row in verdict_on(BUDGETED, measured)["claims"]}


def test_the_lowest_rank_must_be_below_each_other_one() -> None:
    """Rank 64 is above rank 8 in one repeat and below it in the other."""
    measured = profiles({8: 100, 64: 200, 256: 300})
    measured.loc[measured["rank"] == 64, "rss_mean_bytes"] = [1.001e9, 0.999e9]
    assert claims_on(measured)["cpu_memory_lowest_then_flat"] == "not_distinguishable"


def test_an_effect_below_the_noise_is_not_distinguishable() -> None:
    measured = profiles({8: 100, 64: 120, 256: 150})
    assert claims_on(measured)["runtime_rises"] == "held"
    control = measured[measured["rank"] == 8].assign(control=True)
    control["runtime_seconds"] += 500  # the same candidate, measured again, differs by more than the ranks do
    assert claims_on(pd.concat([measured, control]))["runtime_rises"] == "not_distinguishable"


def test_a_best_rate_at_the_edge_of_those_tried_is_told() -> None:
    middle = {(8, 1e-4): [2.5, 2.5], (8, 1e-3): [2.0, 2.0], (8, 1e-2): [2.5, 2.5]}
    assert "rate_at_edge" not in verdict_on(middle)["caveats"]
    assert "rate_at_edge" in verdict_on(middle | {(8, 1e-2): [1.5, 1.5]})["caveats"]


def test_doubts_about_the_data_are_caveats() -> None:
    facts = {"rows_train": 800, "rows_eval": 200, "truncated": 60, "answers_cut_off": 2}
    evidence = nothing_finished("failed")._replace(data_facts=facts)
    caveats = conclude(evidence)["caveats"]
    assert [code for code in caveats if code in DOUBTS] == ["rows_cut", "answers_cut_off"]
    none = conclude(evidence._replace(data_facts=facts | {"truncated": 0, "answers_cut_off": 0}))["caveats"]
    assert none == [code for code in caveats if code not in DOUBTS]
