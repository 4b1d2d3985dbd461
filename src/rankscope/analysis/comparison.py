"""Regret of each candidate with its interval, paired by seed and by held-out example.

A trial's held-out loss is the sum of its losses over all label tokens divided by their number (nats a token). Trials
with one seed saw the same examples in the same order, and all trials are judged on the same held-out examples, so two
candidates are compared pair by pair:

    loss[s, e] - other loss[s, e] = difference + seed s + example e + what is left

with seeds and examples both drawn at random (crossed random effects). Their variances come from the analysis of
variance (Searle, Casella and McCulloch 1992, chapter 4). The interval's t is the mean of those of the two degrees of
freedom, each weighted by its share of the variance (Cochran and Cox 1957, section 4.14). A percentile bootstrap would
cover far less than its nominal level with two or three seeds (docs/method.md, docs/results/simulation.md).

The regret of a candidate is its loss minus the lowest loss of all candidates. The truly lowest is unknown, so a claim
on a regret must hold whichever it is (multiple comparisons with the best: Edwards and Hsu 1983, JASA 78).
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Estimate(NamedTuple):
    """Mean over seeds and held-out examples with its standard errors, in nats per label token."""

    mean: float
    seed_error: float | None  # of seeds and the residual, with seeds - 1 degrees of freedom; None with one seed
    example_error: float  # of examples, alike for every seed, with examples - 1 degrees of freedom
    seeds: int
    examples: int

    def half_width(self, confidence: float) -> float:
        """Half of the two-sided interval; infinite with one seed, which shows no variation between seeds."""
        if self.seed_error is None:
            return math.inf
        seed, example = self.seed_error**2, self.example_error**2
        if not seed + example:
            return 0.0
        share = seed / (seed + example)
        t = share * _quantile(confidence, self.seeds - 1) + (1 - share) * _quantile(confidence, self.examples - 1)
        return t * math.sqrt(seed + example)

    def interval(self, confidence: float) -> tuple[float, float]:
        half = self.half_width(confidence)
        return self.mean - half, self.mean + half

    def with_seeds(self, seeds: int) -> "Estimate":
        """Estimate that so many seeds would give, if they vary as these do."""
        error = None if self.seed_error is None else self.seed_error * math.sqrt(self.seeds / seeds)
        return self._replace(seed_error=error, seeds=seeds)


@cache
def _quantile(confidence: float, degrees: int) -> float:
    """Two-sided quantile of Student's t."""
    return float(stats.t.ppf((1 + confidence) / 2, degrees))


def estimate(values: np.ndarray, label_tokens: np.ndarray) -> Estimate:
    """Mean of `values` (S, E) over seeds and examples, with examples weighted by `label_tokens` (E,).

    A mean with random weights is a ratio: its variance is that of its linear part, w (value - mean).
    """
    seeds, examples = values.shape
    weights = label_tokens / label_tokens.mean()
    mean = float((weights * values).mean())
    parts = weights * (values - mean)
    if seeds < 2 or examples < 2:
        return Estimate(mean, None, 0.0, seeds, examples)
    by_seed, by_example = parts.mean(axis=1), parts.mean(axis=0)
    left = parts - by_seed[:, None] * weights - by_example  # a seed's effect reaches a part as its weight
    left_square = float((left**2).sum()) / ((seeds - 1) * (examples - 1))
    count = seeds * examples
    seed_error = math.sqrt(examples * float(by_seed.var(ddof=1)) / count)
    example_error = math.sqrt(max(0.0, seeds * float(by_example.var(ddof=1)) - left_square) / count)
    return Estimate(mean, seed_error, example_error, seeds, examples)


class Comparison(NamedTuple):
    """One candidate compared with the others. Losses are in nats per label token."""

    candidate: str
    rank: int
    learning_rate: float
    eval_loss: Estimate
    differences: dict[str, Estimate]  # this candidate's loss minus each other one's
    # This candidate's loss minus (1 + margin) times each other one's: above 0 where it is worse than the margin allows.
    # The margin is a share of an estimated loss, so its own uncertainty counts as well.
    excesses: dict[str, Estimate]

    def with_seeds(self, seeds: int) -> "Comparison":
        """Comparison that so many seeds would give, if they vary as these do."""
        return self._replace(
            differences={name: found.with_seeds(seeds) for name, found in self.differences.items()},
            excesses={name: found.with_seeds(seeds) for name, found in self.excesses.items()},
        )


