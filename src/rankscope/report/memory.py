"""Figures of memory, on the CPU and on a GPU: against rank by part, against steps, against time."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import altair as alt
import pandas as pd

from rankscope.analysis.costs import cpu_memory
from rankscope.report import charts
from rankscope.report.figures import Figure, Figures, Missing, Panel, curve_numbers, numbers, say
from rankscope.report.frames import KEYS, bin_steps, has_gpu, mean_and_range, ranks_of
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, Unit, duration, shown, size, size_unit, sizes, time_unit

COLUMNS = {"cpu": "cpu", "gpu": "gpu_allocated"}  # prefix of a kind's columns in `by_candidate`
PARTS = ("process", "base", "adapter", "gradients", "optimizer", "activations", "logits", "retained")
"""Parts of a predicted peak, from the bottom of a bar to its top. A part keeps its colour in every chart."""

PART_COLUMNS = 3  # parts side by side in the legend: as many as fit on a phone
MOST_LABELLED_BARS = 8  # above more bars, numbers would overlap on a phone; the table under the chart has them
POINTS_IN_TIME = 900  # of all curves against time together: samples are many, and repeat each other


def memory_figures(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Memory of each kind against rank; without a GPU the reason stands for its figure."""
    found = [_by_rank(evidence, table, text, kind) for kind in _kinds(evidence)]
    return found if has_gpu(evidence) else [*found, Missing("gpu-memory", text("chart.gpu_steps.absent"))]


