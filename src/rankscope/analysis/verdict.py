"""The verdict: the smallest rank that is good enough, or a plain statement that the evidence does not tell.

A rank is good enough (non-inferior) when the upper bound of its regret lies below the margin, `verdict.margin` of the
best candidate's loss; it is worse when the lower bound lies above; else it is undetermined. The best of the sample is
good enough only where no other rank's interval reaches beyond the margin on the better side: with few seeds and much
noise, being best in the sample says little.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from rankscope.analysis.comparison import Comparison, compare
from rankscope.spec import EMBEDDED
from rankscope.study import Evidence

MOST_MORE_SEEDS = 30


def conclude(evidence: Evidence) -> dict[str, Any]:
    """verdict.json, as plain data.

    `outcome` is `recommended` (`rank` is the smallest that is good enough, and every smaller one is worse),
    `not_distinguishable` (no rank differs from the best, by intervals of at most four margins' width; `rank` is the
    cheapest), or
    `not_enough_evidence` (`rank` is None). `more_seeds` says how many more seeds would settle it if losses vary as
    they did, None where it is settled or cannot be said. `comparison` has a row for each rank at its best learning
    rate; `caveats` are codes that the report puts in words.
    """
    spec, confidence = evidence.spec, evidence.spec.verdict.confidence
    comparison = compare(evidence.examples, confidence) if len(evidence.examples) else []
    caveats = _caveats(evidence)
    verdict: dict[str, Any] = {
        "schema": 1,
        "outcome": "not_enough_evidence",
        "rank": None,
        "candidate": None,
        "best_candidate": None,
        "margin": spec.verdict.margin,
        "confidence": confidence,
        "seeds": len(comparison[0].regret_by_seed) if comparison else 0,
        "more_seeds": None,
        "caveats": caveats,
        "comparison": [],
    }
    if not comparison:
        return verdict
    best = min(comparison, key=lambda row: row.eval_loss.mean)
    margin = spec.verdict.margin * best.eval_loss.mean
    verdict["best_candidate"] = best.candidate
    verdict["comparison"] = [_row(row, best, margin, comparison) for row in comparison]
    verdict |= _decide(comparison, best, margin, confidence)
    return verdict


def _decide(comparison: Sequence[Comparison], best: Comparison, margin: float, confidence: float) -> dict[str, Any]:
    if len(comparison) == 1:
        return {"outcome": "recommended", "rank": best.rank, "candidate": best.candidate}
    if len(best.regret_by_seed) < 2:
        return {"more_seeds": 2}  # three seeds are the fewest whose spread says something
    for row in comparison:
        if _within(row, best, margin, comparison):
            return {"outcome": "recommended", "rank": row.rank, "candidate": row.candidate}
        if row is best or not _worse(row, margin):
            break  # undetermined: whether this rank is good enough is the question
    more = _more_seeds(comparison, best, margin, confidence)
    others = [other for other in comparison if other is not best]
    if all(_near(other, margin) for other in others):
        cheapest = comparison[0]
        return {
            "outcome": "not_distinguishable",
            "rank": cheapest.rank,
            "candidate": cheapest.candidate,
            "more_seeds": more,
        }
    return {"more_seeds": more}


def _within(row: Comparison, best: Comparison, margin: float, comparison: Sequence[Comparison]) -> bool:
    """Good enough. For the best of the sample: no other is better than it by more than the margin."""
    if row is best:
        return all(
            other is best or (other.regret.low is not None and other.regret.low >= -margin) for other in comparison
        )
    return row.regret.high is not None and row.regret.high <= margin


def _worse(row: Comparison, margin: float) -> bool:
    return row.regret.low is not None and row.regret.low > margin


def _near(row: Comparison, margin: float) -> bool:
    """No difference is seen, by an interval narrow enough to mean it: at most two margins to either side."""
    low, high = row.regret.low, row.regret.high
    return low is not None and high is not None and low <= 0 and high - low <= 4 * margin


def _more_seeds(comparison: Sequence[Comparison], best: Comparison, margin: float, confidence: float) -> int | None:
    """Seeds to add until every interval, with its present mean and spread, lies on one side of the margin."""
    others = [np.array(row.regret_by_seed) for row in comparison if row is not best]
    for more in range(1, MOST_MORE_SEEDS + 1):
        n = len(best.regret_by_seed) + more
        reach = stats.t.ppf((1 + confidence) / 2, n - 1) / math.sqrt(n)
        if all(reach * np.std(regrets, ddof=1) <= abs(margin - regrets.mean()) for regrets in others):
            return more
    return None


def _row(row: Comparison, best: Comparison, margin: float, comparison: Sequence[Comparison]) -> dict[str, Any]:
    known = row.regret.high is not None
    return {
        "candidate": row.candidate,
        "rank": row.rank,
        "learning_rate": row.learning_rate,
        "eval_loss": row.eval_loss.mean,
        "eval_loss_low": row.eval_loss.low,
        "eval_loss_high": row.eval_loss.high,
        "regret": row.regret.mean,
        "regret_low": row.regret.low,
        "regret_high": row.regret.high,
        "regret_share": row.regret.mean / best.eval_loss.mean,
        "within_margin": _within(row, best, margin, comparison) if known else None,
    }


def _caveats(evidence: Evidence) -> list[str]:
    spec = evidence.spec
    found = {
        "one_learning_rate": len(spec.learning_rates) == 1,
        "one_seed": len(spec.seeds) == 1,
        "some_trials_unfinished": bool((evidence.results["status"] != "done").any()),
        "embedded_data": EMBEDDED in (spec.data.id, spec.model.id),
    }
    return [code for code, true in found.items() if true]
