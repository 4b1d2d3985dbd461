"""Colours, theme, encodings and layers that charts share, as altair objects.

Labels are the catalogue's; no string of the model or the data enters a chart.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import rate

FONT = (
    "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'Apple SD Gothic Neo', 'Malgun Gothic', "
    "'Noto Sans KR', 'Noto Sans CJK KR', sans-serif"
)

WIDTH, HEIGHT = 640, 280  # of a figure file, in pixels; on the page a chart is as wide as its column

LEGEND_COLUMNS = 5  # ranks side by side in a legend: as many as fit on a phone
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
    chart: alt.Chart = layer.properties(width=WIDTH, height=HEIGHT)
    return chart


def colour(ranks: list[int], text: Catalogue, *, legend: str = "") -> alt.Color:
    scale = alt.Scale(domain=ranks)
    return alt.Color("rank:N", sort=ranks, scale=scale, legend=_legend(text, legend), title=text("chart.rank"))


def shape(ranks: list[int], text: Catalogue, *, legend: str = "") -> alt.Shape:
    scale = cycle(ranks, SHAPES)
    return alt.Shape("rank:N", sort=ranks, scale=scale, legend=_legend(text, legend), title=text("chart.rank"))


def dash(ranks: list[int], text: Catalogue) -> alt.StrokeDash:
    scale, legend = cycle(ranks, DASHES), _legend(text, "stroke")
    return alt.StrokeDash("rank:N", sort=ranks, scale=scale, legend=legend, title=text("chart.rank"))


def cycle(domain: Sequence[Any], values: Sequence[Any]) -> alt.Scale:
    """Scale from the domain to the values, which repeat where there are too few."""
    return alt.Scale(domain=list(domain), range=[values[number % len(values)] for number in range(len(domain))])


def _legend(text: Catalogue, kind: str) -> alt.Legend | None:
    """One legend for colour and dash (`stroke`) or for colour and shape (`symbol`), or none (empty)."""
    if not kind:
        return None
    symbols: dict[str, Any] = {"symbolStrokeWidth": 0, "symbolSize": 90}
    if kind == "stroke":
        symbols = {"symbolType": "stroke", "symbolSize": 400}
    # Full opacity: else a band's paleness passes to the legend's symbols.
    return alt.Legend(title=text("chart.rank"), symbolOpacity=1, columns=LEGEND_COLUMNS, **symbols)


def rank_axis(text: Catalogue, ranks: list[int]) -> alt.X:
    scale, axis = alt.Scale(domain=ranks), alt.Axis(labelAngle=0)
    return alt.X("rank:N", sort=ranks, title=text("chart.rank"), scale=scale, axis=axis)


def by_rank(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> dict[str, Any]:
    """Channels that put ranks side by side, and within a rank its learning rates from low to high."""
    channels: dict[str, Any] = {"x": rank_axis(text, ranks)}
    if frame["learning_rate"].nunique() > 1:
        rates = [rate(value) for value in sorted(frame["learning_rate"].unique())]
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


def loss_titles(text: Catalogue) -> dict[str, str]:
    columns = {"eval_loss": "mean", "eval_loss_low": "lowest", "eval_loss_high": "highest"}
    return {f"{column}:Q": text(f"chart.{name}") for column, name in columns.items()}


def loss_scale(padding: int = 12) -> alt.Scale:
    return alt.Scale(zero=False, nice=True, padding=padding)


def loss_axis(text: Catalogue, column: str = "eval_loss", padding: int = 12) -> alt.Y:
    """Y axis of a held-out loss in nats, which does not start at zero."""
    return alt.Y(f"{column}:Q", title=text("chart.eval_by_rank.y"), scale=loss_scale(padding))


def loss_intervals(
    frame: pd.DataFrame, text: Catalogue, encoding: Mapping[str, Any], padding: int = 12, **mark: Any
) -> list[alt.Chart]:
    """Vertical bars from `eval_loss_low` to `eval_loss_high`; no layer where no row has both."""
    both = frame.dropna(subset=["eval_loss_low", "eval_loss_high"])
    if both.empty:
        return []
    low = loss_axis(text, "eval_loss_low", padding)
    return [alt.Chart(both).mark_rule(**mark).encode(y=low, y2="eval_loss_high:Q", **encoding)]


def band(limits: tuple[float, float], scale: alt.Scale) -> alt.Chart:
    shaded = alt.Chart(pd.DataFrame([limits], columns=["from", "to"])).mark_rect(opacity=0.13, style="band")
    return shaded.encode(y=alt.Y("from:Q", scale=scale), y2="to:Q")  # type: ignore[no-any-return]


class Along(NamedTuple):
    """X axis of a curve: a column of its frame, and how it is shown."""

    column: str
    title: str
    number: str
    axis: alt.Axis


def steps_axis(text: Catalogue) -> Along:
    return Along("step", text("chart.step"), ",d", alt.Axis(format=",d", tickMinStep=1, tickCount=6))


def plain(frame: pd.DataFrame) -> alt.Chart:
    """Chart of `mean low high` as they are."""
    return alt.Chart(frame).transform_calculate(shown="datum.mean", shown_low="datum.low", shown_high="datum.high")


def x_axis(along: Along) -> alt.X:
    return alt.X(f"{along.column}:Q", title=along.title, axis=along.axis, scale=alt.Scale(nice=False))


def y_axis(title: str, y_range: tuple[float, float]) -> alt.Y:
    return alt.Y("shown:Q", title=title, scale=alt.Scale(domain=list(y_range), zero=False, nice=True))


def lines(
    frame: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    title: str,
    y_range: tuple[float, float],
    number: str,
    *,
    along: Along,
    points: bool = False,
    base: alt.Chart | None = None,
) -> list[alt.Chart]:
    """Layers with a mean line and a band per rank, and under the pointer the values of all ranks."""
    base, x, y = base or plain(frame), x_axis(along), y_axis(title, y_range)
    of_rank = colour(ranks, text, legend="symbol" if points else "stroke")
    layers = []
    if (frame["high"] > frame["low"]).any():
        low = alt.Y("shown_low:Q", title=title)
        layers.append(base.mark_area(opacity=0.15).encode(x=x, y=low, y2="shown_high:Q", color=of_rank))
    line = base.mark_line(strokeWidth=2, clip=True).encode(x=x, y=y, color=of_rank)
    if points:  # their shapes tell the ranks apart without colour; elsewhere dashes do
        marks = base.mark_point(filled=True, size=40, opacity=1)
        layers += [line, marks.encode(x=x, y=y, color=of_rank, shape=shape(ranks, text, legend="symbol"))]
    else:
        layers.append(line.encode(strokeDash=dash(ranks, text)))
    return [*layers, _hover(base, frame, text, ranks, number, along)]


def _hover(
    base: alt.Chart, frame: pd.DataFrame, text: Catalogue, ranks: list[int], number: str, along: Along
) -> alt.Chart:
    panel = re.sub(r"\W", "_", rate(frame["learning_rate"].iloc[0]))  # panels of one file need names of their own
    nearest = alt.selection_point(
        name=f"nearest_{panel}", nearest=True, on="pointerover", clear="pointerout", fields=[along.column], empty=False
    )
    values = [
        alt.Tooltip(field=str(rank), type="quantitative", format=number, title=text("name.rank", rank=rank))
        for rank in ranks
        if (frame["rank"] == rank).any()
    ]
    tooltip = [alt.Tooltip(f"{along.column}:Q", title=along.title, format=along.number), *values]
    opacity = alt.condition(nearest, alt.value(0.6), alt.value(0))
    rule = base.transform_pivot("rank", value="shown", groupby=[along.column]).mark_rule(strokeWidth=1)
    hover: alt.Chart = rule.encode(x=x_axis(along), opacity=opacity, tooltip=tooltip).add_params(nearest)
    return hover
