"""The rank curve: losses of truncated adapters, and their error against ranks that were trained.

On its training data, the best adapter of a rank is at least as good as any adapter truncated to that rank, so the
curve is an upper bound there. How much lower training gets shows at ranks that were trained too. Both have the same
seeds and held-out examples, and are compared in pairs, as ranks are (`rankscope.analysis.comparison`).
"""

import math
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.comparison import estimate, judged_examples, label_tokens, paired
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
        found = estimate(table.to_numpy(), tokens.to_numpy())
        # All points have the same examples, whose randomness does not count between them.
        ends = found._replace(example_error=0.0).ends(evidence.spec.verdict.confidence)
        rows.append([kind, steps, rank, found.seeds, found.mean, *ends])
    return _with_ends(pd.DataFrame(rows, columns=CURVE_COLUMNS))


def curve_errors(evidence: Evidence) -> pd.DataFrame:
    """One row per rank that was truncated to and trained, without the largest: `recover_steps rank seeds cut trained
    error error_low error_high error_sd error_share within`.

    `error` is the loss of the truncated adapter minus that of the trained one, in nats per label token, over the
    seeds that both have, with its interval at the verdict's confidence and its standard deviation between seeds (both
    NaN with one); `error_share` is its share of the trained loss. `within` is whether it lies within the verdict's
    margin on either side: True or False where the interval shows it, else None; with one seed by the error itself.
    """
    trained, truncated, tokens = _tables(evidence)
    verdict, rows, top = evidence.spec.verdict, [], max(evidence.spec.ranks)
    for (steps, rank), table in truncated.items():
        found = paired(table, trained[rank], tokens) if rank in trained and rank != top else None
        if found is None:
            continue
        error, ends = float(found.difference.mean), found.difference.ends(verdict.confidence)
        sd = found.difference.with_seeds(1).seed_error
        (low, high), margin = (error if end is None else end for end in ends), found.other * verdict.loss_margin
        inside, outside = -margin <= low and high <= margin, low > margin or high < -margin
        within = True if inside else False if outside else None
        losses, spread = [found.other + error, found.other, error], sd if math.isfinite(sd) else math.nan
        rows.append([steps, rank, found.difference.seeds, *losses, *ends, spread, error / found.other, within])
    return _with_ends(pd.DataFrame(rows, columns=ERROR_COLUMNS))


def _with_ends(table: pd.DataFrame) -> pd.DataFrame:
    """Intervals as numbers, NaN where they are unknown."""
    return table.astype({name: float for name in table if str(name).endswith(("_low", "_high"))})


def lowest_rank_within(points: pd.DataFrame, margin: float) -> int | None:
    """Lowest rank with a mean loss of at most 1 + `margin` times the highest rank's, among points of `loss_curve`; None
    without points."""
    losses = {int(rank): float(loss) for rank, loss in zip(points["rank"], points["eval_loss"], strict=True)}
    return min((rank for rank in losses if losses[rank] <= losses[max(losses)] * (1 + margin)), default=None)


class _Tables(NamedTuple):
    """Losses on the examples on which ranks are compared: seeds as rows, examples as columns."""

    trained: dict[int, pd.DataFrame]  # by rank
    truncated: dict[tuple[int, int], pd.DataFrame]  # by recovery steps and rank
    label_tokens: "pd.Series[float]"  # by example


def _tables(evidence: Evidence) -> _Tables:
    judged = judged_examples(evidence.examples, evidence.results)
    if judged.empty:
        return _Tables({}, {}, pd.Series(dtype=float))
    cuts = evidence.cuts
    same = cuts["candidate"].isin(judged["candidate"]) & cuts["example"].isin(judged["example"])
    truncated = _pivoted(cuts[same], ["recover_steps", "cut_rank"])
    return _Tables(_pivoted(judged, "rank"), truncated, label_tokens(judged))


def _pivoted(examples: pd.DataFrame, by: str | list[str]) -> dict[Any, pd.DataFrame]:
    return {key: part.pivot(index="seed", columns="example", values="loss") for key, part in examples.groupby(by)}
