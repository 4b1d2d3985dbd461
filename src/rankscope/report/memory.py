"""The figures of memory, on the CPU and on a GPU: against rank by part, against steps, against time."""

import math

import pandas as pd

from rankscope.report import charts, charts_by_rank
from rankscope.report import frames as series
from rankscope.report.charts_by_rank import PARTS
from rankscope.report.figures import Figure, Panel, absent, by_rate, curve_numbers, numbers, ranks_of, say
from rankscope.report.frames import has_gpu
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, duration, known, size, size_unit, time_unit

COLUMNS = {"cpu": "rss", "gpu": "gpu_allocated"}
"""What is shown of each kind of memory: the begin of its columns in profiles and samples."""


def memory_figures(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> list[Figure]:
    """Those of a GPU only where there is one; without one, a figure says so."""
    kinds = ["cpu", "gpu"] if has_gpu(evidence) else ["cpu"]
    found = [_by_rank(evidence, table, text, kind) for kind in kinds]
    for kind in kinds:
        found += [_by_step(evidence, table, text, kind), _by_time(evidence, table, text, kind)]
    if "gpu" not in kinds:
        found.append(absent("gpu-memory-steps", text("chart.gpu_steps.title"), text("chart.gpu_steps.absent")))
    return found


def predicted_parts(evidence: Evidence, kind: str, text: Catalogue) -> pd.DataFrame:
    """One row a part of a rank's predicted peak: `rank part name order bytes`; empty where none was predicted for this
    kind of memory. Parts that no rank has are left out.
    """
    device = "cuda" if kind == "gpu" else "cpu"
    candidates = evidence.prediction.get("candidates", {}) if evidence.prediction.get("device") == device else {}
    found = {
        candidate.rank: candidates[candidate.name]["parts"]
        for candidate in evidence.spec.candidates()
        if candidates.get(candidate.name) and candidates[candidate.name]["parts"]
    }
    held = [part for part in PARTS if any(parts[part] for parts in found.values())]
    rows = [
        {"rank": rank, "part": part, "name": text(f"part.{part}"), "order": order, "bytes": parts[part]}
        for rank, parts in found.items()
        for order, part in enumerate(held)
    ]
    return pd.DataFrame(rows, columns=["rank", "part", "name", "order", "bytes"])


def _by_rank(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str) -> Figure:
    name, title = f"{kind}-memory", text(f"chart.{kind}_memory.title")
    columns = [f"{COLUMNS[kind]}_mean_bytes", f"{COLUMNS[kind]}_peak_bytes"]
    known: pd.DataFrame = table[["candidate", "rank", *columns]].drop_duplicates("rank").dropna()  # whatever the rate
    measured = known.set_axis(["candidate", "rank", "average", "peak"], axis="columns")
    parts = predicted_parts(evidence, kind, text)
    if measured.empty and parts.empty:
        return absent(name, title, text(f"chart.{kind}_memory.absent"))
    predicted = parts.groupby("rank")["bytes"].sum().rename("peak").reset_index()
    unit = size_unit(max([*measured["peak"], *predicted["peak"]]))
    chart = charts_by_rank.memory_by_rank(measured, parts, text, ranks_of(evidence), kind, unit)
    said = [text(f"chart.{kind}_memory.note")] if not measured.empty else [text("chart.not_measured")]
    if not parts.empty:
        said.append(text("chart.predicted_only" if measured.empty else "chart.predicted_note"))
    if (parts["part"] == "retained").any():
        said.append(text("chart.retained_note"))
    return Figure(
        name,
        title,
        " ".join(said),
        say(title, predicted if measured.empty else measured, "peak", size, text),
        [Panel("", chart)],
        _numbers(title, measured, parts, text),
    )


def _numbers(title: str, measured: pd.DataFrame, parts: pd.DataFrame, text: Catalogue) -> Table:
    """A row a rank: the parts of its predicted peak, their sum, and what was measured."""
    names = parts.drop_duplicates("part").sort_values("order")
    by_part = parts.pivot_table(index="rank", columns="part", values="bytes")
    of_rank = measured.set_index("rank")
    headers = [text("table.rank"), *names["name"]]
    headers += [text("prediction.predicted")] if len(names) else []
    headers += [text("chart.average"), text("chart.peak")] if len(measured) else []
    rows = []
    for rank in sorted({*by_part.index, *of_rank.index}):
        found = list(by_part.loc[rank, names["part"]]) if rank in by_part.index else [math.nan] * len(names)
        values = [*found, sum(found)] if len(names) else []
        if len(measured):
            values += [of_rank[end].get(rank, math.nan) for end in ("average", "peak")]
        rows.append([str(rank), *(size(value) if known(value) else text("none") for value in values)])
    return numbers(title, headers, rows, text)


def _by_step(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str) -> Figure:
    name, title = f"{kind}-memory-steps", text(f"chart.{kind}_steps.title")
    frame, _ = series.memory(evidence, f"{COLUMNS[kind]}_bytes")
    if frame.empty:
        return absent(name, title, text("chart.cpu_steps.absent" if kind == "cpu" else "chart.gpu_steps.unsampled"))
    ranks, unit = ranks_of(evidence), size_unit(frame["high"].max())
    panels = by_rate(frame, text, lambda rows, y: charts.memory_by_step(rows, text, ranks, y, kind, unit))
    alternative = say(title, table, f"{COLUMNS[kind]}_mean_bytes", size, text)
    table_of = curve_numbers(title, frame, "mean", size, text)
    return Figure(name, title, text(f"chart.{kind}_steps.note"), alternative, panels, table_of)


def _by_time(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str) -> Figure:
    name, title = f"{kind}-memory-time", text(f"chart.{kind}_time.title")
    frame = series.memory_by_time(evidence, f"{COLUMNS[kind]}_bytes")
    if frame.empty:
        return absent(name, title, text("chart.cpu_steps.absent" if kind == "cpu" else "chart.gpu_steps.unsampled"))
    ranks, unit = ranks_of(evidence), size_unit(frame["high"].max())
    time = time_unit(frame["seconds"].max(), text)
    panels = by_rate(frame, text, lambda rows, y: charts.memory_by_time(rows, text, ranks, y, kind, unit, time))
    alternative = say(title, table, f"{COLUMNS[kind]}_peak_bytes", size, text)
    table_of = curve_numbers(
        title, frame, "mean", size, text, along="seconds", place=lambda seconds: duration(seconds, text)
    )
    return Figure(name, title, text("chart.time_note"), alternative, panels, table_of)
