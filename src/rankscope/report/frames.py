"""Evidence as the tidy frames that the charts draw: thinned to what a screen shows, aggregated over seeds."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.comparison import judged_examples
from rankscope.study.evidence import Evidence

POINTS = 4000
"""Of all lines of one figure together, so that a page stays under its 3 MB; a line keeps 30 or more."""

POINTS_IN_TIME = 900
"""Of memory against time, of all lines together: samples are many, and say the same over and over."""

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
    curves = _usable(evidence, "train_loss")
    curves = curves[curves["step"] > 0]
    if curves.empty:
        return Series(_empty("mean", "low", "high", "smooth_mean", "smooth_low", "smooth_high"), 1)
    width = _bin_width(curves)
    binned = curves.assign(step=_bin_ends(curves, width))
    seeds = binned.groupby([*KEYS, "seed", "step"], observed=True)["train_loss"].mean().reset_index()
    window = max(3, round(seeds["step"].nunique() * SMOOTHING_SHARE))
    seeds["smooth"] = seeds.groupby([*KEYS, "seed"], observed=True)["train_loss"].transform(
        lambda losses: losses.rolling(window, center=True, min_periods=1).mean()
    )
    raw = _spread(seeds, "train_loss")
    smooth = _spread(seeds, "smooth").rename(columns=lambda name: name if name in raw.columns[:4] else f"smooth_{name}")
    return Series(raw.merge(smooth, on=[*KEYS, "step"]), width)


def heldout_loss(evidence: Evidence) -> Series:
    """`mean low high` of the held-out loss (nats) over seeds at each evaluation; step 0: before training."""
    return Series(_spread(_usable(evidence, "eval_loss"), "eval_loss"), 1)


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


def memory_by_time(evidence: Evidence, column: str) -> pd.DataFrame:
    """`candidate rank learning_rate seconds phase mean low high` of a memory column (bytes) over the life of each
    rank's first profile: loading, warm-up, training and evaluation. A point is the highest of its span.
    """
    samples = evidence.samples
    if not samples.empty:
        samples = samples[(samples["repeat"] == 0) & samples[column].notna()]
    if samples.empty:
        return pd.DataFrame(columns=[*KEYS, "seconds", "phase", "mean", "low", "high"])
    points = max(30, POINTS_IN_TIME // samples["rank"].nunique())
    width = max(float(samples["seconds"].max()) / points, 1e-3)
    spans = samples.assign(span=(samples["seconds"] // width).astype("int64"), value=samples[column].astype("float64"))
    highest = spans.groupby([*KEYS, "span"], as_index=False).agg(phase=("phase", "last"), mean=("value", "max"))
    highest["seconds"] = highest.pop("span") * width
    return highest.assign(low=highest["mean"], high=highest["mean"])


def heldout_by_seed(evidence: Evidence) -> pd.DataFrame:
    """One row a finished trial: `candidate rank learning_rate seed eval_loss` (nats).

    With several learning rates it is the loss on those held-out rows on which ranks are compared, so that the verdict's
    intervals and margin are of the same rows: see `rankscope.analysis.comparison.judged_examples`.
    """
    results, examples = evidence.results, evidence.examples
    done = results[(results["status"] == "done") & results["eval_loss"].notna()]
    columns = [*KEYS, "seed", "eval_loss"]
    if examples.empty or examples["learning_rate"].nunique() == 1:
        return done[columns].reset_index(drop=True)
    judged = examples[examples["example"].isin(judged_examples(examples)["example"])]
    sums = (
        judged.assign(total=judged["loss"] * judged["label_tokens"]).groupby("trial")[["total", "label_tokens"]].sum()
    )
    losses = done["trial"].map(sums["total"] / sums["label_tokens"])
    return done.assign(eval_loss=losses)[columns].dropna().reset_index(drop=True)


def heldout_by_candidate(evidence: Evidence, table: pd.DataFrame) -> pd.DataFrame:
    """The rows of `by_candidate` with a finished seed, with the means of `heldout_by_seed` as their `eval_loss`."""
    means = heldout_by_seed(evidence).groupby("candidate")["eval_loss"].mean()
    return table.assign(eval_loss=table["candidate"].map(means)).dropna(subset=["eval_loss"])


def measurements(evidence: Evidence, column: str) -> tuple[pd.DataFrame, bool]:
    """One row a measurement: `candidate rank learning_rate number value`, and whether profiles gave them. `column` is
    `runtime_seconds` or `tokens_per_second`.

    Without profiles, trials that had a pack to themselves tell their own time, of steps and evaluations; others
    shared it, and are left out.
    """
    profiles = rank_profiles(evidence)
    if not profiles.empty and profiles[column].notna().any():
        named = profiles[profiles[column].notna()].rename(columns={"repeat": "number", column: "value"})
        return named[[*KEYS, "number", "value"]].reset_index(drop=True), True
    results = evidence.results
    trials_in_pack = results.groupby("pack")["trial"].transform("size")
    alone = results[(trials_in_pack == 1) & (results["status"] == "done") & results["train_seconds"].notna()]
    named = alone.rename(columns={"seed": "number"})
    runtime = alone["train_seconds"] + alone["eval_seconds"].fillna(0.0)
    named["value"] = runtime if column == "runtime_seconds" else alone["tokens_per_second"]
    return named[[*KEYS, "number", "value"]].reset_index(drop=True), False


def _usable(evidence: Evidence, column: str) -> pd.DataFrame:
    """`KEYS seed step` and the column of `Evidence.curves`, where it has a value."""
    status = evidence.results.set_index("trial")[["candidate", "status"]]
    done = status[status["status"] == "done"]
    unfinished = status[~status["candidate"].isin(done["candidate"]) & (status["status"] != "diverged")]
    trials, curves = [*done.index, *unfinished.index], evidence.curves
    kept = curves["trial"].isin(trials) & curves[column].notna()
    return curves.loc[kept, [*KEYS, "seed", "step", column]]


def _spread(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    spread = rows.groupby([*KEYS, "step"], as_index=False, observed=True).agg(
        mean=(column, "mean"), low=(column, "min"), high=(column, "max")
    )
    return spread.astype({"candidate": "str"})  # no category, as in all other tables


def _bin_width(rows: pd.DataFrame) -> int:
    points = max(30, POINTS // rows["candidate"].nunique())
    return int(max(1, -(-rows["step"].max() // points)))


def _bin_ends(rows: pd.DataFrame, width: int) -> pd.Series:
    return (rows["step"].astype("int64") + width - 1) // width * width


def _empty(*values: str) -> pd.DataFrame:
    return pd.DataFrame(columns=[*KEYS, "step", *values])


COMPARED = (
    "eval_loss_low",
    "eval_loss_high",
    "regret",
    "regret_low",
    "regret_high",
    "regret_share",
    "within_margin",
)

GPU = ("gpu_allocated_mean_bytes", "gpu_allocated_peak_bytes")

COSTS = ("rss_mean_bytes", "rss_peak_bytes", *GPU, "step_seconds", "runtime_seconds")


def by_candidate(evidence: Evidence, verdict: Mapping[str, Any] | None) -> pd.DataFrame:
    """One row a candidate, in the study's order, so lowest rank first.

    Columns: `candidate rank learning_rate lora_alpha scaling trials finished trainable_params adapter_bytes
    train_loss eval_loss eval_loss_sd` and those of `COMPARED` and `COSTS`; what is not known is NaN.

    Losses (nats a label token) are means over finished trials, `eval_loss_sd` their sample standard deviation
    (NaN with one). Intervals and regret are the verdict's. Averages of memory (bytes) and runtime (seconds)
    are means over the profile's repeats, peaks are the highest repeat, `step_seconds` is the median of the
    repeats' medians. A rank is profiled once: its costs are those of each of its learning rates.
    """
    results = evidence.results
    done = results[results["status"] == "done"].groupby("candidate")
    everything = results.groupby("candidate", sort=False)
    first = everything.first()
    table = first[["rank", "learning_rate", "lora_alpha", "scaling"]].copy()
    table["trials"] = everything.size()
    table["finished"] = done.size().reindex(table.index, fill_value=0)
    table["trainable_params"] = first["trainable_params"]
    table["adapter_bytes"] = first["adapter_bytes"]
    table["train_loss"] = done["train_loss"].mean()
    table["eval_loss"] = done["eval_loss"].mean()
    table["eval_loss_sd"] = done["eval_loss"].std()
    compared = {row["candidate"]: row for row in (verdict or {}).get("comparison", [])}
    for column in COMPARED:
        known = [compared.get(name, {}).get(column) for name in table.index]
        table[column] = pd.Series(known, index=table.index, dtype="float64")
    table = table.join(_costs(rank_profiles(evidence)), on="rank")
    order = [candidate.name for candidate in evidence.spec.candidates()]
    return table.reindex([name for name in order if name in table.index]).reset_index(names="candidate")


def rank_profiles(evidence: Evidence) -> pd.DataFrame:
    """The rows of `Study.profiles` without repetition: one a repeat of a rank's profile, without the control's."""
    profiles = evidence.profiles
    return profiles if profiles.empty else profiles[~profiles["control"]].drop_duplicates(["rank", "repeat"])


def _costs(profiles: pd.DataFrame) -> pd.DataFrame:
    """One row a rank."""
    if profiles.empty:
        return pd.DataFrame(columns=list(COSTS), index=pd.Index([], name="rank", dtype="int64"), dtype="float64")
    columns = ["rss_mean_bytes", "rss_peak_bytes", *GPU, "step_seconds_median", "runtime_seconds"]
    repeats = profiles.astype(dict.fromkeys(columns, "float64")).groupby("rank")  # None without a GPU
    return pd.DataFrame(
        {
            "rss_mean_bytes": repeats["rss_mean_bytes"].mean(),
            "rss_peak_bytes": repeats["rss_peak_bytes"].max(),
            "gpu_allocated_mean_bytes": repeats["gpu_allocated_mean_bytes"].mean(),
            "gpu_allocated_peak_bytes": repeats["gpu_allocated_peak_bytes"].max(),
            "step_seconds": repeats["step_seconds_median"].median(),
            "runtime_seconds": repeats["runtime_seconds"].mean(),
        }
    )


def chosen_row(verdict: Mapping[str, Any] | None, table: pd.DataFrame) -> "pd.Series[Any] | None":
    """The row of `by_candidate` that the verdict chose, or None."""
    rows = table[table["candidate"] == (verdict or {}).get("candidate")]
    return None if rows.empty else rows.iloc[0]


def has_gpu(evidence: Evidence) -> bool:
    """Whether the study ran on a GPU: profiles tell, and the machine's device where nothing was profiled."""
    if not evidence.profiles.empty:
        return bool(evidence.profiles["gpu_allocated_peak_bytes"].notna().any())
    return str(evidence.machine.get("device") or "").startswith("cuda")
