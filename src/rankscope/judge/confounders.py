"""What differs with rank besides rank, and what runs lack for a conclusion."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rankscope.judge.readers import RSLORA
from rankscope.text.formats import rate

SETTINGS = (
    "tool", "base_model", "variant", "target_modules", "dropout", "learning_rate", "steps", "epochs", "steps_an_epoch",
    "batch_size", "max_length", "data", "eval_set", "eval_rows", "eval_step", "untrained_loss",
)  # fmt: skip
"""Columns that are equal where losses can be compared. Seeds, alpha and the order are judged by themselves."""

_RARE = ("steps_an_epoch", "eval_step", "untrained_loss")  # that few tools record, beside others that say as much
_ROUNDED = dict.fromkeys(("epochs", "steps_an_epoch", "eval_rows"), 0.005) | {"untrained_loss": 0.001}
"""Shares within which values are equal, as they are computed from rounded ones."""
_RISE = 0.01  # share of the lowest held-out loss by which the last is above it where a run overfits


class Finding(NamedTuple):
    what: str  # a column of the runs, or a code
    text: str
    runs: list[str]
    blocks: bool = False  # whether it keeps losses from being compared


def normalised(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with `scaling`, alpha/rank (alpha with rsLoRA, whose rule this is), and equal values where tools round."""
    scaled = np.where(runs["variant"].str.contains(RSLORA, regex=False), runs["alpha"], runs["alpha"] / runs["rank"])
    runs = runs.assign(scaling=scaled)
    for column, share in _ROUNDED.items():
        first, same = math.nan, dict[float, float]()
        for value in sorted(set(runs[column].dropna())):
            same[value] = first = first if value <= (1 + share) * first else value
        runs[column] = runs[column].map(same).astype("float64")
    return runs


def decimals(loss: float) -> int:
    return len(repr(float(loss)).partition(".")[2])


def label(column: str) -> str:
    return "alpha/rank" if column == "scaling" else column.replace("_", " ")


def show(value: Any) -> str:
    """A setting as people write it."""
    if not isinstance(value, float):
        return str(value)
    return rate(value) if 0 < value < 0.01 else f"{value:,.0f}" if value == round(value) else f"{value:.5g}"


def names(runs: Sequence[str], of: int = 0) -> str:
    """The first runs by name; `all`, where there are several and these are `of` them."""
    more = len(runs) - 4
    return "all" if len(runs) == of > 1 else ", ".join(runs[:4]) + (f" and {more} more" if more > 0 else "")


def confounders(runs: pd.DataFrame) -> list[Finding]:
    """Settings whose values differ between ranks, with the runs by value. A value that every rank has is none. And
    whether ranks ran one after the other, up or down; files that were copied have the time of the copy."""
    found = []
    for column in (*SETTINGS, "scaling", "seed"):
        known = runs.dropna(subset=column)
        if len({frozenset(part[column]) for _, part in known.groupby("rank")}) < 2:
            continue
        listed = [
            f"{show(value)} at rank {', '.join(map(str, sorted(set(of['rank']))))} ({names(list(of['run']))})"
            for value, of in known.groupby(column, sort=False)
        ]
        why = "; a difference is partly one of the update's factor" if column == "scaling" else ""
        if column == "learning_rate" and runs["rate_logged"].any():
            why = "; the highest that was logged, as the peak is not recorded"
        text = f"{label(column)}: {'; '.join(listed[:8])}{why}"
        found.append(Finding(column, text, list(known["run"]), column in SETTINGS))
    timed = runs.dropna(subset="time").sort_values("time", kind="stable")
    order, gaps = timed["rank"].drop_duplicates(), timed["time"].diff().iloc[1:]
    real = len(timed) == len(runs) and (gaps > 0.2 * timed["seconds"].iloc[1:].fillna(5)).all()
    if len(order) > 1 and real and (timed["rank"].is_monotonic_increasing or timed["rank"].is_monotonic_decreasing):
        text = f"order: rank {', '.join(map(str, order))}, one after the other; memory and time may drift with it"
        found.append(Finding("order", text, list(timed["run"])))
    return found


def limits(runs: pd.DataFrame) -> list[Finding]:
    """What is missing or doubtful in the runs, whatever their settings."""
    everything, unseeded, evaluated = runs["rank"] > 0, runs["seed"].isna(), runs["eval_loss"].notna()
    seeds, rates = (runs.groupby("rank")[column].nunique() for column in ("seed", "learning_rate"))
    unknown = [label(name) for name in SETTINGS if runs[name].isna().all() and name not in _RARE]
    unknown += ["schedule", "precision", "prompt"]  # which no column has
    counted = evaluated & ~runs["unfinished"]
    own = runs[counted & ~unseeded]
    twice = own.duplicated(["rank", "seed", "alpha", *SETTINGS], keep=False).reindex(runs.index, fill_value=False)
    tests = {
        "one rank alone: there is nothing to compare": everything & (runs["rank"].nunique() == 1),
        "no held-out loss: training loss falls with every parameter": ~evaluated & ~runs["diverged"],
        "its score is not compared: that takes the result at each row": runs["score"].notna(),
        "one seed at its rank: chance cannot be told from rank": runs["rank"].isin(seeds.index[seeds == 1]),
        "seed not recorded, so not counted as a further one: name folders ...-seed0": unseeded,
        "seed taken from the name": runs["seed_in_name"],
        "one learning rate a rank: another may suit another rank better": everything & (rates.max() == 1),
        "diverged: its rank is compared with none": runs["diverged"],
        "ended before its last planned step: compared with none": runs["unfinished"],
        "settings and seed of another run, but other losses: not compared": twice,
        "ends above its lowest held-out loss: overfits": runs["eval_loss"] > (1 + _RISE) * runs["best_loss"],
        f"not recorded and taken to be equal: {', '.join(unknown)}": everything,
    }
    found = [Finding(text.partition(":")[0], text, list(runs["run"][of])) for text, of in tests.items() if of.any()]
    lacking: dict[tuple[str, ...], list[str]] = {}  # columns that only others have, by the runs without them
    for name in ("alpha", *SETTINGS):
        if (runs[name].notna() & counted).any():
            lacking.setdefault(tuple(runs["run"][runs[name].isna() & counted]), []).append(label(name))
    what = "recorded for others only"
    texts = [(f"{what}: {', '.join(of)}; so not compared with them", list(who)) for who, of in lacking.items() if who]
    return [*found, *(Finding(what, text, who) for text, who in texts)]
