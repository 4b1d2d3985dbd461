"""Costs in the report: the chosen rank beside the largest, each cost in detail, and measurement noise."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.costs import Noise, noise_floor
from rankscope.report.frames import chosen_row, has_gpu, rank_profiles
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, change, duration, known, rate, shown, size, tabulate
from rankscope.text.verdict import candidate_name

QUANTITIES = {
    "cpu_mean": "rss_mean_bytes",
    "cpu_peak": "rss_peak_bytes",
    "gpu_mean": "gpu_allocated_mean_bytes",
    "gpu_peak": "gpu_allocated_peak_bytes",
    "step_seconds": "step_seconds_median",
    "runtime": "runtime_seconds",
}
"""Costs with a stated noise, and their columns in `Study.profiles`."""

MEMORY_KINDS = ("rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")
"""Prefixes of memory columns in `Study.profiles`."""


class Saving(NamedTuple):
    """One cost of the recommended candidate beside that of the largest rank."""

    label: str
    value: str
    instead: str  # of the largest rank
    change: str
    less: bool  # by more than noise
    noise: str  # what a difference must exceed; empty for a value that is counted, not measured

    @property
    def difference(self) -> str:
        return f"{self.change}; {self.noise}" if self.noise else self.change


class Savings(NamedTuple):
    """Costs beside the largest rank's, or a note on why they are missing."""

    title: str
    savings: list[Saving]
    note: str


def savings(evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue) -> Savings:
    """Costs of the chosen candidate beside those of the largest rank in the comparison."""
    chosen = chosen_row(verdict, table)
    if chosen is None or verdict is None:
        return Savings("", [], "")
    name = max(verdict["comparison"], key=lambda row: row["rank"])["candidate"]
    largest = table[table["candidate"] == name].iloc[0]
    title = text("saving.title", name=candidate_name(verdict, name, text))
    if largest["rank"] == chosen["rank"]:
        return Savings(title, [], text("saving.none"))
    wanted: list[tuple[str, str, Callable[[float], str]]] = [
        ("gpu_peak", "gpu_allocated_peak_bytes", size),
        ("cpu_peak", "rss_peak_bytes", size),
        ("runtime", "runtime_seconds", lambda value: duration(value, text)),
        ("adapter", "adapter_bytes", size),
    ]
    found = []
    for label, column, number in wanted:
        new, old = chosen[column], largest[column]
        if not (known(new) and known(old) and old > 0):
            continue
        noise = noise_floor(evidence.profiles, column) if column in QUANTITIES.values() else None
        seen = noise is None or abs(new / old - 1) > noise.floor
        beside = text("noise.beside" if seen else "noise.within", floor=noise_share(noise)) if noise else ""
        values = text(f"saving.{label}"), number(new), number(old), change(new, old)
        found.append(Saving(*values, less=bool(new < old and seen), noise=beside))
    return Savings(title, found, "" if known(chosen["rss_peak_bytes"]) else text("saving.unmeasured"))


def noise_sentence(profiles: pd.DataFrame, text: Catalogue) -> str:
    """Noise of each cost, from the candidate that was profiled twice over; empty without one."""
    found = {name: noise for name, column in QUANTITIES.items() if (noise := noise_floor(profiles, column))}
    if not found:
        return ""
    first = next(iter(found.values()))
    items = [
        text("noise.item", floor=noise_share(noise), quantity=text(f"noise.{name}")) for name, noise in found.items()
    ]
    floors = ", ".join(items)
    return text("noise.sentence", name=text("name.rank", rank=first.rank), times=first.measurements, floors=floors)


def cost_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """Memory and time of each rank in detail, with their noise in the last rows; empty without profiles."""
    profiles = rank_profiles(evidence)
    return [] if profiles.empty else [_memory(evidence, profiles, text), _time(evidence, profiles, text)]


def _memory(evidence: Evidence, profiles: pd.DataFrame, text: Catalogue) -> Table:
    """Averages and percentiles are means over repeats, peaks are the highest repeat."""
    details = {
        "chart.average": ("{}_mean_bytes", "mean"),
        "chart.peak": ("{}_peak_bytes", "max"),
        "table.p99": ("{}_p99_bytes", "mean"),
        "table.above_average": ("{}_above_base_mean_bytes", "mean"),
        "table.above_peak": ("{}_above_base_peak_bytes", "max"),
        "table.load_peak": ("load_{}_peak_bytes", "max"),
        "table.eval_peak": ("eval_{}_peak_bytes", "max"),
    }
    kinds = [kind for kind in MEMORY_KINDS if profiles[f"{kind}_mean_bytes"].notna().any()]
    kind_header = text("table.memory_kind")
    columns: dict[str, Callable[[Any], str]] = {
        text("table.rank"): lambda row: row[0],
        kind_header: lambda row: text(f"memory.{row[1]}"),
    }
    for header, (column, how) in details.items():
        columns[text(header)] = lambda row, column=column, how=how: (  # type: ignore[misc]
            _cell(evidence, row[2], column.format(row[1]), how, size, text)
        )
    records: list[tuple[str, str, pd.DataFrame | None]]
    records = [(str(rank), kind, repeats) for rank, repeats in profiles.groupby("rank") for kind in kinds]
    records += [(text("noise.row"), kind, None) for kind in kinds]
    return tabulate(text("table.memory"), columns, records, [kind_header])


