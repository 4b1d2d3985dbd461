"""Figures of time: runtime against rank, and held-out loss against memory and runtime."""

from collections.abc import Callable
from functools import partial

import altair as alt
import pandas as pd

from rankscope.analysis.costs import Noise, cpu_memory, noise_of, on_front
from rankscope.report import charts
from rankscope.report.costs import noise_share
from rankscope.report.figures import Figure, Figures, Missing, Panel, numbers, say, with_rates
from rankscope.report.frames import KEYS, has_gpu, rank_profiles, ranks_of
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, duration, loss, rate, size_unit, sizes, time_unit
from rankscope.text.verdict import Verdict


def measurements(evidence: Evidence) -> tuple[pd.DataFrame, bool]:
    """`candidate rank learning_rate number value`, one row per measured runtime in seconds, and whether profiles gave
    them. Without profiles, trials that had a pack to themselves give the time of their steps and evaluations; the
    others shared theirs, and are left out."""
    profiles = rank_profiles(evidence)
    if not profiles.empty and profiles["runtime_seconds"].notna().any():
        if "rounds" in profiles:  # timed once, side by side
            profiles = profiles.drop_duplicates("rank")
        named = profiles.rename(columns={"repeat": "number", "runtime_seconds": "value"}).dropna(subset=["value"])
        return named[[*KEYS, "number", "value"]].reset_index(drop=True), True
    results = evidence.results
    trials_in_pack = results.groupby("pack")["trial"].transform("size")
    alone = results[(trials_in_pack == 1) & (results["status"] == "done") & results["train_seconds"].notna()]
    named = alone.rename(columns={"seed": "number"})
    named["value"] = alone["train_seconds"] + alone["eval_seconds"].fillna(0.0)
    return named[[*KEYS, "number", "value"]].reset_index(drop=True), False


def runtime_figure(evidence: Evidence, text: Catalogue) -> Figure | Missing:
    """Runtime against rank, with its noise."""
    name, title = "runtime", text("chart.runtime.title")
    frame, profiled = measurements(evidence)
    if frame.empty:
        return Missing(name, text("chart.runtime.absent"))
    number, unit = partial(duration, text=text), time_unit(frame["value"].max(), text)
    note = with_rates(text("chart.runtime.note" if profiled else "chart.runtime.note_trials"), frame, text)
    noise, limits = noise_of(evidence.profiles, "runtime_seconds") if profiled else None, None
    if noise is not None:
        lowest = int(frame["rank"].min())
        note = f"{note} {text('chart.noise_note', rank=lowest, floor=noise_share(noise))}"
        mean = float(frame.loc[frame["rank"] == lowest, "value"].mean()) / unit.factor
        limits = (mean / (1 + noise.floor), mean * (1 + noise.floor))
    scaled, dot = frame.assign(value=frame["value"] / unit.factor), text("chart.repeat" if profiled else "chart.seed")
    y_title = text("chart.runtime.y", unit=unit.name)
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
    return Figure(name, title, note, say(title, means, "mean", number, text), [Panel("", chart)], table, half=True)


