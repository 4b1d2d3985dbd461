"""The charts of a report: each function takes a tidy frame and gives an `altair.Chart`. Change a chart here.

A rank has one colour, one dash and one place in every chart. Colours are Okabe and Ito's, which people with
colour vision deficiency can tell apart (https://jfly.uni-koeln.de/color/), without those too pale on their
background. Labels are the catalogue's; no string of the model or the data enters a chart.
"""

import re
from typing import Any

import altair as alt
import pandas as pd

from rankscope.report.catalogue import Catalogue
from rankscope.report.formats import Unit, rate

WIDTH, HEIGHT = 640, 280
"""Of a figure file, in pixels. On the page a chart is as wide as its column."""
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2], [1, 4], [5, 5]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
FONT = (
    "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'Apple SD Gothic Neo', 'Malgun Gothic', "
    "'Noto Sans KR', 'Noto Sans CJK KR', sans-serif"
)


def theme(dark: bool = False) -> dict[str, Any]:
    """The Vega-Lite config that all charts share; the page picks one by `prefers-color-scheme`."""
    ink, muted, grid = ("#e8e8e6", "#a8a8a4", "#383836") if dark else ("#1c1c1a", "#5c5c58", "#e6e6e2")
    light_palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b"]
    dark_palette = ["#56B4E9", "#E69F00", "#2fc79b", "#CC79A7", "#F0E442", "#D55E00", "#b5b5b5"]
    return {
        "background": "transparent" if dark else None,
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": dark_palette if dark else light_palette},
        "axis": {
            "labelColor": muted,
            "titleColor": muted,
            "titleFontWeight": "normal",
            "titleFontSize": 12,
            "labelFontSize": 12,
            "gridColor": grid,
            "domainColor": grid,
            "tickColor": grid,
            "titlePadding": 10,
            "labelPadding": 6,
            "tickCount": 6,
        },
        "axisX": {"grid": False},
        "legend": {
            "orient": "top",
            "labelColor": ink,
            "titleColor": muted,
            "titleFontWeight": "normal",
            "titleOrient": "left",
            "titlePadding": 8,
            "labelFontSize": 12,
            "titleFontSize": 12,
        },
        "title": {"color": ink, "subtitleColor": muted, "anchor": "start", "fontSize": 14, "offset": 14},
        "text": {"color": ink, "fill": ink},
        "rule": {"color": muted},
        "rect": {"color": muted, "fill": muted},
    }


def training_loss(frame: pd.DataFrame, text: Catalogue, ranks: list[int], y_range: tuple[float, float]) -> alt.Chart:
    """`step rank mean low high smooth_mean smooth_low smooth_high`; a switch chooses the smoothed curve."""
    switch = alt.param(name="smooth", value=True, bind=alt.binding_checkbox(name=text("chart.smooth")))
    shown = {
        "shown": "smooth ? datum.smooth_mean : datum.mean",
        "shown_low": "smooth ? datum.smooth_low : datum.low",
        "shown_high": "smooth ? datum.smooth_high : datum.high",
    }
    base = alt.Chart(frame).transform_calculate(**shown)
    chart = _lines(base, frame, text, ranks, text("chart.train_loss.y"), y_range, ".4f", points=False)
    return chart.add_params(switch)


def heldout_by_step(frame: pd.DataFrame, text: Catalogue, ranks: list[int], y_range: tuple[float, float]) -> alt.Chart:
    """`step rank mean low high`, in nats."""
    base = _plain(frame)
    return _lines(base, frame, text, ranks, text("chart.eval_steps.y"), y_range, ".4f", points=True)


def memory_by_step(
    frame: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    y_range: tuple[float, float],
    kind: str,
    unit: Unit,
) -> alt.Chart:
    """`step rank mean low high` in bytes; `kind` is `cpu` or `gpu`."""
    scaled = frame.assign(**{column: frame[column] / unit.factor for column in ("mean", "low", "high")})
    title = text(f"chart.{kind}_steps.y", unit=unit.name)
    scaled_range = (y_range[0] / unit.factor, y_range[1] / unit.factor)
    points = scaled["step"].nunique() <= 30
    return _lines(_plain(scaled), scaled, text, ranks, title, scaled_range, ".4~g", points=points)


