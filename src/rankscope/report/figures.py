"""Figures of the report: charts with their words and numbers, and the sections that hold them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import altair as alt
import pandas as pd

from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, rate, shown, tabulate

POINTS_IN_TABLE = 6  # columns of a curve in the table under its figure


class Panel(NamedTuple):
    title: str  # empty in a figure with one panel
    chart: alt.Chart


class Figure(NamedTuple):
    """Charts under one title; `alternative` and `numbers` say the same to readers who cannot see them."""

    name: str  # file name without suffix
    title: str
    note: str
    alternative: str  # one sentence
    panels: list[Panel]
    numbers: Table | None = None
    half: bool = False  # as wide as half of the page, beside another

    @property
    def width(self) -> int:
        """Of a panel in a file, in pixels; on the page a panel is as wide as its column."""
        return 400 if self.half or len(self.panels) > 1 else 640


class Missing(NamedTuple):
    name: str
    reason: str


Figures: TypeAlias = list[Figure | Missing]


class Section(NamedTuple):
    name: str  # the page's anchor, and a key of the catalogue
    figures: list[Figure]
    missing: list[Missing]
    sentences: Sequence[str]
    tables: Sequence[Table]

    @property
    def reasons(self) -> list[str]:
        """Why figures are missing, each reason once."""
        return list(dict.fromkeys(missing.reason for missing in self.missing))


def make_section(
    name: str, found: Sequence[Figure | Missing], sentences: Sequence[str] = (), tables: Sequence[Table] = ()
) -> Section:
    figures = [figure for figure in found if isinstance(figure, Figure)]
    return Section(name, figures, [one for one in found if isinstance(one, Missing)], sentences, tables)


def with_rates(note: str, frame: pd.DataFrame, text: Catalogue) -> str:
    """The note, followed by the order of learning rates where there are several."""
    rates = sorted(frame["learning_rate"].unique())
    return note if len(rates) == 1 else f"{note} {text('chart.rates_note', rates=', '.join(map(rate, rates)))}"


def say(title: str, table: pd.DataFrame, column: str, number: Callable[[float], str], text: Catalogue) -> str:
    """Alternative text: the title and the final value of each rank (the lowest of its learning rates)."""
    lowest = table[table[column].notna()].groupby("rank")[column].min()
    values = "; ".join(text("chart.value", rank=rank, value=number(value)) for rank, value in lowest.items())
    return text("chart.values", title=title, values=values) if values else title


def numbers(title: str, columns: Columns, records: Sequence[Any], text: Catalogue) -> Table:
    """Table under a figure: a row per record, a column per header."""
    return tabulate(text("chart.numbers", title=title), columns, records)


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
    """Table under a curve: a row per candidate; its first value, its last and some between them."""
    places = sorted(frame[along].unique())
    last = len(places) - 1
    chosen = sorted({places[round(part * last / (POINTS_IN_TABLE - 1))] for part in range(POINTS_IN_TABLE)})
    wide = frame.pivot_table(index=["rank", "learning_rate"], columns=along, values=column, sort=True)
    # A curve may lack a point just there: two profiles are not sampled at the same moments.
    filled = wide.sort_index(axis=1).ffill(axis=1)[chosen].reset_index()
    columns: Columns = {
        text("table.rank"): lambda row: str(row["rank"]),
        text("table.learning_rate"): lambda row: rate(row["learning_rate"]),
    }
    for value in chosen:
        header = text("chart.at", place=place(value), what=text(f"chart.along.{along}"))
        columns[header] = lambda row, value=value: shown(row[value], number, text)  # type: ignore[misc]
    return numbers(title, columns, filled.to_dict("records"), text)
