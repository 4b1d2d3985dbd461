"""Evidence aggregated to one row a candidate: each number is defined here, once."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from rankscope.study.folder import Evidence

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
