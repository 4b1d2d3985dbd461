"""How the best learning rate moves with rank.

Near its best rate a rank's loss is a parabola in the logarithm of the rate, with one curvature for all ranks:

    loss[rank, seed, rate] = floor[rank, seed] + curvature[seed] / 2 · (log rate − log best[rank, seed])²

It is fitted by least squares for each seed alone, to each rank's best rate and the two beside it, so that the seeds'
optima are as independent as the seeds, and their spread has every source of error in it; the intervals are Student's.
The slope of log best over log rank says how the best rate moves: 0 is the same for all ranks, −1 falls as 1/rank.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rankscope.analysis.comparison import mean_of, with_ends

WINDOW = 3  # rates of a parabola: the best one, and those beside it


class Curve(NamedTuple):
    """Held-out losses of a rank at its rates, from low to high."""

    rates: np.ndarray  # (L,)
    losses: np.ndarray  # (L, S), by seed, in nats

    @property
    def best(self) -> int:
        return int(self.losses.mean(axis=1).argmin())

    @property
    def edge(self) -> str | None:
        return {0: "lowest", len(self.rates) - 1: "highest"}.get(self.best)


def judge_rates(results: pd.DataFrame, confidence: float) -> dict[str, Any] | None:
    """Content of `rates` in verdict.json; None with fewer than three rates.

    `ranks` has a row for each rank: `rank tried optimum low high edge`: the rate of the lowest mean loss among those
    tried, the parabola's with its interval, and `lowest` or `highest` where the one tried is at that end. Such an
    optimum is not between rates that were tried: it is None, and not in `exponent`, the power of rank by which the best
    rate changes, with `exponent_low` and `exponent_high`. `same` and `inverse` say whether exponents of 0 and −1 are
    within the interval; None without one. `curved` is False where the losses of a seed have no minimum over the rates.
    """
    curves = {rank: curve for rank, curve in _curves(results).items() if len(curve.rates) >= WINDOW}
    if not curves:
        return None
    optima, rows, inside = locate(list(curves.values())), [], {}
    for number, (rank, curve) in enumerate(curves.items()):
        row: dict[str, Any] = {"rank": rank, "tried": float(curve.rates[curve.best]), "edge": curve.edge}
        row |= dict.fromkeys(("optimum", "low", "high"))
        if optima is not None and curve.edge is None:
            inside[math.log(rank)] = optima[number]
            ends = mean_of(optima[number], confidence)
            row |= {"optimum": _rate(ends.value), "low": _rate(ends.low), "high": _rate(ends.high)}
        rows.append(row)
    verdict: dict[str, Any] = {"ranks": rows, "seeds": next(iter(curves.values())).losses.shape[1]}
    verdict |= {"curved": optima is not None, **dict.fromkeys(("exponent", "exponent_low", "exponent_high"))}
    verdict |= dict.fromkeys(("same", "inverse"))
    if len(inside) > 1:
        ranks, best = np.array(list(inside)), np.array(list(inside.values()))
        away = ranks - ranks.mean()
        slope = mean_of(away @ best / (away @ away), confidence)
        verdict |= with_ends("exponent", slope.value, (slope.low, slope.high))
        if slope.low is not None and slope.high is not None:
            verdict |= {"same": slope.low <= 0 <= slope.high, "inverse": slope.low <= -1 <= slope.high}
    return verdict


def _rate(log_rate: float | None) -> float | None:
    """A rate from its logarithm; None where it is too large or too small for a number."""
    return math.exp(log_rate) if log_rate is not None and abs(log_rate) < 600 else None


def _curves(results: pd.DataFrame) -> dict[int, Curve]:
    """Curves by rank, at the alpha of its lowest mean loss, on the seeds of all candidates. A rate at which a
    seed did not finish is left out: a mean over the others would flatter it."""
    keys, found = ["lora_alpha", "learning_rate"], dict[int, Curve]()
    seeds = sorted(set.intersection(*results.groupby(["rank", *keys])["seed"].agg(set)))
    done = results[results["status"] == "done"]
    for rank in sorted(map(int, done["rank"].unique())):
        wide = done[done["rank"] == rank].pivot_table(index=keys, columns="seed", values="eval_loss")
        wide = wide.reindex(columns=seeds).dropna()
        if len(wide):
            alpha = wide.mean(axis=1).groupby("lora_alpha").min().idxmin()
            losses = wide.xs(alpha, level="lora_alpha")
            found[rank] = Curve(losses.index.to_numpy(dtype=float), losses.to_numpy())
    return found


def locate(curves: Sequence[Curve]) -> np.ndarray | None:
    """Logarithms of the best rates by rank and seed, (ranks, S); None where a seed's curvature is not positive."""
    parts = []
    for curve in curves:
        first = min(max(curve.best - 1, 0), len(curve.rates) - WINDOW)
        logs, losses = (side[first : first + WINDOW] for side in (np.log(curve.rates), curve.losses))
        centred = logs - logs.mean()
        line = np.stack([np.ones(WINDOW), centred])
        bent = centred**2 - line.T @ np.linalg.lstsq(line.T, centred**2, rcond=None)[0]  # what no line has of it
        parts.append((logs.mean(), centred, bent, losses))
    curvature = sum(bent @ losses for *_, bent, losses in parts) / sum(bent @ bent for *_, bent, _ in parts)
    if not (curvature > 0).all():
        return None
    slopes = [
        centred @ (losses - np.outer(centred**2, curvature)) / (centred @ centred) for _, centred, _, losses in parts
    ]
    return np.array([mean - slope / (2 * curvature) for (mean, *_), slope in zip(parts, slopes, strict=True)])
