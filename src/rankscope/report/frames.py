"""Evidence as tidy frames: candidates with their losses and costs, and curves thinned to the width of a screen."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.comparison import judged_examples
from rankscope.study.evidence import Evidence

POINTS = 4000  # of all curves of a figure together, so that a page stays below 3 MB; a curve keeps 30 or more

KEYS = ["candidate", "rank", "learning_rate"]


class Binned(NamedTuple):
    """Rows at the end of their bin of `steps_a_point` steps."""

    frame: pd.DataFrame
    steps_a_point: int


def bin_steps(rows: pd.DataFrame) -> Binned:
    """Bins of so many steps that all candidates together have at most `POINTS` points. `rows` must not be empty."""
    points = max(30, POINTS // rows["candidate"].nunique())
    width = int(max(1, -(-rows["step"].max() // points)))
    return Binned(rows.assign(step=(rows["step"].astype("int64") + width - 1) // width * width), width)


def mean_and_range(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """`candidate rank learning_rate step mean low high` of a column at each step."""
    found = rows.groupby([*KEYS, "step"], as_index=False, observed=True).agg(
        mean=(column, "mean"), low=(column, "min"), high=(column, "max")
    )
    return found.astype({"candidate": "str"})  # not a category, as in all other tables


def ranks_of(evidence: Evidence) -> list[int]:
    return sorted(evidence.spec.ranks)


def heldout_by_seed(evidence: Evidence) -> pd.DataFrame:
    """One row per finished trial: `candidate rank learning_rate seed eval_loss` (nats).

    With several learning rates the loss is that of the rows on which ranks are compared, as the verdict's intervals
    and margin are: see `rankscope.analysis.comparison.judged_examples`.
    """
    results, examples = evidence.results, evidence.examples
    done = results[(results["status"] == "done") & results["eval_loss"].notna()]
    columns = [*KEYS, "seed", "eval_loss"]
    if examples.empty or examples["learning_rate"].nunique() == 1:
        return done[columns].reset_index(drop=True)
    judged = examples[examples["example"].isin(judged_examples(examples)["example"])]
    weighted = judged.assign(total=judged["loss"] * judged["label_tokens"])
    sums = weighted.groupby("trial")[["total", "label_tokens"]].sum()
    losses = done["trial"].map(sums["total"] / sums["label_tokens"])
    return done.assign(eval_loss=losses)[columns].dropna().reset_index(drop=True)


def heldout_by_candidate(evidence: Evidence, table: pd.DataFrame) -> pd.DataFrame:
    """Rows of `by_candidate` with a finished seed; `eval_loss` is the mean of `heldout_by_seed`."""
    means = heldout_by_seed(evidence).groupby("candidate")["eval_loss"].mean()
    return table.assign(eval_loss=table["candidate"].map(means)).dropna(subset=["eval_loss"])


COMPARED = (
    "eval_loss_low", "eval_loss_high", "regret", "regret_low", "regret_high", "regret_share", "within_margin",
)  # fmt: skip
"""Columns that `by_candidate` takes from the verdict's comparison."""

COSTS = {
    "rss_mean_bytes": ("rss_mean_bytes", "mean"),
    "rss_peak_bytes": ("rss_peak_bytes", "max"),
    "gpu_allocated_mean_bytes": ("gpu_allocated_mean_bytes", "mean"),
    "gpu_allocated_peak_bytes": ("gpu_allocated_peak_bytes", "max"),
    "step_seconds": ("step_seconds_median", "median"),
    "runtime_seconds": ("runtime_seconds", "mean"),
}
"""Costs of `by_candidate`: a column of `Study.profiles`, and its aggregation over repeats."""


def by_candidate(evidence: Evidence, verdict: Mapping[str, Any] | None) -> pd.DataFrame:
    """One row per candidate in the study's order, lowest rank first.

    Columns: `candidate rank learning_rate lora_alpha scaling trainable_params adapter_bytes trials finished
    train_loss eval_loss eval_loss_sd` and those of `COMPARED` and `COSTS`; NaN where a value is unknown.

    Losses (nats per label token) are means over finished trials, `eval_loss_sd` their sample standard deviation
    (NaN with one). Intervals and regret are the verdict's. A rank is profiled once: each of its learning rates has its
    costs, in bytes and seconds.
    """
    results = evidence.results
    done = results[results["status"] == "done"].groupby("candidate")
    everything = results.groupby("candidate", sort=False)
    own = ["rank", "learning_rate", "lora_alpha", "scaling", "trainable_params", "adapter_bytes"]
    table = everything.first()[own].assign(trials=everything.size())
    table["finished"] = done.size().reindex(table.index, fill_value=0)
    table[["train_loss", "eval_loss"]] = done[["train_loss", "eval_loss"]].mean()
    table["eval_loss_sd"] = done["eval_loss"].std()
    compared = {row["candidate"]: row for row in (verdict or {}).get("comparison", [])}
    for column in COMPARED:
        known = [compared.get(name, {}).get(column) for name in table.index]
        table[column] = pd.Series(known, index=table.index, dtype="float64")
    table = table.join(_costs(rank_profiles(evidence)), on="rank")
    order = [candidate.name for candidate in evidence.spec.candidates()]
    return table.reindex([name for name in order if name in table.index]).reset_index(names="candidate")


def rank_profiles(evidence: Evidence) -> pd.DataFrame:
    """`Study.profiles` with one row per repeat of a rank, without the control's."""
    profiles = evidence.profiles
    return profiles if profiles.empty else profiles[~profiles["control"]].drop_duplicates(["rank", "repeat"])


def _costs(profiles: pd.DataFrame) -> pd.DataFrame:
    """Columns of `COSTS`, one row per rank."""
    if profiles.empty:
        return pd.DataFrame(columns=list(COSTS), index=pd.Index([], name="rank", dtype="int64"), dtype="float64")
    numeric = profiles.astype({column: "float64" for column, _ in COSTS.values()})  # None without a GPU
    return numeric.groupby("rank").agg(**COSTS)


def chosen_row(verdict: Mapping[str, Any] | None, table: pd.DataFrame) -> "pd.Series[Any] | None":
    """Row of `by_candidate` that the verdict chose, or None."""
    rows = table[table["candidate"] == (verdict or {}).get("candidate")]
    return None if rows.empty else rows.iloc[0]


def has_gpu(evidence: Evidence) -> bool:
    """Whether the study ran on a GPU, by its profiles, or by the machine's device where nothing was profiled."""
    if not evidence.profiles.empty:
        return bool(evidence.profiles["gpu_allocated_peak_bytes"].notna().any())
    return str(evidence.machine.get("device") or "").startswith("cuda")
