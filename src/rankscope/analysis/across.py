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
from scipy import optimize, special

from rankscope.analysis.comparison import judged_examples, label_tokens, losses_by_candidate, paired
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
    """Smallest rank of a study that keeps 95% of its gain; None without finished trials, untrained loss or gain."""
    untrained = evidence.curves.loc[evidence.curves["step"] == 0, "eval_loss"].mean()
    judged = judged_examples(evidence.examples, evidence.results)
    if judged.empty or math.isnan(untrained):
        return None
    if not evidence.untrained.empty:  # known by row: of the judged ones
        rows = evidence.untrained[evidence.untrained["example"].isin(judged["example"])]
        untrained = np.average(rows["loss"], weights=rows["label_tokens"])
    tokens, tables = label_tokens(judged), losses_by_candidate(judged)
    ranks = {name: int(rank) for name, rank in judged.groupby("candidate")["rank"].first().items()}
    seeds = sorted(set.intersection(*(set(table.index) for table in tables.values())))
    if not seeds:
        return None
    losses = {ranks[name]: np.average(table.loc[seeds], axis=1, weights=tokens) for name, table in tables.items()}
    return _with_error(losses, float(untrained))


def _with_error(losses: Mapping[int, Numbers], untrained: float) -> Sufficient | None:
    """From losses by seed of each rank, each (S,)."""
    found = _interpolated({rank: values.mean() for rank, values in losses.items()}, untrained)
    if found is None:
        return None
    (log2_rank, gap), count = found, len(next(iter(losses.values())))
    left_out = [
        _interpolated({rank: np.delete(values, seed).mean() for rank, values in losses.items()}, untrained)
        for seed in (range(count) if count > 1 else ())
    ]
    values = np.array([one[0] for one in left_out if one is not None])
    by_seed = (len(values) - 1) / len(values) * ((values - values.mean()) ** 2).sum() if len(values) > 1 else math.inf
    return Sufficient(log2_rank, math.sqrt(by_seed + gap**2 / 12), log2_rank == math.log2(min(losses)))


def _interpolated(losses: Mapping[int, float], untrained: float) -> tuple[float, float] | None:
    """log2 of the smallest rank that keeps enough, and the distance between the ranks it lies between (at the lowest
    rank, that to the next); None without a gain."""
    gain = untrained - min(losses.values())
    if gain <= 0:
        return None
    ranks = sorted(losses)
    kept = [(untrained - losses[rank]) / gain for rank in ranks]
    number = next(number for number, share in enumerate(kept) if share >= KEPT)  # the best rank keeps all of it
    if number == 0:
        return math.log2(ranks[0]), math.log2(ranks[min(1, len(ranks) - 1)] / ranks[0])
    below, gap = kept[number - 1], math.log2(ranks[number] / ranks[number - 1])
    return float(math.log2(ranks[number - 1]) + gap * (KEPT - below) / (kept[number] - below)), gap


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
        mine, theirs = (judged_examples(each.examples, each.results) for each in (one, other))
        for rank in sorted(set(mine["rank"]) & set(theirs["rank"])):
            own, beside = (part[part["rank"] == rank] for part in (mine, theirs))
            first, second = (next(iter(losses_by_candidate(part).values())) for part in (own, beside))
            if (found := paired(second, first, label_tokens(own))) is None:
                continue
            low, high = found.difference.ends(0.95)
            rows.append(
                {
                    "rank": int(rank),
                    "study": name,
                    "other": other_name,
                    "loss": found.other,
                    "other_loss": found.own,
                    "difference": found.difference.mean,
                    "low": low,
                    "high": high,
                    "seeds": found.difference.seeds,
                }
            )
    return rows
