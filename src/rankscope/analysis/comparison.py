"""Regret of each candidate with its interval, paired by seed and by held-out example.

A trial's held-out loss is the sum of its losses over all label tokens divided by their number (nats a token). Trials
with one seed saw the same examples in the same order, and all trials are judged on the same held-out examples, so two
candidates are compared pair by pair:

    loss[s, e] - other loss[s, e] = difference + seed s + example e + what is left

with seeds and examples both drawn at random (crossed random effects). Their variances come from the analysis of
variance (Searle, Casella and McCulloch 1992, chapter 4). The interval's t is the mean of those of the two degrees of
freedom, each weighted by its share of the variance (Cochran and Cox 1957, section 4.14). A percentile bootstrap would
cover far less than its nominal level with two or three seeds (docs/method.md).

The regret of a candidate is its loss minus the lowest loss of all candidates. The truly lowest is unknown, so a claim
on a regret must hold whichever it is (multiple comparisons with the best: Edwards and Hsu 1983, JASA 78). Verdicts are
drawn by `rankscope.analysis.decision`; the intervals here are those that are shown.
"""

import math
from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

Numbers = Any  # a float, or an array of floats
Ends = tuple[float | None, float | None]  # of an interval; None where it is unknown


class Estimate(NamedTuple):
    """Mean over seeds and held-out examples with its standard errors, in nats per label token; numbers, or arrays of
    one shape for many estimates."""

    mean: Numbers
    seed_error: Numbers  # of seeds and the residual, with seeds - 1 degrees of freedom; infinite with one seed
    example_error: Numbers  # of examples, alike for every seed, with examples - 1 degrees of freedom
    third: Numbers  # third central moment of the mean over examples: how skewed it is
    seeds: Numbers
    effective: Numbers  # number of examples of equal weight that would tell as much: (sum w)^2 / sum w^2 (Kish 1965)
    examples: int

    def half_width(self, confidence: float) -> Numbers:
        """Half of the two-sided interval; infinite with one seed, which shows no variation between seeds."""
        return self.t((1 + confidence) / 2, self.seeds - 1, self.examples - 1) * self.error

    @property
    def error(self) -> Numbers:
        found: Numbers = np.hypot(self.seed_error, self.example_error)
        return found

    def t(self, level: Numbers, of_seeds: Numbers, of_examples: Numbers) -> Numbers:
        """One-sided quantile of Student's t: the mean of those of the seeds' and the examples' degrees of freedom, by
        their shares of the variance."""
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(np.isfinite(self.seed_error), np.square(self.seed_error / self.error), 1.0)
        share = np.where(self.error == 0, 1.0, share)
        found: Numbers = share * student(of_seeds, level) + (1 - share) * student(of_examples, level)
        return found

    def interval(self, confidence: float) -> tuple[Numbers, Numbers]:
        half = self.half_width(confidence)
        return self.mean - half, self.mean + half

    def ends(self, confidence: float) -> Ends:
        """Interval of one estimate."""
        return finite(*self.interval(confidence))

    def with_seeds(self, seeds: Numbers) -> "Estimate":
        """Estimate that so many seeds would give, if they vary as these do."""
        return self._replace(seed_error=self.seed_error * np.sqrt(self.seeds / seeds), seeds=seeds)


def finite(low: float, high: float) -> Ends:
    return (float(low), float(high)) if math.isfinite(high) else (None, None)


def with_ends(name: str, value: float, ends: Ends) -> dict[str, float | None]:
    """A value and its interval, as verdict.json has them: `gain gain_low gain_high`."""
    return {name: float(value), f"{name}_low": ends[0], f"{name}_high": ends[1]}


def student(degrees: Numbers, level: Numbers) -> Numbers:
    """Quantile of Student's t, with one degree of freedom at least; of many equal values it is found once."""
    pairs = np.maximum(degrees, 1) + 1j * np.asarray(level)
    asked, where = np.unique(pairs, return_inverse=True)
    found: Numbers = special.stdtrit(asked.real, asked.imag)[where].reshape(pairs.shape)
    return found


