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

from rankscope.analysis.comparison import Mean, mean_of
from rankscope.analysis.costs import cpu_memory, noise_of
from rankscope.study.evidence import Evidence

OPEN = "not_distinguishable"

FLAT_TOLERANCE = 0.02  # largest relative change of a flat mean, from the second-lowest rank to the highest


class Measured(NamedTuple):
    """A quantity at several ranks, and its relative change (0.1 is 10% more) from one of them to another."""

    ranks: list[int]
    change: Callable[[int, int], Mean]


def judge_claims(evidence: Evidence, compared: Sequence[str]) -> list[dict[str, Any]]:
    """One row per claim: `claim`, `outcome` (held, not_held, not_distinguishable or not_measured), and the `effect`
    from rank `from_rank` to `to_rank` with `low` and `high`. The claim on CPU memory has a second part, `then`.
    `compared` are the candidates that the verdict compares, each rank at its best learning rate."""
    profiles, results = evidence.profiles, evidence.results
    cost = partial(_cost, profiles, evidence.spec.verdict.confidence)
    claims: dict[str, tuple[Measured | None, Callable[..., dict[str, Any]]]] = {
        "loss_falls": (_loss(results, compared, evidence.spec.verdict.confidence), partial(_monotone, -1)),
        "cpu_memory_lowest_then_flat": (cost(f"{cpu_memory(profiles)}_mean_bytes"), _lowest_then_flat),
        "gpu_memory_rises": (cost("gpu_allocated_mean_bytes"), partial(_monotone, +1)),
        "runtime_rises": (cost("runtime_seconds"), partial(_monotone, +1)),
    }
    return [
        {"claim": claim} | (test(*found) if found and len(found.ranks) > 1 else {"outcome": "not_measured"})
        for claim, (found, test) in claims.items()
    ]


def _cost(profiles: pd.DataFrame, confidence: float, column: str) -> Measured | None:
    """A cost: its mean over repeats, and their noise. Learning rates of a rank share a profile."""
    if column not in profiles:
        return None
    own, noise = profiles[~profiles["control"]], noise_of(profiles, column, confidence)
    means = pd.to_numeric(own[column]).groupby(own["rank"]).mean().dropna()

    def change(before: int, after: int) -> Mean:
        found = float(means[after] / means[before] - 1)
        return Mean(found, *(noise.interval(found) if noise else (None, None)))

    return Measured([int(rank) for rank in means.index], change)


def _loss(results: pd.DataFrame, compared: Sequence[str], confidence: float) -> Measured:
    """Training loss, paired by seed, without seeds that a rank lacks; a change is of its mean before."""
    done = results[(results["status"] == "done") & results["candidate"].isin(compared)]
    table = done.pivot_table(index="seed", columns="rank", values="train_loss", aggfunc="mean").dropna()

    def change(before: int, after: int) -> Mean:
        return mean_of((table[after] - table[before]).to_numpy() / float(table[before].mean()), confidence)

    return Measured([] if table.empty else [int(rank) for rank in table.columns], change)


def _monotone(sign: int, ranks: Sequence[int], change: Callable[[int, int], Mean]) -> dict[str, Any]:
    """A claim that holds where the change from the lowest to the highest rank has the claimed sign, and no step between
    neighbours has the other."""
    found = change(ranks[0], ranks[-1])
    steps = [change(*pair).sign() for pair in pairwise(ranks)]
    outcome = "not_held" if -sign in (found.sign(), *steps) else "held" if found.sign() == sign else OPEN
    return _row(outcome, found, ranks[0], ranks[-1])


def _lowest_then_flat(ranks: Sequence[int], change: Callable[[int, int], Mean]) -> dict[str, Any]:
    """A claim of two parts: less at the lowest rank than at any other, and flat (within `FLAT_TOLERANCE`) from the
    second-lowest to the highest."""
    rises = [change(ranks[0], rank) for rank in ranks[1:]]
    signs = [rise.sign() for rise in rises]
    lowest = "not_held" if -1 in signs else "held" if set(signs) == {1} else OPEN
    row, flat = _row(lowest, rises[0], ranks[0], ranks[1]), OPEN
    if len(ranks) > 2:
        after = change(ranks[1], ranks[-1])
        if after.low is not None and after.high is not None:
            if after.low > FLAT_TOLERANCE or after.high < -FLAT_TOLERANCE:
                flat = "not_held"
            elif after.low >= -FLAT_TOLERANCE and after.high <= FLAT_TOLERANCE:
                flat = "held"
        row["then"] = {"claim": "flat"} | _row(flat, after, ranks[1], ranks[-1])
    both = "not_held" if "not_held" in (lowest, flat) else "held" if lowest == flat == "held" else OPEN
    return row | {"outcome": both}


def _row(outcome: str, found: Mean, before: int, after: int) -> dict[str, Any]:
    row = {"outcome": outcome, "effect": found.value, "low": found.low, "high": found.high}
    return row | {"from_rank": before, "to_rank": after}
