"""Ranks with different numbers of seeds, seeds that diverged, and ranks that overfit."""

import pandas as pd
import pytest

from analysis.made_up import Losses, evidence_of, examples, results, verdict_on
from rankscope.analysis.across import paired_differences, sufficient_rank
from rankscope.analysis.comparison import compare, judge
from rankscope.analysis.curve import loss_curve
from rankscope.analysis.variants import judge_variants
from rankscope.analysis.verdict import conclude
from rankscope.study.evidence import Evidence
from rankscope.text.verdict import cause_of


def without(evidence: Evidence, rank: int, *seeds: int, status: str = "failed") -> Evidence:
    """Evidence in which these seeds of a rank have not ended."""
    rows, frame = evidence.results, evidence.examples
    lost = (rows["rank"] == rank) & rows["seed"].isin(seeds)
    return evidence._replace(
        results=rows.assign(status=rows["status"].mask(lost, status)),
        examples=frame[~frame["trial"].isin(rows.loc[lost, "trial"])],
    )


LATER: Losses = {
    (8, 1e-3): [2.101, 2.1, 2.102, 2.1], (64, 1e-3): [2.001, 2.0, 2.002, 2.0], (256, 1e-3): [2.0, 2.0, 2.0, 2.0]
}  # fmt: skip


def test_each_pair_is_compared_on_the_seeds_that_both_finished() -> None:
    evidence = without(without(evidence_of(LATER), 256, 3), 8, 0)
    found = compare(judge(evidence.examples), 0.01)
    assert dict(zip(found.ranks, found.eval_loss.seeds, strict=True)) == {8: 3, 64: 4, 256: 3}
    pairs = {(8, 64): [1, 2, 3], (8, 256): [1, 2], (64, 256): [0, 1, 2]}
    for ranks, seeds in pairs.items():
        pair = tuple(map(found.ranks.index, ranks))
        own, theirs = (pd.Series(LATER[rank, 1e-3])[seeds] for rank in ranks)
        assert found.differences.seeds[pair] == len(seeds)
        assert found.differences.mean[pair] == pytest.approx((own - theirs).mean())
    verdict = conclude(evidence)
    assert (verdict["outcome"], verdict["rank"], verdict["seeds"]) == ("recommended", 64, 2)


def test_a_seed_that_only_some_ranks_have_makes_none_of_them_the_best() -> None:
    """Two more seeds, which are easy, of the worse rank alone: its mean is lower, and on shared seeds it is worse."""
    losses: Losses = {(8, 1e-3): [2.03, 2.031, 2.032, 1.5, 1.5], (256, 1e-3): [2.0, 2.001, 2.002, 1.4, 1.4]}
    verdict = conclude(without(evidence_of(losses), 256, 3, 4))
    eight, largest = verdict["comparison"]
    assert eight["eval_loss"] < largest["eval_loss"]
    assert verdict["best_candidate"] == largest["candidate"]
    assert (eight["regret"], largest["regret"]) == (pytest.approx(0.03), 0.0)
    assert eight["regret_low"] <= eight["regret"] <= eight["regret_high"]
    assert eight["kept"] < 1.0


def test_ranks_that_share_one_seed_show_no_variation_and_ask_for_seeds() -> None:
    """Each has two of three. Whether more would settle it cannot be known."""
    evidence = evidence_of({(8, 1e-3): [2.101, 2.1, 2.102], (256, 1e-3): [2.0, 2.0, 2.0]})
    verdict = conclude(without(without(evidence, 8, 0), 256, 1))
    assert (verdict["outcome"], verdict["seeds"], cause_of(verdict)) == ("not_enough_evidence", 1, "one_seed")
    assert [row["seeds"] for row in verdict["comparison"]] == [2, 2]
    assert "seeds_would_not_do" not in verdict["caveats"]


def test_a_rank_that_shares_no_seed_with_another_is_left_out_and_named() -> None:
    verdict = conclude(without(without(evidence_of(LATER), 8, 0, 1, 2), 256, 3))
    assert [row["rank"] for row in verdict["comparison"]] == [64, 256]
    assert (verdict["rank"], verdict["left_out"]) == (64, [8])
    assert "ranks_left_out" in verdict["caveats"]


DIVERGED: Losses = {
    (8, 1e-3): [2.03, 2.031, 2.03], (8, 1e-2): [1.9, None, 1.9], (256, 1e-3): [2.0, 2.0, 2.001],
    (256, 1e-2): [2.1, 2.1, 2.1],
}  # fmt: skip


