"""The noise floor of a cost: what the candidate that is profiled twice over differs from itself."""

import pandas as pd
import pytest

from rankscope.analysis.costs import noise_floor


def profiles(own: list[float], control: list[float]) -> pd.DataFrame:
    rows = [{"candidate": "r008", "rank": 8, "control": False, "seconds": value} for value in own]
    rows += [{"candidate": "r256", "rank": 256, "control": False, "seconds": 50.0}]
    rows += [{"candidate": "r008", "rank": 8, "control": True, "seconds": value} for value in control]
    return pd.DataFrame(rows)


def test_the_floor_is_the_largest_difference_of_two_measurements() -> None:
    noise = noise_floor(profiles([10.0, 10.4], [9.8, 10.2]), "seconds")
    assert noise is not None
    assert (noise.rank, noise.measurements) == (8, 4)
    assert noise.floor == pytest.approx(0.6 / 10.1)


def test_the_floor_is_never_below_the_difference_of_the_two_means() -> None:
    noise = noise_floor(profiles([10.0, 10.0], [12.0, 12.0]), "seconds")
    assert noise is not None
    assert noise.floor == pytest.approx(2 / 11)


def test_one_repeat_is_enough_with_the_control() -> None:
    noise = noise_floor(profiles([10.0], [11.0]), "seconds")
    assert noise is not None
    assert noise.floor == pytest.approx(1 / 10.5)


def test_without_a_control_or_a_measurement_there_is_no_floor() -> None:
    assert noise_floor(pd.DataFrame(), "seconds") is None
    assert noise_floor(profiles([10.0, 11.0], []), "seconds") is None
    assert noise_floor(profiles([float("nan")] * 2, [float("nan")] * 2), "seconds") is None
    with_one = profiles([10.0, float("nan")], [float("nan")])
    assert noise_floor(with_one, "seconds") is None
