"""Tests of the original study's four claims on the evidence of this one.

As the rank rises, training loss falls, CPU memory is lowest at the lowest rank and flat above it, GPU memory rises, and
runtime rises. Each is an effect with its interval: differences are paired by seed (loss) or by repeat (cost), and
Student's t gives the interval of their mean. A cost's effect below the noise floor is not distinguishable. There is no
correction for testing four claims.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.comparison import mean_of
from rankscope.analysis.costs import noise_floor
from rankscope.study.evidence import Evidence

FLAT_TOLERANCE = 0.02  # largest relative change of a flat mean, from the second-lowest rank to the highest


class Effect(NamedTuple):
    """Relative change from one rank to another (0.1 is 10% more), with its interval."""

    mean: float
    low: float | None  # None with one pair, as is `high`
    high: float | None

    def sign(self, floor: float) -> int | None:
        """+1 or -1 where the whole interval has that sign and the mean exceeds `floor`, else None."""
        if self.low is None or self.high is None or abs(self.mean) <= floor or self.low <= 0 <= self.high:
            return None
        return 1 if self.mean > 0 else -1


class Paired(NamedTuple):
    """A measured quantity."""

    values: pd.DataFrame  # pairs (seeds or repeats) as rows, ranks as columns
    floor: float  # relative change that is noise


def judge_claims(evidence: Evidence, compared: Sequence[str]) -> list[dict[str, Any]]:
    """One row per claim: `claim`, `outcome` (held, not_held, not_distinguishable or not_measured), and the `effect`
    from rank `from_rank` to `to_rank` with `low` and `high`. The claim on CPU memory has a second part, `then`.
    `compared` are the candidates that the verdict compares, each rank at its best learning rate."""
    confidence, results = evidence.spec.verdict.confidence, evidence.results
    losses = results[(results["status"] == "done") & results["candidate"].isin(compared)] if compared else results[:0]
    loss = Paired(_pivot(losses, "seed", "train_loss"), 0.0)
    cpu, gpu, runtime = (
        _cost(evidence.profiles, column) for column in ("rss_mean_bytes", "gpu_allocated_mean_bytes", "runtime_seconds")
    )
    return [
        _monotone("loss_falls", loss, -1, confidence),
        _lowest_then_flat("cpu_memory_lowest_then_flat", cpu, confidence),
        _monotone("gpu_memory_rises", gpu, +1, confidence),
        _monotone("runtime_rises", runtime, +1, confidence),
    ]


def _cost(profiles: pd.DataFrame, column: str) -> Paired:
    if profiles.empty:
        return Paired(pd.DataFrame(), 0.0)
    noise = noise_floor(profiles, column)
    return Paired(_pivot(profiles[~profiles["control"]], "repeat", column), noise.floor if noise else 0.0)


def _pivot(table: pd.DataFrame, pair: str, column: str) -> pd.DataFrame:
    """Pairs as rows and ranks as columns, without pairs that a rank lacks. Learning rates of a rank share a profile."""
    if table.empty:
        return pd.DataFrame()
    values = table.assign(value=pd.to_numeric(table[column]))
    return values.pivot_table(index=pair, columns="rank", values="value", aggfunc="mean").dropna()


def effect(table: pd.DataFrame, before: int, after: int, confidence: float) -> Effect:
    """Mean paired change between two ranks, over the mean before."""
    changes = (table[after] - table[before]).to_numpy() / float(table[before].mean())
    return Effect(*mean_of(changes, confidence))


def _monotone(claim: str, table: Paired, sign: int, confidence: float) -> dict[str, Any]:
    """A claim that holds where the change from the lowest to the highest rank has the claimed sign, and no step between
    neighbours has the other."""
    ranks = [int(rank) for rank in table.values.columns]
    if len(ranks) < 2 or table.values.empty:
        return {"claim": claim, "outcome": "not_measured"}
    found = effect(table.values, ranks[0], ranks[-1], confidence)
    steps = [effect(table.values, *pair, confidence).sign(table.floor) for pair in pairwise(ranks)]
    seen = found.sign(table.floor)
    outcome = "not_held" if -sign in (seen, *steps) else "held" if seen == sign else "not_distinguishable"
    return _row(claim, outcome, found, ranks[0], ranks[-1])


def _lowest_then_flat(claim: str, table: Paired, confidence: float) -> dict[str, Any]:
    """A claim of two parts: less at the lowest rank than at any other, and flat (within `FLAT_TOLERANCE`) from the
    second-lowest to the highest."""
    ranks = [int(rank) for rank in table.values.columns]
    if len(ranks) < 2 or table.values.empty:
        return {"claim": claim, "outcome": "not_measured"}
    rises = [effect(table.values, ranks[0], rank, confidence) for rank in ranks[1:]]
    signs = [rise.sign(table.floor) for rise in rises]
    lowest = "not_held" if -1 in signs else "held" if set(signs) == {1} else "not_distinguishable"
    row, flat = _row(claim, lowest, rises[0], ranks[0], ranks[1]), "not_distinguishable"
    if len(ranks) > 2:
        after = effect(table.values, ranks[1], ranks[-1], confidence)
        if after.low is not None and after.high is not None:
            if after.low > FLAT_TOLERANCE or after.high < -FLAT_TOLERANCE:
                flat = "not_held"
            elif after.low >= -FLAT_TOLERANCE and after.high <= FLAT_TOLERANCE:
                flat = "held"
        row["then"] = _row("flat", flat, after, ranks[1], ranks[-1])
    both = "not_held" if "not_held" in (lowest, flat) else "held" if lowest == flat == "held" else "not_distinguishable"
    return row | {"outcome": both}


def _row(claim: str, outcome: str, found: Effect, before: int, after: int) -> dict[str, Any]:
    row = {"claim": claim, "outcome": outcome, "effect": found.mean, "low": found.low, "high": found.high}
    return row | {"from_rank": before, "to_rank": after}
