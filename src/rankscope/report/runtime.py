"""Figures of time: runtime against rank, and held-out loss against memory and runtime."""

from collections.abc import Callable
from typing import Any

import altair as alt
import pandas as pd

from rankscope.analysis.costs import Noise, noise_of, on_front
from rankscope.report import charts
from rankscope.report.costs import noise_share
from rankscope.report.figures import Figure, Figures, numbers, say, with_rates
from rankscope.report.frames import KEYS, has_gpu, rank_profiles, ranks_of, with_cpu
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, column, durations, loss, rate, size_unit, sizes, time_unit
from rankscope.text.verdict import Verdict


def measurements(evidence: Evidence) -> tuple[pd.DataFrame, bool]:
    """`candidate rank learning_rate number runtime`, one row per measured runtime in seconds, and whether profiles gave
    them. Without profiles, trials that had a pack to themselves give the time of their steps and evaluations; the
    others shared theirs, and are left out."""
    profiles = rank_profiles(evidence)
    profiled = not profiles.empty and bool(profiles["runtime_seconds"].notna().any())
    if profiled:
        if "rounds" in profiles:  # timed once, side by side
            profiles = profiles.drop_duplicates("rank")
        named = profiles.rename(columns={"repeat": "number", "runtime_seconds": "runtime"})
    else:
        results = evidence.results
        trials_in_pack = results.groupby("pack")["trial"].transform("size")
        named = results[(trials_in_pack == 1) & (results["status"] == "done")].rename(columns={"seed": "number"})
        named["runtime"] = named["train_seconds"] + named["eval_seconds"].fillna(0.0)
    return named.dropna(subset=["runtime"])[[*KEYS, "number", "runtime"]].reset_index(drop=True), profiled


def runtime_figure(evidence: Evidence, text: Catalogue) -> Figure | str:
    """Runtime against rank, with its noise."""
    frame, profiled = measurements(evidence)
    if frame.empty:
        return text("chart.runtime.absent")
    noise = noise_of(evidence.profiles, "runtime_seconds") if profiled else None
    note = with_rates(text("chart.runtime.note" if profiled else "chart.runtime.note_trials"), frame, text)
    title, dot = text("chart.runtime.title"), text("chart.repeat" if profiled else "chart.seed")
    means = frame.groupby(["rank", "learning_rate"])["runtime"].agg(["mean", list]).reset_index()
    number = durations(frame["runtime"], text)
    columns: Columns = {
        text("chart.mean"): column("mean", number, text),
        text("chart.each"): lambda row: ", ".join(map(number, row["list"])),
    }
    table = numbers(title, means, columns, text)
    if noise is not None:
        note = f"{note} {text('chart.noise_note', rank=frame['rank'].min(), floor=noise_share(noise))}"
        table.rows.append([text("noise.row"), text("none"), noise_share(noise), text("none")])
    alternative = say(title, means, "mean", number, text)
    chart = _runtime_chart(frame, text, ranks_of(evidence), dot, noise)
    return Figure("runtime", title, note, alternative, {"": chart}, table, half=True)


