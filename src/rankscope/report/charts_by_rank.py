"""Charts with a place, or a point, for each rank: see `charts`."""

from typing import Any

import altair as alt
import pandas as pd

from rankscope.report.figures import by_rank, colour, identity, rank_axis, several_rates, shape, sized
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Unit, loss, rate

PARTS = ("process", "base", "adapter", "gradients", "optimizer", "activations", "logits", "retained")
"""Parts of a predicted peak (`rankscope.plan.memory.MemoryBreakdown`), from a bar's bottom to its top. A part keeps
its colour whichever others are present."""

PART_COLUMNS = 3
"""Of the legend: as many as fit on a phone."""
MOST_LABELLED_BARS = 8
"""Above more bars, numbers would overlap on a phone; the table under the chart has them."""


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
    x, of_rank, of_shape = by_rank(seeds, text, ranks), colour(ranks, text), shape(ranks, text)
    y = alt.Y("eval_loss:Q", title=title, scale=scale)
    layers = []
    if margin is not None:
        layers.append(_band(margin, scale))
    known = candidates[candidates["eval_loss_low"].notna() & candidates["eval_loss_high"].notna()]
    if not known.empty:
        low = alt.Y("eval_loss_low:Q", title=title, scale=scale)
        rule = alt.Chart(known).mark_rule(strokeWidth=2.5)
        layers.append(rule.encode(**x, y=low, y2="eval_loss_high:Q", color=of_rank))
    means = alt.Chart(candidates).mark_point(filled=True, size=130, opacity=1)
    layers.append(
        means.encode(
            **x,
            y=y,
            color=of_rank,
            shape=of_shape,
            tooltip=[
                *identity(text),
                alt.Tooltip("eval_loss:Q", title=text("chart.mean"), format=".4f"),
                alt.Tooltip("eval_loss_low:Q", title=text("chart.lowest"), format=".4f"),
                alt.Tooltip("eval_loss_high:Q", title=text("chart.highest"), format=".4f"),
            ],
        )
    )
    single = alt.Chart(seeds).mark_point(size=40, opacity=0.85, xOffset=-12 if several_rates(seeds) else -18)
    of_seed = [
        *identity(text),
        alt.Tooltip("seed:O", title=text("chart.seed")),
        alt.Tooltip("eval_loss:Q", title=title, format=".4f"),
    ]
    layers.append(single.encode(**x, y=y, color=of_rank, shape=of_shape, tooltip=of_seed))
    return sized(alt.layer(*layers))


