"""Colours, theme, encodings and layers that charts share, as altair objects.

Labels are the catalogue's; no string of the model or the data enters a chart.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import altair as alt
import numpy as np
import pandas as pd

from rankscope.text.catalogue import Catalogue

FONT = (
    "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'Apple SD Gothic Neo', 'Malgun Gothic', "
    "'Noto Sans KR', 'Noto Sans CJK KR', sans-serif"
)

Range: TypeAlias = tuple[float, float]  # of an axis
Axis: TypeAlias = Callable[[str], alt.Y]  # an axis for any column of a frame
HEIGHT = 280  # of a chart, in pixels
ARROW_SHARE = 0.1  # of the height: an arrow at the upper end, and its label below it
LABEL_SHARE = 0.055  # of the height: the distance of two labels, which do not touch
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2], [1, 4], [5, 5]]
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def _numbered(name: str, colours: Sequence[str]) -> dict[str, str]:
    return {f"{name}-{number}": colour for number, colour in enumerate(colours)}


LIGHT: Mapping[str, str] = {
    "paper": "#fdfdfc", "raised": "#f4f4f1", "ink": "#1c1c1a", "muted": "#5c5c58", "line": "#e2e2dd",
    "accent": "#00619a", "good": "#00714f", "warning": "#8f4a00",
    **_numbered("rank", ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b"]),
    **_numbered("part", ["#8a8a86", "#332288", "#CC6677", "#DDCC77", "#882255", "#44AA99", "#117733", "#c4c4be"]),
}  # fmt: skip

DARK: Mapping[str, str] = {
    "paper": "#161615", "raised": "#20201e", "ink": "#e8e8e6", "muted": "#a8a8a4", "line": "#383836",
    "accent": "#6fc0f0", "good": "#43cda2", "warning": "#f0b454",
    **_numbered("rank", ["#56B4E9", "#E69F00", "#2fc79b", "#CC79A7", "#F0E442", "#D55E00", "#b5b5b5"]),
    **_numbered("part", ["#73736f", "#77AADD", "#FFAABB", "#EEDD88", "#EE8866", "#44BB99", "#BBCC33", "#a5a5a0"]),
}  # fmt: skip

PAGE: Mapping[str, str] = {name: f"var(--{name})" for name in LIGHT}
"""Colours of the page's charts: CSS variables, which follow the theme and paper without a redraw."""


