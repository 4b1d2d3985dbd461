"""What differs with rank besides rank, and what runs lack for a conclusion."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rankscope.judge.readers import RSLORA
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import first_of, rate

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


def label(column: str, text: Catalogue) -> str:
    return text(f"judge.column.{column}")


def show(value: Any) -> str:
    """A setting as people write it."""
    if not isinstance(value, float):
        return str(value)
    return rate(value) if 0 < value < 0.01 else f"{value:,.0f}" if value == round(value) else f"{value:.5g}"


def names(runs: Sequence[str], text: Catalogue, of: int = 0) -> str:
    """The first runs by name; `all`, where there are several and these are `of` them."""
    return text("judge.all") if len(runs) == of > 1 else first_of(runs, 4, text)


def confounders(runs: pd.DataFrame, text: Catalogue) -> list[Finding]:
    """Settings whose values differ between ranks, with the runs by value. A value that every rank has is none. And
    whether ranks ran one after the other, up or down; files that were copied have the time of the copy."""
    found = []
    for column in (*SETTINGS, "scaling", "seed"):
        known = runs.dropna(subset=column)
        if len({frozenset(part[column]) for _, part in known.groupby("rank")}) < 2:
            continue
        listed = []
        for value, of in known.groupby(column, sort=False):
            ranks = ", ".join(map(str, sorted(set(of["rank"]))))
            listed.append(text("judge.at", value=show(value), ranks=ranks, runs=names(list(of["run"]), text)))
        logged = column == "learning_rate" and runs["rate_logged"].any()
        kind = "judge.logged" if logged else "judge.factor" if column == "scaling" else "judge.setting"
        said = text(kind, name=label(column, text), values="; ".join(listed[:8]))
        found.append(Finding(column, said, list(known["run"]), column in SETTINGS))
    timed = runs.dropna(subset="time").sort_values("time", kind="stable")
    order, gaps = timed["rank"].drop_duplicates(), timed["time"].diff().iloc[1:]
    real = len(timed) == len(runs) and (gaps > 0.2 * timed["seconds"].iloc[1:].fillna(5)).all()
    if len(order) > 1 and real and (timed["rank"].is_monotonic_increasing or timed["rank"].is_monotonic_decreasing):
        said = text("judge.order", ranks=", ".join(map(str, order)))
        found.append(Finding("order", said, list(timed["run"])))
    return found


def limits(runs: pd.DataFrame, text: Catalogue) -> list[Finding]:
    """What is missing or doubtful in the runs, whatever their settings."""
    everything, unseeded, evaluated = runs["rank"] > 0, runs["seed"].isna(), runs["eval_loss"].notna()
    seeds, rates = (runs.groupby("rank")[column].nunique() for column in ("seed", "learning_rate"))
    unknown = [name for name in SETTINGS if runs[name].isna().all() and name not in _RARE]
    unknown += ["schedule", "precision", "prompt"]  # which no column has
    counted = evaluated & ~runs["unfinished"]
    own = runs[counted & ~unseeded]
    twice = own.duplicated(["rank", "seed", "alpha", *SETTINGS], keep=False).reindex(runs.index, fill_value=False)
    tests = {
        "one_rank": everything & (runs["rank"].nunique() == 1),
        "no_loss": ~evaluated & ~runs["diverged"],
        "score": runs["score"].notna(),
        "one_seed": runs["rank"].isin(seeds.index[seeds == 1]),
        "no_seed": unseeded,
        "named_seed": runs["seed_in_name"],
        "one_rate": everything & (rates.max() == 1),
        "diverged": runs["diverged"],
        "unfinished": runs["unfinished"],
        "other_losses": twice,
        "overfits": runs["eval_loss"] > (1 + _RISE) * runs["best_loss"],
        "not_recorded": everything,
    }
    listed = ", ".join(label(name, text) for name in unknown)
    said = {code: text(f"judge.limit.{code}", names=listed) for code, of in tests.items() if of.any()}
    found = [Finding(code, words, list(runs["run"][tests[code]])) for code, words in said.items()]
    lacking: dict[tuple[str, ...], list[str]] = {}  # columns that only others have, by the runs without them
    for name in ("alpha", *SETTINGS):
        if (runs[name].notna() & counted).any():
            lacking.setdefault(tuple(runs["run"][runs[name].isna() & counted]), []).append(label(name, text))
    told = {who: text("judge.limit.only_others", names=", ".join(of)) for who, of in lacking.items() if who}
    return [*found, *(Finding("only_others", words, list(who)) for who, words in told.items())]