class Mean(NamedTuple):
    """Mean of independent values, and the ends of its interval; None where it is unknown."""

    value: float
    low: float | None
    high: float | None

    def sign(self) -> int | None:
        """+1 or -1 where the whole interval has that sign, else None."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return None
        return 1 if self.value > 0 else -1


def mean_of(values: np.ndarray, confidence: float) -> Mean:
    """Mean of values (N,) with Student's interval."""
    mean, count = float(values.mean()), len(values)
    if count < 2:
        return Mean(mean, None, None)
    half = float(special.stdtrit(count - 1, (1 + confidence) / 2) * values.std(ddof=1)) / math.sqrt(count)
    return Mean(mean, mean - half, mean + half)


def estimate(values: np.ndarray, label_tokens: np.ndarray) -> Estimate:
    """Mean of `values` (..., S, E) over seeds and examples, with examples weighted by `label_tokens` (..., E). A mean
    with random weights is a ratio: its variance is that of its linear part, w (value - mean)."""
    seeds, examples = values.shape[-2:]
    weights = label_tokens / label_tokens.mean(axis=-1, keepdims=True)
    mean, effective = (weights[..., None, :] * values).mean(axis=(-2, -1)), effective_number(weights)
    if seeds < 2 or examples < 2:
        none = np.zeros_like(mean)
        return Estimate(mean, none + np.inf, none, none, seeds, effective, examples)
    parts = weights[..., None, :] * (values - mean[..., None, None])
    by_seed, by_example = parts.mean(axis=-1), parts.mean(axis=-2)
    parts -= by_seed[..., None] * weights[..., None, :]  # a seed's effect reaches a part as its weight
    parts -= by_example[..., None, :]
    return estimate_of(mean, by_seed, by_example, np.square(parts).sum(axis=(-2, -1)), effective)


def effective_number(weights: np.ndarray) -> Numbers:
    """Number of equal weights that would tell as much as these, (..., E), whose mean is 1."""
    return weights.shape[-1] / np.square(weights).mean(axis=-1)


def estimate_of(
    mean: Numbers, by_seed: np.ndarray, by_example: np.ndarray, left: Numbers, effective: Numbers
) -> Estimate:
    """Estimate from means of the parts over examples (..., S) and over seeds (..., E), and the sum of squares of what
    both leave of them."""
    seeds, examples = by_seed.shape[-1], by_example.shape[-1]
    left_square = left / ((seeds - 1) * (examples - 1))
    centred = by_example - by_example.mean(axis=-1, keepdims=True)
    squares = np.square(centred)
    of_examples = squares.sum(axis=-1) / (examples * (examples - 1)) - left_square / (seeds * examples)
    third = (squares * centred).sum(axis=-1) / (examples * (examples - 1) * max(1, examples - 2))
    seed_error = np.sqrt(by_seed.var(axis=-1, ddof=1) / seeds)
    return Estimate(mean, seed_error, np.sqrt(np.maximum(0.0, of_examples)), third, seeds, effective, examples)


def stacked(estimates: Sequence[Estimate], *shape: int) -> Estimate:
    """Estimates on the same examples as arrays of this shape."""
    *fields, examples = zip(*estimates, strict=True)
    return Estimate._make([*(np.array(field).reshape(shape) for field in fields), examples[0]])


class Judged(NamedTuple):
    """Losses on which ranks are compared: of each rank's best candidate, on the same held-out examples."""

    losses: dict[str, pd.DataFrame]  # by candidate, lowest rank first: seeds as rows, examples as columns
    pairs: list[tuple[np.ndarray, np.ndarray]]  # of each candidate and each one, on the seeds that both have: (S, E)
    identity: dict[str, tuple[int, float]]  # rank and learning rate
    label_tokens: np.ndarray  # (E,)
    untrained: np.ndarray | None = None  # (E,), losses before training; None where the margin is a share of the loss
    full: np.ndarray | None = None  # (E,), means over seeds of full fine-tuning, where it gains more than any candidate

    def allowed(self, losses: np.ndarray, share: float) -> np.ndarray:
        """Largest losses that are good enough beside those of another candidate, (S, E). Of the gain: loss + share
        (untrained - reference), where the reference is the other's loss itself, or that of full fine-tuning. Of the
        loss: (1 + share) loss."""
        scale = losses if self.untrained is None else self.untrained - (losses if self.full is None else self.full)
        found: np.ndarray = losses + share * scale
        return found


