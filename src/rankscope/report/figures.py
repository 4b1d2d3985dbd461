"""What a figure is, and what all of them share; which there are is said in loss_, memory_ and speed_figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, known, rate

POINTS_IN_TABLE = 6


class Panel(NamedTuple):
    """One chart of a figure; `title` is empty where a figure has only one."""

    title: str
    chart: alt.Chart


class Figure(NamedTuple):
    """`name` is a file name. Without panels, `note` says in a sentence why there is nothing to draw.

    `alternative` says the figure in a sentence, `numbers` in full: what is drawn is there for who cannot see it.
    """

    name: str
    title: str
    note: str
    alternative: str
    panels: list[Panel]
    numbers: Table | None = None


class Section(NamedTuple):
    """Figures under one heading, and what follows them; `name` is the page's anchor and a key of the catalogue."""

    name: str
    figures: list[Figure]
    sentences: Sequence[str] = ()
    tables: Sequence[Table] = ()


def absent(name: str, title: str, reason: str) -> Figure:
    return Figure(name, title, reason, "", [])


def by_rate(
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


def ranks_of(evidence: Evidence) -> list[int]:
    return sorted(evidence.spec.ranks)


def with_rates(note: str, frame: pd.DataFrame, text: Catalogue) -> str:
    """The note, and in which order learning rates stand, where there are several."""
    rates = sorted(frame["learning_rate"].unique())
    return note if len(rates) == 1 else f"{note} {text('chart.rates_note', rates=', '.join(map(rate, rates)))}"


def say(title: str, table: pd.DataFrame, column: str, number: Callable[[float], str], text: Catalogue) -> str:
    """The alternative text: the title and the final value of each rank (the lowest of its learning rates)."""
    lowest = table[table[column].notna()].groupby("rank")[column].min()
    values = "; ".join(text("chart.value", rank=rank, value=number(value)) for rank, value in lowest.items())
    return text("chart.values", title=title, values=values) if values else title


def numbers(title: str, headers: list[str], rows: list[list[str]], text: Catalogue) -> Table:
    """The table under a figure; every cell is a number, or text that stands in for one."""
    return Table(text("chart.numbers", title=title), headers, [True] * len(headers), rows)


def curve_numbers(
    title: str,
    frame: pd.DataFrame,
    column: str,
    number: Callable[[float], str],
    text: Catalogue,
    *,
    along: str = "step",
    place: Callable[[float], str] = "{:,.0f}".format,
) -> Table:
    """A row a candidate and a column a place along the curve: its first, its last and some between them."""
    places = sorted(frame[along].unique())
    last = len(places) - 1
    shown = sorted({places[round(part * last / (POINTS_IN_TABLE - 1))] for part in range(POINTS_IN_TABLE)})
    wide = frame.pivot_table(index=["rank", "learning_rate"], columns=along, values=column, sort=True)
    # A curve may have no point just there: two profiles are not sampled at the same moments.
    filled = wide.sort_index(axis=1).ffill(axis=1)[shown]
    rows = [
        [str(key[0]), rate(key[1]), *(number(value) if known(value) else text("none") for value in values)]
        for key, values in zip(filled.index, filled.to_numpy(), strict=True)
    ]
    heads = [text("chart.at", place=place(value), what=text(f"chart.along.{along}")) for value in shown]
    return numbers(title, [text("table.rank"), text("table.learning_rate"), *heads], rows, text)


def _numbered(name: str, colours: Sequence[str]) -> dict[str, str]:
    return {f"{name}-{number}": colour for number, colour in enumerate(colours)}


LIGHT: Mapping[str, str] = {
    "paper": "#fdfdfc", "raised": "#f4f4f1", "ink": "#1c1c1a", "muted": "#5c5c58", "line": "#e2e2dd",
    "accent": "#00619a", "good": "#00714f",
    **_numbered("rank", ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6b6b6b"]),
    **_numbered("part", ["#8a8a86", "#332288", "#CC6677", "#DDCC77", "#882255", "#44AA99", "#117733", "#c4c4be"]),
}  # fmt: skip

DARK: Mapping[str, str] = {
    "paper": "#161615", "raised": "#20201e", "ink": "#e8e8e6", "muted": "#a8a8a4", "line": "#383836",
    "accent": "#6fc0f0", "good": "#43cda2",
    **_numbered("rank", ["#56B4E9", "#E69F00", "#2fc79b", "#CC79A7", "#F0E442", "#D55E00", "#b5b5b5"]),
    **_numbered("part", ["#73736f", "#77AADD", "#FFAABB", "#EEDD88", "#EE8866", "#44BB99", "#BBCC33", "#a5a5a0"]),
}  # fmt: skip

PAGE: Mapping[str, str] = {name: f"var(--{name})" for name in LIGHT}
"""What the page's charts are drawn with: they change with its theme, and on paper, without being drawn anew."""


def declarations(colours: Mapping[str, str]) -> str:
    """As CSS: `--paper: #fdfdfc; --raised: …`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def numbered(name: str, colours: Mapping[str, str]) -> list[str]:
    """All of one name, in order: of `rank`, `rank-0` and so on."""
    return [colour for key, colour in colours.items() if key.startswith(f"{name}-")]


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
