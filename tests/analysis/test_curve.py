"""The error of the estimate, on losses that are known."""

import math
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rankscope.analysis.curve import curve_errors, loss_curve, lowest_rank_within
from rankscope.study.evidence import Evidence
from report.report_evidence import make_evidence, make_spec

EXAMPLES = 40
TOKENS = np.arange(1, EXAMPLES + 1)


def rows(candidate: Any, seed: int, loss: float, **more: Any) -> pd.DataFrame:
    """Examples whose mean, weighted by their label tokens, is `loss`."""
    noise = np.random.default_rng(3).normal(0, 0.5, EXAMPLES)  # the same for all: examples differ, and are shared
    noise -= np.average(noise, weights=TOKENS)
    same = {"candidate": candidate.name, "rank": candidate.rank, "learning_rate": candidate.learning_rate}
    frame = pd.DataFrame({"example": range(EXAMPLES), "loss": loss + noise, "label_tokens": TOKENS})
    return frame.assign(trial=f"{candidate.name}-s{seed}", seed=seed, **same, **more)


def with_cuts(
    trained: dict[int, float], cut: dict[tuple[int, int], float], spread: float = 0.001, **spec: Any
) -> Evidence:
    """Mean losses of trained ranks, and of cuts by recovery steps and rank; cuts differ between seeds by `spread`."""
    asked = make_spec(ranks=list(trained), **spec)
    candidates = {candidate.rank: candidate for candidate in asked.candidates()}
    top = candidates[max(trained)]
    examples = [rows(candidates[rank], seed, trained[rank] + 0.01 * seed) for rank in trained for seed in asked.seeds]
    cuts = [
        rows(top, seed, loss + (0.01 + spread) * seed, cut_rank=rank, recover_steps=steps)
        for (steps, rank), loss in cut.items()
        for seed in asked.seeds
    ]
    evidence = make_evidence(asked, steps=8)
    return evidence._replace(examples=pd.concat(examples), cuts=pd.concat(cuts))


def test_the_error_is_the_cut_s_loss_minus_the_trained_one_s() -> None:
    evidence = with_cuts({4: 2.0, 8: 1.9, 16: 1.8}, {(0, 2): 2.4, (0, 4): 2.1, (0, 8): 1.905, (0, 16): 1.8})
    errors = curve_errors(evidence).set_index("rank")
    assert list(errors.index) == [4, 8], "rank 2 was not trained, and rank 16 is what was cut"
    for rank, error, level in ((4, 0.1, 2.0), (8, 0.005, 1.9)):
        row = errors.loc[rank]
        assert row["seeds"] == 3
        assert row["error"] == pytest.approx(error + 0.001)  # the spread of seeds 0, 1 and 2 in the mean
        assert row["trained"] == pytest.approx(level + 0.01)
        assert row["cut"] == pytest.approx(row["trained"] + row["error"])
        assert row["error_share"] == pytest.approx(row["error"] / row["trained"])
        assert row["error_sd"] == pytest.approx(0.001)
        half = 4.303 * 0.001 / math.sqrt(3)  # Student's t with two degrees of freedom
        assert (row["error_low"], row["error_high"]) == pytest.approx(
            (error + 0.001 - half, error + 0.001 + half), 1e-3
        )
    assert list(errors["within"]) == [False, True]


@pytest.mark.parametrize(
    ("error", "spread", "within"),
    [(0.0, 0.001, True), (0.05, 0.001, False), (-0.05, 0.001, False), (0.015, 0.01, None), (0.0, 0.05, None)],
)
def test_within_the_margin_on_either_side_or_not_clear(error: float, spread: float, within: bool | None) -> None:
    (row,) = curve_errors(with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.0 + error}, spread)).to_dict("records")
    assert row["within"] is within


def test_one_seed_has_no_interval_and_is_judged_by_the_error_itself() -> None:
    cuts = {(0, 4): 2.05, (8, 4): 2.01}
    first, second = curve_errors(with_cuts({4: 2.0, 16: 1.8}, cuts, seeds=[0])).to_dict("records")
    assert math.isnan(first["error_low"])
    assert math.isnan(first["error_sd"])
    assert (first["within"], second["within"]) == (False, True)


def test_only_seeds_that_both_have_are_compared() -> None:
    evidence = with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.1})
    fewer = evidence._replace(cuts=evidence.cuts[evidence.cuts["seed"] != 1])
    (row,) = curve_errors(fewer).to_dict("records")
    assert row["seeds"] == 2
    assert row["trained"] == pytest.approx(2.01)


def test_only_examples_that_both_have_are_compared() -> None:
    evidence = with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.1})
    fewer = evidence._replace(cuts=evidence.cuts[evidence.cuts["example"] != 1])
    (row,) = curve_errors(fewer).to_dict("records")
    assert row["seeds"] == 3
    assert row["error_sd"] == pytest.approx(0.001)


def test_of_several_learning_rates_the_compared_rows_and_the_best_rate_count() -> None:
    """Rates are chosen on the even half of the rows, and ranks, so cuts too, judged on the odd one."""
    spec = make_spec(ranks=[4, 16], learning_rates=[1e-4, 2e-4])
    slow4, fast4, slow16, fast16 = spec.candidates()
    examples = [
        rows(candidate, seed, loss)
        for candidate, loss in ((slow4, 2.0), (fast4, 2.2), (slow16, 2.1), (fast16, 1.8))
        for seed in spec.seeds
    ]
    cut = pd.concat([rows(fast16, seed, 2.06, cut_rank=4, recover_steps=0) for seed in spec.seeds])
    cut["loss"] += np.where(cut["example"] % 2 == 0, 100.0, 0.0)
    of_another_rate = rows(slow16, 0, 9.0, cut_rank=4, recover_steps=0)
    evidence = make_evidence(spec, steps=8)._replace(
        examples=pd.concat(examples), cuts=pd.concat([cut, of_another_rate])
    )
    (row,) = curve_errors(evidence).to_dict("records")
    assert row["error"] == pytest.approx(0.06), "against the best rate of rank 4, on the odd rows"
    kinds = loss_curve(evidence).set_index(["kind", "rank"])["eval_loss"]
    assert kinds["cut", 4] - kinds["trained", 4] == pytest.approx(0.06)


def test_the_curve_has_trained_cut_and_recovered_points() -> None:
    curve = loss_curve(with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.1, (0, 16): 1.8, (8, 4): 2.05}))
    found = {(row["kind"], row["recover_steps"], row["rank"]): row for row in curve.to_dict("records")}
    assert set(found) == {
        ("trained", 0, 4), ("trained", 0, 16), ("cut", 0, 4), ("cut", 0, 16), ("recovered", 8, 4),
    }  # fmt: skip
    row = found["cut", 0, 4]
    assert row["eval_loss_low"] < row["eval_loss"] < row["eval_loss_high"]
    none = with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.1})
    assert loss_curve(none._replace(cuts=none.cuts[:0]))["kind"].unique().tolist() == ["trained"]


def test_the_lowest_rank_within_the_margin() -> None:
    points = pd.DataFrame({"rank": [16, 2, 4, 8], "eval_loss": [2.0, 2.5, 2.019, 2.03]})
    assert lowest_rank_within(points, 0.01) == 4
    assert lowest_rank_within(points, 0.001) == 16
    assert lowest_rank_within(points.iloc[:0], 0.01) is None


def test_without_examples_there_is_nothing_to_compare() -> None:
    evidence = make_evidence(steps=8)
    assert loss_curve(evidence).empty
    assert curve_errors(evidence).empty