class Comparison(NamedTuple):
    """Candidates compared with each other, lowest rank first, in nats per label token. Contrasts are (K, K): of each
    candidate beside each other one, on the seeds that both finished; their diagonals mean nothing."""

    candidates: list[str]
    ranks: list[int]
    learning_rates: list[float]
    eval_loss: Estimate  # (K,), as the gain on each candidate's own seeds
    differences: Estimate  # a candidate's loss minus another's
    # A candidate's loss minus the largest that the margin allows beside another's: above 0 where it is worse. The
    # margin is a share of what was estimated, so its own uncertainty counts as well.
    excesses: Estimate
    gain: Estimate | None  # (K,), the untrained model's loss minus a candidate's

    @property
    def regrets(self) -> np.ndarray:
        """Largest mean difference of each candidate to any other, (K,); negative for the best, 0 for one alone."""
        others = np.where(np.eye(len(self.ranks), dtype=bool), -math.inf, self.differences.mean)
        return others.max(axis=1) if len(self.ranks) > 1 else np.zeros(1)

    @property
    def best(self) -> int:
        """Number of the candidate with the lowest held-out loss, on the seeds that it shares with each other one."""
        return int(self.regrets.argmin())

    def with_seeds(self, seeds: int, of: np.ndarray) -> "Comparison":
        """Comparison that so many seeds of some candidates, `of` (K,), would give, if they vary as these do."""

        def more(found: Estimate, which: np.ndarray) -> Estimate:
            return found.with_seeds(np.where(which, np.maximum(found.seeds, seeds), found.seeds))

        pairs = of[:, None] & of
        gain = more(self.gain, of) if self.gain else None
        return self._replace(differences=more(self.differences, pairs), excesses=more(self.excesses, pairs), gain=gain)


def bounds(found: Comparison, confidence: float) -> list[Ends]:
    """Interval of each candidate's regret, which is never negative, from the intervals of the differences at
    `confidence`. Its upper end is that of the largest difference to any other; its lower end that of the least
    difference to any that may be the best, and zero where no other is shown to beat the candidate."""
    others = ~np.eye(len(found.ranks), dtype=bool)
    lows, highs = found.differences.interval(confidence)
    best = np.where(others, lows, -math.inf).max(axis=1) <= 0
    low = np.where(best, 0.0, np.where(others & best, lows, math.inf).min(axis=1))
    high = np.where(others, highs, -math.inf).max(axis=1)
    return [
        (max(0.0, float(one)), max(0.0, float(other))) if math.isfinite(other) else (None, None)
        for one, other in zip(low, high, strict=True)
    ]


def excesses(judged: Judged, share: float) -> Estimate:
    """Excesses of each candidate over a margin of `share` beside each other one, (K, K); at 0 differences."""
    found = [estimate(own - judged.allowed(other, share), judged.label_tokens) for own, other in judged.pairs]
    return stacked(found, len(judged.losses), len(judged.losses))


class Pair(NamedTuple):
    """Two candidates on the seeds and the examples that both have."""

    own: float  # mean losses, in nats per label token
    other: float
    difference: Estimate


def paired(own: pd.DataFrame, other: pd.DataFrame, tokens: "pd.Series[float]") -> Pair | None:
    """Losses of two candidates (seeds as rows, examples as columns) held against each other; None where they share
    nothing. `tokens` are the label tokens by example."""
    seeds, examples = own.index.intersection(other.index), own.columns.intersection(other.columns)
    if seeds.empty or examples.empty:
        return None
    weights = tokens[examples].to_numpy()
    first, second = (table.loc[seeds, examples].to_numpy() for table in (own, other))
    own_mean, other_mean = (float(np.average(one.mean(axis=0), weights=weights)) for one in (first, second))
    return Pair(own_mean, other_mean, estimate(first - second, weights))


def without_diverged(examples: pd.DataFrame, results: pd.DataFrame | None) -> pd.DataFrame:
    """Examples of candidates none of whose seeds diverged: a mean over the seeds that survived would flatter them."""
    if results is None or results.empty or examples.empty:
        return examples
    return examples[~examples["candidate"].isin(results.loc[results["status"] == "diverged", "candidate"])]


