"""Costs in the report: the chosen rank beside the largest, each cost in detail, and measurement noise."""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import pandas as pd

from rankscope.analysis.costs import Noise, noise_of
from rankscope.report.frames import chosen_row, has_gpu, rank_profiles, with_cpu
from rankscope.study.evidence import Evidence
from rankscope.study.records import BUSY_PRESSURE
from rankscope.text import formats
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, column, known, shown, tabulate
from rankscope.text.verdict import Verdict, candidate_name

QUANTITIES = {
    "cpu_mean": "cpu_mean_bytes",
    "cpu_peak": "cpu_peak_bytes",
    "gpu_mean": "gpu_allocated_mean_bytes",
    "gpu_peak": "gpu_allocated_peak_bytes",
    "step_seconds": "step_seconds_median",
    "runtime": "runtime_seconds",
}
"""Costs with a stated noise, and their columns in `with_cpu`."""

MEMORY_KINDS = ("private", "mapped", "rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")
"""Prefixes of columns in `Study.profiles`."""

MEMORY_DETAILS = {
    "chart.average": ("{}_mean_bytes", "mean"),
    "chart.peak": ("{}_peak_bytes", "max"),
    "table.p99": ("{}_p99_bytes", "mean"),
    "table.above_average": ("{}_above_base_mean_bytes", "mean"),
    "table.above_peak": ("{}_above_base_peak_bytes", "max"),
    "table.load_peak": ("load_{}_peak_bytes", "max"),
    "table.eval_peak": ("eval_{}_peak_bytes", "max"),
}
TIME_DETAILS = {
    "table.step_p10": ("step_seconds_p10", "median"),
    "table.step_median": ("step_seconds_median", "median"),
    "table.step_p90": ("step_seconds_p90", "median"),
    "table.step_ratio": ("step_ratio", "mean"),
    "table.cpu_ratio": ("cpu_ratio", "mean"),
    "table.tokens_per_second": ("tokens_per_second", "mean"),
    "table.load_seconds": ("load_seconds", "mean"),
    "table.energy": ("joules_per_token", "mean"),
}
"""Details of costs by header: a column of `Study.profiles`, and its aggregation over repeats."""


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
    if chosen is None:
        return Savings("", [], "")
    name = max(verdict["comparison"], key=lambda row: row["rank"])["candidate"]
    largest = table[table["candidate"] == name].iloc[0]
    if largest["rank"] == chosen["rank"]:
        return Savings("", [], text("saving.none"))
    title = text("saving.title", name=candidate_name(verdict, name, text))
    found, profiles = [], with_cpu(evidence.profiles)
    for cost in ("gpu_peak", "cpu_peak", "runtime", "adapter"):
        field = QUANTITIES.get(cost, "adapter_bytes")
        new, old = chosen[field], largest[field]
        if not (known(new) and known(old) and old > 0):
            continue
        noise = noise_of(profiles, field) if cost in QUANTITIES else None  # an adapter's size is counted
        seen = noise is None or abs(new / old - 1) > noise.floor
        change = formats.change(new, old) if seen else ""
        beside = text("noise.beside" if seen else "noise.within", floor=noise_share(noise)) if noise else ""
        number = partial(formats.duration, text=text) if cost == "runtime" else formats.size
        values = text(f"saving.{cost}"), number(new), number(old), change
        found.append(Saving(*values, less=bool(new < old and seen), noise=beside))
    return Savings(title, found, "" if known(chosen["cpu_peak_bytes"]) else text("saving.unmeasured"))


def noise_sentence(profiles: pd.DataFrame, text: Catalogue) -> str:
    """Noise of each cost, and whether other programs ran while time was measured; empty where noise is unknown."""
    measured, items = with_cpu(profiles), []
    for name, field in QUANTITIES.items():
        if noise := noise_of(measured, field):
            items.append(text("noise.item", floor=noise_share(noise), quantity=text(f"noise.{name}")))
    if not items:
        return ""
    sentences = [text("noise.sentence", floors=", ".join(items))]
    pressure = profiles["cpu_pressure"].max() if "cpu_pressure" in profiles else None
    if known(pressure) and pressure > BUSY_PRESSURE:
        sentences.append(text("noise.busy", share=formats.percent(pressure)))
    return " ".join(sentences)


