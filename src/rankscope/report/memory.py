"""Figures of memory, on the CPU and on a GPU: against rank by part, against steps, against time."""

from functools import partial
from typing import Any

import altair as alt
import pandas as pd

from rankscope.analysis.costs import cpu_memory
from rankscope.report import charts
from rankscope.report.figures import Figure, Figures, curve_numbers, numbers, say
from rankscope.report.frames import KEYS, bin_steps, has_gpu, mean_and_range, ranks_of
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import column, duration, size, size_unit, sizes, time_unit

COLUMNS = {"cpu": "cpu", "gpu": "gpu_allocated"}  # prefix of a kind's columns in `by_candidate`
PARTS = ("process", "base", "adapter", "gradients", "optimizer", "activations", "logits", "retained")
"""Parts of a predicted peak, from the bottom of a bar to its top. A part keeps its colour in every chart."""

PART_COLUMNS = 3  # parts side by side in the legend: as many as fit on a phone
MOST_LABELLED_BARS = 8  # above more bars, numbers would overlap on a phone; the table under the chart has them
POINTS_IN_TIME = 900  # of all curves against time together: samples are many, and repeat each other


def memory_figures(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Memory of each kind against rank; without a GPU the reason stands for its figure."""
    found = [_by_rank(evidence, table, text, kind) for kind in _kinds(evidence)]
    return found if has_gpu(evidence) else [*found, text("chart.gpu_steps.absent")]


def memory_curves(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Memory of each kind against steps and against time."""
    return [_curve(evidence, table, text, kind, along) for kind in _kinds(evidence) for along in ("steps", "time")]


def _kinds(evidence: Evidence) -> list[str]:
    return ["cpu", "gpu"] if has_gpu(evidence) else ["cpu"]


def memory_by_step(evidence: Evidence, field: str) -> pd.DataFrame:
    """`candidate rank learning_rate step mean low high` of a memory field, in bytes, over the samples of each training
    step and all repeats."""
    samples = evidence.samples
    if not samples.empty:
        samples = samples[(samples["phase"] == "train") & samples["step"].notna() & samples[field].notna()]
    if samples.empty:
        return samples
    return mean_and_range(bin_steps(samples.astype({field: "float64"})).frame, field)


def memory_by_time(evidence: Evidence, field: str) -> pd.DataFrame:
    """`candidate rank learning_rate seconds phase mean low high` of a memory field, in bytes, over the life of each
    rank's first profile: loading, warm-up, training and evaluation. A point is the maximum of its time slice."""
    samples = evidence.samples
    if not samples.empty:
        samples = samples[(samples["repeat"] == 0) & samples[field].notna()]
    if samples.empty:
        return samples
    points = max(30, POINTS_IN_TIME // samples["rank"].nunique())
    width = max(float(samples["seconds"].max()) / points, 1e-3)
    spans = samples.assign(span=(samples["seconds"] // width).astype("int64"), value=samples[field].astype("float64"))
    highest = spans.groupby([*KEYS, "span"], as_index=False).agg(phase=("phase", "last"), mean=("value", "max"))
    highest["seconds"] = highest.pop("span") * width
    return highest.assign(low=highest["mean"], high=highest["mean"])


def predicted_parts(evidence: Evidence, kind: str) -> pd.DataFrame:
    """Predicted peak of each rank (rows), in bytes, by its parts (columns, in the order of `PARTS`), without those that
    no rank has. Empty without a prediction for this kind of memory."""
    device = "cuda" if kind == "gpu" else "cpu"
    known = evidence.prediction.get("candidates", {}) if evidence.prediction.get("device") == device else {}
    candidates = {one.rank: known[one.name] for one in evidence.spec.candidates() if one.name in known}
    parts = {rank: found["parts"] for rank, found in candidates.items() if found["parts"]}
    table = pd.DataFrame.from_dict(parts, orient="index", columns=PARTS).rename_axis("rank")
    return table.loc[:, table.any()]


def _by_rank(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str) -> Figure | str:
    """Measured memory beside its prediction. Either may be unknown; the table has a row per rank, with the parts of its
    predicted peak, their sum, and what was measured."""
    title, parts = text(f"chart.{kind}_memory.title"), predicted_parts(evidence, kind)
    fields = {f"{COLUMNS[kind]}_mean_bytes": "average", f"{COLUMNS[kind]}_peak_bytes": "peak"}
    once = table.drop_duplicates("rank").set_index("rank")  # all learning rates of a rank have the same
    measured = once[list(fields)].rename(columns=fields).dropna()
    if measured.empty and parts.empty:
        return text("chart.not_profiled")
    predicted = parts.sum(axis="columns")
    named = parts.rename(columns=lambda part: text(f"part.{part}")).assign(**{text("prediction.predicted"): predicted})
    both = [named, measured.rename(columns=lambda end: text(f"chart.{end}"))]
    wide = pd.concat([one for one in both if not one.empty], axis="columns").sort_index().rename_axis("rank")
    columns = {str(name): column(name, sizes(values), text) for name, values in wide.items()}
    notes = {
        "chart.not_measured": measured.empty,
        "chart.measured_note": not measured.empty,
        "chart.predicted_note": not parts.empty,
        "chart.retained_note": "retained" in parts,
    }
    peaks = (predicted if measured.empty else measured["peak"]).rename("peak").reset_index()
    return Figure(
        f"{kind}-memory",
        title,
        " ".join(text(key) for key, holds in notes.items() if holds),
        say(title, peaks, "peak", size, text),
        {"": _chart(measured, parts, text, ranks_of(evidence), kind)},
        numbers(title, wide.reset_index(), columns, text),
        half=True,
    )


def _chart(measured: pd.DataFrame, parts: pd.DataFrame, text: Catalogue, ranks: list[int], kind: str) -> alt.Chart:
    """`measured` (`average peak` by rank, in bytes) as a bar for the average and a line above for the peak; beside it
    `predicted_parts` as a stacked bar. Either may be empty."""
    unit = size_unit(max([*measured["peak"], *parts.sum(axis="columns")]))
    title, rank = text(f"chart.{kind}_memory.y", unit=unit.name), {"rank:O": text("chart.rank")}
    kinds = [name for name, rows in (("predicted", parts), ("measured", measured)) if not rows.empty]
    bars = len(ranks) * len(kinds)
    width, zero = max(6, min(44, 200 // bars)), alt.Scale(zero=True)
    beside = alt.XOffset("kind:N", scale=alt.Scale(domain=kinds), sort=kinds)
    x: dict[str, Any] = {"x": charts.rank_axis(text, ranks), "xOffset": beside}
    layers, words = [], []
    if not parts.empty:
        names = {part: text(f"part.{part}") for part in PARTS}
        long = (parts / unit.factor).melt(var_name="part", ignore_index=False).reset_index().assign(kind="predicted")
        base = alt.Chart(long.assign(name=long["part"].map(names), order=long["part"].map(PARTS.index))).encode(**x)
        legend = alt.Legend(
            title=text("chart.predicted"), titleOrient="top", columns=PART_COLUMNS, symbolType="square",
            values=[names[str(part)] for part in parts],
        )  # fmt: skip
        scale = alt.Scale(domain=list(names.values()), range="ordinal")
        of_part = alt.Color("name:N", sort=None, scale=scale, legend=legend)
        tooltip = charts.tooltips({**rank, "name:N": text("chart.predicted"), "value:Q": title}, ".3~g")
        y = alt.Y("value:Q", title=title, stack="zero", scale=zero)
        stack = base.mark_bar(size=width, style="part")
        layers.append(stack.encode(y=y, color=of_part, order=alt.Order("order:Q"), tooltip=tooltip))
        total = alt.Text("sum(value):Q", format=".3r")
        words.append(base.mark_text(dy=-10).encode(y="sum(value):Q", text=total))
    if not measured.empty:
        ends = {end: measured[end] / unit.factor for end in ("average", "peak")}
        base = alt.Chart(measured.assign(kind="measured", **ends).reset_index()).encode(**x)
        tooltip = charts.tooltips(rank | {f"{end}:Q": text(f"chart.{end}") for end in ends})
        coloured = base.encode(color=charts.colour(ranks), tooltip=tooltip)
        y = alt.Y("average:Q", title=title, scale=zero)
        layers.append(coloured.mark_bar(opacity=0.45, size=width).encode(y=y))
        layers.append(coloured.mark_tick(thickness=3, size=width).encode(y=alt.Y("peak:Q", title=title)))
        for end, above in (("peak", -10), ("average", 14)):
            words.append(base.mark_text(dy=above).encode(y=f"{end}:Q", text=alt.Text(f"{end}:Q", format=".3r")))
    drawn = [*layers, *words] if bars <= MOST_LABELLED_BARS else layers
    chart: alt.Chart = charts.layered(*drawn).resolve_scale(color="independent")
    return chart


def _curve(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str, along: str) -> Figure | str:
    """Memory of a kind against `steps`, or against `time`, where training is drawn thicker than what is around it."""
    title, prefix, of_time = text(f"chart.{kind}_{along}.title"), COLUMNS[kind], along == "time"
    sampled = cpu_memory(evidence.profiles) if kind == "cpu" else prefix
    frame = (memory_by_time if of_time else memory_by_step)(evidence, f"{sampled}_bytes")
    if frame.empty:
        return text("chart.not_profiled")
    ranks, unit = ranks_of(evidence), size_unit(frame["high"].max())
    y_title, by = text(f"chart.{kind}_memory.y", unit=unit.name), charts.along_steps(text)
    scaled = frame.assign(**{name: frame[name] / unit.factor for name in ("mean", "low", "high")})
    if of_time:
        time = time_unit(frame["seconds"].max(), text)
        by = charts.along("seconds", text("chart.time", unit=time.name), ".3~g")
        scaled = scaled.assign(seconds=scaled["seconds"] / time.factor)
    y_range, points = charts.reach(scaled["low"], scaled["high"]), not of_time and scaled["step"].nunique() <= 30
    layers = charts.lines(scaled, text, ranks, y_title, y_range, ".4~g", by=by, points=points)
    if of_time:
        thick = alt.Chart(scaled[scaled["phase"] == "train"]).mark_line(strokeWidth=4, opacity=0.45)
        y = charts.y_axis(y_title, y_range)
        layers.insert(0, thick.encode(x=by.x, y=y("mean"), color=charts.colour(ranks)))
    alternative = say(title, table, f"{prefix}_{'peak' if of_time else 'mean'}_bytes", size, text)
    places: dict[str, Any] = {"along": "seconds", "place": partial(duration, text=text)} if of_time else {}
    table_of = curve_numbers(title, frame, "mean", sizes(frame["mean"]), text, **places)
    note = text("chart.time_note" if of_time else f"chart.{kind}_steps.note")
    return Figure(f"{kind}-memory-{along}", title, note, alternative, {"": charts.layered(*layers)}, table_of)