def runtime(frame: pd.DataFrame, text: Catalogue, ranks: list[int], unit: Unit, dot: str) -> alt.Chart:
    """`rank learning_rate number seconds`; a bar is the mean, a dot one measurement (`dot` names it)."""
    values = frame.assign(value=frame["seconds"] / unit.factor, rate=frame["learning_rate"].map(rate))
    x = _by_rank(values, text, ranks)
    y_title = text("chart.runtime.y", unit=unit.name)
    mean = alt.Y("mean(value):Q", title=y_title, scale=alt.Scale(zero=True))
    bars = (
        alt.Chart(values)
        .mark_bar(opacity=0.45, cornerRadiusEnd=2, size=_bar_size(values))
        .encode(
            **x,
            y=mean,
            color=_colour(ranks, text),
            tooltip=_tooltip(text, values, mean_title=y_title),
        )
    )
    dots = (
        alt.Chart(values)
        .mark_point(filled=True, size=55, opacity=1)
        .encode(
            **x,
            y=alt.Y("value:Q", title=y_title),
            color=_colour(ranks, text),
            shape=_shape(ranks, text),
            tooltip=[
                alt.Tooltip("rank:O", title=text("chart.rank")),
                alt.Tooltip("rate:N", title=text("chart.learning_rate")),
                alt.Tooltip("number:O", title=dot),
                alt.Tooltip("value:Q", title=y_title, format=".4~g"),
            ],
        )
    )
    return _sized(bars + dots)


def memory_by_rank(frame: pd.DataFrame, text: Catalogue, ranks: list[int], kind: str, unit: Unit) -> alt.Chart:
    """`rank learning_rate average peak` in bytes: a bar for the average, a line above it for the peak."""
    values = frame.assign(
        average=frame["average"] / unit.factor,
        peak=frame["peak"] / unit.factor,
        rate=frame["learning_rate"].map(rate),
    )
    x = _by_rank(values, text, ranks)
    title = text(f"chart.{kind}_memory.y", unit=unit.name)
    colour = _colour(ranks, text)
    tooltip = [
        alt.Tooltip("rank:O", title=text("chart.rank")),
        alt.Tooltip("rate:N", title=text("chart.learning_rate")),
        alt.Tooltip("average:Q", title=text("chart.average"), format=".4~g"),
        alt.Tooltip("peak:Q", title=text("chart.peak"), format=".4~g"),
    ]
    base = alt.Chart(values)
    size = _bar_size(values)
    bars = base.mark_bar(opacity=0.45, size=size).encode(
        **x, y=alt.Y("average:Q", title=title, scale=alt.Scale(zero=True)), color=colour, tooltip=tooltip
    )
    peaks = base.mark_tick(thickness=3, size=size).encode(
        **x, y=alt.Y("peak:Q", title=title), color=colour, tooltip=tooltip
    )
    layers = [bars, peaks]
    if not _several_rates(values):  # numbers over bars that stand side by side would overlap
        layers.append(base.mark_text(dy=-10).encode(**x, y="peak:Q", text=alt.Text("peak:Q", format=".3r")))
        layers.append(base.mark_text(dy=14).encode(**x, y="average:Q", text=alt.Text("average:Q", format=".3r")))
    return _sized(alt.layer(*layers))


