"""What runs show of rank: differences of held-out loss over seeds, by the rules of the verdict.

Other tools keep no losses of single rows, so the rows count as given: intervals are over seeds alone, and what is shown
is shown of these rows. What is open is open whatever the rows.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from rankscope.analysis.comparison import Comparison, Estimate, bounds, student
from rankscope.analysis.decision import level_at
from rankscope.analysis.outcome import PLANNED, decide
from rankscope.judge.confounders import SETTINGS
from rankscope.spec.models import LOSS_MARGIN, VerdictSpec

CONFIDENCE = 0.95
_VERDICT = ("outcome", "rank", "undetermined", "more_seeds")


def differences(runs: pd.DataFrame) -> list[dict[str, Any]]:
    """`difference` of every group of comparable runs, with `at`: its settings that are not those of all runs."""
    found, ended = [], runs[~runs["unfinished"]]
    for part in comparable(runs):
        settings = (*SETTINGS, "scaling" if part["alpha"].nunique(dropna=False) > 1 else "alpha")
        own = [name for name in settings if part[name].nunique(dropna=False) == 1 < ended[name].nunique(dropna=False)]
        if shown := difference(part):
            values = part[own].iloc[0].to_dict()
            found.append(shown | {"at": {name: None if pd.isna(one) else one for name, one in values.items()}})
    return found


def comparable(runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Runs of several ranks with all `SETTINGS` in common, and alpha or alpha/rank, by whichever splits them less.
    Left out are those whose rank diverged at their rate, that have not ended, and whose seed is unknown or not theirs
    alone; where no seed is known, one run a rank stays, as of one seed."""
    lost = runs.groupby(["rank", "learning_rate"], dropna=False)["diverged"].transform("any")
    usable = runs[~lost & ~runs["unfinished"] & runs["eval_loss"].notna()]
    for _, alike in usable.groupby(list(SETTINGS), dropna=False, sort=False):
        parts = [[part for _, part in alike.groupby(by, dropna=False)] for by in ("alpha", "scaling")]
        for part in min(parts, key=len):
            left = part if part["seed"].isna().all() else part.dropna(subset="seed")
            left = left.fillna({"seed": -1})[~left.duplicated(["rank", "seed"], keep=False)]
            if left["rank"].nunique() > 1:
                yield left


def difference(runs: pd.DataFrame) -> dict[str, Any]:
    """What comparable runs show, nothing where no two ranks share a seed: `runs ranks seeds`, `gap` (between the
    highest and the lowest mean), `coarse` (losses have too few digits to show how seeds vary), `rows` (`rank mean`;
    from two seeds on `regret low high within_margin`), and of the verdict `margin margin_of` and `_VERDICT`."""
    table = runs.pivot(index="rank", columns="seed", values="eval_loss").sort_index()
    several = table[table.count(axis=1) > 1]
    while len(several) > 2 and several.dropna(axis=1).shape[1] < 2:
        several = several.drop(index=several.count(axis=1).idxmin())
    table = (several if len(several) > 1 and several.dropna(axis=1).shape[1] > 1 else table).dropna(axis=1)
    if table.empty:
        return {}
    ranks, losses = [int(rank) for rank in table.index], table.to_numpy()
    used = runs[runs["rank"].isin(ranks) & runs["seed"].isin(table.columns)]
    known = used["untrained_loss"].notna().all()
    found: dict[str, Any] = dict.fromkeys(_VERDICT) | {
        "runs": list(used["run"]), "ranks": ranks, "seeds": table.columns.astype(int).tolist(), "coarse": False,
        "rows": [{"rank": rank, "mean": float(own.mean())} for rank, own in zip(ranks, losses, strict=True)],
        "gap": float(np.ptp(losses.mean(axis=1))),
        "margin": VerdictSpec().margin if known else LOSS_MARGIN, "margin_of": "gain" if known else "loss",
    }  # fmt: skip
    if losses.shape[1] < 2:
        return found
    gained = float(used["untrained_loss"].mean()) - losses if known else losses  # what the margin is a share of
    allowed, gain = losses + found["margin"] * gained, _over_seeds(gained) if known else None
    apart, excesses = (_over_seeds(losses[:, None] - other[None]) for other in (losses, allowed))
    compared = Comparison([*map(str, ranks)], ranks, [0.0] * len(ranks), _over_seeds(losses), apart, excesses, gain)
    errors = compared.differences.seed_error[~np.eye(len(ranks), dtype=bool)]
    decimals = max(len(repr(float(loss)).partition(".")[2]) for loss in losses.flat)
    if (errors * math.sqrt(losses.shape[1]) < max(10.0**-decimals, 1e-9)).any():
        return found | {"coarse": True}
    fields, states = decide(compared, CONFIDENCE)
    for row, regret, (low, high) in zip(found["rows"], compared.regrets, bounds(compared, CONFIDENCE), strict=True):
        row |= {"regret": max(0.0, float(regret)), "low": low, "high": high}
        row["within_margin"] = None if (state := states[str(row["rank"])]) is None else bool(state)
    return found | {name: fields.get(name) for name in _VERDICT}


def _over_seeds(values: np.ndarray) -> Estimate:
    """Estimate from values by seed (..., S), with the held-out rows as given."""
    error = values.std(axis=-1, ddof=1) / math.sqrt(values.shape[-1])
    return Estimate(values.mean(axis=-1), error, 0 * error, 0 * error, np.full(error.shape, values.shape[-1]), 2, 2)


def largest_spread(gap: float, ranks: int) -> dict[int, float]:
    """By planned number of seeds, the largest standard deviation over seeds at which the rule of the verdict shows a
    difference of `gap` among so many ranks."""
    levels = {seeds: level_at(seeds, CONFIDENCE) / (ranks - 1) ** 2 for seeds in PLANNED}
    return {seeds: gap * math.sqrt(seeds) / float(student(seeds - 1, 1 - level)) for seeds, level in levels.items()}
