"""Noise of measured costs, costs over the budget, and the Pareto front."""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from rankscope.spec.models import VerdictSpec


class Noise(NamedTuple):
    """Variation between repeated measurements of one candidate."""

    rank: int
    measurements: int
    floor: float  # relative: 0.03 means that differences below 3% are noise


def noise_floor(profiles: pd.DataFrame, column: str) -> Noise | None:
    """Noise of a column of `Study.profiles`; None where it was not measured twice.

    The first candidate is profiled twice over, as a control. The floor is (highest - lowest) / mean over the repeats
    of both profiles. It is never less than the difference of the two means, which may be small by luck, and does not
    shrink with more repeats, as a standard error would: it errs on the side of calling a difference noise.
    """
    if profiles.empty or not profiles["control"].any():
        return None
    twice = profiles[profiles["control"]].iloc[0]
    values = pd.to_numeric(profiles.loc[profiles["candidate"] == twice["candidate"], column]).dropna()
    if len(values) < 2 or not values.mean() > 0:
        return None
    return Noise(int(twice["rank"]), len(values), float((values.max() - values.min()) / values.mean()))


def over_budget(verdict: VerdictSpec, profiles: pd.DataFrame, candidates: Sequence[str]) -> dict[str, list[str]]:
    """Limits that each candidate exceeds: `gpu_memory`, `runtime`, or `unmeasured` for an unknown cost. GPU memory is
    the highest repeat's peak that torch's allocator reserved (CUDA's own context adds about 0.5 GB); runtime is the
    mean over repeats of the whole schedule, trained alone."""
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
    """Whether each row of `table` is on the Pareto front of `columns`, where less is better. A row is beaten by one
    that is nowhere higher and somewhere lower, so rows with equal values do not beat each other. A row with NaN is not
    on the front and beats none. Noise and intervals are not considered."""
    values = table[list(columns)].to_numpy(dtype="float64")
    front = []
    for row in values:
        beaten = ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
        front.append(bool(not beaten and (row == row).all()))
    return pd.Series(front, index=table.index, dtype=bool)
