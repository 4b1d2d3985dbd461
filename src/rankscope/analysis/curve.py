"""The rank curve: losses of truncated adapters, and their error against ranks that were trained.

On its training data, the best adapter of a rank is at least as good as any adapter truncated to that rank, so the
curve is an upper bound there. How much lower training gets shows at ranks that were trained too. Both have the same
seeds and held-out examples, and are compared in pairs, as ranks are (`rankscope.analysis.comparison`).
"""

import math
from typing import NamedTuple

import numpy as np
import pandas as pd

from rankscope.analysis.comparison import Estimate, estimate, judged_examples, label_tokens, without_diverged
from rankscope.study.evidence import Evidence

CURVE_COLUMNS = ["kind", "recover_steps", "rank", "seeds", "eval_loss", "eval_loss_low", "eval_loss_high"]
ERROR_COLUMNS = ["recover_steps", "rank", "seeds", "cut", "trained", "error", "error_low", "error_high"]
ERROR_COLUMNS += ["error_sd", "error_share", "within"]


def loss_curve(evidence: Evidence) -> pd.DataFrame:
    """One row per point: `kind recover_steps rank seeds eval_loss eval_loss_low eval_loss_high`. `kind` is `trained`,
    `cut` or `recovered`. Losses are means over seeds, in nats per label token; the interval covers the randomness of
    seeds, at the verdict's confidence (NaN with one seed)."""
    trained, truncated, tokens = _tables(evidence)
    points = [("trained", 0, rank, table) for rank, table in trained.items()]
    points += [("recovered" if steps else "cut", steps, rank, table) for (steps, rank), table in truncated.items()]
    rows = []
    for kind, steps, rank, table in points:
        found = estimate(table.to_numpy(), tokens)
        # All points have the same examples, whose randomness does not count between them.
        low, high = found._replace(example_error=0.0).interval(evidence.spec.verdict.confidence)
        rows.append([kind, steps, rank, found.seeds, found.mean, _finite(low), _finite(high)])
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def curve_errors(evidence: Evidence) -> pd.DataFrame:
    """One row per rank that was truncated to and trained, without the largest: `recover_steps rank seeds cut trained
    error error_low error_high error_sd error_share within`.

    `error` is the loss of the truncated adapter minus that of the trained one, in nats per label token, over the
    seeds that both have, with its interval at the verdict's confidence and its standard deviation between seeds (both
    NaN with one); `error_share` is its share of the trained loss. `within` is whether it lies within the verdict's
    margin on either side: True or False where the interval shows it, else None; with one seed by the error itself.
    """
    trained, truncated, tokens = _tables(evidence)
    verdict, top = evidence.spec.verdict, max(evidence.spec.ranks)
    rows = []
    for (steps, rank), table in truncated.items():
        seeds = table.index.intersection(trained[rank].index) if rank in trained else table.index[:0]
        if seeds.empty or rank == top:
            continue
        own, other = table.loc[seeds].to_numpy(), trained[rank].loc[seeds].to_numpy()
        found, level = estimate(own - other, tokens), estimate(other, tokens).mean
        low, high = found.interval(verdict.confidence)
        by_seed = np.average(own - other, axis=1, weights=tokens)
        rows.append(
            {
                "recover_steps": steps,
                "rank": rank,
                "seeds": len(seeds),
                "cut": level + found.mean,
                "trained": level,
                "error": found.mean,
                "error_low": _finite(low),
                "error_high": _finite(high),
                "error_sd": float(by_seed.std(ddof=1)) if len(seeds) > 1 else math.nan,
                "error_share": found.mean / level,
                "within": _within(found, level * verdict.loss_margin, verdict.confidence),
            }
        )
    return pd.DataFrame(rows, columns=ERROR_COLUMNS)


def lowest_rank_within(points: pd.DataFrame, margin: float) -> int | None:
    """Lowest rank with a mean loss of at most 1 + `margin` times the highest rank's, among points of `loss_curve`; None
    without points."""
    losses = {int(rank): float(loss) for rank, loss in zip(points["rank"], points["eval_loss"], strict=True)}
    return min((rank for rank in losses if losses[rank] <= losses[max(losses)] * (1 + margin)), default=None)


def _within(error: Estimate, margin: float, confidence: float) -> bool | None:
    low, high = error.interval(confidence)
    if math.isinf(high):
        low = high = error.mean
    if -margin <= low and high <= margin:
        return True
    return False if low > margin or high < -margin else None


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


class _Tables(NamedTuple):
    """Losses on the examples on which ranks are compared: seeds as rows, examples as columns."""

    trained: dict[int, pd.DataFrame]  # by rank
    truncated: dict[tuple[int, int], pd.DataFrame]  # by recovery steps and rank
    label_tokens: np.ndarray  # (E,)


def _tables(evidence: Evidence) -> _Tables:
    examples = without_diverged(evidence.examples, evidence.results)
    if examples.empty:
        return _Tables({}, {}, np.ones(0))
    judged = judged_examples(examples)
    trained = {int(str(rank)): _table(part) for rank, part in judged.groupby("rank")}
    tokens = label_tokens(judged)
    if evidence.cuts is None or evidence.cuts.empty:
        return _Tables(trained, {}, tokens)
    same = evidence.cuts["candidate"].isin(judged["candidate"]) & evidence.cuts["example"].isin(judged["example"])
    groups = evidence.cuts[same].groupby(["recover_steps", "cut_rank"])
    truncated = {(int(str(steps)), int(str(rank))): _table(part) for (steps, rank), part in groups}
    return _Tables(trained, truncated, tokens)


def _table(part: pd.DataFrame) -> pd.DataFrame:
    return part.pivot(index="seed", columns="example", values="loss")
