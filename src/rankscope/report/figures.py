"""Figures of the report: charts with their words and numbers, and the sections that hold them."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import altair as alt
import pandas as pd

from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, column, rate, tabulate

POINTS_IN_TABLE = 6  # columns of a curve in the table under its figure


class Panel(NamedTuple):
    """One chart of a figure: its element's id on the page, and what a screen reader reads for it."""

    id: str
    title: str
    label: str
    chart: alt.Chart


class Figure(NamedTuple):
    """Charts under one title; `alternative` and `numbers` say the same to readers who cannot see them."""

    name: str  # file name without suffix
    title: str
    note: str
    alternative: str  # one sentence
    charts: Mapping[str, alt.Chart]  # by title, which is empty in a figure of one chart
    numbers: Table | None = None
    half: bool = False  # as wide as half of the page, beside another

    @property
    def panels(self) -> list[Panel]:
        return [
            Panel(f"chart-{self.name}-{number}", title, ". ".join(filter(None, [title, self.alternative])), chart)
            for number, (title, chart) in enumerate(self.charts.items())
        ]

    @property
    def width(self) -> int:
        """Of a chart in a file, in pixels; on the page it is as wide as its column."""
        return 400 if self.half or len(self.charts) > 1 else 640


Figures: TypeAlias = Sequence[Figure | str]
"""Figures of a section; a string is the reason why one is missing."""


class Section(NamedTuple):
    name: str  # the page's anchor, and a key of the catalogue
    figures: Sequence[Figure]
    reasons: Sequence[str]  # why figures are missing, each once
    sentences: Sequence[str]
    tables: Sequence[Table]


def make_section(name: str, found: Figures, sentences: Sequence[str] = (), tables: Sequence[Table] = ()) -> Section:
    figures = [one for one in found if isinstance(one, Figure)]
    reasons = list(dict.fromkeys(one for one in found if isinstance(one, str)))
    return Section(name, figures, reasons, sentences, tables)


def with_rates(note: str, frame: pd.DataFrame, text: Catalogue) -> str:
    """The note, followed by the order of learning rates where there are several."""
    rates = sorted(frame["learning_rate"].unique())
    return note if len(rates) == 1 else f"{note} {text('chart.rates_note', rates=', '.join(map(rate, rates)))}"


def say(title: str, table: pd.DataFrame, field: str, number: Callable[[float], str], text: Catalogue) -> str:
    """Alternative text: the title and the final value of each rank (the lowest of its learning rates)."""
    lowest = table[table[field].notna()].groupby("rank")[field].min()
    values = "; ".join(text("chart.value", rank=rank, value=number(value)) for rank, value in lowest.items())
    return text("chart.values", title=title, values=values) if values else title


def numbers(title: str, frame: pd.DataFrame, columns: Columns, text: Catalogue) -> Table:
    """Table under a figure, a row per row of the frame: its rank and learning rate, if it has them, and `columns`."""
    forms: dict[str, Callable[[Any], str]] = {"rank": str, "learning_rate": rate}
    own = {text(f"table.{name}"): column(name, form, text) for name, form in forms.items() if name in frame}
    return tabulate(text("chart.numbers", title=title), own | columns, frame.to_dict("records"))


def curve_numbers(
    title: str, frame: pd.DataFrame, field: str, number: Callable[[float], str], text: Catalogue,
    *, along: str = "step", place: Callable[[float], str] = "{:,.0f}".format,
) -> Table:  # fmt: skip
    """Table under a curve: a row per candidate; its first value, its last and some between them."""
    places = sorted(frame[along].unique())
    last = len(places) - 1
    chosen = sorted({places[round(part * last / (POINTS_IN_TABLE - 1))] for part in range(POINTS_IN_TABLE)})
    wide = frame.pivot_table(index=["rank", "learning_rate"], columns=along, values=field, sort=True)
    # A curve may lack a point just there: two profiles are not sampled at the same moments.
    filled = wide.sort_index(axis=1).ffill(axis=1)[chosen].reset_index()
    what = text(f"chart.along.{along}")
    columns = {text("chart.at", place=place(one), what=what): column(one, number, text) for one in chosen}
    return numbers(title, filled, columns, text)
