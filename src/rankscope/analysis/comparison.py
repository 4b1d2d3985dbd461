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
from collections.abc import Sequence
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
    """Mean of `values` (S, E) over seeds and examples, with examples weighted by `label_tokens` (E,). A mean with
    random weights is a ratio: its variance is that of its linear part, w (value - mean)."""
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


class Judged(NamedTuple):
    """Losses on which ranks are compared: of each rank's best candidate, on the same held-out examples."""

    losses: dict[str, pd.DataFrame]  # by candidate, lowest rank first: seeds as rows, examples as columns
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
    """One candidate compared with the others, each on the seeds that both finished. Losses are in nats per label
    token."""

    candidate: str
    rank: int
    learning_rate: float
    eval_loss: Estimate
    differences: dict[str, Estimate]  # this candidate's loss minus each other one's
    # This candidate's loss minus the largest that the margin allows beside each other one's: above 0 where it is worse.
    # The margin is a share of what was estimated, so its own uncertainty counts as well.
    excesses: dict[str, Estimate]
    gain: Estimate | None  # the untrained model's loss minus this candidate's

    def with_seeds(self, added: int) -> "Comparison":
        """Comparison that so many more seeds would give, if they vary as these do."""
        return self._replace(
            differences={name: found.with_seeds(found.seeds + added) for name, found in self.differences.items()},
            excesses={name: found.with_seeds(found.seeds + added) for name, found in self.excesses.items()},
            gain=self.gain.with_seeds(self.gain.seeds + added) if self.gain else None,
        )


class Bounds(NamedTuple):
    """Interval of a regret, which is never negative; None where it is unknown."""

    low: float | None
    high: float | None


def may_be_best(rows: Sequence[Comparison], confidence: float) -> set[str]:
    """Candidates that no other is shown to beat; the best of the sample is always one."""
    return {row.candidate for row in rows if all(d.interval(confidence)[0] <= 0 for d in row.differences.values())}


def bounds(rows: Sequence[Comparison], confidence: float) -> list[Bounds]:
    """Interval of each candidate's regret, from the intervals of the differences at `confidence`. Its upper end is that
    of the largest difference to any other; its lower end that of the least difference to any that may be the best, and
    zero where the candidate itself may be."""
    best = may_be_best(rows, confidence)
    found = []
    for row in rows:
        own = {name: difference.interval(confidence) for name, difference in row.differences.items()}
        high = max((high for _, high in own.values()), default=math.inf)
        low = 0.0 if row.candidate in best else max(0.0, min(own[name][0] for name in best))
        found.append(Bounds(None, None) if math.isinf(high) else Bounds(low, max(0.0, high)))
    return found


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


def label_tokens(examples: pd.DataFrame) -> np.ndarray:
    """Label tokens of each held-out example, (E,), in the order of their numbers."""
    return examples.groupby("example")["label_tokens"].first().to_numpy(dtype=np.float64)


def best_of_each_rank(examples: pd.DataFrame) -> list[str]:
    """Candidate with the lowest loss at each rank, among those that finished the most seeds, on the seeds that these
    share; lowest rank first."""
    best = []
    for _, part in examples.groupby("rank"):
        tokens, tables = label_tokens(part), losses_by_candidate(part)
        most = max(len(table) for table in tables.values())
        tables = {name: table for name, table in tables.items() if len(table) == most}
        shared = sorted(set.intersection(*(set(table.index) for table in tables.values())))
        means = {
            name: estimate(table.loc[shared or table.index].to_numpy(), tokens).mean for name, table in tables.items()
        }
        best.append(min(means, key=means.__getitem__))
    return best


def judged_examples(examples: pd.DataFrame) -> pd.DataFrame:
    """Losses of each rank's best candidate, on the examples on which ranks are compared.

    With several candidates a rank (learning rates, alphas), a rank's is chosen on the even-numbered half of the held-
    out examples and judged on the odd-numbered half: chosen and judged on the same examples, a rank with more
    candidates would look better than it is. The luck of a seed is common to both halves, and stays.
    """
    if (examples.groupby("rank")["candidate"].nunique() == 1).all():
        return examples
    odd = examples["example"] % 2 == 1
    return examples[odd & examples["candidate"].isin(best_of_each_rank(examples[~odd]))]


