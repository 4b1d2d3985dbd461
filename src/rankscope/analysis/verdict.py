"""The verdict: the smallest rank that is good enough, or a plain statement that the evidence does not tell.

A rank is good enough (non-inferior) when the upper bound of its regret lies below the margin, `verdict.margin` of the
best candidate's loss; it is worse when the lower bound lies above; else it is undetermined.
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
    `not_distinguishable` (no rank differs from the best beyond noise; `rank` is the cheapest), or
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
    verdict["comparison"] = [_row(row, best, margin) for row in comparison]
    verdict |= _decide(comparison, best, margin, confidence)
    return verdict


def _decide(comparison: Sequence[Comparison], best: Comparison, margin: float, confidence: float) -> dict[str, Any]:
    if len(comparison) > 1 and len(best.regret_by_seed) < 2:
        return {"more_seeds": 2}  # three seeds are the fewest whose spread says something
    if len(comparison) == 1:
        return {"outcome": "recommended", "rank": best.rank, "candidate": best.candidate}
    for row in comparison:
        if _within(row, best, margin):
            return {"outcome": "recommended", "rank": row.rank, "candidate": row.candidate}
        if not _worse(row, margin):
            break  # undetermined: whether a smaller rank is good enough is the question
    more = _more_seeds(row, margin, confidence)
    others = [other for other in comparison if other is not best]
    if all(other.regret.low is not None and other.regret.low <= 0 for other in others):
        cheapest = comparison[0]
        return {
            "outcome": "not_distinguishable",
            "rank": cheapest.rank,
            "candidate": cheapest.candidate,
            "more_seeds": more,
        }
    return {"more_seeds": more}


def _within(row: Comparison, best: Comparison, margin: float) -> bool:
    return row is best or (row.regret.high is not None and row.regret.high <= margin)


def _worse(row: Comparison, margin: float) -> bool:
    return row.regret.low is not None and row.regret.low > margin


def _more_seeds(row: Comparison, margin: float, confidence: float) -> int | None:
    """Seeds to add until the interval of `row`, with its present mean and spread, lies on one side of the margin."""
    seeds, spread = len(row.regret_by_seed), float(np.std(row.regret_by_seed, ddof=1))
    for more in range(1, MOST_MORE_SEEDS + 1):
        n = seeds + more
        if stats.t.ppf((1 + confidence) / 2, n - 1) * spread / math.sqrt(n) <= abs(margin - row.regret.mean):
            return more
    return None


def _row(row: Comparison, best: Comparison, margin: float) -> dict[str, Any]:
    known = row.regret.high is not None or row is best
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
        "within_margin": _within(row, best, margin) if known else None,
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
