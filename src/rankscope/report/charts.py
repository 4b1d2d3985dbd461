"""The charts' theme, and curves: each function takes a tidy frame and gives an `altair.Chart`. Change a chart here.

Those with a place for each rank are in `charts_by_rank`. Labels are the catalogue's; no string of the model or the data
enters a chart.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from rankscope.report.figures import LIGHT, colour, dash, numbered, shape, sized
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Unit, rate

FONT = (
    "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', 'Apple SD Gothic Neo', 'Malgun Gothic', "
    "'Noto Sans KR', 'Noto Sans CJK KR', sans-serif"
)


def theme(colours: Mapping[str, str] = LIGHT) -> dict[str, Any]:
    """The Vega-Lite config that all charts share. Screen readers hear a chart's description, not each of its marks."""
    ink, muted, grid, paper = (colours[name] for name in ("ink", "muted", "line", "paper"))
    return {
        "background": None,
        "mark": {"aria": False},
        "font": FONT,
        "view": {"stroke": None},
        "range": {"category": numbered("rank", colours), "ordinal": numbered("part", colours)},
        "axis": {
            "aria": False,
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
            "aria": False,
            "orient": "top",
            "labelColor": ink,
            "titleColor": muted,
            "titleFontWeight": "normal",
            "titleOrient": "left",
            "titlePadding": 8,
            "rowPadding": 5,
            "labelFontSize": 12,
            "titleFontSize": 12,
        },
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


class Along(NamedTuple):
    """What a curve runs along: a column of its frame, and the axis that shows it."""

    column: str
    title: str
    number: str
    axis: alt.Axis


def _steps(text: Catalogue) -> Along:
    return Along("step", text("chart.step"), ",d", alt.Axis(format=",d", tickMinStep=1, tickCount=6))


def training_loss(frame: pd.DataFrame, text: Catalogue, ranks: list[int], y_range: tuple[float, float]) -> alt.Chart:
    """`step rank mean low high smooth_mean smooth_low smooth_high`; a switch chooses the smoothed curve."""
    switch = alt.param(name="smooth", value=True, bind=alt.binding_checkbox(name=text("chart.smooth")))
    shown = {
        "shown": "smooth ? datum.smooth_mean : datum.mean",
        "shown_low": "smooth ? datum.smooth_low : datum.low",
        "shown_high": "smooth ? datum.smooth_high : datum.high",
    }
    base = alt.Chart(frame).transform_calculate(**shown)
    layers = _lines(base, frame, text, ranks, text("chart.train_loss.y"), y_range, ".4f", along=_steps(text))
    return sized(alt.layer(*layers)).add_params(switch)


def heldout_by_step(frame: pd.DataFrame, text: Catalogue, ranks: list[int], y_range: tuple[float, float]) -> alt.Chart:
    """`step rank mean low high`, in nats."""
    title = text("chart.eval_steps.y")
    layers = _lines(_plain(frame), frame, text, ranks, title, y_range, ".4f", along=_steps(text), points=True)
    return sized(alt.layer(*layers))


def memory_by_step(
    frame: pd.DataFrame, text: Catalogue, ranks: list[int], y_range: tuple[float, float], kind: str, unit: Unit
) -> alt.Chart:
    """`step rank mean low high` in bytes; `kind` is `cpu` or `gpu`."""
    scaled, scaled_range = _in_unit(frame, y_range, unit)
    title, points = text(f"chart.{kind}_steps.y", unit=unit.name), scaled["step"].nunique() <= 30
    layers = _lines(_plain(scaled), scaled, text, ranks, title, scaled_range, ".4~g", along=_steps(text), points=points)
    return sized(alt.layer(*layers))


def memory_by_time(
    frame: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    y_range: tuple[float, float],
    kind: str,
    unit: Unit,
    time: Unit,
) -> alt.Chart:
    """`seconds phase rank mean low high`, memory in bytes. Training, which the other figures show, is drawn thick."""
    scaled, scaled_range = _in_unit(frame, y_range, unit)
    scaled["seconds"] = scaled["seconds"] / time.factor
    title, unit_title = text(f"chart.{kind}_steps.y", unit=unit.name), text("chart.time", unit=time.name)
    along = Along("seconds", unit_title, ".3~g", alt.Axis(tickCount=6))
    base = _plain(scaled)
    thick = base.transform_filter("datum.phase === 'train'").mark_line(strokeWidth=4, opacity=0.45, clip=True)
    training = thick.encode(x=_x(along), y=_y(title, scaled_range), color=colour(ranks, text, legend="stroke"))
    layers = _lines(base, scaled, text, ranks, title, scaled_range, ".4~g", along=along)
    return sized(alt.layer(training, *layers))


def _in_unit(frame: pd.DataFrame, y_range: tuple[float, float], unit: Unit) -> tuple[pd.DataFrame, tuple[float, float]]:
    scaled = frame.assign(**{column: frame[column] / unit.factor for column in ("mean", "low", "high")})
    return scaled, (y_range[0] / unit.factor, y_range[1] / unit.factor)


def _plain(frame: pd.DataFrame) -> alt.Chart:
    return alt.Chart(frame).transform_calculate(shown="datum.mean", shown_low="datum.low", shown_high="datum.high")


def _x(along: Along) -> alt.X:
    return alt.X(f"{along.column}:Q", title=along.title, axis=along.axis, scale=alt.Scale(nice=False))


def _y(title: str, y_range: tuple[float, float]) -> alt.Y:
    return alt.Y("shown:Q", title=title, scale=alt.Scale(domain=list(y_range), zero=False, nice=True))


def _lines(
    base: alt.Chart,
    frame: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    title: str,
    y_range: tuple[float, float],
    number: str,
    *,
    along: Along,
    points: bool = False,
) -> list[alt.Chart]:
    """Layers: a mean line and a band for each rank; under the pointer, the values of all ranks at that place."""
    x, y = _x(along), _y(title, y_range)
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
    present = [rank for rank in ranks if (frame["rank"] == rank).any()]
    panel = re.sub(r"\W", "_", rate(frame["learning_rate"].iloc[0]))  # panels of one file need names of their own
    nearest = alt.selection_point(
        name=f"nearest_{panel}",
        nearest=True,
        on="pointerover",
        clear="pointerout",
        fields=[along.column],
        empty=False,
    )
    values = [
        alt.Tooltip(field=str(rank), type="quantitative", format=number, title=text("name.rank", rank=rank))
        for rank in present
    ]
    hover: alt.Chart = (
        base.transform_pivot("rank", value="shown", groupby=[along.column])
        .mark_rule(strokeWidth=1)
        .encode(
            x=_x(along),
            opacity=alt.condition(nearest, alt.value(0.6), alt.value(0)),
            tooltip=[alt.Tooltip(f"{along.column}:Q", title=along.title, format=along.number), *values],
        )
        .add_params(nearest)
    )
    return hover
