"""What a figure is, and what all of them share; which there are is said in loss_, memory_ and speed_figures."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import altair as alt
import pandas as pd

from rankscope.study.folder import Evidence
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