def _runtime_chart(frame: pd.DataFrame, text: Catalogue, ranks: list[int], dot: str, noise: Noise | None) -> alt.Chart:
    """`measurements` as a bar for the mean and a dot for each one, which `dot` names; the noise around the lowest rank
    is shaded."""
    unit = time_unit(frame["runtime"].max(), text)
    values = frame.assign(rate=frame["learning_rate"].map(rate), runtime=frame["runtime"] / unit.factor)
    title, scale = text("chart.runtime.y", unit=unit.name), alt.Scale(zero=True)
    x, of_rank = charts.by_rank(values, text, ranks), charts.colour(ranks)
    base = alt.Chart(values).encode(**x, color=of_rank)
    bars = base.mark_bar(opacity=0.45, cornerRadiusEnd=2, size=max(6, 48 // values["rate"].nunique()))
    averaged = charts.candidate_tooltip(text, {"mean(runtime):Q": f"{text('chart.mean')}, {title}"})
    measured = charts.candidate_tooltip(text, {"number:O": dot, "runtime:Q": title})
    layers = [bars.encode(y=alt.Y("mean(runtime):Q", title=title, scale=scale), tooltip=averaged)]
    if noise is not None:
        mean = float(values.loc[values["rank"] == values["rank"].min(), "runtime"].mean())
        limits = (mean / (1 + noise.floor), mean * (1 + noise.floor))
        layers.append(charts.band(limits, lambda name: alt.Y(f"{name}:Q", title=title, scale=scale)))
    dots = base.mark_point(filled=True, size=55, opacity=1)
    y = alt.Y("runtime:Q", title=title)
    return charts.layered(*layers, dots.encode(y=y, shape=charts.shape(ranks), tooltip=measured))


def trade_off_figures(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Figures:
    """Held-out loss against peak memory, of the GPU where there is one, and against runtime."""
    kind, peak = ("gpu", "gpu_allocated_peak_bytes") if has_gpu(evidence) else ("cpu", "cpu_peak_bytes")
    known = table.dropna(subset=["eval_loss"])
    known = known.assign(chosen=known["candidate"] == verdict.get("candidate"))
    axes = {"loss-memory": (peak, f"chart.trade_off.{kind}"), "loss-runtime": ("runtime_seconds", "chart.runtime.y")}
    profiles = with_cpu(evidence.profiles)
    return [
        _trade_off(name, known.assign(cost=known[cost]), axis, noise_of(profiles, cost), text)
        for name, (cost, axis) in axes.items()
    ]


def _trade_off(name: str, known: pd.DataFrame, axis: str, noise: Noise | None, text: Catalogue) -> Figure | str:
    """Held-out loss of finished candidates against their `cost`, whose title is the catalogue's `axis`. There is no
    Pareto front of costs that differ by noise alone."""
    table = known.dropna(subset=["cost"])
    if len(table) < 2:
        return text("chart.trade_off.absent")
    in_time, most = name == "loss-runtime", table["cost"].max()
    unit = time_unit(most, text) if in_time else size_unit(most)
    number: Callable[[float], str] = durations(table["cost"], text) if in_time else sizes(table["cost"])
    alike = noise is not None and most / table["cost"].min() - 1 <= noise.floor
    frame = table.assign(front=False if alike else on_front(table, ["cost", "eval_loss"]))
    title, note, y_title = text(f"chart.trade_off.{name}"), text("chart.trade_off.note"), text(axis, unit=unit.name)
    columns = {y_title: column("cost", number, text), text("table.eval_loss"): column("eval_loss", loss, text)}
    if noise is not None and alike:
        alternative = note = text("chart.trade_off.alike", floor=noise_share(noise))
    else:
        columns[text("chart.trade_off.on_front")] = lambda row: text("table.yes" if row["front"] else "table.no")
        on = ", ".join(text("name.rank", rank=rank) for rank in sorted(set(frame.loc[frame["front"], "rank"])))
        alternative = text("chart.trade_off.says", title=title, ranks=on)
    table_of = numbers(title, frame, columns, text)
    chart = _trade_off_chart(frame.assign(cost=frame["cost"] / unit.factor), text, y_title)
    return Figure(name, title, note, alternative, {"": chart}, table_of, half=True)


def _trade_off_chart(table: pd.DataFrame, text: Catalogue, cost_title: str) -> alt.Chart:
    """One point per candidate, with its rank; the Pareto front joined by steps, and a ring around the chosen one. The
    axis of loss reaches as far as the compared candidates; others are arrows at its end, one a rank, as all rates of a
    rank cost the same."""
    drawn = ["rank", "learning_rate", "cost", "eval_loss", "eval_loss_low", "eval_loss_high", "front", "chosen"]
    compared = table if table["regret"].isna().all() else table.dropna(subset=["regret"])
    y_range = charts.reach(*(compared[name] for name in ("eval_loss", "eval_loss_low", "eval_loss_high")))
    shown = table[drawn].assign(rate=table["learning_rate"].map(rate), label=table["eval_loss"].map(loss))
    near, ranks = shown["eval_loss"] <= y_range[1], sorted(int(rank) for rank in set(table["rank"]))
    values, far, named = shown[near], _one_a_rank(shown[~near], text), shown.loc[compared.index]
    y_range = y_range if far.empty else charts.room_for_arrows(y_range)
    named = named.assign(label=[text("name.rank", rank=rank) for rank in named["rank"]])
    x = alt.X("cost:Q", title=cost_title, scale=alt.Scale(zero=False, nice=True, padding=24), axis=alt.Axis(grid=True))
    y, of_rank = charts.y_axis(text("table.eval_loss"), y_range), charts.colour(ranks)
    base = alt.Chart(values).encode(x=x, y=y("eval_loss"))
    layers: list[alt.Chart] = []
    opacity: Any = alt.value(1)
    if values["front"].any():
        front = base.transform_filter("datum.front").mark_line(interpolate="step-after", style="front")
        layers.append(front.encode(order=alt.Order("cost:Q")))
        opacity = alt.condition("datum.front", alt.value(1), alt.value(0.4))
    layers += charts.intervals(values, y, {"x": x, "color": of_rank}, "eval_loss", strokeWidth=1.5, opacity=0.6)
    if values["chosen"].any():  # under the points: it must not catch the pointer before them
        layers.append(base.transform_filter("datum.chosen").mark_point(size=420, style="chosen"))
    tooltip = charts.candidate_tooltip(text, {"cost:Q": cost_title})
    tooltip += charts.tooltips({"eval_loss:Q": text("table.eval_loss")}, ".4f")
    points = base.mark_point(filled=True, size=130)
    layers.append(points.encode(color=of_rank, shape=charts.shape(ranks), opacity=opacity, tooltip=tooltip))
    words = alt.Chart(named).mark_text(align="left", dx=12, dy=-9).encode(x=x, y=y("eval_loss"), text="label:N")
    return charts.layered(*layers, words, *charts.beyond(far, {"x": x}, ranks))


def _one_a_rank(far: pd.DataFrame, text: Catalogue) -> pd.DataFrame:
    """The row of the lowest loss of each rank; where there are more, its label says that it is the lowest."""
    lowest = far.sort_values("eval_loss").drop_duplicates("rank")
    several = lowest["rank"].map(far["rank"].value_counts()) > 1
    return lowest.assign(label=lowest["label"].mask(several, lowest["label"].map(lambda at: text("chart.from", at=at))))