class Bounds(NamedTuple):
    """Interval of a regret, which is never negative; None where it is unknown."""

    low: float | None
    high: float | None


def may_be_best(rows: Sequence[Comparison], confidence: float) -> set[str]:
    """Candidates that no other is shown to beat; the best of the sample is always one."""
    return {row.candidate for row in rows if all(d.interval(confidence)[0] <= 0 for d in row.differences.values())}


def bounds(rows: Sequence[Comparison], confidence: float) -> list[Bounds]:
    """Interval of each candidate's regret, from the intervals of the differences at `confidence`.

    Its upper end is that of the largest difference to any other; its lower end that of the least difference to any that
    may be the best, and zero where the candidate itself may be.
    """
    best = may_be_best(rows, confidence)
    found = []
    for row in rows:
        own = {name: difference.interval(confidence) for name, difference in row.differences.items()}
        high = max((high for _, high in own.values()), default=math.inf)
        low = 0.0 if row.candidate in best else max(0.0, min(own[name][0] for name in best))
        found.append(Bounds(None, None) if math.isinf(high) else Bounds(low, max(0.0, high)))
    return found


def losses_by_candidate(examples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Held-out losses of each candidate, lowest rank first: seeds that all finished as rows, examples as columns.

    A candidate that finished fewer seeds than others is left out: one that fails must not take evidence from the
    others. `examples` is `Study.examples()`, or part of it.
    """
    tables = {
        str(name): part.pivot(index="seed", columns="example", values="loss")
        for (_, _, name), part in examples.groupby(["rank", "learning_rate", "candidate"])
    }
    most = max((len(table) for table in tables.values()), default=0)
    tables = {name: table for name, table in tables.items() if len(table) == most}
    shared = sorted(set.intersection(*(set(table.index) for table in tables.values()))) if tables else []
    return {name: table.loc[shared] for name, table in tables.items()} if shared else {}


def label_tokens(examples: pd.DataFrame) -> np.ndarray:
    """Label tokens of each held-out example, (E,), in the order of their numbers."""
    return examples.groupby("example")["label_tokens"].first().to_numpy(dtype=np.float64)


def best_rates(examples: pd.DataFrame) -> list[str]:
    """Candidate with the lowest loss at each rank, among its rates that finished the most seeds; lowest rank first."""
    best = []
    for _, part in examples.groupby("rank"):
        tokens, tables = label_tokens(part), losses_by_candidate(part)
        means = {name: estimate(table.to_numpy(), tokens).mean for name, table in tables.items()}
        best += [min(means, key=means.__getitem__)] if means else []
    return best


def judged_examples(examples: pd.DataFrame) -> pd.DataFrame:
    """Losses at each rank's best learning rate, on the examples on which ranks are compared.

    With several rates, a rank's is chosen on the even-numbered half of the held-out examples and judged on the
    odd-numbered half: chosen and judged on the same examples, a rank with more rates would look better than it is. The
    luck of a seed is common to both halves, and stays.
    """
    if examples["learning_rate"].nunique() == 1:
        return examples
    odd = examples["example"] % 2 == 1
    return examples[odd & examples["candidate"].isin(best_rates(examples[~odd]))]


def compare(examples: pd.DataFrame, margin: float) -> list[Comparison]:
    """Comparison of each rank, at its best learning rate, with the others; `margin` is a share of the loss."""
    judged = judged_examples(examples)
    tables = losses_by_candidate(judged)
    first = judged.groupby("candidate")[["rank", "learning_rate"]].first()
    identity = {str(name): (int(rank), float(rate)) for name, rank, rate in first.itertuples()}
    losses = {name: table.to_numpy() for name, table in tables.items()}
    return compare_losses(losses, identity, label_tokens(judged), margin) if losses else []


def compare_losses(
    losses: Mapping[str, np.ndarray], identity: Mapping[str, tuple[int, float]], tokens: np.ndarray, margin: float
) -> list[Comparison]:
    """`compare` from losses (S, E) and (rank, learning rate) by candidate, and label tokens (E,)."""
    found = []
    for name, own in losses.items():
        others = {other: theirs for other, theirs in losses.items() if other != name}
        differences = {other: estimate(own - theirs, tokens) for other, theirs in others.items()}
        excesses = {other: estimate(own - (1 + margin) * theirs, tokens) for other, theirs in others.items()}
        found.append(Comparison(name, *identity[name], estimate(own, tokens), differences, excesses))
    return found