def judge(examples: pd.DataFrame, untrained: pd.DataFrame | None = None, full: pd.DataFrame | None = None) -> Judged:
    """Choose what is compared, from `Study.examples()`. `untrained` has the losses before training, by example, where
    the margin is a share of the gain; `full` those of full fine-tuning (seeds as rows, examples as columns). Candidates
    that share no seed with another one are left out, those with the fewest seeds first."""
    judged = judged_examples(examples)
    losses, tokens = losses_by_candidate(judged), label_tokens(judged)
    while lone := [name for name, own in losses.items() if any(not _shared(own, other) for other in losses.values())]:
        del losses[min(lone, key=lambda name: len(losses[name]))]
    first = judged.groupby("candidate")[["rank", "learning_rate"]].first()
    identity = {str(name): (int(rank), float(rate)) for name, rank, rate in first.itertuples()}
    if untrained is None:
        return Judged(losses, identity, tokens)
    order = sorted(judged["example"].unique())
    before = untrained.set_index("example")["loss"].loc[order].to_numpy()
    mean = None if full is None or full.empty else full[order].to_numpy().mean(axis=0)
    if mean is not None:
        best = min(estimate(table.to_numpy(), tokens).mean for table in losses.values())
        mean = mean if estimate(mean[None], tokens).mean < best else None
    return Judged(losses, identity, tokens, before, mean)


def compare(judged: Judged, share: float) -> list[Comparison]:
    """Comparison of each candidate with the others; `share` is the margin."""
    found = []
    for name, own in judged.losses.items():
        differences, excesses = {}, {}
        for other, (mine, theirs) in _beside(judged, name).items():
            differences[other] = estimate(mine - theirs, judged.label_tokens)
            excesses[other] = estimate(mine - judged.allowed(theirs, share), judged.label_tokens)
        losses = own.to_numpy()
        gain = None if judged.untrained is None else estimate(judged.untrained - losses, judged.label_tokens)
        identity = judged.identity[name]
        found.append(Comparison(name, *identity, estimate(losses, judged.label_tokens), differences, excesses, gain))
    return found


def least_kept(judged: Judged, name: str, confidence: float) -> float | None:
    """Share of the gain that a candidate is shown to keep, whichever other one is the best: one minus the smallest
    margin at which it is good enough. None if it is not good enough at any, and 1 without another candidate. Of full
    fine-tuning's gain, where that is larger."""
    pairs = list(_beside(judged, name).values())
    if judged.full is not None:
        pairs = [(judged.losses[name].to_numpy(), judged.full[None])]

    def good(share: float) -> bool:
        excesses = (estimate(own - judged.allowed(other, share), judged.label_tokens) for own, other in pairs)
        return all(excess.interval(confidence)[1] <= 0 for excess in excesses)

    if not good(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS if pairs else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return 1.0 - high if pairs else 1.0


_BISECTIONS = 14  # to a share of 0.0001


def _beside(judged: Judged, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Losses of a candidate and of each other one, on the seeds that both finished, (S, E)."""
    own = judged.losses[name]
    seeds = {other: _shared(own, theirs) for other, theirs in judged.losses.items() if other != name}
    return {other: (_of_seeds(own, both), _of_seeds(judged.losses[other], both)) for other, both in seeds.items()}


def _of_seeds(losses: pd.DataFrame, seeds: list[int]) -> np.ndarray:
    return losses.to_numpy() if len(seeds) == len(losses) else losses.loc[seeds].to_numpy()


def _shared(one: pd.DataFrame, other: pd.DataFrame) -> list[int]:
    """Seeds that two candidates both finished."""
    return sorted(set(one.index) & set(other.index))