def noise_share(noise: Noise) -> str:
    """The floor in percent, `3.1%`, and at least `0.10%`: less would read as no noise at all."""
    return f"{formats.two_digits(100 * max(noise.floor, 0.001))}%"


def cost_tables(evidence: Evidence, text: Catalogue) -> list[Table]:
    """Memory and time of each rank in detail, with their noise in the last rows; empty without profiles."""
    profiles = rank_profiles(evidence)
    if profiles.empty:
        return []
    details = partial(_details, evidence, profiles, text)
    measured = profiles.columns[profiles.notna().any()]
    kinds = [kind for kind in MEMORY_KINDS if f"{kind}_mean_bytes" in measured]
    by_kind = [
        [[rank, text(f"memory.{kind}"), *cells] for rank, *cells in details(MEMORY_DETAILS, kind)] for kind in kinds
    ]
    memory = [row for rows in zip(*by_kind, strict=True) for row in rows]
    time = details(TIME_DETAILS)
    headers = [text("table.rank"), text("table.memory_kind"), *map(text, MEMORY_DETAILS)]
    of_memory = Table(text("table.memory"), headers, [header != headers[1] for header in headers], memory)
    headers = [text("table.rank"), *map(text, TIME_DETAILS)]
    return [of_memory, Table(text("table.time"), headers, [True] * len(headers), time)]


def _details(
    evidence: Evidence, profiles: pd.DataFrame, text: Catalogue, details: Mapping[str, tuple[str, str]], kind: str = ""
) -> list[list[str]]:
    """A row per rank of `profiles` (`rank_profiles`), lowest first, with each detail's aggregate over its repeats; then
    one with the details' noise."""
    fields = {pattern.format(kind): how for pattern, how in details.values()}
    table = profiles.reindex(columns=["rank", *fields]).groupby("rank").agg(fields)
    columns = [[*map(str, table.index), text("noise.row")]]
    for field, values in table.items():
        number, noise = (formats.sizes if kind else formats.fixed)(values), noise_of(evidence.profiles, str(field))
        last = noise_share(noise) if noise else text("none")
        columns.append([*(shown(value, number, text) for value in values), last])
    return [list(row) for row in zip(*columns, strict=True)]


def prediction_tables(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> list[Table]:
    """Predicted and measured memory and time, one row per candidate of `table` (`by_candidate`); empty where no memory
    was predicted."""
    rows = {
        name: found["parts"] | {"predicted": found["peak_bytes"], "seconds": found["step_seconds"]}
        for name, found in evidence.prediction.get("candidates", {}).items()
        if found["parts"]
    }
    if not rows:
        return []
    frame = table.join(pd.DataFrame.from_dict(rows, orient="index"), on="candidate", how="inner")
    frame["adapter"] += frame["gradients"] + frame["optimizer"]
    frame["other"] = frame["process"] + frame["retained"]
    frame["measured"] = frame["gpu_allocated_peak_bytes" if has_gpu(evidence) else "cpu_peak_bytes"]
    peaks = formats.sizes([*frame["predicted"], *frame["measured"]])
    seconds = formats.fixed([*frame["seconds"], *frame["step_seconds"]])
    parts = {part: formats.sizes(frame[part]) for part in ("base", "adapter", "activations", "logits", "other")}
    columns: Columns = {
        text("table.rank"): column("rank", str, text),
        text("table.learning_rate"): column("learning_rate", formats.rate, text),
        **{text(f"prediction.{part}"): column(part, number, text) for part, number in parts.items()},
        text("prediction.predicted"): column("predicted", peaks, text),
        text("prediction.measured"): column("measured", peaks, text),
        text("prediction.difference"): lambda row: shown(
            row["measured"], partial(formats.change, row["predicted"]), text
        ),
        text("prediction.seconds_predicted"): column("seconds", seconds, text),
        text("prediction.seconds_measured"): column("step_seconds", seconds, text),
    }
    return [tabulate(text("prediction.title"), columns, frame.to_dict("records"))]
