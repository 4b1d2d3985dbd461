"""Evidence as tidy frames: candidates with their losses and costs, and curves thinned to the width of a screen."""

import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rankscope.analysis.comparison import judged_examples, without_diverged
from rankscope.analysis.costs import cpu_memory
from rankscope.study.evidence import Evidence
from rankscope.text.verdict import Verdict

POINTS = 4000  # of all lines of a figure together, so that a page stays below 3 MB; a line keeps 30 or more
KEYS = ["candidate", "rank", "learning_rate"]
LOSSES = ["train_loss", "eval_loss", "eval_perplexity", "eval_accuracy", "general_loss_after"]


class Binned(NamedTuple):
    """Rows at the end of their bin of `steps_a_point` steps."""

    frame: pd.DataFrame
    steps_a_point: int


def bin_steps(rows: pd.DataFrame) -> Binned:
    """Bins of so many steps that all lines together have at most `POINTS` points. `rows` must not be empty."""
    lines = rows[["candidate", "seed"]] if "seed" in rows else rows[["candidate"]]
    points = max(30, POINTS // len(lines.drop_duplicates()))
    width = int(max(1, -(-rows["step"].max() // points)))
    return Binned(rows.assign(step=(rows["step"].astype("int64") + width - 1) // width * width), width)


def scored_results(evidence: Evidence) -> pd.DataFrame:
    """`Study.results()`, in a study with a task with each trial's mean score, `task_score`."""
    scores = evidence.task_scores
    if scores is None:
        return evidence.results
    means = scores.astype({"score": "float64"}).groupby("trial")["score"].mean()
    return evidence.results.assign(task_score=evidence.results["trial"].map(means))


def mean_and_range(rows: pd.DataFrame, column: str) -> pd.DataFrame:
    """`candidate rank learning_rate step mean low high` of a column at each step."""
    at_step = rows.groupby([*KEYS, "step"], as_index=False, observed=True)
    found = at_step.agg(mean=(column, "mean"), low=(column, "min"), high=(column, "max"))
    return found.astype({"candidate": "str"})  # not a category, as in all other tables


def ranks_of(evidence: Evidence) -> list[int]:
    return sorted(evidence.spec.ranks)


def compared_rows(evidence: Evidence) -> set[int] | None:
    """Numbers of the held-out rows on which ranks are compared, where these are half of all; None where they are all.
    With several candidates a rank, the verdict judges on one half (`rankscope.analysis.comparison.judged_examples`),
    and all losses of a candidate are shown on that half."""
    examples = without_diverged(evidence.examples, evidence.results)
    if examples.empty:
        return None
    rows = set(judged_examples(examples)["example"])
    return rows if len(rows) < examples["example"].nunique() else None


def comparable(results: pd.DataFrame, examples: pd.DataFrame, rows: set[int] | None) -> pd.DataFrame:
    """`Study.results()` whose means can be compared: held-out metrics are those of `rows`, and losses of a candidate
    with a seed that diverged are NaN, as a mean over the other seeds would flatter it."""
    results = results.copy()
    if rows is not None:
        part = examples[examples["example"].isin(rows)]
        part = part.assign(total=part["loss"] * part["label_tokens"])
        sums = part.groupby("trial")[["total", "correct_tokens", "label_tokens"]].sum(min_count=1)
        results["eval_loss"] = results["trial"].map(sums["total"] / sums["label_tokens"])
        results["eval_accuracy"] = results["trial"].map(sums["correct_tokens"] / sums["label_tokens"])
        results["eval_perplexity"] = np.exp(results["eval_loss"].clip(upper=700.0))
    lost = results["candidate"].isin(results.loc[results["status"] == "diverged", "candidate"])
    losses = results.columns.intersection(LOSSES)
    results[losses] = results[losses].mask(lost)
    return results


def means_of(results: pd.DataFrame, first: list[str], means: list[str]) -> pd.DataFrame:
    """By candidate, in their order: the `first` columns, its numbers of trials, `trials finished diverged`, and `means`
    of columns over its finished trials, NaN without one."""
    states = {"finished": results["status"] == "done", "diverged": results["status"] == "diverged"}
    marked = results.assign(**states).groupby("candidate", sort=False)
    table = marked[first].first().assign(trials=marked.size(), **{name: marked[name].sum() for name in states})
    return table.join(results[results["status"] == "done"].groupby("candidate")[means].mean())


def heldout_by_seed(evidence: Evidence) -> pd.DataFrame:
    """One row per finished trial of a candidate that did not diverge, on `compared_rows`: `candidate rank learning_rate
    seed eval_loss` (nats)."""
    results = comparable(evidence.results, evidence.examples, compared_rows(evidence))
    done = results[(results["status"] == "done") & results["eval_loss"].notna()]
    return done[[*KEYS, "seed", "eval_loss"]].reset_index(drop=True)


def untrained_loss(evidence: Evidence, rows: set[int] | None) -> float:
    """Held-out loss before training, in nats per label token; NaN in a study of an earlier version."""
    examples = evidence.untrained
    if examples.empty:
        return math.nan
    part = examples if rows is None else examples[examples["example"].isin(rows)]
    return float(np.average(part["loss"], weights=part["label_tokens"]))


COMPARED = [
    "eval_loss_low", "eval_loss_high", "regret", "regret_low", "regret_high", "regret_share", "kept", "kept_low",
    "within_margin",
]  # fmt: skip
"""Columns that `by_candidate` takes from the verdict's comparison."""

COSTS = {
    "cpu_mean_bytes": ("cpu_mean_bytes", "mean"),
    "cpu_peak_bytes": ("cpu_peak_bytes", "max"),
    "gpu_allocated_mean_bytes": ("gpu_allocated_mean_bytes", "mean"),
    "gpu_allocated_peak_bytes": ("gpu_allocated_peak_bytes", "max"),
    "step_seconds": ("step_seconds_median", "median"),
    "runtime_seconds": ("runtime_seconds", "mean"),
}
"""Costs of `by_candidate`: a column of `with_cpu`, and its aggregation over repeats."""


def by_candidate(evidence: Evidence, verdict: Verdict, beside: Evidence | None = None) -> pd.DataFrame:
    """One row per candidate in the study's order, lowest rank first.

    Columns: `candidate rank learning_rate lora_alpha scaling trainable_params adapter_bytes trials finished diverged
    train_loss eval_loss eval_loss_sd gain few_seeds` and those of `COMPARED` and `COSTS`; NaN where a value is unknown.

    Losses (nats per label token) are means over finished trials, `eval_loss_sd` their sample standard deviation (NaN
    with one), `gain` the untrained model's held-out loss minus theirs. Held-out losses are those of the `compared_rows`
    of `beside` (default: of the evidence itself), and unknown where a seed diverged. Intervals and regret are the
    verdict's; an interval wider than what fine-tuning gains is unknown too, and `few_seeds` says so. A rank is profiled
    once: each of its learning rates has its costs, in bytes and seconds.
    """
    rows = compared_rows(beside or evidence)
    results = comparable(evidence.results, evidence.examples, rows)
    identity = ["rank", "learning_rate", "lora_alpha", "scaling", "trainable_params", "adapter_bytes"]
    table = means_of(results, identity, ["train_loss", "eval_loss"])
    table["eval_loss_sd"] = results[results["status"] == "done"].groupby("candidate")["eval_loss"].std()
    table["gain"] = untrained_loss(evidence, rows) - table["eval_loss"]
    compared = pd.DataFrame(verdict.get("comparison", []), columns=["candidate", *COMPARED])
    table = table.join(compared.set_index("candidate").astype("float64"))
    gain = verdict.get("gain") or 0.0
    for name in ("eval_loss", "regret"):
        ends = [f"{name}_low", f"{name}_high"]
        wide = (table[ends[1]] - table[ends[0]] > gain) & (gain > 0)
        table[ends] = table[ends].mask(wide)
    table["few_seeds"] = table["regret"].notna() & table["regret_high"].isna() & (len(compared) > 1)
    table = table.join(_costs(evidence), on="rank")
    order = [candidate.name for candidate in evidence.spec.candidates()]
    return table.reindex([name for name in order if name in table.index]).reset_index(names="candidate")


def best_of(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """One row of `by_candidate` per value of `keys`: the verdict's, or else that of the lowest held-out loss, or the
    first."""
    best_first = table.assign(other=table["regret"].isna()).sort_values(["other", "eval_loss"], kind="stable")
    return table.loc[best_first.drop_duplicates(keys).index.sort_values()]


def with_cpu(profiles: pd.DataFrame) -> pd.DataFrame:
    """`Study.profiles` with the memory of `cpu_memory` as `cpu_mean_bytes cpu_peak_bytes`."""
    if profiles.empty:
        return profiles
    kind = cpu_memory(profiles)
    return profiles.assign(**{f"cpu_{end}_bytes": profiles[f"{kind}_{end}_bytes"] for end in ("mean", "peak")})


def rank_profiles(evidence: Evidence) -> pd.DataFrame:
    """`with_cpu` of the evidence, with one row per repeat of a rank, without the control's."""
    profiles = with_cpu(evidence.profiles)
    return profiles if profiles.empty else profiles[~profiles["control"]].drop_duplicates(["rank", "repeat"])


def _costs(evidence: Evidence) -> pd.DataFrame:
    profiles = rank_profiles(evidence)
    if profiles.empty:
        return pd.DataFrame(columns=list(COSTS), index=pd.Index([], name="rank", dtype="int64"), dtype="float64")
    numeric = profiles.astype({column: "float64" for column, _ in COSTS.values()})  # None without a GPU
    return numeric.groupby("rank").agg(**COSTS)


def chosen_row(verdict: Verdict, table: pd.DataFrame) -> "pd.Series[Any] | None":
    rows = table[table["candidate"] == verdict.get("candidate")]
    return None if rows.empty else rows.iloc[0]


def has_gpu(evidence: Evidence) -> bool:
    """Whether the study ran on a GPU, by its profiles, or by the machine's device where nothing was profiled."""
    if not evidence.profiles.empty:
        return bool(evidence.profiles["gpu_allocated_peak_bytes"].notna().any())
    return str(evidence.machine.get("device") or "").startswith("cuda")