def heldout_by_rank(
    seeds: pd.DataFrame,
    candidates: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    margin: tuple[float, float] | None,
) -> alt.Chart:
    """`seeds`: `rank learning_rate seed eval_loss`; `candidates`: `rank learning_rate eval_loss
    eval_loss_low eval_loss_high` (NaN where there is no interval). `margin` is the shaded range of losses
    that are good enough (nats).
    """
    seeds = seeds.assign(rate=seeds["learning_rate"].map(rate))
    candidates = candidates.assign(rate=candidates["learning_rate"].map(rate))
    title, scale = text("chart.eval_by_rank.y"), alt.Scale(zero=False, nice=True, padding=12)
    x, colour, shape = (
        _by_rank(seeds, text, ranks),
        _colour(ranks, text),
        _shape(ranks, text),
    )
    identity = [
        alt.Tooltip("rank:O", title=text("chart.rank")),
        alt.Tooltip("rate:N", title=text("chart.learning_rate")),
    ]
    layers = []
    if margin is not None:
        band = pd.DataFrame({"from": [margin[0]], "to": [margin[1]]})
        layers.append(alt.Chart(band).mark_rect(opacity=0.13).encode(y=alt.Y("from:Q", scale=scale), y2="to:Q"))
    known = candidates[candidates["eval_loss_low"].notna() & candidates["eval_loss_high"].notna()]
    if not known.empty:
        layers.append(
            alt.Chart(known)
            .mark_rule(strokeWidth=2.5)
            .encode(**x, y=alt.Y("eval_loss_low:Q", title=title, scale=scale), y2="eval_loss_high:Q", color=colour)
        )
    layers.append(
        alt.Chart(candidates)
        .mark_point(filled=True, size=130, opacity=1)
        .encode(
            **x,
            y=alt.Y("eval_loss:Q", title=title, scale=scale),
            color=colour,
            shape=shape,
            tooltip=[
                *identity,
                alt.Tooltip("eval_loss:Q", title=text("chart.mean"), format=".4f"),
                alt.Tooltip("eval_loss_low:Q", title=text("chart.lowest"), format=".4f"),
                alt.Tooltip("eval_loss_high:Q", title=text("chart.highest"), format=".4f"),
            ],
        )
    )
    layers.append(
        alt.Chart(seeds)
        .mark_point(size=40, opacity=0.85, xOffset=-12 if _several_rates(seeds) else -18)
        .encode(
            **x,
            y=alt.Y("eval_loss:Q", title=title, scale=scale),
            color=colour,
            shape=shape,
            tooltip=[
                *identity,
                alt.Tooltip("seed:O", title=text("chart.seed")),
                alt.Tooltip("eval_loss:Q", title=title, format=".4f"),
            ],
        )
    )
    return _sized(alt.layer(*layers))


def _plain(frame: pd.DataFrame) -> alt.Chart:
    return alt.Chart(frame).transform_calculate(shown="datum.mean", shown_low="datum.low", shown_high="datum.high")


def _lines(
    base: alt.Chart,
    frame: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    title: str,
    y_range: tuple[float, float],
    number: str,
    *,
    points: bool,
) -> alt.Chart:
    """A mean line and a band for each rank; under the pointer, the values of all ranks at that step."""
    x = alt.X(
        "step:Q",
        title=text("chart.step"),
        axis=alt.Axis(format=",d", tickMinStep=1, tickCount=6),
        scale=alt.Scale(nice=False),
    )
    y = alt.Y("shown:Q", title=title, scale=alt.Scale(domain=list(y_range), zero=False, nice=True))
    colour = _colour(ranks, text, legend="symbol" if points else "stroke")
    layers = []
    if (frame["high"] > frame["low"]).any():
        low = alt.Y("shown_low:Q", title=title)
        layers.append(base.mark_area(opacity=0.15).encode(x=x, y=low, y2="shown_high:Q", color=colour))
    line = base.mark_line(strokeWidth=2, clip=True).encode(x=x, y=y, color=colour)
    if points:  # their shapes tell the ranks apart without colour; elsewhere dashes do
        marks = base.mark_point(filled=True, size=40, opacity=1)
        shape = _shape(ranks, text, legend="symbol")
        layers += [line, marks.encode(x=x, y=y, color=colour, shape=shape)]
    else:
        layers.append(line.encode(strokeDash=_dash(ranks, text)))
    present = [rank for rank in ranks if (frame["rank"] == rank).any()]
    panel = re.sub(r"\W", "_", rate(frame["learning_rate"].iloc[0]))  # panels of one file need names of their own
    nearest = alt.selection_point(
        name=f"nearest_{panel}",
        nearest=True,
        on="pointerover",
        clear="pointerout",
        fields=["step"],
        empty=False,
    )
    hover = (
        base.transform_pivot("rank", value="shown", groupby=["step"])
        .mark_rule(strokeWidth=1)
        .encode(
            x=x,
            opacity=alt.condition(nearest, alt.value(0.6), alt.value(0)),
            tooltip=[
                alt.Tooltip("step:Q", title=text("chart.step")),
                *(
                    alt.Tooltip(
                        field=str(rank),
                        type="quantitative",
                        format=number,
                        title=text("name.rank", rank=rank),
                    )
                    for rank in present
                ),
            ],
        )
        .add_params(nearest)
    )
    return _sized(alt.layer(*layers, hover))


