"""How much of a difference of costs is noise: the first candidate is profiled twice over, as a control."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from rankscope.spec.models import VerdictSpec


class Noise(NamedTuple):
    """What the same candidate, measured again and again, differs from itself."""

    rank: int
    measurements: int
    floor: float
    """Relative: 0.03 means that differences below 3% are noise."""


def noise_floor(profiles: pd.DataFrame, column: str) -> Noise | None:
    """The noise of a column of `Study.profiles`; None where it was not measured twice.

    The floor is the largest relative difference of any two measurements of the candidate that was profiled twice over:
    (highest - lowest) / mean, over the repeats of its own profile and of the control. That is never less than the
    difference of the two profiles' means, which with two or three repeats may be small by luck; it does not shrink as
    repeats are added, as the error of a mean would, so it errs on the side of calling a difference noise.
    """
    if profiles.empty or not profiles["control"].any():
        return None
    twice = profiles[profiles["control"]].iloc[0]
    values = pd.to_numeric(profiles.loc[profiles["candidate"] == twice["candidate"], column]).dropna()
    if len(values) < 2 or not values.mean() > 0:
        return None
    return Noise(int(twice["rank"]), len(values), float((values.max() - values.min()) / values.mean()))


def over_budget(verdict: VerdictSpec, profiles: pd.DataFrame, candidates: Sequence[str]) -> dict[str, list[str]]:
    """For each candidate what it exceeds: `gpu_memory`, `runtime`, or `unmeasured` where that is not known.

    GPU memory is the highest repeat's peak that torch's allocator held from the device (CUDA's own context comes on
    top: some 0.5 GB); runtime is the mean over repeats of the whole schedule, trained alone.
    """
    over: dict[str, list[str]] = {name: [] for name in candidates}
    for cost, limit, column, how in (
        ("gpu_memory", verdict.max_gpu_memory, "gpu_reserved_peak_bytes", "max"),
        ("runtime", verdict.max_runtime, "runtime_seconds", "mean"),
    ):
        if limit is None:
            continue
        found: dict[str, float] = {}
        if not profiles.empty:
            measured = profiles[~profiles["control"]].astype({column: "float64"})
            values = measured.groupby("candidate")[column].agg(how).dropna()
            found = {str(name): float(value) for name, value in values.items()}
        for name in candidates:
            if name not in found:
                over[name].append("unmeasured")
            elif found[name] > limit:
                over[name].append(cost)
    return over


def on_front(table: pd.DataFrame, columns: Sequence[str]) -> "pd.Series[bool]":
    """Of each row of `table`, whether it is on the Pareto front of `columns`, of which less is better.

    A row is beaten by one that is nowhere higher and somewhere lower; rows with equal values do not beat each other. A
    row with NaN is not on the front and beats none. Noise and intervals are not considered.
    """
    values = table[list(columns)].to_numpy(dtype="float64")
    front = []
    for row in values:
        beaten = ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
        front.append(bool(not beaten and (row == row).all()))
    return pd.Series(front, index=table.index, dtype=bool)
