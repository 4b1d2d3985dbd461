"""The verdict: the smallest rank that is good enough, or that the evidence does not show one.

A rank is good enough (non-inferior) when its loss is shown to be at most the best candidate's times 1 + margin,
whichever candidate is the best; it is worse when its loss is shown to be above. Several ranks are tested at once, so
their level is divided among them (Bonferroni): the chance that any rank is wrongly called good enough stays below
1 - confidence, and so does the chance that any is wrongly called worse (benchmarks/simulate.py).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankscope.analysis.claims import judge_claims
from rankscope.analysis.comparison import (
    Comparison,
    bounds,
    compare,
    estimate,
    judged_examples,
    label_tokens,
    losses_by_candidate,
    may_be_best,
)
from rankscope.analysis.costs import over_budget
from rankscope.analysis.variants import judge_variants
from rankscope.data.doubts import doubts
from rankscope.spec.models import EMBEDDED
from rankscope.study.evidence import Evidence

MAX_MORE_SEEDS = 50  # added seeds that the search for `more_seeds` tries

MAX_REGRET_MARGINS = 2.0  # margins that the cheapest of ranks without a visible difference may lose at most

States = Mapping[str, bool | None]  # by candidate: True for good enough, False for worse, None for undecided


def conclude(evidence: Evidence) -> dict[str, Any]:
    """Content of verdict.json.

    `outcome` is one of

    - `recommended`: `rank` is the smallest within the budget that is shown to be good enough; `undetermined` names
      smaller candidates that are shown to be neither good enough nor worse.
    - `not_distinguishable`: no two ranks differ visibly, and the intervals are narrow; `rank` is the cheapest.
    - `best_in_budget`: every rank within the budget is worse than the margin allows; `rank` is the best of them.
    - `nothing_in_budget`: no rank is known to fit the budget; `rank` is None.
    - `not_enough_evidence`: `rank` is None.

    `more_seeds` is the least number of added seeds that would settle it with the same means and spreads; None where
    all is settled, or where up to 50 would not do. `comparison` has a row for each rank at its best learning rate,
    `left_out` names ranks without one, `reference_candidate` is full fine-tuning at its best one; `claims` are the four
    of the original study; `variants` are those of `rankscope.analysis.variants`; `caveats` are codes that the report
    puts in words; of those in `rankscope.data.doubts.DOUBTS` the numbers are in data/facts.json.
    """
    spec, confidence = evidence.spec, evidence.spec.verdict.confidence
    rows = compare(evidence.examples, spec.verdict.margin) if len(evidence.examples) else []
    compared = [row.candidate for row in rows]
    verdict: dict[str, Any] = {
        "schema": 2,
        "outcome": "not_enough_evidence",
        "rank": None,
        "candidate": None,
        "best_candidate": None,
        "margin": spec.verdict.margin,
        "confidence": confidence,
        "seeds": rows[0].eval_loss.seeds if rows else 0,
        "examples": rows[0].eval_loss.examples if rows else 0,
        "scaling": {"alpha": spec.adapter.alpha, "use_rslora": spec.adapter.use_rslora},
        "more_seeds": None,
        "undetermined": [],
        "left_out": sorted(set(spec.ranks) - {row.rank for row in rows}),
        "reference_candidate": None,
        "comparison": [],
        "claims": judge_claims(evidence, compared),
        "variants": judge_variants(evidence),
        "caveats": [],
    }
    over = over_budget(spec.verdict, evidence.profiles, compared)
    if rows:
        decision, states = decide(rows, confidence, over)
        reference, over_reference = over_full(evidence)
        verdict |= decision | {"reference_candidate": reference}
        verdict["comparison"] = _table(rows, states, over, over_reference, confidence)
    verdict["caveats"] = _caveats(evidence, verdict, rows, over)
    return verdict


def best_of(rows: Sequence[Comparison]) -> Comparison:
    """Candidate with the lowest held-out loss in the sample."""
    return min(rows, key=lambda row: row.eval_loss.mean)


def decide(
    rows: Sequence[Comparison], confidence: float, over: Mapping[str, list[str]] | None = None
) -> tuple[dict[str, Any], States]:
    """Fields of verdict.json that hold the conclusion, and the state of each candidate.

    `over` names the limits that each candidate exceeds.
    """
    over, seeds = over or {}, rows[0].eval_loss.seeds
    states = _states(rows, confidence)
    found = {"best_candidate": best_of(rows).candidate} | _outcome(rows, states, confidence, over)
    for added in range(1, MAX_MORE_SEEDS + 1) if seeds > 1 and not _settled(found) else ():
        more = [row.with_seeds(seeds + added) for row in rows]
        if _settled(_outcome(more, _states(more, confidence), confidence, over)):
            found["more_seeds"] = added
            break
    return found, states


def _settled(found: Mapping[str, Any]) -> bool:
    """Whether the outcome is final and no lower rank is undecided."""
    return found["outcome"] not in ("not_enough_evidence", "not_distinguishable") and not found.get("undetermined")


def _levels(candidates: int, confidence: float) -> tuple[float, float]:
    """Two-sided confidence of one difference, for claims of good enough and of worse.

    One candidate is the best, so a claim can be wrong about `candidates - 1` others. Good enough is wrong on one side
    only, which doubles the level; the confidence is never below the one shown.
    """
    share = (1 - confidence) / max(1, candidates - 1)
    return max(confidence, 1 - 2 * share), 1 - share


def _states(rows: Sequence[Comparison], confidence: float) -> States:
    good, worse = _levels(len(rows), confidence)
    best = may_be_best(rows, worse)
    states: dict[str, bool | None] = {}
    for row in rows:
        highs = [excess.interval(good)[1] for excess in row.excesses.values()]
        lows = [row.excesses[name].interval(worse)[0] for name in best if name != row.candidate]
        states[row.candidate] = None
        if highs and max(highs) <= 0:
            states[row.candidate] = True
        elif row.candidate not in best and min(lows) > 0:
            states[row.candidate] = False
    return states


def _outcome(
    rows: Sequence[Comparison], states: States, confidence: float, over: Mapping[str, list[str]]
) -> dict[str, Any]:
    inside = [row for row in rows if not over.get(row.candidate)]
    if not inside:
        return {"outcome": "nothing_in_budget"}
    if len(rows) == 1:
        return _chosen("recommended", rows[0])
    for row in inside:
        if states[row.candidate]:
            below = [other.candidate for other in inside if other.rank < row.rank and states[other.candidate] is None]
            return _chosen("recommended", row) | {"undetermined": below}
    if len(inside) < len(rows) and all(states[row.candidate] is False for row in inside):
        return _chosen("best_in_budget", best_of(inside))
    if len(inside) == len(rows) and _alike(rows, confidence):
        return _chosen("not_distinguishable", inside[0])
    return {"outcome": "not_enough_evidence"}


def _chosen(outcome: str, row: Comparison) -> dict[str, Any]:
    return {"outcome": outcome, "rank": row.rank, "candidate": row.candidate}


def _alike(rows: Sequence[Comparison], confidence: float) -> bool:
    """Whether no two differ visibly, and the first one's regret is at most `MAX_REGRET_MARGINS`."""
    alike = len(may_be_best(rows, confidence)) == len(rows)
    margins = [rows[0].differences[name].mean - rows[0].excesses[name].mean for name in rows[0].excesses]
    high = bounds(rows, confidence)[0].high
    return alike and high is not None and high <= MAX_REGRET_MARGINS * min(margins)