def test_a_rate_of_which_a_seed_diverged_is_not_its_ranks() -> None:
    """The mean over those that survived, 1.9, is the lowest of all, and no mean of that candidate."""
    verdict = verdict_on(DIVERGED)
    assert [row["candidate"] for row in verdict["comparison"]] == ["r008-lr0.001", "r256-lr0.001"]
    assert verdict["diverged"] == [{"candidate": "r008-lr0.01", "rank": 8, "learning_rate": 1e-2, "seeds": [1]}]
    assert (verdict["rank"], verdict["seeds"], verdict["left_out"]) == (256, 3, [])
    assert "diverged" in verdict["caveats"]
    assert not {"some_trials_unfinished", "ranks_left_out"} & set(verdict["caveats"])


def test_no_other_table_averages_over_the_seeds_that_survived() -> None:
    """Rank 8 has no other candidate; by the seeds that survived, 1.9, it would be the best."""
    evidence = evidence_of({(8, 1e-2): [1.9, None, 1.9], (64, 1e-2): [2.02] * 3, (256, 1e-2): [2.0] * 3})
    curve = loss_curve(evidence)
    assert dict(zip(curve["rank"], curve["eval_loss"], strict=True)) == pytest.approx({64: 2.02, 256: 2.0})
    facts = evidence._replace(data_facts={"tokens_sha256": "0"})
    pairs = paired_differences({"one": facts, "other": facts})
    assert [(pair["rank"], pair["seeds"]) for pair in pairs] == [(64, 3), (256, 3)]
    assert [pair["loss"] for pair in pairs] == pytest.approx([2.02, 2.0])
    found = sufficient_rank(evidence)
    assert found is not None
    assert 2**found.log2_rank == pytest.approx(64), "of a gain of 0.4 it keeps 95%"


def test_a_seed_that_diverged_is_no_missing_seed() -> None:
    """A candidate that has not finished a seed yet is compared on the others."""
    losses = dict(DIVERGED) | {(8, 1e-2): [1.9, 1.9, 1.9]}
    verdict = conclude(without(evidence_of(losses), 8, 1))
    assert verdict["comparison"][0]["candidate"] == "r008-lr0.01"
    assert (verdict["diverged"], verdict["rank"]) == ([], 8)


def test_the_smallest_rank_is_not_recommended_where_all_its_rates_diverged() -> None:
    losses: Losses = {
        (8, 1e-3): [2.0, None, 2.0], (8, 1e-2): [None, None, None], (64, 1e-3): [2.0, 2.0, 2.001],
        (64, 1e-2): [2.5, 2.5, 2.5], (256, 1e-3): [2.0, 2.001, 2.0], (256, 1e-2): [2.5, 2.5, 2.5],
    }  # fmt: skip
    verdict = verdict_on(losses)
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 64)
    assert [row["rank"] for row in verdict["comparison"]] == [64, 256]
    assert [(row["candidate"], row["seeds"]) for row in verdict["diverged"]] == [
        ("r008-lr0.001", [1]), ("r008-lr0.01", [0, 1, 2]),
    ]  # fmt: skip
    assert (verdict["left_out"], verdict["undetermined"], verdict["guess"]) == ([8], [], "r064-lr0.001")
    assert verdict["claims"][0].get("from_rank") == 64


def test_nothing_is_recommended_where_every_rank_diverged() -> None:
    verdict = verdict_on({(8, 1e-3): [2.0, None, 2.0], (256, 1e-3): [None, 1.9, 1.9]})
    assert (verdict["outcome"], verdict["rank"], verdict["comparison"]) == ("not_enough_evidence", None, [])
    assert (len(verdict["diverged"]), verdict["guess"]) == (2, None)


def test_a_seed_that_diverged_is_no_cause_while_others_are_not_trained() -> None:
    evidence = evidence_of({(8, 1e-3): [None, 2.0], (16, 1e-3): [2.0, 2.0]})
    waiting = evidence.results["status"].where(evidence.results["rank"] == 8, "pending")
    verdict = conclude(evidence._replace(results=evidence.results.assign(status=waiting), examples=pd.DataFrame()))
    assert cause_of(verdict) == "unfinished"
    assert cause_of(verdict_on({(8, 1e-3): [None, 2.0]})) == "diverged"


def test_a_best_rate_beside_one_that_diverged_is_not_at_the_edge() -> None:
    losses: Losses = {(8, 1e-4): [2.5, 2.5], (8, 1e-3): [2.0, 2.0], (8, 1e-2): [None, None]}
    assert "rate_at_edge" not in verdict_on(losses)["caveats"]
    assert "rate_at_edge" in verdict_on({**losses, (8, 1e-2): [1.5, 1.5]})["caveats"]


