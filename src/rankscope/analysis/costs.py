"""Noise of measured costs, costs over the budget, and the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import special

from rankscope.spec.models import VerdictSpec

CONFIDENCE = 0.95  # of the noise of costs

RATIO_ERRORS = {
    "step_seconds_median": "step_ratio_se",
    "step_seconds_mean": "step_ratio_se",
    "tokens_per_second": "step_ratio_se",
    "runtime_seconds": "runtime_ratio_se",
}
"""Columns of `Study.profiles` that were measured side by side, and the standard error of their logarithms."""


class Noise(NamedTuple):
    """Uncertainty of the difference of a cost between two candidates."""

    measurements: int  # of each candidate: rounds in which all were timed, or repeats
    floor: float  # relative: a difference below 0.03, or 3%, may be noise

    def interval(self, change: float) -> tuple[float, float]:
        """Interval of a relative change."""
        return (1 + change) / (1 + self.floor) - 1, (1 + change) * (1 + self.floor) - 1


def noise_of(profiles: pd.DataFrame, column: str, confidence: float = CONFIDENCE) -> Noise | None:
    """Noise of a column of `Study.profiles`: half of the interval of a difference between two candidates.

    The standard error is that of logarithms, pooled over all ranks and the control: of times from the rounds in which
    they were measured side by side, of other costs from their repeats, where the control counts as its rank's. None
    where neither tells.
    """
    if column not in profiles:
        return None
    error = RATIO_ERRORS.get(column)
    if error in profiles and profiles[error].notna().any():  # one that failed has none
        errors = profiles.loc[~profiles["control"], error]
        errors = errors[errors > 0]  # the control's own ratio to itself is exact
        rounds = int(profiles["rounds"].min())
        se, free = float(np.sqrt((errors**2).mean())) if len(errors) else 0.0, rounds - 1
    else:
        one = profiles.drop_duplicates(["rank", "repeat", "control"]).reset_index(drop=True)
        logs = np.log(pd.to_numeric(one[column]).where(lambda values: values > 0)).dropna()
        groups = logs.groupby(one["rank"])
        free, rounds = len(logs) - groups.ngroups, int(groups.size().min()) if len(logs) else 0
        if free < 1:
            return None
        spread = float(np.sqrt(((logs - groups.transform("mean")) ** 2).sum() / free))
        se = spread * math.sqrt(2 / rounds)
    if free < 1:
        return None
    return Noise(rounds, math.expm1(float(special.stdtrit(free, (1 + confidence) / 2)) * se))


def cpu_memory(profiles: pd.DataFrame) -> str:
    """Prefix of the CPU's memory in `Study.profiles`: `private`, or `rss` in a study that does not tell it apart."""
    told = "private_peak_bytes" in profiles and bool(profiles["private_peak_bytes"].notna().all())
    return "private" if told else "rss"


GPU_CONTEXT_BYTES = 500_000_000
"""CUDA's context, which torch's allocator does not count, where NVML has not measured it."""


def over_budget(verdict: VerdictSpec, profiles: pd.DataFrame, candidates: Sequence[str]) -> dict[str, list[str]]:
    """Limits that each candidate exceeds: `gpu_memory`, `runtime`, or `unmeasured` for an unknown cost. GPU memory is
    the highest repeat's peak that torch's allocator reserved, with CUDA's context; runtime is that of the whole
    schedule, trained alone, and exceeds its limit where it does by more than noise."""
    over: dict[str, list[str]] = {name: [] for name in candidates}
    noise = noise_of(profiles, "runtime_seconds")
    for cost, limit in (("gpu_memory", verdict.max_gpu_memory), ("runtime", verdict.max_runtime)):
        if limit is None:
            continue
        found: Mapping[Any, float] = {}
        if not profiles.empty:
            measured = profiles[~profiles["control"]]
            values = gpu_memory(measured) if cost == "gpu_memory" else measured["runtime_seconds"].astype("float64")
            by_candidate = values.groupby(measured["candidate"])
            slack = 1 + noise.floor if noise else 1.0
            most = by_candidate.max() if cost == "gpu_memory" else by_candidate.mean() / slack
            found = most.dropna().to_dict()
        for name in candidates:
            if found.get(name, math.inf) > limit:
                over[name].append(cost if name in found else "unmeasured")
    return over


def gpu_memory(profiles: pd.DataFrame) -> "pd.Series[float]":
    """Peak of a GPU's memory in each repeat, in bytes: reserved by torch's allocator, and CUDA's context."""
    reserved = profiles["gpu_reserved_peak_bytes"].astype("float64")
    context = profiles.get("gpu_context_bytes", pd.Series(index=profiles.index, dtype="float64")).astype("float64")
    return reserved + context.fillna(GPU_CONTEXT_BYTES)


def on_front(table: pd.DataFrame, columns: Sequence[str]) -> "pd.Series[bool]":
    """Whether each row of `table` is on the Pareto front of `columns`, where less is better. A row is beaten by one
    that is nowhere higher and somewhere lower, so rows with equal values do not beat each other. A row with NaN is not
    on the front and beats none. Noise and intervals are not considered."""
    values = table[list(columns)].to_numpy(dtype="float64")
    beaten = [((values <= row).all(axis=1) & (values < row).any(axis=1)).any() for row in values]
    known = ~np.isnan(values).any(axis=1)
    return pd.Series(known & ~np.array(beaten, dtype=bool), index=table.index, dtype=bool)
