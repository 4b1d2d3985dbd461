"""A profile's numbers from known samples."""

import numpy as np
import pytest

from rankscope.measure.profile import summarise_memory, summarise_steps
from rankscope.measure.sampler import Sample


def samples(phase: str, rss: list[int], allocated: list[int | None] | None = None) -> list[Sample]:
    gpu = allocated or [None] * len(rss)
    return [Sample(phase, 0, 0.0, value, of_gpu, of_gpu, None) for value, of_gpu in zip(rss, gpu, strict=True)]


def test_memory_of_each_phase() -> None:
    rows = samples("load", [10, 20]) + samples("warmup", [999]) + samples("train", list(range(1, 101)))
    rows += samples("eval", [7])
    peaks = {"load": {"rss": 25}, "warmup": {}, "train": {"rss": 130}, "eval": {}}
    columns = summarise_memory(rows, peaks, base_bytes=30)
    kinds = ("rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")
    named = {f"{phase}{kind}" for phase in ("", "load_", "eval_") for kind in kinds} | {"rss_above_base"}
    assert set(columns) == {f"{name}_{statistic}_bytes" for name in named for statistic in ("mean", "peak", "p99")}
    assert columns["load_rss_mean_bytes"] == 15
    assert columns["load_rss_peak_bytes"] == 25
    assert columns["rss_mean_bytes"] == 50.5
    assert columns["rss_p99_bytes"] == pytest.approx(np.percentile(np.arange(1, 101), 99))
    assert columns["rss_peak_bytes"] == 130, "what the kernel counted between two samples"
    assert columns["rss_above_base_peak_bytes"] == 100
    assert columns["rss_above_base_mean_bytes"] == 20.5
    assert columns["eval_rss_peak_bytes"] == 7, "the highest sample where nothing counts"
    assert columns["gpu_allocated_mean_bytes"] is None
    assert columns["gpu_nvml_peak_bytes"] is None


def test_memory_of_a_gpu() -> None:
    rows = samples("load", [1, 1], [None, 40]) + samples("train", [1, 1], [50, 70]) + samples("eval", [1], [60])
    peaks = {"load": {}, "train": {"rss": 1, "gpu_allocated": 90, "gpu_reserved": 95}, "eval": {}}
    columns = summarise_memory(rows, peaks, base_bytes=0)
    assert columns["load_gpu_allocated_mean_bytes"] == 40, "before the device is taken there is nothing to sample"
    assert columns["gpu_allocated_mean_bytes"] == 60
    assert columns["gpu_allocated_peak_bytes"] == 90
    assert columns["gpu_reserved_peak_bytes"] == 95
    assert columns["eval_gpu_reserved_peak_bytes"] == 60


def test_steps_are_a_distribution() -> None:
    seconds = [0.1 * number for number in range(1, 12)]  # 0.1 to 1.1
    found = summarise_steps(seconds, [30] * 11)
    assert found == pytest.approx(
        {
            "steps": 11,
            "step_seconds_median": 0.6,
            "step_seconds_mean": 0.6,
            "step_seconds_p10": 0.2,
            "step_seconds_p90": 1.0,
            "tokens_per_second": 330 / 6.6,
        }
    )