def _table(
    rows: Sequence[Comparison],
    states: States,
    over: Mapping[str, list[str]],
    over_reference: Mapping[str, Mapping[str, float | None]],
    confidence: float,
) -> list[dict[str, Any]]:
    best = best_of(rows)
    table = []
    for row, bound in zip(rows, bounds(rows, confidence), strict=True):
        on_these = row.eval_loss._replace(example_error=0.0)  # between candidates what examples share does not count
        low, high = _finite(on_these.interval(confidence))
        regret = 0.0 if row is best else row.differences[best.candidate].mean
        table.append(
            {
                "candidate": row.candidate,
                "rank": row.rank,
                "learning_rate": row.learning_rate,
                "eval_loss": row.eval_loss.mean,
                "eval_loss_low": low,
                "eval_loss_high": high,
                "regret": regret,
                "regret_low": bound.low,
                "regret_high": bound.high,
                "regret_share": regret / best.eval_loss.mean,
                "within_margin": states[row.candidate],
                "over_budget": over.get(row.candidate, []),
                **over_reference.get(row.candidate, {}),
            }
        )
    return table


def _finite(interval: tuple[float, float]) -> list[float | None]:
    return [end if math.isfinite(end) else None for end in interval]


def over_full(evidence: Evidence) -> tuple[str | None, dict[str, dict[str, float | None]]]:
    """Name of full fine-tuning at its best rate, and each compared candidate's loss above its own: `over_full`,
    `over_full_low`, `over_full_high`, on the seeds that both finished. None and empty without a finished reference."""
    if evidence.reference.empty:
        return None, {}
    reference, judged = judged_examples(evidence.reference), judged_examples(evidence.examples)
    shared = sorted(set(reference["example"]) & set(judged["example"]))  # half of them, where one had several rates
    judged, reference = (table[table["example"].isin(shared)] for table in (judged, reference))
    best, full = next(iter(losses_by_candidate(reference).items()))
    found: dict[str, dict[str, float | None]] = {}
    for name, losses in losses_by_candidate(judged).items():
        seeds = losses.index.intersection(full.index)
        if len(seeds):
            difference = estimate((losses.loc[seeds] - full.loc[seeds]).to_numpy(), label_tokens(judged))
            low, high = _finite(difference.interval(evidence.spec.verdict.confidence))
            found[name] = {"over_full": difference.mean, "over_full_low": low, "over_full_high": high}
    return best, found


def _caveats(
    evidence: Evidence, verdict: Mapping[str, Any], rows: Sequence[Comparison], over: Mapping[str, list[str]]
) -> list[str]:
    spec = evidence.spec
    rates = sorted(evidence.examples["learning_rate"].unique()) if rows else sorted(spec.learning_rates)
    open_ = bool(rows) and verdict["seeds"] > 1 and not _settled(verdict) and verdict["more_seeds"] is None
    found = {
        "one_learning_rate": len(rates) == 1,
        "rate_at_edge": len(rates) > 1 and any(row.learning_rate in (rates[0], rates[-1]) for row in rows),
        "one_seed": verdict["seeds"] == 1,
        "seeds_would_not_do": open_,
        "ranks_left_out": bool(rows) and bool(verdict["left_out"]),
        "some_trials_unfinished": bool((evidence.results["status"] != "done").any()),
        "budget_unmeasured": any("unmeasured" in reasons for reasons in over.values()),
        "embedded_data": EMBEDDED in (*spec.data.ids, spec.model.id),
    }
    return [*(code for code, true in found.items() if true), *doubts(evidence.data_facts)]