def cost_by_rank(
    frame: pd.DataFrame,
    text: Catalogue,
    ranks: list[int],
    title: str,
    dot: str,
    noise: tuple[float, float] | None,
) -> alt.Chart:
    """`rank learning_rate number value`; a bar is the mean, a dot one measurement (`dot` names it). `noise` is the
    shaded range of values that cannot be told from the lowest rank's.
    """
    values = frame.assign(rate=frame["learning_rate"].map(rate))
    x, of_rank = by_rank(values, text, ranks), colour(ranks, text)
    scale = alt.Scale(zero=True)
    mean = alt.Y("mean(value):Q", title=title, scale=scale)
    mean_title = f"{text('chart.mean')}, {title}"
    base = alt.Chart(values)
    bars = base.mark_bar(opacity=0.45, cornerRadiusEnd=2, size=max(6, 48 // values["learning_rate"].nunique())).encode(
        **x,
        y=mean,
        color=of_rank,
        tooltip=[*identity(text), alt.Tooltip("mean(value):Q", title=mean_title, format=".4~g")],
    )
    measured = [
        *identity(text),
        alt.Tooltip("number:O", title=dot),
        alt.Tooltip("value:Q", title=title, format=".4~g"),
    ]
    dots = base.mark_point(filled=True, size=55, opacity=1).encode(
        **x, y=alt.Y("value:Q", title=title), color=of_rank, shape=shape(ranks, text), tooltip=measured
    )
    layers = [bars, dots] if noise is None else [bars, _band(noise, scale), dots]
    return sized(alt.layer(*layers))


def memory_by_rank(
    measured: pd.DataFrame, parts: pd.DataFrame, text: Catalogue, ranks: list[int], kind: str, unit: Unit
) -> alt.Chart:
    """`measured`: `rank average peak` in bytes: a bar for the average, a line above it for the peak. `parts`:
    `rank part name order bytes` of the predicted peak, a bar of its own beside it. Either may be empty.
    """
    measured = measured.assign(average=measured["average"] / unit.factor, peak=measured["peak"] / unit.factor)
    parts = parts.assign(value=parts["bytes"] / unit.factor)
    title = text(f"chart.{kind}_memory.y", unit=unit.name)
    kinds = [name for name, rows in (("predicted", parts), ("measured", measured)) if not rows.empty]
    bars = len(ranks) * len(kinds)
    size = max(6, min(44, 200 // bars))
    layers = []
    for name in kinds:
        x = {"x": rank_axis(text, ranks), "xOffset": alt.XOffset("kind:N", scale=alt.Scale(domain=kinds), sort=kinds)}
        draw = _predicted if name == "predicted" else _measured
        rows = (parts if name == "predicted" else measured).assign(kind=name)
        layers += draw(rows, text, ranks, x, title, size, bars <= MOST_LABELLED_BARS)
    return sized(alt.layer(*layers).resolve_scale(color="independent"))


def _predicted(
    parts: pd.DataFrame, text: Catalogue, ranks: list[int], x: dict[str, Any], title: str, size: int, labelled: bool
) -> list[alt.Chart]:
    present = [text(f"part.{part}") for part in PARTS if (parts["part"] == part).any()]
    legend = alt.Legend(
        title=text("chart.predicted"), titleOrient="top", columns=PART_COLUMNS, symbolType="square", values=present
    )
    scale = alt.Scale(domain=[text(f"part.{part}") for part in PARTS], range="ordinal")
    of_part = alt.Color("name:N", sort=None, scale=scale, legend=legend)
    stack = (
        alt.Chart(parts)
        .mark_bar(size=size, style="part")
        .encode(
            **x,
            y=alt.Y("value:Q", title=title, stack="zero", scale=alt.Scale(zero=True)),
            color=of_part,
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("rank:O", title=text("chart.rank")),
                alt.Tooltip("name:N", title=text("chart.predicted")),
                alt.Tooltip("value:Q", title=title, format=".3~g"),
            ],
        )
    )
    total = alt.Chart(parts).mark_text(dy=-10)
    return [stack, total.encode(**x, y="sum(value):Q", text=alt.Text("sum(value):Q", format=".3r"))][: 1 + labelled]


def _measured(
    values: pd.DataFrame, text: Catalogue, ranks: list[int], x: dict[str, Any], title: str, size: int, labelled: bool
) -> list[alt.Chart]:
    tooltip = [
        alt.Tooltip("rank:O", title=text("chart.rank")),
        alt.Tooltip("average:Q", title=text("chart.average"), format=".4~g"),
        alt.Tooltip("peak:Q", title=text("chart.peak"), format=".4~g"),
    ]
    base, of_rank = alt.Chart(values), colour(ranks, text)
    average, peak = alt.Y("average:Q", title=title, scale=alt.Scale(zero=True)), alt.Y("peak:Q", title=title)
    layers = [
        base.mark_bar(opacity=0.45, size=size).encode(**x, y=average, color=of_rank, tooltip=tooltip),
        base.mark_tick(thickness=3, size=size).encode(**x, y=peak, color=of_rank, tooltip=tooltip),
        base.mark_text(dy=-10).encode(**x, y="peak:Q", text=alt.Text("peak:Q", format=".3r")),
        base.mark_text(dy=14).encode(**x, y="average:Q", text=alt.Text("average:Q", format=".3r")),
    ]
    return layers if labelled else layers[:2]


def trade_off(frame: pd.DataFrame, text: Catalogue, ranks: list[int], cost_title: str) -> alt.Chart:
    """`rank learning_rate cost eval_loss eval_loss_low eval_loss_high front chosen`: a point a candidate, those that no
    other beats joined by steps; a ring around the chosen one.
    """
    values = frame.assign(rate=frame["learning_rate"].map(rate))
    x = alt.X("cost:Q", title=cost_title, scale=alt.Scale(zero=False, nice=True, padding=24), axis=alt.Axis(grid=True))
    title, scale = text("chart.eval_by_rank.y"), alt.Scale(zero=False, nice=True, padding=16)
    y, of_rank = alt.Y("eval_loss:Q", title=title, scale=scale), colour(ranks, text, legend="symbol")
    base = alt.Chart(values)
    front = base.transform_filter("datum.front").mark_line(interpolate="step-after", style="front")
    layers = [front.encode(x=x, y=y, order=alt.Order("cost:Q"))]
    known = values[values["eval_loss_low"].notna() & values["eval_loss_high"].notna()]
    if not known.empty:
        low = alt.Y("eval_loss_low:Q", title=title, scale=scale)
        rule = alt.Chart(known).mark_rule(strokeWidth=1.5, opacity=0.6)
        layers.append(rule.encode(x=x, y=low, y2="eval_loss_high:Q", color=of_rank))
    tooltip = [
        *identity(text),
        alt.Tooltip("cost:Q", title=cost_title, format=".4~g"),
        alt.Tooltip("eval_loss:Q", title=title, format=".4f"),
    ]
    points = base.mark_point(filled=True, size=130).encode(
        x=x,
        y=y,
        color=of_rank,
        shape=shape(ranks, text, legend="symbol"),
        opacity=alt.condition("datum.front", alt.value(1), alt.value(0.4)),
        tooltip=tooltip,
    )
    if values["chosen"].any():  # under the points: it must not catch the pointer before them
        ring = base.transform_filter("datum.chosen").mark_point(size=420, style="chosen")
        layers.append(ring.encode(x=x, y=y))
    return sized(alt.layer(*layers, points))


def rate_map(frame: pd.DataFrame, text: Catalogue, ranks: list[int]) -> alt.Chart:
    """`rank learning_rate eval_loss best note`: a cell a candidate, the deeper the lower its loss; `note` stands where
    there is none. The `best` of each rank is bold.
    """
    values = frame.assign(rate=frame["learning_rate"].map(rate), label=frame["eval_loss"].map(loss))
    values["label"] = values["label"].where(values["eval_loss"].notna(), values["note"])
    known = values["eval_loss"].dropna()
    # One rate that nearly diverged must not make all others look alike: above this, cells are equally pale.
    most = min(float(known.max()), float(2 * known.median() - known.min()))
    least = float(known.min())
    depth = alt.Scale(domain=[least, most if most > least else least + 1], range=[0.5, 0.04], clamp=True)
    rates = [rate(value) for value in sorted(values["learning_rate"].unique(), reverse=True)]
    x = rank_axis(text, ranks)
    y = alt.Y("rate:N", sort=rates, title=text("chart.learning_rate"), scale=alt.Scale(domain=rates))
    title = text("chart.eval_by_rank.y")
    tooltip = [*identity(text), alt.Tooltip("eval_loss:Q", title=title, format=".4f")]
    opacity = alt.Opacity("eval_loss:Q", scale=depth, legend=None)
    cells = alt.Chart(values).mark_rect(style="cell-of-map").encode(x=x, y=y, opacity=opacity, tooltip=tooltip)
    plain, best = values[~values["best"]], values[values["best"]]
    labels = [alt.Chart(plain).mark_text(size=13).encode(x=x, y=y, text="label:N", tooltip=tooltip)]
    labels.append(
        alt.Chart(best).mark_text(size=13, fontWeight="bold").encode(x=x, y=y, text="label:N", tooltip=tooltip)
    )
    return sized(alt.layer(cells, *labels)).properties(height=max(120, 52 * len(rates)))


def _band(limits: tuple[float, float], scale: alt.Scale) -> alt.Chart:
    """A shaded range of the y axis."""
    frame = pd.DataFrame({"from": [limits[0]], "to": [limits[1]]})
    band: alt.Chart = (
        alt.Chart(frame).mark_rect(opacity=0.13, style="band").encode(y=alt.Y("from:Q", scale=scale), y2="to:Q")
    )
    return band