def declarations(colours: Mapping[str, str]) -> str:
    """The colours as CSS: `--paper: #fdfdfc; --raised: …`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def _palette(name: str, colours: Mapping[str, str]) -> list[str]:
    return [colour for key, colour in colours.items() if key.startswith(f"{name}-")]


def theme(colours: Mapping[str, str] = LIGHT) -> dict[str, Any]:
    """Vega-Lite config of all charts. Screen readers read a chart's description, not each of its marks."""
    ink, muted, grid, paper = (colours[name] for name in ("ink", "muted", "line", "paper"))
    words = {"titleColor": muted, "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 12, "aria": False}
    lines = {"gridColor": grid, "domainColor": grid, "tickColor": grid, "tickCount": 6}
    on_top = {"orient": "top", "titleOrient": "left"}
    return {
        "background": None,
        "mark": {"aria": False},
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": _palette("rank", colours), "ordinal": _palette("part", colours)},
        "axis": {**words, **lines, "labelColor": muted, "titlePadding": 10, "labelPadding": 6},
        "axisX": {"grid": False},
        "legend": {**words, **on_top, "labelColor": ink, "titlePadding": 8, "rowPadding": 5},
        "title": {"color": ink, "subtitleColor": muted, "anchor": "start", "fontSize": 14, "offset": 14},
        "text": {"color": ink, "fill": ink},
        "rule": {"color": muted},
        "style": {
            "band": {"color": muted},
            "part": {"stroke": paper, "strokeWidth": 1},
            "cell-of-map": {"color": colours["accent"], "stroke": paper, "strokeWidth": 2},
            "front": {"color": muted, "strokeWidth": 1.5},
            "chosen": {"color": ink, "strokeWidth": 1.5},
        },
    }


def layered(*layers: Any) -> alt.Chart:
    layer: Any = alt.layer(*layers)
    chart: alt.Chart = layer.properties(height=HEIGHT)
    return chart


def colour(ranks: list[int]) -> alt.Color:
    return alt.Color("rank:N", sort=ranks, scale=alt.Scale(domain=ranks), legend=None)


def shape(ranks: list[int]) -> alt.Shape:
    return alt.Shape("rank:N", sort=ranks, scale=cycle(ranks, SHAPES), legend=None)


def cycle(domain: Sequence[Any], values: Sequence[Any]) -> alt.Scale:
    """Scale from the domain to the values, which repeat where there are too few."""
    return alt.Scale(domain=list(domain), range=[values[number % len(values)] for number in range(len(domain))])


def rank_axis(text: Catalogue, ranks: list[int]) -> alt.X:
    scale, axis = alt.Scale(domain=ranks), alt.Axis(labelAngle=0)
    return alt.X("rank:N", sort=ranks, title=text("chart.rank"), scale=scale, axis=axis)


def by_rank(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> dict[str, Any]:
    """Channels that put ranks side by side, and within a rank its learning rates (`rate`) from low to high."""
    channels: dict[str, Any] = {"x": rank_axis(text, ranks)}
    rates = frame.sort_values("learning_rate")["rate"].unique().tolist()
    if len(rates) > 1:
        channels["xOffset"] = alt.XOffset("rate:N", sort=rates, scale=alt.Scale(domain=rates))
    return channels


def tooltips(titles: Mapping[str, str], number: str = ".4~g") -> list[alt.Tooltip]:
    """Lines of a tooltip, by field; quantities have the format `number`."""
    return [
        alt.Tooltip(field, title=title, format=number if field.endswith(":Q") else alt.Undefined)
        for field, title in titles.items()
    ]


def candidate_tooltip(text: Catalogue, more: Mapping[str, str], number: str = ".4~g") -> list[alt.Tooltip]:
    """Tooltip of a candidate, whose frame has `rank` and `rate`, with `more` lines."""
    return tooltips({"rank:O": text("chart.rank"), "rate:N": text("chart.learning_rate"), **more}, number)


def reach(*values: Any) -> Range:
    """Range of an axis that shows all these numbers and columns, with room around them; NaN is left out."""
    found = np.concatenate([np.atleast_1d(np.asarray(value, dtype="float64")) for value in values])
    low, high = float(np.nanmin(found)), float(np.nanmax(found))
    room = 0.06 * (high - low) or 0.01 * abs(high) or 1.0
    return low - room, high + room


def room_for_arrows(y_range: Range) -> Range:
    """The range, with room at its upper end for the arrows of `beyond` and their labels, above all that it shows."""
    low, high = y_range
    return low, high + ARROW_SHARE * (high - low)


def y_axis(title: str, y_range: Range) -> Axis:
    """Y axis of this range, which need not start at zero, for any column."""
    scale = alt.Scale(domain=list(y_range), zero=False, nice=True)
    return lambda column: alt.Y(f"{column}:Q", title=title, scale=scale)


def intervals(frame: pd.DataFrame, y: Axis, encoding: Mapping[str, Any], column: str, **mark: Any) -> list[alt.Chart]:
    """Vertical bars from `…_low` to `…_high` of a column, on the axis `y`; no layer where no row has both."""
    both = frame.dropna(subset=[f"{column}_low", f"{column}_high"])
    if both.empty:
        return []
    return [alt.Chart(both).mark_rule(**mark).encode(y=y(f"{column}_low"), y2=f"{column}_high:Q", **encoding)]


def beyond(frame: pd.DataFrame, x: Mapping[str, Any], ranks: list[int]) -> list[alt.Chart]:
    """Arrows at the upper edge of the chart for rows that lie above it, each with its `label`; no layer without. Their
    height is in pixels: an axis that ends at a round number would leave them within it. Labels of a rank stand at two
    heights in turn: side by side they would touch on a phone."""
    if frame.empty:
        return []
    arrows = alt.Chart(frame).mark_point(shape="triangle-up", filled=True, size=90, opacity=1)
    layers = [arrows.encode(y=alt.value(5), color=colour(ranks), **x)]
    for height, rows in frame.groupby(frame.groupby("rank").cumcount() % 2):
        words = alt.Chart(rows).mark_text(dy=14 + 12 * int(height), fontSize=11)
        layers.append(words.encode(y=alt.value(5), text="label:N", **x))
    return layers


def band(limits: Range, y: Axis) -> alt.Chart:
    shaded = alt.Chart(pd.DataFrame([limits], columns=["from", "to"])).mark_rect(opacity=0.13, style="band")
    return shaded.encode(y=y("from"), y2="to:Q")  # type: ignore[no-any-return]


class Along(NamedTuple):
    """X axis of a curve: a column of its frame, and how it is shown."""

    column: str
    x: alt.X
    tooltip: alt.Tooltip


def along(column: str, title: str, number: str, **axis: Any) -> Along:
    """X axis of a curve along a column, whose tooltip has the format `number`."""
    scale = alt.Scale(nice=False)
    x = alt.X(f"{column}:Q", title=title, axis=alt.Axis(tickCount=6, **axis), scale=scale)
    return Along(column, x, alt.Tooltip(f"{column}:Q", title=title, format=number))


def along_steps(text: Catalogue) -> Along:
    return along("step", text("chart.step"), ",d", format=",d", tickMinStep=1)


def lines(
    frame: pd.DataFrame, text: Catalogue, ranks: list[int], title: str, y_range: Range, number: str,
    *, by: Along, points: bool = False,
) -> list[alt.Chart]:  # fmt: skip
    """Layers with a mean line and a band per rank, its name at the end, and under the pointer the values of all ranks.
    The frame has `rank mean low high`, and the column of the x axis."""
    base, y, of_rank = alt.Chart(frame).encode(x=by.x), y_axis(title, y_range), colour(ranks)
    layers = []
    if (frame["high"] > frame["low"]).any():
        band = base.mark_area(opacity=0.15, clip=True)
        layers.append(band.encode(y=y("low"), y2="high:Q", color=of_rank))
    line = base.mark_line(strokeWidth=2, clip=True).encode(y=y("mean"), color=of_rank)
    if points:  # their shapes tell the ranks apart without colour; elsewhere dashes do
        marks = base.mark_point(filled=True, size=40, opacity=1)
        layers += [line, marks.encode(y=y("mean"), color=of_rank, shape=shape(ranks))]
    else:
        dashes = alt.StrokeDash("rank:N", sort=ranks, scale=cycle(ranks, DASHES), legend=None)
        layers.append(line.encode(strokeDash=dashes))
    layers += end_labels(frame, text, ranks, by, y, y_range)
    nearest = alt.selection_point(
        nearest=True, on="pointerover", clear="pointerout", fields=[by.column], empty=False, name="nearest"
    )
    values = [
        alt.Tooltip(field=str(rank), type="quantitative", format=number, title=text("name.rank", rank=rank))
        for rank in ranks
        if (frame["rank"] == rank).any()
    ]
    opacity = alt.condition(nearest, alt.value(0.6), alt.value(0))
    rule = base.transform_pivot("rank", value="mean", groupby=[by.column]).mark_rule(strokeWidth=1)
    return [*layers, rule.encode(opacity=opacity, tooltip=[by.tooltip, *values]).add_params(nearest)]


def end_labels(
    frame: pd.DataFrame, text: Catalogue, ranks: list[int], by: Along, y: Axis, y_range: Range
) -> list[alt.Chart]:
    """Name of each rank at the end of its line, where it is `mean` high, or beside it where two would touch."""
    ends = frame.loc[frame.groupby("rank")[by.column].idxmax(), ["rank", by.column, "mean"]]
    heights = spread([float(value) for value in ends["mean"].clip(*y_range)], LABEL_SHARE * (y_range[1] - y_range[0]))
    names = [text("name.rank", rank=rank) for rank in ends["rank"]]
    base = alt.Chart(ends.assign(at=heights, label=names)).encode(x=by.x, y=y("at"))
    symbols = base.mark_point(filled=True, size=50, opacity=1, xOffset=10)
    words = base.mark_text(align="left", dx=18).encode(text="label:N")
    return [symbols.encode(color=colour(ranks), shape=shape(ranks)), words]


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Positions of labels, in the order of their values and about as high, at least `gap` from each other."""
    placed, last = dict[int, float](), -math.inf
    for place in sorted(range(len(values)), key=values.__getitem__):
        placed[place] = last = max(values[place], last + gap)
    above = (sum(placed.values()) - sum(values)) / max(1, len(values))
    return [placed[place] - above for place in range(len(values))]
