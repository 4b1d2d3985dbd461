"""Costs in the report: the chosen rank beside the largest, each cost in detail, and measurement noise."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from rankscope.analysis.costs import Noise, cpu_memory, noise_of
from rankscope.report.frames import chosen_row, has_gpu, rank_profiles
from rankscope.study.evidence import Evidence
from rankscope.study.records import BUSY_PRESSURE
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import (
    Columns,
    Table,
    change,
    duration,
    fixed,
    known,
    percent,
    rate,
    shown,
    size,
    sizes,
    tabulate,
    two_digits,
)
from rankscope.text.verdict import Verdict, candidate_name

QUANTITIES = {
    "cpu_mean": "{}_mean_bytes",
    "cpu_peak": "{}_peak_bytes",
    "gpu_mean": "gpu_allocated_mean_bytes",
    "gpu_peak": "gpu_allocated_peak_bytes",
    "step_seconds": "step_seconds_median",
    "runtime": "runtime_seconds",
}
"""Costs with a stated noise, and their columns in `Study.profiles`; {} is `cpu_memory`."""

MEMORY_KINDS = ("private", "mapped", "rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")
"""Prefixes of columns in `Study.profiles`."""

Detail = tuple[str, str]
"""A column of `Study.profiles`, and its aggregation over repeats."""

MEMORY_DETAILS: dict[str, Detail] = {
    "chart.average": ("{}_mean_bytes", "mean"),
    "chart.peak": ("{}_peak_bytes", "max"),
    "table.p99": ("{}_p99_bytes", "mean"),
    "table.above_average": ("{}_above_base_mean_bytes", "mean"),
    "table.above_peak": ("{}_above_base_peak_bytes", "max"),
    "table.load_peak": ("load_{}_peak_bytes", "max"),
    "table.eval_peak": ("eval_{}_peak_bytes", "max"),
}

TIME_DETAILS: dict[str, Detail] = {
    "table.step_p10": ("step_seconds_p10", "median"),
    "table.step_median": ("step_seconds_median", "median"),
    "table.step_p90": ("step_seconds_p90", "median"),
    "table.step_ratio": ("step_ratio", "mean"),
    "table.cpu_ratio": ("cpu_ratio", "mean"),
    "table.tokens_per_second": ("tokens_per_second", "mean"),
    "table.load_seconds": ("load_seconds", "mean"),
    "table.energy": ("joules_per_token", "mean"),
}


class Saving(NamedTuple):
    """One cost of the recommended candidate beside that of the largest rank."""

    label: str
    value: str
    instead: str  # value of the largest rank
    change: str  # empty within noise
    less: bool  # by more than noise
    noise: str  # what a difference must exceed; empty for a value that is counted, not measured

    @property
    def difference(self) -> str:
        return "; ".join(filter(None, [self.change, self.noise]))


class Savings(NamedTuple):
    title: str
    rows: list[Saving]
    note: str


def savings(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Savings:
    """Costs of the chosen candidate beside those of the largest rank in the comparison."""
    chosen = chosen_row(verdict, table)
    if chosen is None or verdict is None:
        return Savings("", [], "")
    name = max(verdict["comparison"], key=lambda row: row["rank"])["candidate"]
    largest = table[table["candidate"] == name].iloc[0]
    title = text("saving.title", name=candidate_name(verdict, name, text))
    if largest["rank"] == chosen["rank"]:
        return Savings(title, [], text("saving.none"))
    wanted: list[tuple[str, str, str, Callable[[float], str]]] = [
        ("gpu_peak", "gpu_allocated_peak_bytes", QUANTITIES["gpu_peak"], size),
        ("cpu_peak", "cpu_peak_bytes", QUANTITIES["cpu_peak"].format(cpu_memory(evidence.profiles)), size),
        ("runtime", "runtime_seconds", QUANTITIES["runtime"], lambda value: duration(value, text)),
        ("adapter", "adapter_bytes", "", size),
    ]
    found = []
    for label, column, measured, number in wanted:
        new, old = chosen[column], largest[column]
        if not (known(new) and known(old) and old > 0):
            continue
        noise = noise_of(evidence.profiles, measured)
        seen = noise is None or abs(new / old - 1) > noise.floor
        beside = text("noise.beside" if seen else "noise.within", floor=noise_share(noise)) if noise else ""
        values = text(f"saving.{label}"), number(new), number(old), change(new, old) if seen else ""
        found.append(Saving(*values, less=bool(new < old and seen), noise=beside))
    return Savings(title, found, "" if known(chosen["cpu_peak_bytes"]) else text("saving.unmeasured"))


def noise_sentence(profiles: pd.DataFrame, text: Catalogue) -> str:
    """Noise of each cost, and whether other programs ran while time was measured; empty where noise is unknown."""
    kind = cpu_memory(profiles)
    columns = {name: column.format(kind) for name, column in QUANTITIES.items()}
    found = {name: noise for name, column in columns.items() if (noise := noise_of(profiles, column))}
    if not found:
        return ""
    quantities = {name: text(f"noise.{name}") for name in found}
    items = [text("noise.item", floor=noise_share(noise), quantity=quantities[name]) for name, noise in found.items()]
    sentences = [text("noise.sentence", floors=", ".join(items))]
    pressure = profiles["cpu_pressure"].max() if "cpu_pressure" in profiles else None
    if known(pressure) and pressure > BUSY_PRESSURE:
        sentences.append(text("noise.busy", share=percent(pressure)))
    return " ".join(sentences)


def cost_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """Memory and time of each rank in detail, with their noise in the last rows; empty without profiles."""
    profiles = rank_profiles(evidence)
    if profiles.empty:
        return []
    measured = {kind: f"{kind}_mean_bytes" for kind in MEMORY_KINDS}
    kinds = [kind for kind, column in measured.items() if column in profiles and profiles[column].notna().any()]
    ranks = [*map(str, sorted(profiles["rank"].unique())), text("noise.row")]
    by_kind = {kind: _details(evidence, MEMORY_DETAILS, text, kind) for kind in kinds}
    memory = [
        [name, text(f"memory.{kind}"), *by_kind[kind][number]] for number, name in enumerate(ranks) for kind in kinds
    ]
    time = [[name, *cells] for name, cells in zip(ranks, _details(evidence, TIME_DETAILS, text), strict=True)]
    headers = [text(f"table.{name}") for name in ("rank", "memory_kind")]
    numeric = [True] * len(MEMORY_DETAILS)
    return [
        Table(text("table.memory"), [*headers, *map(text, MEMORY_DETAILS)], [True, False, *numeric], memory),
        Table(text("table.time"), [headers[0], *map(text, TIME_DETAILS)], [True] * (1 + len(TIME_DETAILS)), time),
    ]


def _details(evidence: Evidence, details: Mapping[str, Detail], text: Catalogue, kind: str = "") -> list[list[str]]:
    """Cells of each rank, lowest first: each detail's aggregate over its repeats; then the details' noise."""
    profiles, columns = rank_profiles(evidence), []
    for pattern, how in details.values():
        column = pattern.format(kind)
        values = profiles.assign(**({} if column in profiles else {column: math.nan})).groupby("rank")[column].agg(how)
        number = (sizes if kind else fixed)(values)
        noise = noise_of(evidence.profiles, column)
        last = noise_share(noise) if noise else text("none")
        columns.append([*(shown(float(value), number, text) for value in values), last])
    return [list(row) for row in zip(*columns, strict=True)]


def noise_share(noise: Noise) -> str:
    """The floor in percent, `3.1%`, and at least `0.10%`: less would read as no noise at all."""
    return f"{two_digits(100 * max(noise.floor, 0.001))}%"


def prediction_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """Predicted and measured memory and time, one row per candidate; empty where no memory was predicted."""
    predicted, profiles = evidence.prediction.get("candidates", {}), evidence.profiles
    pairs = [(candidate, predicted.get(candidate.name)) for candidate in evidence.spec.candidates()]
    records = [(candidate, found) for candidate, found in pairs if found and found["parts"]]
    peak = "gpu_allocated_peak_bytes" if has_gpu(evidence) else f"{cpu_memory(profiles)}_peak_bytes"

    def parts(*names: str) -> Callable[[Any], str]:
        number = sizes(sum(found["parts"][name] for name in names) for _, found in records)
        return lambda row: number(sum(row[1]["parts"][name] for name in names))

    def measured(row: Any, column: str, how: str, number: Callable[[float], str]) -> str:
        """Aggregate over the candidate's own repeats, without the control's; unknown where it was not profiled."""
        if profiles.empty or column not in profiles:
            return text("none")
        own = profiles.loc[(profiles["candidate"] == row[0].name) & ~profiles["control"], column]
        return shown(float(own.astype("float64").agg(how)), number, text)

    peaks = sizes([*(found["peak_bytes"] for _, found in records), *profiles.get(peak, [])])
    seconds = fixed([*(found["step_seconds"] for _, found in records), *profiles.get("step_seconds_median", [])])
    columns: Columns = {
        "table.rank": lambda row: str(row[0].rank),
        "table.learning_rate": lambda row: rate(row[0].learning_rate),
        "prediction.base": parts("base"),
        "prediction.adapter": parts("adapter", "gradients", "optimizer"),
        "prediction.activations": parts("activations"),
        "prediction.logits": parts("logits"),
        "prediction.other": parts("process", "retained"),
        "prediction.predicted": lambda row: peaks(row[1]["peak_bytes"]),
        "prediction.measured": lambda row: measured(row, peak, "max", peaks),
        "prediction.difference": lambda row: measured(
            row, peak, "max", lambda value: change(row[1]["peak_bytes"], value)
        ),
        "prediction.seconds_predicted": lambda row: shown(row[1]["step_seconds"], seconds, text),
        "prediction.seconds_measured": lambda row: measured(row, "step_seconds_median", "median", seconds),
    }
    headed = {text(key): cell for key, cell in columns.items()}
    return [tabulate(text("prediction.title"), headed, records)] if records else []
