"""A profile's numbers: what is computed from its samples, step times and counts."""

import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from rankscope.measure.sampler import Sample

MEMORY = ("rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")
"""What is sampled: see `Sample`."""
PHASES = {"load": "load_", "train": "", "eval": "eval_"}
"""The phases that are summed up, and what their columns begin with: training's are the plain ones."""
MEMORY_COLUMNS = tuple(
    f"{prefix}{kind}_{statistic}_bytes"
    for prefix in PHASES.values()
    for kind in MEMORY
    for statistic in ("mean", "peak", "p99")
) + tuple(f"rss_above_base_{statistic}_bytes" for statistic in ("mean", "peak", "p99"))


def summarise_memory(
    samples: Sequence[Sample], peaks: Mapping[str, Mapping[str, int]], base_bytes: int
) -> dict[str, float | None]:
    """The `MEMORY_COLUMNS`; None for what was not sampled (the GPU's without one).

    For each phase and kind of memory: the mean and the 99th percentile of its samples, which are taken each 20 ms and
    at each step's end, and its peak. That is what the kernel or the allocator counted (`peaks`), which no sample can
    miss, and the highest sample for NVML and where nothing counts. `rss_above_base_*` is training's resident memory
    less `base_bytes`, that of the process with the base model loaded.
    """
    columns: dict[str, float | None] = {}
    for phase, prefix in PHASES.items():
        during = [sample for sample in samples if sample.phase == phase]
        for kind in MEMORY:
            found = [getattr(sample, f"{kind}_bytes") for sample in during]
            values = [value for value in found if value is not None]
            counted = [peaks[phase][kind]] if kind in peaks[phase] else []
            columns[f"{prefix}{kind}_mean_bytes"] = statistics.fmean(values) if values else None
            columns[f"{prefix}{kind}_peak_bytes"] = max([*values, *counted]) if values else None
            columns[f"{prefix}{kind}_p99_bytes"] = float(np.percentile(values, 99)) if values else None
    for statistic in ("mean", "peak", "p99"):
        value = columns[f"rss_{statistic}_bytes"]
        columns[f"rss_above_base_{statistic}_bytes"] = None if value is None else value - base_bytes
    return columns


def summarise_steps(seconds: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """How long measured steps took: `steps`, seconds a step (median, mean, 10th and 90th percentile), tokens/s."""
    low, median, high = np.percentile(seconds, (10, 50, 90))
    return {
        "steps": len(seconds),
        "step_seconds_median": float(median),
        "step_seconds_mean": statistics.fmean(seconds),
        "step_seconds_p10": float(low),
        "step_seconds_p90": float(high),
        "tokens_per_second": sum(tokens) / sum(seconds),
    }
