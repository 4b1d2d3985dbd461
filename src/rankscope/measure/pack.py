"""What a pack took, and how near it came to the machine's limit: packs/NAME/pack.json."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from rankscope.measure.sampler import peak_rss, reset_peak_rss
from rankscope.train.cost import product_rate
from rankscope.train.loop import PackRun


class PackResults(NamedTuple):
    """What a pack measured of itself."""

    steps: int
    step_seconds: float  # of all steps
    useful_flops: float  # of all steps: see `rankscope.train.cost.Cost`
    useful_flops_per_second: float
    product_flops_per_second: float
    """Of plain matrix products of the first step's shapes, timed after the last."""
    product_share: float
    """Useful over plain: 1 would be a step that is nothing but products of real tokens."""
    rss_peak_bytes: int
    gpu_allocated_peak_bytes: int | None


def measure_pack(train: Callable[[], PackRun], device: torch.device, dtype: torch.dtype) -> PackResults:
    """Runs `train` and measures it; the peaks are those of the run alone, without loading or the plain products."""
    reset_peak_rss()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    run = train()
    gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    peak, useful = peak_rss(), run.useful_flops / run.step_seconds
    rate = product_rate(run.products, device, dtype)
    return PackResults(run.steps, run.step_seconds, run.useful_flops, useful, rate, useful / rate, peak, gpu)