def _sized(chart: Any) -> alt.Chart:
    sized: alt.Chart = chart.properties(width=WIDTH, height=HEIGHT)
    return sized


def _colour(ranks: list[int], text: Catalogue, *, legend: str = "") -> alt.Color:
    scale = alt.Scale(domain=ranks)
    return alt.Color("rank:N", sort=ranks, scale=scale, legend=_legend(text, legend), title=text("chart.rank"))


def _shape(ranks: list[int], text: Catalogue, *, legend: str = "") -> alt.Shape:
    scale = alt.Scale(domain=ranks, range=_cycle(SHAPES, ranks))
    return alt.Shape("rank:N", sort=ranks, scale=scale, legend=_legend(text, legend), title=text("chart.rank"))


def _dash(ranks: list[int], text: Catalogue) -> alt.StrokeDash:
    scale = alt.Scale(domain=ranks, range=_cycle(DASHES, ranks))
    legend = _legend(text, "stroke")
    return alt.StrokeDash("rank:N", sort=ranks, scale=scale, legend=legend, title=text("chart.rank"))


def _legend(text: Catalogue, kind: str) -> alt.Legend | None:
    """One legend for colour and dash (`stroke`) or colour and shape (`symbol`), or none (empty).

    Full opacity, for else the paleness of a band passes to its symbols.
    """
    if not kind:
        return None
    title = text("chart.rank")
    if kind == "stroke":
        return alt.Legend(title=title, symbolOpacity=1, symbolType="stroke", symbolSize=400)
    return alt.Legend(title=title, symbolOpacity=1, symbolStrokeWidth=0, symbolSize=90)


def _by_rank(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> dict[str, Any]:
    """Ranks side by side, and within a rank its learning rates from low to high, where there are several."""
    channels: dict[str, Any] = {
        "x": alt.X(
            "rank:N",
            sort=ranks,
            title=text("chart.rank"),
            scale=alt.Scale(domain=ranks),
            axis=alt.Axis(labelAngle=0),
        )
    }
    if _several_rates(frame):
        rates = [rate(value) for value in sorted(frame["learning_rate"].unique())]
        channels["xOffset"] = alt.XOffset("rate:N", sort=rates, scale=alt.Scale(domain=rates))
    return channels


def _several_rates(frame: pd.DataFrame) -> bool:
    return bool(frame["learning_rate"].nunique() > 1)


def _bar_size(frame: pd.DataFrame) -> int:
    return max(6, 48 // int(frame["learning_rate"].nunique()))


def _tooltip(text: Catalogue, frame: pd.DataFrame, mean_title: str) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("rank:O", title=text("chart.rank")),
        alt.Tooltip("rate:N", title=text("chart.learning_rate")),
        alt.Tooltip("mean(value):Q", title=f"{text('chart.mean')}, {mean_title}", format=".4~g"),
    ]


def _cycle(values: list[Any], ranks: list[int]) -> list[Any]:
    return [values[index % len(values)] for index in range(len(ranks))]
