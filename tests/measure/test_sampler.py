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
        sampler.begin("train")
        block = np.ones(BLOCK, dtype=np.uint8)
        time.sleep(0.2)
        del block
    for kind in ("rss_bytes", "private_bytes"):
        before = np.mean([getattr(row, kind) for row in sampler.rows if row.phase == "load"])
        during = max(getattr(row, kind) for row in sampler.rows if row.phase == "train")
        assert during - before == pytest.approx(BLOCK, rel=0.05), kind
    assert all(row.rss_bytes == row.private_bytes + row.mapped_bytes for row in sampler.rows)
    assert len(sampler.rows) >= 8
    assert all(row[6:] == (None, None, None) for row in sampler.rows), "no GPU columns on a CPU"


def test_each_phase_has_a_peak_of_its_own() -> None:
    if not reset_peak_rss():
        pytest.skip("this system has no /proc/self/clear_refs")
    with MemorySampler(torch.device("cpu")) as sampler:
        sampler.begin("train")
        np.ones(BLOCK, dtype=np.uint8).sum()
        sampler.begin("eval")
    assert set(sampler.peaks) == {"load", "train", "eval"}
    for quiet in ("load", "eval"):
        for kind in ("rss", "private"):
            assert sampler.peaks["train"][kind] - sampler.peaks[quiet][kind] == pytest.approx(BLOCK, rel=0.1)


def test_the_kernels_peak_is_not_missed_and_starts_anew() -> None:
    if not reset_peak_rss():
        pytest.skip("this system has no /proc/self/clear_refs")
    start = peak_rss()
    np.ones(BLOCK, dtype=np.uint8).sum()  # held for a moment, between two samples
    assert peak_rss() - start == pytest.approx(BLOCK, rel=0.1)
    assert reset_peak_rss()
    assert peak_rss() < start + BLOCK / 2