def test_full_fine_tuning_is_not_averaged_over_the_seeds_that_survived() -> None:
    full: Losses = {(0, 1e-4): [1.6, None, 1.6], (0, 1e-5): [1.9, 1.9, 1.9]}
    evidence = evidence_of(LATER)
    reference = {"reference": examples(full), "reference_results": results(full)}
    verdict = conclude(evidence._replace(**reference))
    assert (verdict["reference_candidate"], verdict["gain"]) == ("r000-lr1e-05", pytest.approx(0.5))
    none = {key: table[table["learning_rate"] == 1e-4] for key, table in reference.items()}
    verdict = conclude(evidence._replace(**none))
    assert (verdict["reference_candidate"], verdict["gain_of"]) == (None, "r256-lr0.001")


def test_a_variant_is_not_averaged_over_the_seeds_that_survived() -> None:
    """Neither is the plain candidate that it is held against."""
    losses: Losses = {(8, 1e-3): [2.0, 2.0, 2.0], (8, 1e-2): [1.8, None, 1.8]}
    evidence = evidence_of(losses)
    better: Losses = {(8, 1e-3): [1.9, 1.901, 1.9], (8, 1e-2): [1.5, 1.5, None]}
    variants = evidence_of(better)
    spec = variants.spec.model_copy(update={"variants": ("rslora",)})
    own = {name: getattr(variants, name).assign(variant="rslora") for name in ("examples", "results")}
    (row,) = judge_variants(evidence._replace(variants=variants._replace(spec=spec, **own)))
    assert (row["candidate"], row["plain"]) == ("r008-lr0.001", "r008-lr0.001")
    assert row["difference"] == pytest.approx(-0.1, abs=1e-3)


def with_curve(evidence: Evidence, rank: int, evaluations: list[float]) -> Evidence:
    """Evidence in which a rank's held-out loss was as given at steps 1, 2, ..."""
    curves = evidence.curves
    own = (curves["rank"] == rank) & (curves["step"] > 0)
    values = curves["step"].map(dict(enumerate(evaluations, start=1)))
    return evidence._replace(curves=curves.assign(eval_loss=curves["eval_loss"].mask(own, values)))


@pytest.mark.parametrize("margin_of", ["gain", "loss"])
def test_a_rank_whose_best_evaluation_came_early_overfits(margin_of: str) -> None:
    evidence = evidence_of(LATER, margin_of=margin_of)
    assert conclude(evidence)["overfits"] == []
    verdict = conclude(with_curve(evidence, 256, [1.9, 1.85, 1.95, 2.0]))
    (row,) = verdict["overfits"]
    assert (row["candidate"], row["rank"], row["step"]) == ("r256-lr0.001", 256, 2)
    assert row["rise"] == pytest.approx(0.15)
    assert "overfits" in verdict["caveats"]


@pytest.mark.parametrize(
    "evaluations",
    [[2.1, 2.0, 1.99, 2.0], [2.3, 2.2, 2.1, 2.0], [2.3, 2.2, 2.0, 2.019]],
    ids=["by less than the margin", "never", "within the margin at the end"],
)
def test_a_rise_within_the_margin_is_no_overfitting(evaluations: list[float]) -> None:
    assert conclude(with_curve(evidence_of(LATER), 256, evaluations))["overfits"] == []


def test_a_trial_that_has_not_ended_says_nothing_of_overfitting() -> None:
    """Two of four seeds stopped half way, where their loss was lower than the others ever get."""
    evidence = without(evidence_of(LATER), 256, 2, 3)
    curves = evidence.curves
    stopped = (curves["rank"] == 256) & curves["seed"].isin([2, 3])
    early = curves.assign(eval_loss=curves["eval_loss"].mask(stopped & (curves["step"] > 0), 1.0))
    assert conclude(evidence._replace(curves=early[~(stopped & (early["step"] > 2))]))["overfits"] == []


def test_the_best_guess_is_within_the_budget() -> None:
    """Where no rank in it is within the margin, it is the best of them and not the smallest."""
    losses: Losses = {
        (8, 1e-3): [2.3, 2.3, 2.301], (64, 1e-3): [2.1, 2.1, 2.101], (256, 1e-3): [2.0, 2.0, 2.0]
    }  # fmt: skip
    rows = [
        {"candidate": f"r{rank:03d}-lr0.001", "rank": rank, "repeat": 0, "control": False, "runtime_seconds": rank,
         "rss_mean_bytes": 1e9, "gpu_allocated_mean_bytes": None, "gpu_reserved_peak_bytes": None}
        for rank, _ in losses
    ]  # fmt: skip
    verdict = verdict_on(losses, pd.DataFrame(rows), max_runtime="100s")
    assert (verdict["outcome"], verdict["candidate"], verdict["guess"]) == ("best_in_budget", *["r064-lr0.001"] * 2)
