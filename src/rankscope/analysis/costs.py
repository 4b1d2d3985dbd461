"""How much of a difference of costs is noise: the first candidate is profiled twice over, as a control."""

from typing import NamedTuple

import pandas as pd


class Noise(NamedTuple):
    """What the same candidate, measured again and again, differs from itself."""

    rank: int
    measurements: int
    floor: float
    """Relative: 0.03 means that differences below 3% are noise."""


def noise_floor(profiles: pd.DataFrame, column: str) -> Noise | None:
    """The noise of a column of `Study.profiles`; None where it was not measured twice.

    The floor is the largest relative difference of any two measurements of the candidate that was profiled twice over:
    (highest - lowest) / mean, over the repeats of its own profile and of the control. That is never less than the
    difference of the two profiles' means, which with two or three repeats may be small by luck; it does not shrink as
    repeats are added, as the error of a mean would, so it errs on the side of calling a difference noise.
    """
    if profiles.empty or not profiles["control"].any():
        return None
    twice = profiles[profiles["control"]].iloc[0]
    values = pd.to_numeric(profiles.loc[profiles["candidate"] == twice["candidate"], column]).dropna()
    if len(values) < 2 or not values.mean() > 0:
        return None
    return Noise(int(twice["rank"]), len(values), float((values.max() - values.min()) / values.mean()))
