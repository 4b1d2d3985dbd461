"""The verdict on a task: planted effects found and null effects not, beside the loss, and recomputed by other code."""

import json
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import special, stats

from analysis.made_up import RATE, Outcomes, evidence_of, outcomes, with_task
from marks import mostly_slow
from rankscope.analysis.comparison import estimate
from rankscope.analysis.task import CONCLUSION, add_items
from rankscope.analysis.verdict import conclude
from rankscope.errors import StudyError
from rankscope.text.verdict import verdict_sentence
from scripts import load_benchmark

BY_LOSS = {(8, RATE): [2.0, 2.001, 2.002], (64, RATE): [2.0, 2.001, 2.002], (256, RATE): [2.0, 2.001, 2.002]}
"""Losses that are alike at every rank: by loss, rank 8 is enough."""


def verdict_on(found: Outcomes, losses: Any = BY_LOSS, **criteria: Any) -> dict[str, Any]:
    return conclude(with_task(evidence_of(losses, **criteria), found))


def test_a_planted_effect_is_found_where_losses_are_alike() -> None:
    verdict = verdict_on(outcomes({8: 0.5, 64: 0.8, 256: 0.8}, items=1000))
    task = verdict["task"]
    assert (verdict["by"], verdict["rank"], verdict["outcome"]) == ("task", 64, "recommended")
    assert [row["within_margin"] for row in task["scores"]] == [False, True, True]
    assert verdict["loss"]["rank"] == 8
    assert verdict["agreement"] == "different"
    assert task["gain"] == pytest.approx(0.7, abs=0.05)
    for row, share in zip(task["scores"], (0.5, 0.8, 0.8), strict=True):
        assert row["score_low"] < share < row["score_high"]
        assert row["score_low"] < row["score"] < row["score_high"]


def test_no_effect_is_found_where_there_is_none() -> None:
    """The lowest of equal ranks is named, and no rank is called worse."""
    verdict = verdict_on(outcomes({8: 0.8, 64: 0.8, 256: 0.8}, items=1000))
    assert (verdict["outcome"], verdict["rank"], verdict["agreement"]) == ("recommended", 8, "same")
    assert False not in [row["within_margin"] for row in verdict["task"]["scores"]]


@pytest.mark.parametrize(("items", "outcome"), [(40, "not_distinguishable"), (2000, "recommended")])
def test_agreement_on_few_items_shows_little(items: int, outcome: str) -> None:
    """All ranks are right on the same items, with every seed: without added items the interval would have no width."""
    right = np.repeat(np.arange(items)[None] < 0.6 * items, 3, axis=0).astype(float)
    verdict = verdict_on({0: 0 * right[:1], 8: right, 64: right, 256: right})
    assert verdict["outcome"] == outcome
    widest = max(row["behind_high"] for row in verdict["task"]["scores"])
    assert widest == pytest.approx(3.8 / items, rel=0.35)  # z^2 / n


def test_what_the_added_items_are() -> None:
    """By the sources: Tango's bound without a pair that disagrees, Agresti and Coull's for one proportion, Bonett and
    Price's where one item of each kind is added."""
    items, z = 80, float(special.ndtri(0.975))
    added = add_items(estimate(np.zeros((3, items)), np.ones(items)), 0.95)
    assert added.mean + z * added.error == pytest.approx(z**2 / (items + z**2), rel=0.02)
    right = np.arange(items) < 12
    alone = add_items(estimate(np.stack([right - 0.5] * 2), np.ones(items)), 0.95, 0.5)
    share = (12 + z**2 / 2) / (items + z**2)
    assert alone.mean + 0.5 == pytest.approx(share)
    assert alone.error == pytest.approx((share * (1 - share) / (items + z**2)) ** 0.5, rel=0.01)
    one, other = 7, 3  # items on which only the one is right, or only the other
    pairs = np.concatenate([np.ones(one), -np.ones(other), np.zeros(items - one - other)])
    both = add_items(estimate(np.stack([pairs] * 2), np.ones(items)), 2 * float(special.ndtr(2**0.5)) - 1)
    first, second = (one + 1) / (items + 2), (other + 1) / (items + 2)
    assert both.mean == pytest.approx(first - second)
    expected = ((first + second - (first - second) ** 2) / (items + 2)) ** 0.5
    assert both.error == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("score", [0.0, 1.0])
