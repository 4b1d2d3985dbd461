"""Outcome of one study, and what would settle it where it is open."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rankscope.analysis.comparison import Comparison
from rankscope.analysis.decision import LEVELS, Decision, decide_arrays, in_contention, outcome_of

PLANNED = [seeds for seeds in LEVELS if seeds > 2]
"""Numbers of seeds at which a study that grows until it is settled is judged."""

States = Mapping[str, bool | None]  # by candidate: True for good enough, False for worse, None for undecided


def decide(
    found: Comparison,
    confidence: float,
    over: Mapping[str, list[str]] | None = None,
    *,
    look_ahead: bool = True,
) -> tuple[dict[str, Any], States]:
    """Fields of verdict.json that hold the conclusion, and the state of each candidate, None where too little is gained
    for a share of it to mean anything. `over` names the limits that each candidate exceeds; `look_ahead` is whether to
    find `more_seeds` and `next_look`."""
    over, decision = over or {}, _decision(found, confidence)
    fields = {"best_candidate": found.candidates[found.best]} | _outcome(found, decision, over)
    pairs = zip(found.candidates, decision.good & decision.gained, decision.worse & decision.gained, strict=True)
    states = {name: True if good else False if worse else None for name, good, worse in pairs}
    contending = in_contention(decision)
    if not look_ahead or settled(fields) or not contending.any():
        return fields, states
    fewest, helps = int(found.eval_loss.seeds[contending].min()), fields["outcome"] != "not_trained_enough"
    for look in (look for look in PLANNED if look > fewest > 1):
        more = found.with_seeds(look, contending)
        then = _outcome(more, _decision(more, confidence), over)
        helps = helps or then["outcome"] != "not_trained_enough"
        if settled(then):
            fields["more_seeds"] = look - fewest
            break
    if helps:
        ranks = [rank for rank, contends in zip(found.ranks, contending, strict=True) if contends]
        fields["next_look"] = next(({"ranks": ranks, "seeds": look} for look in PLANNED if look > fewest), None)
    return fields, states


def _decision(found: Comparison, confidence: float) -> Decision:
    """Decision on one study."""
    return decide_arrays(found.differences, found.excesses, found.gain, np.log2(found.ranks), confidence)


def settled(fields: Mapping[str, Any]) -> bool:
    """Whether the outcome is final and no lower rank is undecided."""
    open_ = ("not_enough_evidence", "not_distinguishable", "not_trained_enough")
    return fields["outcome"] not in open_ and not fields.get("undetermined")


def _outcome(found: Comparison, decision: Decision, over: Mapping[str, list[str]]) -> dict[str, Any]:
    inside = [not over.get(name) for name in found.candidates]
    # Of one seed the gain, of which the margin is a share, has no interval.
    known = found.gain is None or np.isfinite(found.gain.seed_error).all()
    outcome, number = outcome_of(decision, inside)
    if inside == [True] and decision.gained and known:
        outcome, number = "recommended", 0
    if outcome == "best_in_budget":
        number = min((n for n, fits in enumerate(inside) if fits), key=found.regrets.__getitem__)
    if number is None:
        return {"outcome": outcome}
    fields = {"outcome": outcome, "rank": found.ranks[number], "candidate": found.candidates[number]}
    if outcome != "recommended":
        return fields
    below = [name for n, name in enumerate(found.candidates[:number]) if inside[n] and not decision.worse[n]]
    return fields | {"undetermined": below}


def best_guess(found: Comparison, over: Mapping[str, list[str]]) -> str | None:
    """Candidate of the smallest rank whose mean is within the margin, whatever is shown; else the best."""
    others = ~np.eye(len(found.ranks), dtype=bool)
    within = np.where(others, found.excesses.mean, -math.inf).max(axis=1) <= 0
    inside = [number for number, name in enumerate(found.candidates) if not over.get(name)]
    good = [number for number in inside if within[number]]
    chosen = good[0] if good else min(inside, key=found.regrets.__getitem__, default=None)
    return None if chosen is None else found.candidates[chosen]