def losses_by_candidate(examples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Held-out losses of each candidate, lowest rank first: its finished seeds as rows, examples as columns. `examples`
    is `Study.examples()`, or part of it."""
    return {
        str(name): part.pivot(index="seed", columns="example", values="loss").sort_index()
        for (_, _, name), part in examples.groupby(["rank", "learning_rate", "candidate"])
    }


def label_tokens(examples: pd.DataFrame) -> "pd.Series[float]":
    """Label tokens by held-out example."""
    return examples.groupby("example")["label_tokens"].first().astype(float)


def best_of_each_rank(examples: pd.DataFrame) -> list[str]:
    """Each rank's candidate with the lowest loss: of those with the most seeds, on the seeds that they share."""
    best = []
    for _, part in examples.groupby("rank"):
        tokens, tables = label_tokens(part).to_numpy(), losses_by_candidate(part)
        most = max(len(table) for table in tables.values())
        tables = {name: table for name, table in tables.items() if len(table) == most}
        shared = sorted(set.intersection(*(set(table.index) for table in tables.values())))
        means = {
            name: estimate(table.loc[shared or table.index].to_numpy(), tokens).mean for name, table in tables.items()
        }
        best.append(min(means, key=means.__getitem__))
    return best


def judged_examples(examples: pd.DataFrame, results: pd.DataFrame | None = None) -> pd.DataFrame:
    """Losses of each rank's best candidate without a diverged seed, on the examples on which ranks are compared.

    With several candidates a rank (learning rates, alphas), a rank's is chosen on the even-numbered half of the held-
    out examples and judged on the odd-numbered half: chosen and judged on the same examples, a rank with more
    candidates would look better than it is. The luck of a seed is common to both halves, and stays.
    """
    examples = without_diverged(examples, results)
    if examples.empty or (examples.groupby("rank")["candidate"].nunique() == 1).all():
        return examples
    odd = examples["example"] % 2 == 1
    return examples[odd & examples["candidate"].isin(best_of_each_rank(examples[~odd]))]


def judge(examples: pd.DataFrame, untrained: pd.DataFrame | None = None, full: pd.DataFrame | None = None) -> Judged:
    """Choose what is compared, from `Study.examples()`. `untrained` has the losses before training, by example, where
    the margin is a share of the gain; `full` those of full fine-tuning (seeds as rows, examples as columns). Candidates
    that share no seed with another one are left out, those with the fewest seeds first."""
    judged = judged_examples(examples)
    losses, tokens = losses_by_candidate(judged), label_tokens(judged).to_numpy()
    while lone := [
        name for name, own in losses.items() if any(own.index.intersection(one.index).empty for one in losses.values())
    ]:
        del losses[min(lone, key=lambda name: len(losses[name]))]
    pairs = []
    for own, other in product(losses.values(), repeat=2):
        seeds = own.index.intersection(other.index)
        pairs.append((own.loc[seeds].to_numpy(), other.loc[seeds].to_numpy()))
    first = judged.groupby("candidate")[["rank", "learning_rate"]].first()
    identity = {str(name): (int(rank), float(rate)) for name, rank, rate in first.itertuples()}
    if untrained is None or not losses:
        return Judged(losses, pairs, identity, tokens)
    order = sorted(judged["example"].unique())
    before = untrained.set_index("example")["loss"].loc[order].to_numpy()
    mean = None if full is None else full[order].to_numpy().mean(axis=0)
    if mean is not None:
        best = min(estimate(table.to_numpy(), tokens).mean for table in losses.values())
        mean = mean if estimate(mean[None], tokens).mean < best else None
    return Judged(losses, pairs, identity, tokens, before, mean)


def compare(judged: Judged, share: float) -> Comparison:
    """Comparison of the candidates with each other; `share` is the margin."""
    tables, tokens = [table.to_numpy() for table in judged.losses.values()], judged.label_tokens
    ranks, rates = zip(*(judged.identity[name] for name in judged.losses), strict=True)
    losses = stacked([estimate(own, tokens) for own in tables], len(tables))
    before = judged.untrained
    gain = None if before is None else stacked([estimate(before - own, tokens) for own in tables], len(tables))
    differences = excesses(judged, 0.0)
    return Comparison(list(judged.losses), list(ranks), list(rates), losses, differences, excesses(judged, share), gain)