def test_scores_at_the_ends_have_intervals(score: float) -> None:
    found = {0: np.full((1, 50), 0.4)} | {rank: np.full((3, 50), score) for rank in (8, 64, 256)}
    row = verdict_on(found)["task"]["scores"][0]
    low, high = stats.binomtest(round(50 * score), 50).proportion_ci(method="wilson")
    assert (row["score_low"], row["score_high"]) == pytest.approx((low, high), abs=0.02)
    assert 0 <= row["score_low"] < row["score_high"] <= 1


@pytest.mark.parametrize(("before", "after"), [(0.5, 0.5), (0.6, 0.3), (0.5, 0.51)])
def test_a_task_that_is_not_learned_recommends_nothing(before: float, after: float) -> None:
    verdict = verdict_on(outcomes({8: after, 64: after, 256: after}, before=before))
    assert (verdict["outcome"], verdict["rank"]) == ("not_trained_enough", None)
    assert verdict["loss"]["rank"] == 8
    assert verdict["agreement"] == "open"
    sentence = verdict_sentence(verdict)
    assert sentence.startswith("The task is not learned well enough")
    assert sentence.endswith("The verdict follows the task; by loss it would be rank 8.")


def test_one_seed_gives_no_verdict() -> None:
    losses = {key: values[:1] for key, values in BY_LOSS.items()}
    verdict = verdict_on(outcomes({8: 0.5, 64: 0.8, 256: 0.8}, seeds=1), losses)
    assert verdict["outcome"] == "not_enough_evidence"
    assert verdict["task"]["scores"][0]["score_low"] is None
    assert "one seed" in verdict_sentence(verdict)


def test_a_rank_without_scores_leaves_the_task_open() -> None:
    verdict = verdict_on(outcomes({8: 0.5, 64: 0.8}))
    assert (verdict["outcome"], verdict["task"]["scores"]) == ("not_enough_evidence", [])
    assert "no scores" in verdict_sentence(verdict)
    assert verdict_on(outcomes({8: 0.5, 64: 0.8}), by="loss")["rank"] == 8


def test_only_the_conclusion_follows_the_task() -> None:
    """Without a task a verdict is as before, to the bit; by loss it differs in the task's fields alone."""
    plain = conclude(evidence_of(BY_LOSS))
    found = outcomes({8: 0.5, 64: 0.8, 256: 0.8})
    added = {"by", "agreement", "loss", "task"}
    assert not added & plain.keys()
    by_loss, by_task = verdict_on(found, by="loss"), verdict_on(found)
    assert json.dumps({name: by_loss[name] for name in by_loss if name not in added}) == json.dumps(plain)
    changed = {name for name in plain if by_task[name] != plain[name]}
    assert changed <= set(CONCLUSION)
    assert by_task["loss"] == {name: plain[name] for name in CONCLUSION}


def test_items_of_several_tasks_are_counted_apart() -> None:
    """Two tasks number their items alike."""
    evidence, found = evidence_of(BY_LOSS), outcomes({8: 0.5, 64: 0.8, 256: 0.8}, items=300)
    parts = [with_task(evidence, found, name) for name in ("arc", "piqa")]
    scores, untrained = ([getattr(one, name) for one in parts] for name in ("task_scores", "task_untrained"))
    task = conclude(evidence._replace(task_scores=pd.concat(scores), task_untrained=pd.concat(untrained)))["task"]
    assert task["items"] == 600
    assert task["untrained"] == pytest.approx(found[0].mean())


SENTENCES = {
    "task": "By the task, use rank 64: the lowest rank shown to keep at least 90% of what fine-tuning gains on it.",
    "loss": "Use rank 8: the lowest rank compared also has the lowest held-out loss",
}


@pytest.mark.parametrize("by", ["task", "loss"])
def test_the_sentence_says_what_it_follows_and_whether_both_agree(by: str) -> None:
    asked = {"by": by} if by == "loss" else {}  # the task is the default
    verdict = verdict_on(outcomes({8: 0.5, 64: 0.8, 256: 0.8}, items=1000), **asked)
    sentence = verdict_sentence(verdict)
    assert sentence.startswith(SENTENCES[by])
    assert "Loss and task disagree." in sentence
    assert ("by loss it would be rank 8." if by == "task" else "By the task, rank 8 is shown to lose more") in sentence
    assert "태스크" in verdict_sentence(verdict, "ko")


