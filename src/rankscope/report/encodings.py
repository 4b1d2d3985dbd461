"""What all charts share: a rank has one colour, one dash, one shape and one place in every chart."""

from typing import Any

import altair as alt
import pandas as pd

from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import rate

WIDTH, HEIGHT = 640, 280
"""Of a figure file, in pixels. On the page a chart is as wide as its column."""
DASHES = [[1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2], [1, 4], [5, 5]]
LEGEND_COLUMNS = 5
"""Of ranks: as many as fit on a phone."""
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]


def sized(chart: Any) -> alt.Chart:
    chart_of_size: alt.Chart = chart.properties(width=WIDTH, height=HEIGHT)
    return chart_of_size


def colour(ranks: list[int], text: Catalogue, *, legend: str = "") -> alt.Color:
    scale = alt.Scale(domain=ranks)
    return alt.Color("rank:N", sort=ranks, scale=scale, legend=_legend(text, legend), title=text("chart.rank"))


def shape(ranks: list[int], text: Catalogue, *, legend: str = "") -> alt.Shape:
    scale = alt.Scale(domain=ranks, range=_cycle(SHAPES, ranks))
    return alt.Shape("rank:N", sort=ranks, scale=scale, legend=_legend(text, legend), title=text("chart.rank"))


def dash(ranks: list[int], text: Catalogue) -> alt.StrokeDash:
    scale = alt.Scale(domain=ranks, range=_cycle(DASHES, ranks))
    legend = _legend(text, "stroke")
    return alt.StrokeDash("rank:N", sort=ranks, scale=scale, legend=legend, title=text("chart.rank"))


def by_rank(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> dict[str, Any]:
    """Ranks side by side, and within a rank its learning rates from low to high, where there are several."""
    channels: dict[str, Any] = {"x": rank_axis(text, ranks)}
    if several_rates(frame):
        rates = [rate(value) for value in sorted(frame["learning_rate"].unique())]
        channels["xOffset"] = alt.XOffset("rate:N", sort=rates, scale=alt.Scale(domain=rates))
    return channels


def rank_axis(text: Catalogue, ranks: list[int]) -> alt.X:
    scale, axis = alt.Scale(domain=ranks), alt.Axis(labelAngle=0)
    return alt.X("rank:N", sort=ranks, title=text("chart.rank"), scale=scale, axis=axis)


def several_rates(frame: pd.DataFrame) -> bool:
    return bool(frame["learning_rate"].nunique() > 1)


def identity(text: Catalogue) -> list[alt.Tooltip]:
    """The first lines of a candidate's tooltip; its frame has `rank` and `rate`."""
    return [
        alt.Tooltip("rank:O", title=text("chart.rank")),
        alt.Tooltip("rate:N", title=text("chart.learning_rate")),
    ]


def _legend(text: Catalogue, kind: str) -> alt.Legend | None:
    """One legend for colour and dash (`stroke`) or colour and shape (`symbol`), or none (empty).

    Full opacity, for else the paleness of a band passes to its symbols.
    """
    if not kind:
        return None
    title = text("chart.rank")
    if kind == "stroke":
        return alt.Legend(title=title, symbolOpacity=1, symbolType="stroke", symbolSize=400, columns=LEGEND_COLUMNS)
    return alt.Legend(title=title, symbolOpacity=1, symbolStrokeWidth=0, symbolSize=90, columns=LEGEND_COLUMNS)


def _cycle(values: list[Any], ranks: list[int]) -> list[Any]:
    return [values[index % len(values)] for index in range(len(ranks))]
