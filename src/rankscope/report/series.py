"""Evidence as the tidy frames that the charts draw: thinned to what a screen shows, aggregated over seeds."""

from typing import NamedTuple

import pandas as pd

from rankscope.report.tables import rank_profiles
from rankscope.study import Evidence

POINTS = 4000
"""Of all lines of one figure together, so that a page stays under its 3 MB; a line keeps 30 or more."""
SMOOTHING_SHARE = 0.05
"""The smoothed curve is a centred moving average over this share of the points."""
KEYS = ["candidate", "rank", "learning_rate"]


class Series(NamedTuple):
    """`frame` has `candidate rank learning_rate step` and values; a point is `steps_a_point` steps."""

    frame: pd.DataFrame
    steps_a_point: int


def training_loss(evidence: Evidence) -> Series:
    """`mean low high` over seeds at each step, and `smooth_mean smooth_low smooth_high` of smoothed curves.

    A mean over a trial that stopped midway would jump where it stops, so only finished trials count; of a
    candidate that has none, those that did not diverge. Loss in nats.
    """
    curves = _usable(evidence)
    curves = curves[curves["train_loss"].notna() & (curves["step"] > 0)]
    if curves.empty:
        return Series(_empty("mean", "low", "high", "smooth_mean", "smooth_low", "smooth_high"), 1)
    width = _bin_width(curves)
    binned = curves.assign(step=_bin_ends(curves, width))
    seeds = binned.groupby([*KEYS, "seed", "step"])["train_loss"].mean().reset_index()
    window = max(3, round(seeds["step"].nunique() * SMOOTHING_SHARE))
    seeds["smooth"] = seeds.groupby([*KEYS, "seed"])["train_loss"].transform(
        lambda losses: losses.rolling(window, center=True, min_periods=1).mean()
    )
    raw = _spread(seeds, "train_loss")
    smooth = _spread(seeds, "smooth").rename(columns=lambda name: name if name in raw.columns[:4] else f"smooth_{name}")
    return Series(raw.merge(smooth, on=[*KEYS, "step"]), width)


def heldout_loss(evidence: Evidence) -> Series:
    """`mean low high` of the held-out loss (nats) over seeds at each evaluation; step 0: before training."""
    curves = _usable(evidence)
    return Series(_spread(curves[curves["eval_loss"].notna()], "eval_loss"), 1)


def memory(evidence: Evidence, column: str) -> Series:
    """`mean low high` of a memory column (bytes) over the samples of each training step and all repeats."""
    samples = evidence.samples
    if samples.empty:
        return Series(_empty("mean", "low", "high"), 1)
    samples = samples[(samples["phase"] == "train") & samples["step"].notna() & samples[column].notna()]
    if samples.empty:
        return Series(_empty("mean", "low", "high"), 1)
    width = _bin_width(samples)
    values = {"step": _bin_ends(samples, width), column: samples[column].astype("float64")}
    return Series(_spread(samples.assign(**values), column), width)


def heldout_by_seed(evidence: Evidence) -> pd.DataFrame:
    """One row a finished trial: `candidate rank learning_rate seed eval_loss` (nats)."""
    results = evidence.results
    done = results[(results["status"] == "done") & results["eval_loss"].notna()]
    return done[[*KEYS, "seed", "eval_loss"]].reset_index(drop=True)


def runtimes(evidence: Evidence) -> tuple[pd.DataFrame, bool]:
    """One row a measurement: `candidate rank learning_rate number seconds`, and whether profiles gave them.

    Without profiles, trials that had a pack to themselves tell their own time, of steps and evaluations; others
    shared it, and are left out.
    """
    profiles = rank_profiles(evidence)
    if not profiles.empty and profiles["runtime_seconds"].notna().any():
        named = profiles[profiles["runtime_seconds"].notna()].rename(
            columns={"repeat": "number", "runtime_seconds": "seconds"}
        )
        return named[[*KEYS, "number", "seconds"]].reset_index(drop=True), True
    results = evidence.results
    trials_in_pack = results.groupby("pack")["trial"].transform("size")
    alone = results[(trials_in_pack == 1) & (results["status"] == "done") & results["train_seconds"].notna()]
    named = alone.rename(columns={"seed": "number"})
    named["seconds"] = alone["train_seconds"] + alone["eval_seconds"].fillna(0.0)
    return named[[*KEYS, "number", "seconds"]].reset_index(drop=True), False


def _usable(evidence: Evidence) -> pd.DataFrame:
    status = evidence.results.set_index("trial")[["candidate", "status"]]
    done = status[status["status"] == "done"]
    unfinished = status[~status["candidate"].isin(done["candidate"]) & (status["status"] != "diverged")]
    trials = [*done.index, *unfinished.index]
    return evidence.curves[evidence.curves["trial"].isin(trials)]


def _spread(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    return rows.groupby([*KEYS, "step"], as_index=False).agg(
        mean=(column, "mean"), low=(column, "min"), high=(column, "max")
    )


def _bin_width(rows: pd.DataFrame) -> int:
    points = max(30, POINTS // rows["candidate"].nunique())
    return int(max(1, -(-rows["step"].max() // points)))


def _bin_ends(rows: pd.DataFrame, width: int) -> pd.Series:
    return (rows["step"].astype("int64") + width - 1) // width * width


def _empty(*values: str) -> pd.DataFrame:
    return pd.DataFrame(columns=[*KEYS, "step", *values])