def test_a_verdict_by_a_task_needs_one() -> None:
    with pytest.raises(StudyError, match="the study has none: give measure"):
        evidence_of(BY_LOSS, by="task")


@pytest.fixture(scope="module")
def recompute() -> ModuleType:
    return load_benchmark("recompute")


@pytest.mark.parametrize(
    "shares", [(0.5, 0.8, 0.8), (0.8, 0.8, 0.8), (0.76, 0.8, 0.81), (0.2, 0.25, 0.3), (0.97, 0.97, 0.99)]
)
@pytest.mark.parametrize("items", [pytest.param(60, marks=pytest.mark.slow), 500])
def test_other_code_finds_the_same(
    recompute: ModuleType, monkeypatch: pytest.MonkeyPatch, shares: tuple[float, ...], items: int
) -> None:
    """benchmarks/recompute.py, which knows nothing of rankscope, on errors, with items added one kind at a time."""
    found = outcomes(dict(zip((8, 64, 256), shares, strict=True)), items=items)
    plain, added = recompute.moments, float(special.ndtri(0.975)) ** 2

    def with_items(table: pd.DataFrame, weight: "pd.Series[float]") -> Any:
        own = plain(table, weight)
        values = np.append(table.to_numpy().mean(axis=0), [1.0, -1.0])
        weights = np.append(np.ones(items), [added / 2, added / 2])
        mean, total = float(np.average(values, weights=weights)), items + added
        square = float(weights @ (values - mean) ** 2)
        alone = np.var(values[:-2], ddof=1) / items - own.of_examples  # what seeds leave in the items' variance
        of_items = (square - alone * items * (items - 1)) / (total * (total - 1))
        share = items / total
        return own._replace(
            mean=mean, of_seeds=own.of_seeds * share**2, of_examples=of_items, third=own.third * share**3
        )

    judge = object.__new__(recompute.Judge)
    judge.tables = {rank: pd.DataFrame(1 - table) for rank, table in found.items() if rank}
    judge.weight, judge.untrained, judge.full = pd.Series(np.ones(items)), pd.Series(1 - found[0][0]), None
    judge.confidence = 0.95
    monkeypatch.setattr(recompute, "moments", with_items)
    verdict = verdict_on(found)
    states = {row["rank"]: row["within_margin"] for row in verdict["task"]["scores"]}
    assert states == judge.states(0.1)
    assert (verdict["outcome"] == "not_trained_enough") == (not judge.trained_enough())
    assert (verdict["rank"] if verdict["outcome"] == "recommended" else None) == judge.recommended(0.1)
    best = judge.interval(judge.untrained - judge.tables[judge.best()], 0.95)
    assert (verdict["task"]["gain_low"], verdict["task"]["gain_high"]) == pytest.approx(best[1:], rel=1e-9)


@pytest.fixture(scope="module")
def simulate() -> Any:
    """Rates of 200 studies of a cell of benchmarks/simulate.py; those of 2,000 are in docs/results."""
    module = load_benchmark("simulate")
    return lambda world, *cell: module.simulate(module.Cell("task", world, *cell), 200, (5,))


@pytest.mark.parametrize("world", mostly_slow(["nested", "typical", "erratic"], "typical"))
def test_ranks_on_the_margin_are_seldom_recommended(simulate: partial[Any], world: str) -> None:
    found = simulate(world, 0.3, 3, (3,), 100, (1, 4, 0), 0.5)
    assert found["false"] <= 0.05 + 3 * (0.05 * 0.95 / 200) ** 0.5
    assert found["falsely worse"] <= 0.05
    assert min(found["coverage"], found["score"]) >= 0.9


def test_effects_are_found_and_null_effects_are_not(simulate: partial[Any]) -> None:
    planted = simulate("typical", 0.9, 3, (3,), 200, (4, 4, 0), 0.05)
    null = simulate("typical", 0.9, 3, (3,), 200, (0, 0, 0), 0.05)
    assert planted["right"] >= 0.6
    assert planted["false"] <= 0.01
    assert null["recommended"] >= 0.6
    assert null["falsely worse"] <= 0.01
