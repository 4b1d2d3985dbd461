"""Several studies together: paired where they have the same rows and seeds, and what they say of rank in common.

"The smallest rank that keeps 95% of the gain" is found in each study by interpolation in log2(rank), with the error of
a jackknife over its seeds. From ten studies on, a random-effects model says what is common to them (Paule and Mandel
1982 for the variance between studies, Hartung and Knapp 2001 for the interval), and draws each study's own estimate
towards it by as much as it is uncertain. A study whose lowest rank keeps as much already counts at that rank.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy import optimize, special

from rankscope.analysis.comparison import (
    estimate,
    judged_examples,
    label_tokens,
    losses_by_candidate,
    without_diverged,
)
from rankscope.study.evidence import Evidence

KEPT = 0.95  # share of the gain
FEWEST_STUDIES = 10  # for a common estimate: a variance between fewer is hardly known

Numbers = npt.NDArray[np.float64]


class Sufficient(NamedTuple):
    """Smallest rank that keeps `KEPT` of the gain, as log2(rank)."""

    log2_rank: float
    error: float  # standard error; of the seeds and of the grid of ranks
    at_lowest: bool  # the lowest rank tried keeps as much already, so that it may be lower


class Common(NamedTuple):
    """What studies have in common: log2 of the rank, its interval, and that of one more study; and each study's own
    estimate, drawn towards it."""

    log2_rank: float
    low: float
    high: float
    next_low: float
    next_high: float
    between: float  # standard deviation between studies
    shrunken: list[float]


def sufficient_rank(evidence: Evidence) -> Sufficient | None:
    """Smallest rank of a study that keeps 95% of its gain; None without finished trials, the loss before training, or a
    gain."""
    untrained = evidence.curves.loc[evidence.curves["step"] == 0, "eval_loss"].mean()
    examples = without_diverged(evidence.examples, evidence.results)
    if examples.empty or math.isnan(untrained):
        return None
    judged = judged_examples(examples)
    tokens = label_tokens(judged)
    tables = losses_by_candidate(judged)
    ranks = {name: int(rank) for name, rank in judged.groupby("candidate")["rank"].first().items()}
    seeds = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    if not seeds:
        return None
    losses = {ranks[name]: np.average(table.loc[seeds], axis=1, weights=tokens) for name, table in tables.items()}
    return _with_error(losses, _untrained_of(evidence, judged, untrained))


def _untrained_of(evidence: Evidence, judged: pd.DataFrame, mean: float) -> float:
    """Untrained model's loss on the judged rows, where it is known by row; else on all."""
    if evidence.untrained is None or evidence.untrained.empty:
        return mean
    rows = evidence.untrained[evidence.untrained["example"].isin(judged["example"])]
    return float(np.average(rows["loss"], weights=rows["label_tokens"]))


def _with_error(losses: Mapping[int, Numbers], untrained: float) -> Sufficient | None:
    found = _interpolated({rank: values.mean() for rank, values in losses.items()}, untrained)
    if found is None:
        return None
    log2_rank, gap = found
    count = len(next(iter(losses.values())))
    left_out = [
        _interpolated({rank: np.delete(values, seed).mean() for rank, values in losses.items()}, untrained)
        for seed in range(count)
    ]
    values = np.array([one[0] for one in left_out if one is not None]) if count > 1 else np.array([])
    by_seed = (len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum() if len(values) > 1 else math.inf
    return Sufficient(log2_rank, math.sqrt(by_seed + gap**2 / 12), log2_rank == math.log2(min(losses)))


def _interpolated(losses: Mapping[int, float], untrained: float) -> tuple[float, float] | None:
    """log2 of the smallest rank that keeps enough, and the distance between the ranks it lies between (at the lowest
    rank, that to the next); None without a gain."""
    gain = untrained - min(losses.values())
    if gain <= 0:
        return None
    kept = {rank: (untrained - losses[rank]) / gain for rank in sorted(losses)}
    ranks = list(kept)
    below: int | None = None
    for rank, share in kept.items():
        if share >= KEPT:
            if below is None:
                return math.log2(rank), math.log2(ranks[min(1, len(ranks) - 1)] / rank)
            gap = math.log2(rank / below)
            return float(math.log2(below) + gap * (KEPT - kept[below]) / (share - kept[below])), gap
        below = rank
    return None  # the best rank keeps all of it


def common_rank(found: Sequence[Sufficient]) -> Common | None:
    """What at least `FEWEST_STUDIES` studies have in common; None with fewer whose error is known."""
    known = [one for one in found if 0 < one.error < math.inf]
    if len(known) < FEWEST_STUDIES:
        return None
    values, variances = np.array([one.log2_rank for one in known]), np.array([one.error**2 for one in known])
    between = _between(values, variances)
    weights = 1 / (variances + between)
    mean, degrees = float(np.average(values, weights=weights)), len(values) - 1
    scale = max(1.0, float((weights * (values - mean) ** 2).sum()) / degrees)  # studies too much alike are luck
    error = math.sqrt(scale / weights.sum())
    t = float(special.stdtrit(degrees, 0.975))
    spread = t * math.sqrt(between + error**2)
    drawn = [
        mean + between / (between + one.error**2) * (one.log2_rank - mean) if one in known else mean for one in found
    ]
    return Common(mean, mean - t * error, mean + t * error, mean - spread, mean + spread, math.sqrt(between), drawn)


def _between(values: Numbers, variances: Numbers) -> float:
    """Variance between studies (Paule and Mandel): at which the weighted squares are as many as their degrees."""

    def excess(between: float) -> float:
        weights = 1 / (variances + between)
        mean = np.average(values, weights=weights)
        return float((weights * (values - mean) ** 2).sum()) - (len(values) - 1)

    if excess(0.0) <= 0:
        return 0.0
    return float(optimize.brentq(excess, 0.0, 10 * float(values.var()) + 10.0))


def paired_differences(studies: Mapping[str, Evidence]) -> list[dict[str, Any]]:
    """Differences between two studies with the same tokens, at each rank that both finished, over the seeds that both
    have: `rank study other loss other_loss difference low high seeds`; `difference` is the second's held-out loss minus
    the first's, in nats per label token, with its interval at 95%, None with one seed."""
    rows = []
    for (name, one), (other_name, other) in combinations(studies.items(), 2):
        tokens = one.data_facts.get("tokens_sha256")
        if tokens is None or tokens != other.data_facts.get("tokens_sha256"):
            continue
        mine, theirs = (judged_examples(without_diverged(each.examples, each.results)) for each in (one, other))
        for rank in sorted(set(mine["rank"]) & set(theirs["rank"])):
            pair = [part[part["rank"] == rank] for part in (mine, theirs)]
            shared = sorted(set(pair[0]["example"]) & set(pair[1]["example"]))
            pair = [part[part["example"].isin(shared)] for part in pair]
            first, second = (next(iter(losses_by_candidate(part).values())) for part in pair)
            seeds = first.index.intersection(second.index)
            if seeds.empty:
                continue
            weights = label_tokens(pair[0])
            found = estimate((second.loc[seeds] - first.loc[seeds]).to_numpy(), weights)
            low, high = found.interval(0.95)
            rows.append(
                {
                    "rank": int(rank),
                    "study": name,
                    "other": other_name,
                    "loss": estimate(first.loc[seeds].to_numpy(), weights).mean,
                    "other_loss": estimate(second.loc[seeds].to_numpy(), weights).mean,
                    "difference": found.mean,
                    "low": low if math.isfinite(low) else None,
                    "high": high if math.isfinite(high) else None,
                    "seeds": len(seeds),
                }
            )
    return rows