def _cost_chart(
    frame: pd.DataFrame, text: Catalogue, ranks: list[int], title: str, dot: str, noise: tuple[float, float] | None
) -> alt.Chart:
    """`measurements` as a bar for the mean and a dot for each one, which `dot` names; `noise` is shaded."""
    values = frame.assign(rate=frame["learning_rate"].map(rate))
    x, of_rank, scale = charts.by_rank(values, text, ranks), charts.colour(ranks), alt.Scale(zero=True)
    mean = alt.Y("mean(value):Q", title=title, scale=scale)
    base = alt.Chart(values)
    bars = base.mark_bar(opacity=0.45, cornerRadiusEnd=2, size=max(6, 48 // values["learning_rate"].nunique()))
    averaged = charts.candidate_tooltip(text, {"mean(value):Q": f"{text('chart.mean')}, {title}"})
    measured = charts.candidate_tooltip(text, {"number:O": dot, "value:Q": title})
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        **x, y=alt.Y("value:Q", title=title), color=of_rank, shape=charts.shape(ranks), tooltip=measured
    )
    shaded = [] if noise is None else [charts.band(noise, lambda name: alt.Y(f"{name}:Q", title=title, scale=scale))]
    return charts.layered(bars.encode(**x, y=mean, color=of_rank, tooltip=averaged), *shaded, dots)


def trade_off_figures(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Held-out loss against peak memory, of the GPU where there is one, and against runtime."""
    kind, peak = ("gpu", "gpu_allocated_peak_bytes") if has_gpu(evidence) else ("cpu", "cpu_peak_bytes")
    known = table.dropna(subset=["eval_loss"])
    known = known.assign(chosen=known["candidate"] == (verdict or {}).get("candidate"))
    measured = peak if kind == "gpu" else f"{cpu_memory(evidence.profiles)}_peak_bytes"
    memory, time = (noise_of(evidence.profiles, column) for column in (measured, "runtime_seconds"))
    return [
        _trade_off("loss-memory", known.assign(cost=known[peak]), f"chart.trade_off.{kind}", memory, text),
        _trade_off("loss-runtime", known.assign(cost=known["runtime_seconds"]), "chart.runtime.y", time, text),
    ]


def _trade_off(name: str, known: pd.DataFrame, axis: str, noise: Noise | None, text: Catalogue) -> Figure | Missing:
    """Held-out loss of finished candidates against their `cost`, whose title is the catalogue's `axis`. There is no
    Pareto front of costs that differ by noise alone."""
    table = known.dropna(subset=["cost"])
    if len(table) < 2:
        return Missing(name, text("chart.trade_off.absent"))
    in_time, most = name == "loss-runtime", table["cost"].max()
    unit = time_unit(most, text) if in_time else size_unit(most)
    number: Callable[[float], str] = partial(duration, text=text) if in_time else sizes(table["cost"])
    alike = noise is not None and most / table["cost"].min() - 1 <= noise.floor
    frame = table.assign(front=False if alike else on_front(table, ["cost", "eval_loss"]))
    title, note = text(f"chart.trade_off.{name}"), text("chart.trade_off.note")
    columns: Columns = {
        text("table.rank"): lambda row: str(row["rank"]),
        text("table.learning_rate"): lambda row: rate(row["learning_rate"]),
        text(axis, unit=unit.name): lambda row: number(row["cost"]),
        text("table.eval_loss"): lambda row: loss(row["eval_loss"]),
    }
    if noise is not None and alike:
        alternative = note = text("chart.trade_off.alike", floor=noise_share(noise))
    else:
        columns[text("chart.trade_off.on_front")] = lambda row: text("table.yes" if row["front"] else "table.no")
        on = ", ".join(text("name.rank", rank=rank) for rank in sorted(set(frame.loc[frame["front"], "rank"])))
        alternative = text("chart.trade_off.says", title=title, ranks=on)
    table_of = numbers(title, columns, frame.to_dict("records"), text)
    chart = _trade_off_chart(frame.assign(cost=frame["cost"] / unit.factor), text, text(axis, unit=unit.name))
    return Figure(name, title, note, alternative, [Panel("", chart)], table_of, half=True)


def _trade_off_chart(table: pd.DataFrame, text: Catalogue, cost_title: str) -> alt.Chart:
    """One point per candidate, with its rank; the Pareto front joined by steps, and a ring around the chosen one. The
    axis of loss reaches as far as the compared candidates; others are arrows at its end."""
    drawn = ["rank", "learning_rate", "cost", "eval_loss", "eval_loss_low", "eval_loss_high", "front", "chosen"]
    compared = table if table["regret"].isna().all() else table.dropna(subset=["regret"])
    y_range = charts.reach(*(compared[name] for name in ("eval_loss", "eval_loss_low", "eval_loss_high")))
    shown = table[drawn].assign(rate=table["learning_rate"].map(rate), label=table["eval_loss"].map(loss))
    near, ranks = shown["eval_loss"] <= y_range[1], sorted(int(rank) for rank in set(table["rank"]))
    values, far, named = shown[near], shown[~near], shown.loc[compared.index]
    named = named.assign(label=[text("name.rank", rank=rank) for rank in named["rank"]])
    x = alt.X("cost:Q", title=cost_title, scale=alt.Scale(zero=False, nice=True, padding=24), axis=alt.Axis(grid=True))
    y, of_rank = charts.y_axis(text("table.eval_loss"), y_range), charts.colour(ranks)
    base = alt.Chart(values)
    front = base.transform_filter("datum.front").mark_line(interpolate="step-after", style="front")
    layers = [front.encode(x=x, y=y("eval_loss"), order=alt.Order("cost:Q"))] if values["front"].any() else []
    layers += charts.intervals(values, y, {"x": x, "color": of_rank}, "eval_loss", strokeWidth=1.5, opacity=0.6)
    tooltip = charts.candidate_tooltip(text, {"cost:Q": cost_title})
    tooltip += charts.tooltips({"eval_loss:Q": text("table.eval_loss")}, ".4f")
    faded = alt.condition("datum.front", alt.value(1), alt.value(0.4)) if values["front"].any() else alt.value(1)
    points = base.mark_point(filled=True, size=130).encode(x=x, y=y("eval_loss"), color=of_rank, tooltip=tooltip)
    if values["chosen"].any():  # under the points: it must not catch the pointer before them
        ring = base.transform_filter("datum.chosen").mark_point(size=420, style="chosen")
        layers.append(ring.encode(x=x, y=y("eval_loss")))
    words = alt.Chart(named).mark_text(align="left", dx=12, dy=-9).encode(x=x, y=y("eval_loss"), text="label:N")
    points = points.encode(shape=charts.shape(ranks), opacity=faded)
    return charts.layered(*layers, points, words, *charts.beyond(far, y, {"x": x}, of_rank, y_range[1]))
