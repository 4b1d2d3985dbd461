"""What a pack took, and how near it came to the machine's limit: packs/NAME/pack.json."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch

from rankscope.measure.sampler import peak_rss, reset_peak_rss
from rankscope.model.load import give_back_freed
from rankscope.train.loop import PackRun


class PackResults(NamedTuple):
    """What a pack measured of itself."""

    steps: int
    step_seconds: float  # of all steps
    useful_flops: float  # of all steps: see `rankscope.train.flops.Cost`
    useful_flops_per_second: float
    product_flops_per_second: float | None
    """Of plain matrix products of one step's shapes: the mean of two timings; None where there are none."""
    product_share: float | None
    """Useful over plain: 1 would be a step that is nothing but products of real tokens."""
    rss_peak_bytes: int
    gpu_allocated_peak_bytes: int | None


def measure_pack(train: Callable[[], PackRun], device: torch.device) -> PackResults:
    """Runs `train` and measures it; the peaks are those of the run alone, without what was freed before it."""
    give_back_freed(device)
    reset_peak_rss()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = train()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    peak, useful = peak_rss(), run.useful_flops / run.step_seconds
    rate = statistics.fmean(run.product_rates) if run.product_rates else None
    share = useful / rate if rate else None
    return PackResults(run.steps, run.step_seconds, run.useful_flops, useful, rate, share, peak, gpu)