def memory_curves(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Memory of each kind against steps and against time."""
    return [_curve(evidence, table, text, kind, along) for kind in _kinds(evidence) for along in ("steps", "time")]


def _kinds(evidence: Evidence) -> list[str]:
    return ["cpu", "gpu"] if has_gpu(evidence) else ["cpu"]


def memory_by_step(evidence: Evidence, column: str) -> pd.DataFrame:
    """`candidate rank learning_rate step mean low high` of a memory column, in bytes, over the samples of each training
    step and all repeats."""
    samples = evidence.samples
    if not samples.empty:
        samples = samples[(samples["phase"] == "train") & samples["step"].notna() & samples[column].notna()]
    if samples.empty:
        return samples
    return mean_and_range(bin_steps(samples.astype({column: "float64"})).frame, column)


def memory_by_time(evidence: Evidence, column: str) -> pd.DataFrame:
    """`candidate rank learning_rate seconds phase mean low high` of a memory column, in bytes, over the life of each
    rank's first profile: loading, warm-up, training and evaluation. A point is the maximum of its time slice."""
    samples = evidence.samples
    if not samples.empty:
        samples = samples[(samples["repeat"] == 0) & samples[column].notna()]
    if samples.empty:
        return pd.DataFrame()
    points = max(30, POINTS_IN_TIME // samples["rank"].nunique())
    width = max(float(samples["seconds"].max()) / points, 1e-3)
    spans = samples.assign(span=(samples["seconds"] // width).astype("int64"), value=samples[column].astype("float64"))
    highest = spans.groupby([*KEYS, "span"], as_index=False).agg(phase=("phase", "last"), mean=("value", "max"))
    highest["seconds"] = highest.pop("span") * width
    return highest.assign(low=highest["mean"], high=highest["mean"])


def predicted_parts(evidence: Evidence, kind: str, text: Catalogue) -> pd.DataFrame:
    """`rank part name order bytes`: one row per part of a rank's predicted peak. Empty without a prediction for this
    kind of memory; parts that no rank has are left out."""
    device = "cuda" if kind == "gpu" else "cpu"
    candidates = evidence.prediction.get("candidates", {}) if evidence.prediction.get("device") == device else {}
    predicted = [(candidate.rank, candidates.get(candidate.name)) for candidate in evidence.spec.candidates()]
    found = {rank: known["parts"] for rank, known in predicted if known and known["parts"]}
    held = [part for part in PARTS if any(parts[part] for parts in found.values())]
    rows = [
        {"rank": rank, "part": part, "name": text(f"part.{part}"), "order": order, "bytes": parts[part]}
        for rank, parts in found.items()
        for order, part in enumerate(held)
    ]
    return pd.DataFrame(rows, columns=["rank", "part", "name", "order", "bytes"])


def _by_rank(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str) -> Figure | Missing:
    name, title = f"{kind}-memory", text(f"chart.{kind}_memory.title")
    columns = ["rank", f"{COLUMNS[kind]}_mean_bytes", f"{COLUMNS[kind]}_peak_bytes"]
    once = table[columns].drop_duplicates("rank").dropna()  # all learning rates of a rank have the same
    measured: pd.DataFrame = once.set_axis(["rank", "average", "peak"], axis="columns")
    parts = predicted_parts(evidence, kind, text)
    if measured.empty and parts.empty:
        return Missing(name, text("chart.not_profiled"))
    predicted = parts.groupby("rank")["bytes"].sum().rename("peak").reset_index()
    unit = size_unit(max([*measured["peak"], *predicted["peak"]]))
    notes = [text("chart.not_measured")] if measured.empty else []
    if not parts.empty:
        notes.append(text("chart.predicted_note"))
    if (parts["part"] == "retained").any():
        notes.append(text("chart.retained_note"))
    return Figure(
        name,
        title,
        " ".join(notes),
        say(title, predicted if measured.empty else measured, "peak", size, text),
        [Panel("", _chart(measured, parts, text, ranks_of(evidence), kind, unit))],
        _numbers(title, measured, parts, text),
        half=True,
    )


def _numbers(title: str, measured: pd.DataFrame, parts: pd.DataFrame, text: Catalogue) -> Table:
    """A row per rank: the parts of its predicted peak, their sum, and what was measured."""
    by_part = parts.pivot_table(index="rank", columns="part", values="bytes")
    by_rank = measured.set_index("rank")
    columns: Columns = {text("table.rank"): str}

    def cell(column: "pd.Series[Any]") -> Callable[[Any], str]:
        number = sizes(column)
        return lambda rank: shown(column.get(rank, math.nan), number, text)

    for part in parts.drop_duplicates("part").sort_values("order").to_dict("records"):
        columns[part["name"]] = cell(by_part[part["part"]])
    if len(by_part):
        columns[text("prediction.predicted")] = cell(by_part.sum(axis="columns"))
    if len(by_rank):
        columns[text("chart.average")] = cell(by_rank["average"])
        columns[text("chart.peak")] = cell(by_rank["peak"])
    return numbers(title, columns, sorted({*by_part.index, *by_rank.index}), text)


def _chart(
    measured: pd.DataFrame, parts: pd.DataFrame, text: Catalogue, ranks: list[int], kind: str, unit: Unit
) -> alt.Chart:
    """`measured` (`rank average peak`, in bytes) as a bar for the average and a line above it for the peak; beside it
    `parts` (`predicted_parts`) as a stacked bar. Either may be empty."""
    measured = measured.assign(average=measured["average"] / unit.factor, peak=measured["peak"] / unit.factor)
    parts = parts.assign(value=parts["bytes"] / unit.factor)
    title = text(f"chart.{kind}_memory.y", unit=unit.name)
    kinds = [name for name, rows in (("predicted", parts), ("measured", measured)) if not rows.empty]
    bars = len(ranks) * len(kinds)
    size = max(6, min(44, 200 // bars))
    beside = alt.XOffset("kind:N", scale=alt.Scale(domain=kinds), sort=kinds)
    x = {"x": charts.rank_axis(text, ranks), "xOffset": beside}
    layers = []
    if not parts.empty:
        layers += _predicted(parts.assign(kind="predicted"), text, x, title, size, bars <= MOST_LABELLED_BARS)
    if not measured.empty:
        layers += _measured(measured.assign(kind="measured"), text, ranks, x, title, size, bars <= MOST_LABELLED_BARS)
    chart: alt.Chart = charts.layered(*layers).resolve_scale(color="independent")
    return chart


def _predicted(
    parts: pd.DataFrame, text: Catalogue, x: dict[str, Any], title: str, size: int, labelled: bool
) -> list[alt.Chart]:
    present = [text(f"part.{part}") for part in PARTS if (parts["part"] == part).any()]
    legend = alt.Legend(
        title=text("chart.predicted"), titleOrient="top", columns=PART_COLUMNS, symbolType="square", values=present
    )
    scale = alt.Scale(domain=[text(f"part.{part}") for part in PARTS], range="ordinal")
    of_part = alt.Color("name:N", sort=None, scale=scale, legend=legend)
    titles = {"rank:O": text("chart.rank"), "name:N": text("chart.predicted"), "value:Q": title}
    tooltip = charts.tooltips(titles, ".3~g")
    y = alt.Y("value:Q", title=title, stack="zero", scale=alt.Scale(zero=True))
    stack, total = alt.Chart(parts).mark_bar(size=size, style="part"), alt.Chart(parts).mark_text(dy=-10)
    layers = [
        stack.encode(**x, y=y, color=of_part, order=alt.Order("order:Q"), tooltip=tooltip),
        total.encode(**x, y="sum(value):Q", text=alt.Text("sum(value):Q", format=".3r")),
    ]
    return layers if labelled else layers[:1]


def _measured(
    values: pd.DataFrame, text: Catalogue, ranks: list[int], x: dict[str, Any], title: str, size: int, labelled: bool
) -> list[alt.Chart]:
    titles = {"rank:O": text("chart.rank"), "average:Q": text("chart.average"), "peak:Q": text("chart.peak")}
    tooltip = charts.tooltips(titles)
    base, of_rank = alt.Chart(values), charts.colour(ranks)
    average, peak = alt.Y("average:Q", title=title, scale=alt.Scale(zero=True)), alt.Y("peak:Q", title=title)
    layers = [
        base.mark_bar(opacity=0.45, size=size).encode(**x, y=average, color=of_rank, tooltip=tooltip),
        base.mark_tick(thickness=3, size=size).encode(**x, y=peak, color=of_rank, tooltip=tooltip),
        base.mark_text(dy=-10).encode(**x, y="peak:Q", text=alt.Text("peak:Q", format=".3r")),
        base.mark_text(dy=14).encode(**x, y="average:Q", text=alt.Text("average:Q", format=".3r")),
    ]
    return layers if labelled else layers[:2]


def _curve(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str, along: str) -> Figure | Missing:
    """Memory of a kind against `steps`, or against `time`, where training is drawn thicker than what is around it."""
    name, title, column = f"{kind}-memory-{along}", text(f"chart.{kind}_{along}.title"), COLUMNS[kind]
    of_time = along == "time"
    sampled = cpu_memory(evidence.profiles) if kind == "cpu" else column
    frame = (memory_by_time if of_time else memory_by_step)(evidence, f"{sampled}_bytes")
    if frame.empty:
        return Missing(name, text("chart.not_profiled"))
    ranks, unit = ranks_of(evidence), size_unit(frame["high"].max())
    y_title, axis = text(f"chart.{kind}_memory.y", unit=unit.name), charts.steps_axis(text)
    scaled = frame.assign(**{name: frame[name] / unit.factor for name in ("mean", "low", "high")})
    if of_time:
        time = time_unit(frame["seconds"].max(), text)
        axis = charts.Along("seconds", text("chart.time", unit=time.name), ".3~g", alt.Axis(tickCount=6))
        scaled = scaled.assign(seconds=scaled["seconds"] / time.factor)
    y_range, points = charts.reach(scaled["low"], scaled["high"]), not of_time and scaled["step"].nunique() <= 30
    layers = charts.lines(scaled, text, ranks, y_title, y_range, ".4~g", along=axis, points=points)
    if of_time:
        x, y = charts.x_axis(axis), charts.y_axis(y_title, y_range)
        thick = alt.Chart(scaled[scaled["phase"] == "train"]).mark_line(strokeWidth=4, opacity=0.45)
        layers.insert(0, thick.encode(x=x, y=y("mean"), color=charts.colour(ranks)))
    alternative = say(title, table, f"{column}_{'peak' if of_time else 'mean'}_bytes", size, text)
    places: dict[str, Any] = {"along": "seconds", "place": partial(duration, text=text)} if of_time else {}
    table_of = curve_numbers(title, frame, "mean", size, text, **places)
    note = text("chart.time_note" if of_time else f"chart.{kind}_steps.note")
    return Figure(name, title, note, alternative, [Panel("", charts.layered(*layers))], table_of)
