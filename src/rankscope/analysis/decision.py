"""Which candidates are shown to be good enough or worse: plain arrays, for one study or for many at once.

One of K candidates is the best, so at most K - 1 can be called good enough wrongly. Claims are made in steps (Holm
1979, Scandinavian Journal of Statistics 6): first at a level divided by K - 1; once some candidates are decided,
divided by the number of those still open, which are all that can still be decided wrongly.

The level depends on the number of seeds alone (`LEVELS`), so a verdict is a function of a study's files, not of how it
grew. How often a study that is judged again and again makes a false claim is in docs/results/simulation.md.

Contrasts have the shape (..., K, K): a candidate beside each other one. Their diagonal is ignored.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rankscope.analysis.comparison import Estimate, Numbers

LEVELS = {2: 0.02, 3: 0.6, 5: 0.15, 8: 0.1, 12: 0.1}
"""Planned numbers of seeds, and the level of claims from there to the next, as a share of 1 - confidence."""
GAIN_OVER_WIDTH = 3.0  # least gain for ranks to be told apart, in half-widths of the widest interval between them
MAX_REGRET_MARGINS = 2.0  # margins that the cheapest of ranks without a visible difference may lose at most


class Decision(NamedTuple):
    """What a study shows: of each candidate, (..., K), and of all, (...). All are booleans."""

    good: Numbers  # at most the margin above the best candidate, whichever that is
    worse: Numbers  # more than the margin above it
    gained: Numbers  # fine-tuning gained so much that differences could matter
    alike: Numbers  # no two candidates differ visibly, and the first is at most two margins above the best


def level_at(seeds: Numbers, confidence: float) -> Numbers:
    """One-sided level of claims with so many seeds, before it is divided among candidates."""
    index = np.searchsorted(list(LEVELS), seeds, side="right") - 1
    return (1 - confidence) * np.array(list(LEVELS.values()))[np.maximum(index, 0)]


def decide_arrays(
    differences: Estimate, excesses: Estimate, gain: Estimate | None, octaves: Numbers, confidence: float
) -> Decision:
    """Decide by each candidate's loss minus each other's, (..., K, K); the same minus what the margin allows; its gain,
    (..., K), where the margin is a share of it; and log2 of its rank, (K,)."""
    off = ~np.eye(len(octaves), dtype=bool)
    widths = np.where(off, differences.half_width(confidence), 0.0)
    good, worse = states(excesses, octaves, confidence)
    gained = np.ones(good.shape[:-1], dtype=bool)
    if gain is not None:
        best = np.where(off, differences.mean, -np.inf).max(axis=-1).argmin(axis=-1)[..., None]
        low, mean = (np.take_along_axis(of, best, -1)[..., 0] for of in (gain.interval(confidence)[0], gain.mean))
        widest = np.where(np.isfinite(widths), widths, 0.0).max(axis=(-2, -1))
        gained = ((low > 0) & (mean >= GAIN_OVER_WIDTH * widest)) | np.isinf(gain.seed_error).any(axis=-1)
    alike = (len(octaves) > 1) & np.where(off, differences.mean - widths <= 0, True).all(axis=(-2, -1))
    high = np.where(off, differences.mean + widths, -np.inf)[..., 0, :].max(axis=-1)
    margins = np.where(off, differences.mean - excesses.mean, np.inf)[..., 0, :].min(axis=-1)
    return Decision(good, worse, gained, alike & (np.maximum(high, 0.0) <= MAX_REGRET_MARGINS * margins))


def outcome_of(decision: Decision, inside: Sequence[bool]) -> tuple[str, int | None]:
    """Outcome of one study, as verdict.json has it, and the number of the candidate that it names. Candidates are in
    the order of their ranks; `inside` says which of them are within the budget."""
    numbers = [number for number, fits in enumerate(inside) if fits]
    if not numbers:
        return "nothing_in_budget", None
    if not decision.gained:
        return "not_trained_enough", None
    for number in numbers:
        if decision.good[number]:
            return "recommended", number
    if len(numbers) < len(inside) and all(decision.worse[number] for number in numbers):
        return "best_in_budget", None
    if len(numbers) == len(inside) and decision.alike:
        return "not_distinguishable", 0
    return "not_enough_evidence", None


def states(excesses: Estimate, octaves: Numbers, confidence: float) -> tuple[Numbers, Numbers]:
    """Candidates that are good enough, and those that are worse, (..., K).

    Good enough: the bound beside every other candidate that may be the best, as none does that is worse, is below zero.
    Worse: the bound beside some other candidate is above zero, since the best is no worse than that one; which one it
    is may be chosen after the fact, so the level is divided by their number once more.
    """
    count = len(octaves)
    open_ = np.ones(excesses.mean.shape[:-1], dtype=bool)
    good, worse, others = ~open_, ~open_, count - 1
    if not others:
        return good, worse
    off, level = ~np.eye(count, dtype=bool), level_at(excesses.seeds, confidence)
    drawn, degrees = pooled(excesses, octaves)
    within, beyond = [], []
    for among in range(1, count):
        within.append((upper_bound(drawn, degrees, level / among) <= 0) | ~off)
        low = lower_bound(drawn, degrees, level / (among * others))
        beyond.append(np.where(off, low, -np.inf).max(axis=-1) > 0)
    for _ in range(count):
        among = np.clip((~(good | worse)).sum(axis=-1), 1, others)[None, ..., None] - 1
        beside = np.take_along_axis(np.array(within), among[..., None], 0)[0] | worse[..., None, :]
        good = good | (beside.all(axis=-1) & ~worse)
        worse = worse | (np.take_along_axis(np.array(beyond), among, 0)[0] & ~good)
    return good, worse


def in_contention(decision: Decision) -> Numbers:
    """Candidates whose further seeds could change the outcome, (..., K): all but those that are worse, or all where no
    difference could matter yet."""
    found: Numbers = ~(decision.worse & np.asarray(decision.gained)[..., None])
    return found


def pooled(contrasts: Estimate, octaves: Numbers) -> tuple[Estimate, Numbers]:
    """Contrasts whose variance over seeds is drawn towards what all pairs say of it, and its degrees of freedom.

    Losses of neighbouring ranks move together, so the variance of a pair is taken to be proportional to the octaves
    between its ranks, plus a half for what neighbours do not share; the rate is the mean over pairs, each weighted by
    its S - 1. It counts as the root of K - 2 further pairs. Trials of K ranks leave K - 2 beside one pair, but one rank
    may be noisier than this model says (docs/results/simulation.md, the unstable world).
    """
    apart = np.abs(octaves[:, None] - octaves)
    spread = apart + 0.5
    seeds = contrasts.seeds + 0.0 * apart
    known = (apart > 0) & np.isfinite(contrasts.seed_error)
    own = np.where(known, np.square(contrasts.seed_error), 0.0) * seeds
    free = np.where(known, seeds - 1, 0.0)
    all_free, pairs = (of.sum(axis=(-2, -1), keepdims=True) for of in (free, known))
    rate = (free * own / spread).sum(axis=(-2, -1), keepdims=True) / np.maximum(all_free, 1)
    others = math.sqrt(len(octaves) - 2) * all_free / np.maximum(pairs, 1)
    degrees = np.maximum(seeds - 1, 1) + others
    variance = (others * rate * spread + free * own) / (degrees * seeds)
    return contrasts._replace(seed_error=np.where(known, np.sqrt(variance), np.inf)), degrees


def upper_bound(contrasts: Estimate, degrees: Numbers, level: Numbers) -> Numbers:
    """One-sided upper bound of the mean. Where a few examples make up much of it, its distribution is skewed and the
    bound is higher (Hall 1992, Journal of the Royal Statistical Society B 54); never lower, since the skewness is that
    of few examples, and far out Hall's is below Student's."""
    error, t = contrasts.error, contrasts.t(1 - level, degrees, contrasts.effective - 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        skewness = np.where(error > 0, np.maximum(contrasts.third, 0.0) / error**3, 0.0)
        below = t + skewness / 6
        root = np.cbrt(1 - skewness * below)
        reach = np.maximum(t, 3 * below / (root**2 + root + 1))
        found: Numbers = contrasts.mean + np.where(error > 0, error * reach, 0.0)
    return np.where(np.isinf(error), np.inf, found)


def lower_bound(contrasts: Estimate, degrees: Numbers, level: Numbers) -> Numbers:
    found: Numbers = -upper_bound(contrasts._replace(mean=-contrasts.mean, third=-contrasts.third), degrees, level)
    return found
