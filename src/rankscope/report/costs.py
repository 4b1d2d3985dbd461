"""What a report says of costs: what the chosen rank saves, each cost in detail, and how much of it all is noise."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.costs import Noise, noise_floor
from rankscope.report.frames import chosen_row, has_gpu, rank_profiles
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, change, duration, known, rate, size
from rankscope.text.verdict import candidate_name

QUANTITIES = {
    "cpu_mean": "rss_mean_bytes",
    "cpu_peak": "rss_peak_bytes",
    "gpu_mean": "gpu_allocated_mean_bytes",
    "gpu_peak": "gpu_allocated_peak_bytes",
    "step_seconds": "step_seconds_median",
    "runtime": "runtime_seconds",
}
"""Costs whose noise is told, and their columns in `Study.profiles`."""

MEMORY_KINDS = ("rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")
"""In the names of the columns of `Study.profiles`."""


class Saving(NamedTuple):
    """One cost of the recommended candidate beside that of the largest rank."""

    label: str
    value: str
    instead: str
    change: str
    less: bool
    """By more than noise."""
    noise: str
    """What a difference must exceed to be one; empty for what is counted, not measured."""

    @property
    def difference(self) -> str:
        return f"{self.change}; {self.noise}" if self.noise else self.change


class Savings(NamedTuple):
    """All of them, with a title; a note where there are none."""

    title: str
    savings: list[Saving]
    note: str


def savings(evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue) -> Savings:
    """The chosen candidate's costs against those of the largest rank that is compared."""
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
        instead = text("saving.instead", value=number(old))
        found.append(
            Saving(text(f"saving.{label}"), number(new), instead, change(new, old), bool(new < old and seen), beside)
        )
    return Savings(title, found, "" if known(chosen["rss_peak_bytes"]) else text("saving.unmeasured"))


def noise_sentence(profiles: pd.DataFrame, text: Catalogue) -> str:
    """How much the candidate that was profiled twice over differed from itself; empty where none was."""
    known_floors = {
        name: noise for name, column in QUANTITIES.items() if (noise := noise_floor(profiles, column)) is not None
    }
    if not known_floors:
        return ""
    first = next(iter(known_floors.values()))
    floors = ", ".join(
        text("noise.item", floor=noise_share(noise), quantity=text(f"noise.{name}"))
        for name, noise in known_floors.items()
    )
    return text("noise.sentence", name=text("name.rank", rank=first.rank), times=first.measurements, floors=floors)


def cost_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """Memory and time of each rank in detail, the last rows with their noise; empty where nothing was profiled."""
    profiles = rank_profiles(evidence)
    return [] if profiles.empty else [_memory(evidence, profiles, text), _time(evidence, profiles, text)]


def _memory(evidence: Evidence, profiles: pd.DataFrame, text: Catalogue) -> Table:
    """Averages and percentiles are means over repeats, peaks are the highest repeat."""
    columns = {
        "chart.average": ("{}_mean_bytes", "mean"),
        "chart.peak": ("{}_peak_bytes", "max"),
        "table.p99": ("{}_p99_bytes", "mean"),
        "table.above_average": ("{}_above_base_mean_bytes", "mean"),
        "table.above_peak": ("{}_above_base_peak_bytes", "max"),
        "table.load_peak": ("load_{}_peak_bytes", "max"),
        "table.eval_peak": ("eval_{}_peak_bytes", "max"),
    }
    kinds = [kind for kind in MEMORY_KINDS if profiles[f"{kind}_mean_bytes"].notna().any()]
    rows = [
        [str(rank), text(f"memory.{kind}")]
        + [_show(repeats, column.format(kind), how, size, text) for column, how in columns.values()]
        for rank, repeats in profiles.groupby("rank")
        for kind in kinds
    ]
    rows += [
        [text("noise.row"), text(f"memory.{kind}")]
        + [_floor(evidence, column.format(kind), text) for column, _ in columns.values()]
        for kind in kinds
    ]
    headers = [text("table.rank"), text("table.memory_kind"), *map(text, columns)]
    return Table(text("table.memory"), headers, [True, False] + [True] * len(columns), rows)


