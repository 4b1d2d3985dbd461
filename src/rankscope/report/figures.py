"""The figures of a report: which charts there are, what they say in words, what stands in for one."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from rankscope.report import charts, series
from rankscope.report.catalogue import Catalogue
from rankscope.report.formats import duration, loss, percent, rate, size, size_unit, time_unit
from rankscope.report.tables import has_gpu
from rankscope.study import Evidence


class Panel(NamedTuple):
    """One chart of a figure; `title` is empty where a figure has only one."""

    title: str
    chart: alt.Chart


class Figure(NamedTuple):
    """`name` is a file name. Without panels, `note` says in a sentence why there is nothing to draw."""

    name: str
    title: str
    note: str
    alternative: str
    panels: list[Panel]


def curve_figures(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> list[Figure]:
    """The four graphs of the original question (loss, CPU and GPU memory, runtime), and memory by rank."""
    gpu = has_gpu(evidence)
    found = [
        _training_loss(evidence, table, text),
        _memory_by_step(evidence, table, text, "cpu", "rss_bytes"),
        _memory_by_step(evidence, table, text, "gpu", "gpu_allocated_bytes") if gpu else _no_gpu(text),
        _runtime(evidence, text),
        _memory_by_rank(evidence, table, text, "cpu", "rss"),
    ]
    if gpu and table["gpu_allocated_peak_bytes"].notna().any():
        found.append(_memory_by_rank(evidence, table, text, "gpu", "gpu_allocated"))
    return found


def heldout_figures(
    evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue
) -> list[Figure]:
    """Held-out loss against rank, and against steps."""
    return [_heldout_by_rank(evidence, verdict, table, text), _heldout_by_step(evidence, table, text)]


def _training_loss(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure:
    title = text("chart.train_loss.title")
    frame, steps_a_point = series.training_loss(evidence)
    if frame.empty:
        return Figure("train-loss", title, text("chart.train_loss.absent"), "", [])
    ranks = _ranks(evidence)
    note = text("chart.train_loss.note", bins=text.count("steps", steps_a_point))
    panels = _by_rate(frame, text, lambda rows, y: charts.training_loss(rows, text, ranks, y))
    return Figure("train-loss", title, note, _say(title, table, "train_loss", loss, text), panels)


def _memory_by_step(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str, column: str) -> Figure:
    name, title = f"{kind}-memory-steps", text(f"chart.{kind}_steps.title")
    frame, _ = series.memory(evidence, column)
    if frame.empty:
        return Figure(
            name,
            title,
            text("chart.cpu_steps.absent" if kind == "cpu" else "chart.gpu_steps.unsampled"),
            "",
            [],
        )
    ranks, unit = _ranks(evidence), size_unit(frame["high"].max())
    panels = _by_rate(frame, text, lambda rows, y: charts.memory_by_step(rows, text, ranks, y, kind, unit))
    average = "rss_mean_bytes" if kind == "cpu" else "gpu_allocated_mean_bytes"
    note = text(f"chart.{kind}_steps.note")
    return Figure(name, title, note, _say(title, table, average, size, text), panels)


def _no_gpu(text: Catalogue) -> Figure:
    return Figure("gpu-memory-steps", text("chart.gpu_steps.title"), text("chart.gpu_steps.absent"), "", [])


def _runtime(evidence: Evidence, text: Catalogue) -> Figure:
    title = text("chart.runtime.title")
    frame, profiled = series.runtimes(evidence)
    if frame.empty:
        return Figure("runtime", title, text("chart.runtime.absent"), "", [])
    unit = time_unit(frame["seconds"].max(), text)
    dot = text("chart.repeat" if profiled else "chart.seed")
    chart = charts.runtime(frame, text, _ranks(evidence), unit, dot)
    means = frame.groupby(["candidate", "rank"])["seconds"].mean().reset_index()
    alternative = _say(title, means, "seconds", lambda value: duration(value, text), text)
    note = _with_rates(text("chart.runtime.note" if profiled else "chart.runtime.note_trials"), frame, text)
    return Figure("runtime", title, note, alternative, [Panel("", chart)])


def _memory_by_rank(evidence: Evidence, table: pd.DataFrame, text: Catalogue, kind: str, prefix: str) -> Figure:
    name, title = f"{kind}-memory", text(f"chart.{kind}_memory.title")
    columns = {f"{prefix}_mean_bytes": "average", f"{prefix}_peak_bytes": "peak"}
    known = table[table[f"{prefix}_peak_bytes"].notna()].drop_duplicates("rank")  # the same for its learning rates
    if known.empty:
        return Figure(name, title, text(f"chart.{kind}_memory.absent"), "", [])
    frame = known[["candidate", "rank", "learning_rate", *columns]].rename(columns=columns)
    chart = charts.memory_by_rank(frame, text, _ranks(evidence), kind, size_unit(frame["peak"].max()))
    note = _with_rates(text(f"chart.{kind}_memory.note"), frame, text)
    return Figure(name, title, note, _say(title, frame, "peak", size, text), [Panel("", chart)])


def _heldout_by_rank(
    evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue
) -> Figure:
    name, title = "heldout-loss-rank", text("chart.eval_by_rank.title")
    seeds = series.heldout_by_seed(evidence)
    if seeds.empty:
        return Figure(name, title, text("chart.eval_by_rank.absent"), "", [])
    finished = table[table["eval_loss"].notna()]
    margin, note = None, text("chart.eval_by_rank.note")
    if verdict is not None and verdict["comparison"]:
        best = min(row["eval_loss"] for row in verdict["comparison"])
        margin = (best, best * (1 + verdict["margin"]))
        note = text(
            "chart.eval_by_rank.note_margin",
            confidence=percent(verdict["confidence"]),
            margin=percent(verdict["margin"]),
        )
        if finished["learning_rate"].nunique() > 1:
            note = f"{note} {text('chart.eval_by_rank.rates')}"
    columns = ["candidate", "rank", "learning_rate", "eval_loss", "eval_loss_low", "eval_loss_high"]
    chart = charts.heldout_by_rank(seeds, finished[columns], text, _ranks(evidence), margin)
    alternative = _say(title, finished, "eval_loss", loss, text)
    return Figure(name, title, _with_rates(note, finished, text), alternative, [Panel("", chart)])


def _heldout_by_step(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure:
    title = text("chart.eval_steps.title")
    frame, _ = series.heldout_loss(evidence)
    if frame.empty:
        return Figure("heldout-loss-steps", title, text("chart.eval_steps.absent"), "", [])
    ranks = _ranks(evidence)
    panels = _by_rate(frame, text, lambda rows, y: charts.heldout_by_step(rows, text, ranks, y))
    alternative = _say(title, table, "eval_loss", loss, text)
    return Figure("heldout-loss-steps", title, text("chart.eval_steps.note"), alternative, panels)


def _by_rate(
    frame: pd.DataFrame, text: Catalogue, draw: Callable[[pd.DataFrame, tuple[float, float]], alt.Chart]
) -> list[Panel]:
    """One panel a learning rate, all with the same y axis, so that heights can be compared."""
    y_range = (float(frame["low"].min()), float(frame["high"].max()))
    rates = sorted(frame["learning_rate"].unique())
    return [
        Panel(
            text("chart.panel", rate=rate(value)) if len(rates) > 1 else "",
            draw(frame[frame["learning_rate"] == value].reset_index(drop=True), y_range),
        )
        for value in rates
    ]


def _ranks(evidence: Evidence) -> list[int]:
    return sorted(evidence.spec.ranks)


def _with_rates(note: str, frame: pd.DataFrame, text: Catalogue) -> str:
    rates = sorted(frame["learning_rate"].unique())
    return note if len(rates) == 1 else f"{note} {text('chart.rates_note', rates=', '.join(map(rate, rates)))}"


def _say(title: str, table: pd.DataFrame, column: str, number: Callable[[float], str], text: Catalogue) -> str:
    """The alternative text: the title and the final value of each rank (the best of its learning rates)."""
    lowest = table[table[column].notna()].groupby("rank")[column].min()
    values = "; ".join(text("chart.value", rank=rank, value=number(value)) for rank, value in lowest.items())
    return text("chart.values", title=title, values=values) if values else title
