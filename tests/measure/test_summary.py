"""A profile's numbers from known samples."""

import numpy as np
import pytest

from rankscope.measure.profile import summarise_memory
from rankscope.measure.sampler import Sample


def samples(phase: str, rss: list[int], allocated: list[int | None] | None = None) -> list[Sample]:
    gpu = allocated or [None] * len(rss)
    return [
        Sample(phase, 0, 0.0, value, value - 1, 1, of_gpu, of_gpu, None) for value, of_gpu in zip(rss, gpu, strict=True)
    ]


def test_memory_of_each_phase() -> None:
    rows = samples("load", [10, 20]) + samples("warmup", [999]) + samples("train", list(range(1, 101)))
    rows += samples("eval", [7])
    peaks = {"load": {"rss": 25}, "warmup": {}, "train": {"rss": 130, "private": 129}, "eval": {}}
    columns = summarise_memory(rows, peaks, base_bytes=30)
    kinds = ("rss", "private", "mapped", "gpu_allocated", "gpu_reserved", "gpu_nvml")
    named = {f"{phase}{kind}" for phase in ("", "load_", "eval_") for kind in kinds} | {"private_above_base"}
    assert set(columns) == {f"{name}_{statistic}_bytes" for name in named for statistic in ("mean", "peak", "p99")}
    assert columns["load_rss_mean_bytes"] == 15
    assert columns["load_rss_peak_bytes"] == 25
    assert columns["rss_mean_bytes"] == 50.5
    assert columns["rss_p99_bytes"] == pytest.approx(np.percentile(np.arange(1, 101), 99))
    assert columns["rss_peak_bytes"] == 130, "what the kernel counted between two samples"
    assert columns["private_above_base_peak_bytes"] == 99
    assert columns["private_above_base_mean_bytes"] == 19.5
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
