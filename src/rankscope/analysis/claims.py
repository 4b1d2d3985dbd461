"""Tests of the four rules of thumb that the original exercise ended with, on the evidence of this study.

As the rank rises, training loss falls, CPU memory is lowest at the lowest rank and flat above it, GPU memory rises, and
runtime rises. Each is an effect with its interval: of the loss by Student's t over differences paired by seed, of a
cost from its noise (`rankscope.analysis.costs.noise_of`). There is no correction for testing four claims.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.comparison import mean_of
from rankscope.analysis.costs import cpu_memory, noise_of
from rankscope.study.evidence import Evidence

OPEN = "not_distinguishable"

FLAT_TOLERANCE = 0.02  # largest relative change of a flat mean, from the second-lowest rank to the highest


class Effect(NamedTuple):
    """Relative change from one rank to another (0.1 is 10% more), with its interval."""

    mean: float
    low: float | None  # None with one pair, as is `high`
    high: float | None

    def sign(self) -> int | None:
        """+1 or -1 where the whole interval has that sign, else None."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return None
        return 1 if self.mean > 0 else -1


class Measured(NamedTuple):
    """A quantity at several ranks, and its change between two of them."""

    ranks: list[int]
    change: Callable[[int, int], Effect]


def judge_claims(evidence: Evidence, compared: Sequence[str]) -> list[dict[str, Any]]:
    """One row per claim: `claim`, `outcome` (held, not_held, not_distinguishable or not_measured), and the `effect`
    from rank `from_rank` to `to_rank` with `low` and `high`. The claim on CPU memory has a second part, `then`.
    `compared` are the candidates that the verdict compares, each rank at its best learning rate."""
    confidence, results, profiles = evidence.spec.verdict.confidence, evidence.results, evidence.profiles
    losses = results[(results["status"] == "done") & results["candidate"].isin(compared)] if compared else results[:0]
    cpu, gpu, runtime = (
        _cost(profiles, column, confidence)
        for column in (f"{cpu_memory(profiles)}_mean_bytes", "gpu_allocated_mean_bytes", "runtime_seconds")
    )
    return [
        _monotone("loss_falls", _loss(losses, confidence), -1),
        _lowest_then_flat("cpu_memory_lowest_then_flat", cpu),
        _monotone("gpu_memory_rises", gpu, +1),
        _monotone("runtime_rises", runtime, +1),
    ]


def _cost(profiles: pd.DataFrame, column: str, confidence: float) -> Measured:
    """A cost: its mean over repeats, and their noise. Learning rates of a rank share a profile."""
    if profiles.empty or column not in profiles:
        return Measured([], _no_change)
    own, noise = profiles[~profiles["control"]], noise_of(profiles, column, confidence)
    means = pd.to_numeric(own[column]).groupby(own["rank"]).mean().dropna()

    def change(before: int, after: int) -> Effect:
        found = float(means[after] / means[before] - 1)
        return Effect(found, *(noise.interval(found) if noise else (None, None)))

    return Measured([int(rank) for rank in means.index], change)


def _loss(results: pd.DataFrame, confidence: float) -> Measured:
    """Training loss, paired by seed, without seeds that a rank lacks."""
    if results.empty:
        return Measured([], _no_change)
    table = results.pivot_table(index="seed", columns="rank", values="train_loss", aggfunc="mean").dropna()
    ranks = [] if table.empty else [int(rank) for rank in table.columns]
    return Measured(ranks, partial(effect, table, confidence=confidence))


def _no_change(before: int, after: int) -> Effect:
    raise ValueError("not measured")


def effect(table: pd.DataFrame, before: int, after: int, confidence: float) -> Effect:
    """Mean paired change between two ranks, over the mean before."""
    changes = (table[after] - table[before]).to_numpy() / float(table[before].mean())
    return Effect(*mean_of(changes, confidence))


def _monotone(claim: str, measured: Measured, sign: int) -> dict[str, Any]:
    """A claim that holds where the change from the lowest to the highest rank has the claimed sign, and no step between
    neighbours has the other."""
    ranks = measured.ranks
    if len(ranks) < 2:
        return {"claim": claim, "outcome": "not_measured"}
    found = measured.change(ranks[0], ranks[-1])
    steps = [measured.change(*pair).sign() for pair in pairwise(ranks)]
    outcome = "not_held" if -sign in (found.sign(), *steps) else "held" if found.sign() == sign else OPEN
    return _row(claim, outcome, found, ranks[0], ranks[-1])


def _lowest_then_flat(claim: str, measured: Measured) -> dict[str, Any]:
    """A claim of two parts: less at the lowest rank than at any other, and flat (within `FLAT_TOLERANCE`) from the
    second-lowest to the highest."""
    ranks = measured.ranks
    if len(ranks) < 2:
        return {"claim": claim, "outcome": "not_measured"}
    rises = [measured.change(ranks[0], rank) for rank in ranks[1:]]
    signs = [rise.sign() for rise in rises]
    lowest = "not_held" if -1 in signs else "held" if set(signs) == {1} else OPEN
    row, flat = _row(claim, lowest, rises[0], ranks[0], ranks[1]), OPEN
    if len(ranks) > 2:
        after = measured.change(ranks[1], ranks[-1])
        if after.low is not None and after.high is not None:
            if after.low > FLAT_TOLERANCE or after.high < -FLAT_TOLERANCE:
                flat = "not_held"
            elif after.low >= -FLAT_TOLERANCE and after.high <= FLAT_TOLERANCE:
                flat = "held"
        row["then"] = _row("flat", flat, after, ranks[1], ranks[-1])
    both = "not_held" if "not_held" in (lowest, flat) else "held" if lowest == flat == "held" else OPEN
    return row | {"outcome": both}


def _row(claim: str, outcome: str, found: Effect, before: int, after: int) -> dict[str, Any]:
    row = {"claim": claim, "outcome": outcome, "effect": found.mean, "low": found.low, "high": found.high}
    return row | {"from_rank": before, "to_rank": after}
