"""Figures of time: runtime and throughput against rank, and held-out loss against memory and runtime."""

from collections.abc import Callable
from functools import partial

import altair as alt
import pandas as pd

from rankscope.analysis.costs import noise_of, on_front
from rankscope.report import charts
from rankscope.report.costs import noise_share
from rankscope.report.figures import Figure, Figures, Missing, Panel, numbers, say, with_rates
from rankscope.report.frames import KEYS, has_gpu, rank_profiles, ranks_of
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Unit, duration, loss, rate, size, size_unit, time_unit
from rankscope.text.verdict import Verdict

NUMBER = Unit("", 1.0)


def runtime_figures(evidence: Evidence, text: Catalogue) -> Figures:
    """Runtime and training throughput, each with its noise."""
    runtimes, _ = measurements(evidence, "runtime_seconds")
    unit = time_unit(runtimes["value"].max(), text) if not runtimes.empty else NUMBER
    return [
        _by_rank(evidence, text, "runtime", "runtime_seconds", unit, partial(duration, text=text)),
        _by_rank(evidence, text, "tokens", "tokens_per_second", NUMBER, "{:,.0f}".format),
    ]


def measurements(evidence: Evidence, column: str) -> tuple[pd.DataFrame, bool]:
    """`candidate rank learning_rate number value`, one row per measurement, and whether profiles gave them. `column` is
    `runtime_seconds` or `tokens_per_second`. Without profiles, trials that had a pack to themselves give the time of
    their steps and evaluations; the others shared theirs, and are left out."""
    profiles = rank_profiles(evidence)
    if not profiles.empty and profiles[column].notna().any():
        if "rounds" in profiles:  # timed once, side by side
            profiles = profiles.drop_duplicates("rank")
        named = profiles[profiles[column].notna()].rename(columns={"repeat": "number", column: "value"})
        return named[[*KEYS, "number", "value"]].reset_index(drop=True), True
    results = evidence.results
    trials_in_pack = results.groupby("pack")["trial"].transform("size")
    alone = results[(trials_in_pack == 1) & (results["status"] == "done") & results["train_seconds"].notna()]
    named = alone.rename(columns={"seed": "number"})
    runtime = alone["train_seconds"] + alone["eval_seconds"].fillna(0.0)
    named["value"] = runtime if column == "runtime_seconds" else alone["tokens_per_second"]
    return named[[*KEYS, "number", "value"]].reset_index(drop=True), False


def _by_rank(
    evidence: Evidence, text: Catalogue, key: str, column: str, unit: Unit, number: Callable[[float], str]
) -> Figure | Missing:
    name, title = {"runtime": "runtime", "tokens": "tokens-per-second"}[key], text(f"chart.{key}.title")
    frame, profiled = measurements(evidence, column)
    if frame.empty:
        return Missing(name, text("chart.runtime.absent"))
    note = with_rates(text(f"chart.{key}.note" if profiled else f"chart.{key}.note_trials"), frame, text)
    noise = noise_of(evidence.profiles, column) if profiled else None
    limits = None
    if noise is not None:
        lowest = int(frame["rank"].min())
        note = f"{note} {text('chart.noise_note', rank=lowest, floor=noise_share(noise))}"
        mean = float(frame.loc[frame["rank"] == lowest, "value"].mean()) / unit.factor
        limits = (mean / (1 + noise.floor), mean * (1 + noise.floor))
    scaled = frame.assign(value=frame["value"] / unit.factor)
    dot = text("chart.repeat" if profiled else "chart.seed")
    y_title = text(f"chart.{key}.y", unit=unit.name)
    chart = _cost_chart(scaled, text, ranks_of(evidence), y_title, dot, limits)
    means = frame.groupby(["rank", "learning_rate"])["value"].agg(["mean", list]).reset_index()
    columns: Columns = {
        text("table.rank"): lambda row: str(row["rank"]),
        text("table.learning_rate"): lambda row: rate(row["learning_rate"]),
        text("chart.mean"): lambda row: number(row["mean"]),
        text("chart.each"): lambda row: ", ".join(map(number, row["list"])),
    }
    table = numbers(title, columns, means.to_dict("records"), text)
    if noise is not None:
        table.rows.append([text("noise.row"), text("none"), noise_share(noise), text("none")])
    return Figure(name, title, note, say(title, means, "mean", number, text), [Panel("", chart)], table)


