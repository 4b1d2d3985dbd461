"""Which candidates cost more than the user can spend."""

from collections.abc import Sequence

import pandas as pd

from rankscope.spec.models import VerdictSpec


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