def _time(evidence: Evidence, profiles: pd.DataFrame, text: Catalogue) -> Table:
    """Percentiles of a step are medians over repeats, the rest means."""
    columns: dict[str, tuple[str, str, Callable[[float], str]]] = {
        "table.step_p10": ("step_seconds_p10", "median", "{:.3g}".format),
        "table.step_median": ("step_seconds_median", "median", "{:.3g}".format),
        "table.step_p90": ("step_seconds_p90", "median", "{:.3g}".format),
        "table.tokens_per_second": ("tokens_per_second", "mean", "{:,.0f}".format),
        "table.load_seconds": ("load_seconds", "mean", "{:.3g}".format),
        "table.energy": ("joules_per_token", "mean", "{:.3g}".format),
    }
    rows = [
        [str(rank), *(_show(repeats, column, how, number, text) for column, how, number in columns.values())]
        for rank, repeats in profiles.groupby("rank")
    ]
    rows.append([text("noise.row"), *(_floor(evidence, column, text) for column, _, _ in columns.values())])
    return Table(text("table.time"), [text("table.rank"), *map(text, columns)], [True] * (1 + len(columns)), rows)


def _show(repeats: pd.DataFrame, column: str, how: str, number: Callable[[float], str], text: Catalogue) -> str:
    value = float(repeats[column].agg(how)) if column in repeats else math.nan
    return number(value) if known(value) else text("none")


def _floor(evidence: Evidence, column: str, text: Catalogue) -> str:
    noise = noise_floor(evidence.profiles, column) if column in evidence.profiles else None
    return noise_share(noise) if noise else text("none")


def noise_share(noise: Noise) -> str:
    """The floor as it is shown: `3.1%`. What is smaller than a tenth of a per cent counts as that: it would read as no
    noise at all."""
    return f"{max(noise.floor, 0.001):.1%}"


def prediction_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """One row a candidate; empty where no memory was predicted."""
    predicted = evidence.prediction.get("candidates", {})
    peak = "gpu_allocated_peak_bytes" if has_gpu(evidence) else "rss_peak_bytes"
    rows = []
    for candidate in evidence.spec.candidates():
        found = predicted.get(candidate.name)
        if not found or not found["parts"]:
            continue
        parts, total, seconds = found["parts"], found["peak_bytes"], found["step_seconds"]
        measured = _measured(evidence.profiles, candidate.name, peak, "max")
        measured_seconds = _measured(evidence.profiles, candidate.name, "step_seconds_median", "median")
        adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
        rows.append(
            [
                str(candidate.rank),
                rate(candidate.learning_rate),
                *map(size, (parts["base"], adapter, parts["activations"], parts["logits"])),
                size(parts["process"] + parts["retained"]),
                size(total),
                size(measured) if known(measured) else text("none"),
                change(total, measured) if known(measured) else text("none"),
                f"{seconds:.3g}" if seconds is not None else text("none"),
                f"{measured_seconds:.3g}" if known(measured_seconds) else text("none"),
            ]
        )
    names = ["base", "adapter", "activations", "logits", "other", "predicted", "measured", "difference"]
    names += ["seconds_predicted", "seconds_measured"]
    headers = [text("table.rank"), text("table.learning_rate"), *(text(f"prediction.{name}") for name in names)]
    return [Table(text("prediction.title"), headers, [True] * len(headers), rows)] if rows else []


def _measured(profiles: pd.DataFrame, candidate: str, column: str, how: str) -> float:
    """Of the candidate's own repeats, not the control's; NaN where it was not profiled."""
    if profiles.empty or column not in profiles:
        return math.nan
    own = (profiles["candidate"] == candidate) & ~profiles["control"]
    return float(profiles.loc[own, column].astype("float64").agg(how))
