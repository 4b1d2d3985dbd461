"""Regret: how much worse each candidate is than the best, paired by seed.

A trial's held-out loss is the sum of its losses over all label tokens divided by their number (nats a token). Trials
with one seed saw the same examples in the same order, so candidates are compared seed by seed: the regret of a
candidate with one seed is its loss minus the best candidate's with that seed, and its interval is Student's t over
seeds (paired t; Student 1908). One seed gives no interval. The best is picked by the losses that it is then compared
by, so regrets lean high: a claim that a rank is good enough is the safer for it, a claim that one is worse is not.
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats


class Interval(NamedTuple):
    """A mean and its two-sided confidence bounds; the bounds are None where fewer than two values are known."""

    mean: float
    low: float | None
    high: float | None


class Comparison(NamedTuple):
    """One candidate against the best. Losses and regrets in nats a label token."""

    candidate: str
    rank: int
    learning_rate: float
    eval_loss: Interval
    regret: Interval
    regret_by_seed: tuple[float, ...]


def t_interval(values: np.ndarray, confidence: float) -> Interval:
    """Student's t interval of the mean of independent values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, None, None)
    half = float(stats.t.ppf((1 + confidence) / 2, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))
    return Interval(mean, mean - half, mean + half)


def seed_losses(examples: pd.DataFrame) -> pd.DataFrame:
    """Held-out loss with (rank, candidate, learning_rate) as rows and seeds as columns, NaN where not finished.

    `examples` is `Study.examples()`, or part of it.
    """
    weighted = examples.assign(nats=examples["loss"] * examples["label_tokens"])
    sums = weighted.groupby(["rank", "candidate", "learning_rate", "seed"])[["nats", "label_tokens"]].sum()
    frame: pd.DataFrame = (sums["nats"] / sums["label_tokens"]).unstack("seed")
    return frame


def paired(losses: pd.DataFrame) -> pd.DataFrame:
    """The candidates that finished the most seeds, on the seeds that all of them finished.

    One that finished fewer is left out, rather than its missing seeds taken from everybody: a candidate that fails
    must not make the others' evidence smaller.
    """
    finished = losses.notna().sum(axis="columns")
    most: pd.DataFrame = losses[finished == finished.max()]
    return most.dropna(axis="columns")


def best_rates(examples: pd.DataFrame) -> list[str]:
    """For each rank the candidate with the lowest loss, among its rates that finished the most seeds. Lowest first."""
    best = []
    for _, losses in seed_losses(examples).groupby(level="rank"):
        means = paired(losses).mean(axis="columns")
        if means.notna().any():
            best.append(str(means.index.get_level_values("candidate").to_list()[int(means.argmin())]))
    return best


def compare(examples: pd.DataFrame, confidence: float) -> list[Comparison]:
    """Each rank at its best learning rate against the best of them, lowest rank first.

    With several learning rates a rank's rate is chosen on the even-numbered half of the held-out examples and judged
    on the odd-numbered one: chosen and judged on the same examples, a rank with more rates would look better than it
    is. Ranks that finished fewer seeds than others are left out (see `paired`).
    """
    rates = examples["learning_rate"].nunique()
    odd = examples["example"] % 2 == 1
    chosen = best_rates(examples[~odd] if rates > 1 else examples)
    judged = examples[odd] if rates > 1 else examples
    losses = paired(seed_losses(judged[judged["candidate"].isin(chosen)]))
    if losses.empty:
        return []
    best = losses.to_numpy()[losses.mean(axis="columns").argmin()]
    rows = []
    for (rank, candidate, learning_rate), values in zip(losses.index.to_list(), losses.to_numpy(), strict=True):
        regret = values - best
        rows.append(
            Comparison(
                candidate=candidate,
                rank=int(rank),
                learning_rate=float(learning_rate),
                eval_loss=t_interval(values, confidence),
                regret=t_interval(regret, confidence),
                regret_by_seed=tuple(float(value) for value in regret),
            )
        )
    return rows
