"""Memory measurement sees what a process really holds."""

import time

import numpy as np
import pytest
import torch

from rankscope.measure.sampler import MemorySampler, peak_rss, reset_peak_rss

BLOCK = 200_000_000


def test_samples_see_a_block_that_is_held() -> None:
    with MemorySampler(torch.device("cpu")) as sampler:
        time.sleep(0.1)
        sampler.phase = "train"
        block = np.ones(BLOCK, dtype=np.uint8)
        time.sleep(0.2)
        del block
    before = np.mean([row[3] for row in sampler.rows if row[0] == "load"])
    during = max(row[3] for row in sampler.rows if row[0] == "train")
    assert during - before == pytest.approx(BLOCK, rel=0.05)
    assert len(sampler.rows) >= 8
    assert all(row[4] is None and row[5] is None for row in sampler.rows), "no GPU columns on a CPU"


def test_the_kernels_peak_is_not_missed_and_starts_anew() -> None:
    if not reset_peak_rss():
        pytest.skip("this system has no /proc/self/clear_refs")
    start = peak_rss()
    np.ones(BLOCK, dtype=np.uint8).sum()  # held for a moment, between two samples
    assert peak_rss() - start == pytest.approx(BLOCK, rel=0.1)
    assert reset_peak_rss()
    assert peak_rss() < start + BLOCK / 2
