"""Speed of plain matrix products, the limit of what training can reach."""

import math
import statistics
import time
from collections.abc import Mapping

import torch

from rankscope.model.device import synchronize


def product_rate(
    shapes: Mapping[tuple[int, int, int], int], device: torch.device, dtype: torch.dtype, most_seconds: float = math.inf
) -> float:
    """FLOP/s of plain products of these shapes, each as often as counted: the median of five, after two to warm up.

    After `most_seconds` what is left is taken to run as fast as what was timed; the shapes that take most come first.
    """
    flops = seconds = 0.0
    end = time.perf_counter() + most_seconds
    for (m, k, n), count in sorted(shapes.items(), key=lambda item: -math.prod(item[0]) * item[1]):
        left, right = torch.rand(m, k, device=device, dtype=dtype), torch.rand(k, n, device=device, dtype=dtype)
        out = left @ right
        times: list[float] = []
        while len(times) < 7 and (len(times) < 2 or time.perf_counter() < end):
            synchronize(device)
            start = time.perf_counter()
            torch.mm(left, right, out=out)
            synchronize(device)
            times.append(time.perf_counter() - start)
        flops += 2 * m * k * n * count
        seconds += statistics.median(times[min(2, len(times) - 1) :]) * count
        if time.perf_counter() > end:
            break
    return flops / seconds