def _cost_chart(
    frame: pd.DataFrame, text: Catalogue, ranks: list[int], title: str, dot: str, noise: tuple[float, float] | None
) -> alt.Chart:
    """`measurements` as a bar for the mean and a dot for each one, which `dot` names; `noise` is shaded."""
    values = frame.assign(rate=frame["learning_rate"].map(rate))
    x, of_rank = charts.by_rank(values, text, ranks), charts.colour(ranks, text)
    scale = alt.Scale(zero=True)
    mean = alt.Y("mean(value):Q", title=title, scale=scale)
    base = alt.Chart(values)
    bars = base.mark_bar(opacity=0.45, cornerRadiusEnd=2, size=max(6, 48 // values["learning_rate"].nunique()))
    averaged = charts.candidate_tooltip(text, {"mean(value):Q": f"{text('chart.mean')}, {title}"})
    measured = charts.candidate_tooltip(text, {"number:O": dot, "value:Q": title})
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        **x, y=alt.Y("value:Q", title=title), color=of_rank, shape=charts.shape(ranks, text), tooltip=measured
    )
    shaded = [] if noise is None else [charts.band(noise, scale)]
    return charts.layered(bars.encode(**x, y=mean, color=of_rank, tooltip=averaged), *shaded, dots)


def trade_off_figures(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Held-out loss against peak memory, of the GPU where there is one, and against runtime."""
    kind, peak = ("gpu", "gpu_allocated_peak_bytes") if has_gpu(evidence) else ("cpu", "cpu_peak_bytes")
    known = table.dropna(subset=["eval_loss"])
    known = known.assign(chosen=known["candidate"] == (verdict or {}).get("candidate"))
    return [
        _trade_off("loss-memory", known, peak, f"chart.trade_off.{kind}", ranks_of(evidence), text),
        _trade_off("loss-runtime", known, "runtime_seconds", "chart.runtime.y", ranks_of(evidence), text),
    ]


def _trade_off(
    name: str, known: pd.DataFrame, column: str, axis: str, ranks: list[int], text: Catalogue
) -> Figure | Missing:
    """Held-out loss of finished candidates against `column`, whose title is the catalogue's `axis`."""
    table = known.assign(cost=known[column]).dropna(subset=["cost"])
    if len(table) < 2:
        return Missing(name, text("chart.trade_off.absent"))
    in_time, most = column == "runtime_seconds", table["cost"].max()
    unit = time_unit(most, text) if in_time else size_unit(most)
    number: Callable[[float], str] = partial(duration, text=text) if in_time else size
    cost_title = text(axis, unit=unit.name)
    frame = table.assign(front=on_front(table, ["cost", "eval_loss"]))
    title, note = text(f"chart.trade_off.{name}"), text("chart.trade_off.note")
    if frame["chosen"].any():
        note = f"{note} {text('chart.trade_off.ring')}"
    columns: Columns = {
        text("table.rank"): lambda row: str(row["rank"]),
        text("table.learning_rate"): lambda row: rate(row["learning_rate"]),
        cost_title: lambda row: number(row["cost"]),
        text("table.eval_loss"): lambda row: loss(row["eval_loss"]),
        text("chart.trade_off.on_front"): lambda row: text("table.yes" if row["front"] else "table.no"),
    }
    on = ", ".join(text("name.rank", rank=rank) for rank in sorted(set(frame.loc[frame["front"], "rank"])))
    alternative = text("chart.trade_off.says", title=title, ranks=on)
    table_of = numbers(title, columns, frame.to_dict("records"), text)
    drawn = ["rank", "learning_rate", "cost", "eval_loss", "eval_loss_low", "eval_loss_high", "front", "chosen"]
    chart = _trade_off_chart(frame.assign(cost=frame["cost"] / unit.factor)[drawn], text, ranks, cost_title)
    return Figure(name, title, note, alternative, [Panel("", chart)], table_of)


def _trade_off_chart(frame: pd.DataFrame, text: Catalogue, ranks: list[int], cost_title: str) -> alt.Chart:
    """`rank learning_rate cost eval_loss eval_loss_low eval_loss_high front chosen`: one point per candidate, the
    Pareto front joined by steps, and a ring around the chosen one."""
    values = frame.assign(rate=frame["learning_rate"].map(rate))
    x = alt.X("cost:Q", title=cost_title, scale=alt.Scale(zero=False, nice=True, padding=24), axis=alt.Axis(grid=True))
    y, of_rank = charts.loss_axis(text, padding=16), charts.colour(ranks, text, legend="symbol")
    base = alt.Chart(values)
    front = base.transform_filter("datum.front").mark_line(interpolate="step-after", style="front")
    layers = [front.encode(x=x, y=y, order=alt.Order("cost:Q"))]
    layers += charts.loss_intervals(values, text, {"x": x, "color": of_rank}, padding=16, strokeWidth=1.5, opacity=0.6)
    tooltip = charts.candidate_tooltip(text, {"cost:Q": cost_title})
    tooltip += charts.tooltips({"eval_loss:Q": text("chart.eval_by_rank.y")}, ".4f")
    of_front = alt.condition("datum.front", alt.value(1), alt.value(0.4))
    of_shape = charts.shape(ranks, text, legend="symbol")
    points = base.mark_point(filled=True, size=130)
    points = points.encode(x=x, y=y, color=of_rank, shape=of_shape, opacity=of_front, tooltip=tooltip)
    if values["chosen"].any():  # under the points: it must not catch the pointer before them
        ring = base.transform_filter("datum.chosen").mark_point(size=420, style="chosen")
        layers.append(ring.encode(x=x, y=y))
    return charts.layered(*layers, points)
