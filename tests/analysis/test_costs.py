"""Noise of a cost: what two candidates of equal cost may differ by; and what a budget makes of it."""

import math

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from rankscope.analysis.costs import cpu_memory, noise_of, over_budget
from rankscope.spec.models import VerdictSpec


def profiles(own: list[float], control: list[float], other: list[float] | None = None) -> pd.DataFrame:
    rows = [
        {"candidate": f"r{rank:03d}", "rank": rank, "control": of_control, "repeat": repeat, "seconds": value}
        for rank, of_control, values in ((8, False, own), (256, False, other or []), (8, True, control))
        for repeat, value in enumerate(values)
    ]
    return pd.DataFrame(rows)


def timed(errors: list[float], rounds: int = 24, **columns: float) -> pd.DataFrame:
    """Ranks 8, 16, … with these errors of their ratios, and the control."""
    rows = [
        {"candidate": f"r{8 << number}", "rank": 8 << number, "control": False, "runtime_ratio_se": error}
        for number, error in enumerate(errors)
    ]
    rows.append({"candidate": "r8", "rank": 8, "control": True, "runtime_ratio_se": 0.0})
    return pd.DataFrame(rows).assign(repeat=0, rounds=rounds, runtime_seconds=100.0, **columns)


def test_the_noise_of_repeats_is_pooled_over_ranks_and_the_control() -> None:
    noise = noise_of(profiles([10.0, 10.4], [9.8, 10.2], [50.0, 51.0]), "seconds")
    assert noise is not None
    logs = [np.log([10.0, 10.4, 9.8, 10.2]), np.log([50.0, 51.0])]
    spread = math.sqrt(sum(((one - one.mean()) ** 2).sum() for one in logs) / 4)
    assert noise.measurements == 2
    assert noise.floor == pytest.approx(math.expm1(stats.t.ppf(0.975, 4) * spread * math.sqrt(2 / 2)))


def test_more_repeats_make_the_noise_smaller() -> None:
    draw = np.random.default_rng(0)
    few, many = (noise_of(profiles(*draw.normal(10, 0.1, (3, count)).tolist()), "seconds") for count in (3, 50))
    assert few is not None
    assert many is not None
    assert many.floor < few.floor / 3


def test_equal_ranks_are_told_apart_in_five_of_a_hundred_studies() -> None:
    draw, apart = np.random.default_rng(0), 0
    for _ in range(400):
        own, control, other = 10 * np.exp(draw.normal(0, 0.05, (3, 2)))
        noise = noise_of(profiles(own.tolist(), control.tolist(), other.tolist()), "seconds")
        assert noise is not None
        low, high = noise.interval(other.mean() / own.mean() - 1)
        apart += low > 0 or high < 0
    assert 0.01 < apart / 400 < 0.06, "0.05, and less where the control counts as one more measurement of rank 8"


def test_what_was_timed_side_by_side_has_the_error_of_its_ratios() -> None:
    noise = noise_of(timed([0.01, 0.03]), "runtime_seconds")
    assert noise is not None
    assert noise.measurements == 24
    pooled = math.sqrt((0.01**2 + 0.03**2) / 2)
    assert noise.floor == pytest.approx(math.expm1(stats.t.ppf(0.975, 23) * pooled))
    assert noise_of(timed([0.01, 0.03, float("nan")]), "runtime_seconds") == noise, "one was not timed"
    assert noise.interval(0.5) == pytest.approx((1.5 / (1 + noise.floor) - 1, 1.5 * (1 + noise.floor) - 1))


def test_without_a_second_measurement_there_is_no_noise() -> None:
    assert noise_of(pd.DataFrame(), "seconds") is None
    assert noise_of(profiles([10.0], [], [11.0]), "seconds") is None
    assert noise_of(profiles([float("nan")] * 2, [float("nan")] * 2), "seconds") is None
    assert noise_of(profiles([10.0, float("nan")], [float("nan")]), "seconds") is None
    assert noise_of(profiles([10.0, 11.0], [10.0]), "absent") is None
    assert noise_of(timed([0.01], rounds=1), "runtime_seconds") is None


def test_a_runtime_is_over_its_limit_where_it_is_by_more_than_noise() -> None:
    noise = noise_of(timed([0.01, 0.01]), "runtime_seconds")
    assert noise is not None
    measured = timed([0.01, 0.01])
    for factor, expected in ((0.99, []), (1.01, ["runtime"])):
        measured["runtime_seconds"] = 60 * (1 + noise.floor) * factor
        found = over_budget(VerdictSpec(max_runtime="60s"), measured, ["r8", "r16", "r32"])
        assert found == {"r8": expected, "r16": expected, "r32": ["unmeasured"]}


def test_gpu_memory_is_what_the_device_gives_up() -> None:
    measured = timed([0.01], gpu_reserved_peak_bytes=9.7e9)
    limit = VerdictSpec(max_gpu_memory="10GB")
    assert over_budget(limit, measured, ["r8"]) == {"r8": ["gpu_memory"]}, "0.5 GB for CUDA where nothing is known"
    for context, expected in ((0.2e9, []), (0.4e9, ["gpu_memory"])):
        assert over_budget(limit, measured.assign(gpu_context_bytes=context), ["r8"]) == {"r8": expected}


def test_private_memory_counts_where_all_profiles_have_it() -> None:
    assert cpu_memory(pd.DataFrame()) == "rss"
    assert cpu_memory(pd.DataFrame({"private_peak_bytes": [1.0, 2.0]})) == "private"
    assert cpu_memory(pd.DataFrame({"private_peak_bytes": [1.0, None]})) == "rss"