def _time(evidence: Evidence, profiles: pd.DataFrame, text: Catalogue) -> Table:
    """Percentiles of a step are medians over repeats, the rest means."""
    details: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "table.step_p10": ("step_seconds_p10", "median", "{:.3g}".format),
        "table.step_median": ("step_seconds_median", "median", "{:.3g}".format),
        "table.step_p90": ("step_seconds_p90", "median", "{:.3g}".format),
        "table.tokens_per_second": ("tokens_per_second", "mean", "{:,.0f}".format),
        "table.load_seconds": ("load_seconds", "mean", "{:.3g}".format),
        "table.energy": ("joules_per_token", "mean", "{:.3g}".format),
    }
    columns: dict[str, Callable[[Any], str]] = {text("table.rank"): lambda row: row[0]}
    for header, (column, how, number) in details.items():
        columns[text(header)] = lambda row, column=column, how=how, number=number: (  # type: ignore[misc]
            _cell(evidence, row[1], column, how, number, text)
        )
    records = [(str(rank), repeats) for rank, repeats in profiles.groupby("rank")]
    return tabulate(text("table.time"), columns, [*records, (text("noise.row"), None)])


def _cell(
    evidence: Evidence,
    repeats: pd.DataFrame | None,
    column: str,
    how: str,
    number: Callable[[float], str],
    text: Catalogue,
) -> str:
    """A column's aggregate over a rank's repeats; without repeats, its noise."""
    if column not in evidence.profiles:
        return text("none")
    if repeats is not None:
        return shown(float(repeats[column].agg(how)), number, text)
    noise = noise_floor(evidence.profiles, column)
    return noise_share(noise) if noise else text("none")


def noise_share(noise: Noise) -> str:
    """The floor as it is shown: `3.1%`, and at least `0.1%`: less would read as no noise at all."""
    return f"{max(noise.floor, 0.001):.1%}"


def prediction_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """Predicted and measured memory and time, one row per candidate; empty where no memory was predicted."""
    predicted = evidence.prediction.get("candidates", {})
    peak = "gpu_allocated_peak_bytes" if has_gpu(evidence) else "rss_peak_bytes"

    def parts(*names: str) -> Callable[[Any], str]:
        return lambda row: size(sum(row[1]["parts"][name] for name in names))

    def measured_change(row: Any) -> str:
        measured = _measured(evidence.profiles, row[0].name, peak, "max")
        return shown(measured, lambda value: change(row[1]["peak_bytes"], value), text)

    def measured(column: str, how: str, number: Callable[[float], str]) -> Callable[[Any], str]:
        return lambda row: shown(_measured(evidence.profiles, row[0].name, column, how), number, text)

    columns: dict[str, Callable[[Any], str]] = {
        "table.rank": lambda row: str(row[0].rank),
        "table.learning_rate": lambda row: rate(row[0].learning_rate),
        "prediction.base": parts("base"),
        "prediction.adapter": parts("adapter", "gradients", "optimizer"),
        "prediction.activations": parts("activations"),
        "prediction.logits": parts("logits"),
        "prediction.other": parts("process", "retained"),
        "prediction.predicted": lambda row: size(row[1]["peak_bytes"]),
        "prediction.measured": measured(peak, "max", size),
        "prediction.difference": measured_change,
        "prediction.seconds_predicted": lambda row: shown(row[1]["step_seconds"], "{:.3g}".format, text),
        "prediction.seconds_measured": measured("step_seconds_median", "median", "{:.3g}".format),
    }
    pairs = [(candidate, predicted.get(candidate.name)) for candidate in evidence.spec.candidates()]
    records = [(candidate, found) for candidate, found in pairs if found and found["parts"]]
    headed = {text(key): cell for key, cell in columns.items()}
    return [tabulate(text("prediction.title"), headed, records)] if records else []


def _measured(profiles: pd.DataFrame, candidate: str, column: str, how: str) -> float:
    """Aggregate over the candidate's own repeats, without the control's; NaN where it was not profiled."""
    if profiles.empty or column not in profiles:
        return math.nan
    own = (profiles["candidate"] == candidate) & ~profiles["control"]
    return float(profiles.loc[own, column].astype("float64").agg(how))
