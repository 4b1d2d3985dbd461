"""The rank curve: losses of the largest rank's adapters truncated to lower ranks, beside those of trained ranks."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd

from rankscope.analysis.curve import curve_errors, loss_curve, lowest_rank_within
from rankscope.report import charts
from rankscope.report.figures import Figure, Panel, Section, make_section, numbers
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, interval, loss, percent, shown, signed, signed_percent, tabulate


def rank_curve_sections(evidence: Evidence, text: Catalogue) -> list[Section]:
    """One section, or none without a curve; without a table where no lower rank was trained."""
    if evidence.cuts is None or evidence.cuts.empty:
        return []
    curve, errors = loss_curve(evidence), curve_errors(evidence)
    tables = [] if errors.empty else [_error_table(evidence, errors, text)]
    return [make_section("cuts", [_figure(curve, text)], _sentences(evidence, curve, errors, text), tables)]


def _name(steps: Any, text: Catalogue) -> str:
    return text("cuts.recovered" if steps else "cuts.cut", steps=steps)


def _figure(curve: pd.DataFrame, text: Catalogue) -> Figure:
    title, trained = text("cuts.title"), curve["kind"] == "trained"
    named = curve.assign(name=[_name(steps, text) for steps in curve["recover_steps"]])
    named.loc[trained, "name"] = text("cuts.trained")
    names = list(dict.fromkeys(named["name"]))
    wide = named.pivot(index="rank", columns="name", values="eval_loss").reset_index()
    columns: Columns = {text("table.rank"): lambda row: str(row["rank"])}
    for name in names:
        columns[name] = lambda row, name=name: shown(row[name], loss, text)  # type: ignore[misc]
    points = named[named["kind"] == "cut"].sort_values("rank").to_dict("records")
    values = "; ".join(text("chart.value", rank=row["rank"], value=loss(row["eval_loss"])) for row in points)
    return Figure(
        "cut-loss-rank",
        title,
        text("cuts.note"),
        text("chart.values", title=f"{title}. {_name(0, text)}", values=values),
        [Panel("", _chart(named, names, text))],
        numbers(title, columns, wide.to_dict("records"), text),
    )


def _chart(points: pd.DataFrame, names: Sequence[str], text: Catalogue) -> alt.Chart:
    """`rank name eval_loss eval_loss_low eval_loss_high`: one line per `name`, over the logarithm of the rank."""
    x = alt.X(
        "rank:Q",
        title=text("chart.rank"),
        scale=alt.Scale(type="log", base=2, nice=False, padding=16),
        axis=alt.Axis(values=sorted(map(int, points["rank"].unique())), format="d", labelOverlap=True),
    )
    legend = alt.Legend(title=None, columns=2, symbolOpacity=1, symbolSize=110)
    ends = [points[name] for name in ("eval_loss", "eval_loss_low", "eval_loss_high")]
    y = charts.y_axis(text("chart.eval_steps.y"), charts.reach(*ends))
    common: dict[str, Any] = {"sort": list(names), "legend": legend}
    colour = alt.Color("name:N", scale=alt.Scale(domain=list(names)), **common)
    dash = alt.StrokeDash("name:N", scale=charts.cycle(names, charts.DASHES), **common)
    shape = alt.Shape("name:N", scale=charts.cycle(names, charts.SHAPES), **common)
    titles = {"name:N": text("cuts.kind"), "rank:O": text("chart.rank"), "eval_loss:Q": text("chart.mean")}
    titles |= {"eval_loss_low:Q": text("chart.lowest"), "eval_loss_high:Q": text("chart.highest")}
    tooltip = charts.tooltips(titles, ".4f")
    layers = [alt.Chart(points).mark_line(strokeWidth=1.5).encode(x=x, y=y("eval_loss"), color=colour, strokeDash=dash)]
    for number, name in enumerate(names):  # side by side, or at one rank they would hide each other
        mark: dict[str, Any] = {"strokeWidth": 1.5, "opacity": 0.6, "xOffset": 6 * (number - (len(names) - 1) / 2)}
        layers += charts.intervals(points[points["name"] == name], y, {"x": x, "color": colour}, "eval_loss", **mark)
    dots = alt.Chart(points).mark_point(filled=True, size=80, opacity=1)
    layers.append(dots.encode(x=x, y=y("eval_loss"), color=colour, shape=shape, tooltip=tooltip))
    return charts.layered(*layers)


def _error_table(evidence: Evidence, errors: pd.DataFrame, text: Catalogue) -> Table:
    verdict, states = evidence.spec.verdict, {True: "table.yes", False: "table.no", None: "cuts.open"}
    columns: Columns = {
        text("table.rank"): lambda row: str(row["rank"]),
        text("cuts.steps"): lambda row: str(row["recover_steps"]),
        text("cuts.trained_loss"): lambda row: loss(row["trained"]),
        text("cuts.cut_loss"): lambda row: loss(row["cut"]),
        text("cuts.error"): lambda row: signed(row["error"]) + interval(row["error_low"], row["error_high"], signed),
        text("cuts.share"): lambda row: signed_percent(row["error_share"]),
        text("cuts.sd"): lambda row: shown(row["error_sd"], loss, text),
        text("cuts.within", margin=percent(verdict.loss_margin)): lambda row: text(states[row["within"]]),
    }
    caption = text("cuts.caption", confidence=percent(verdict.confidence))
    return tabulate(caption, columns, errors.sort_values(["recover_steps", "rank"]).to_dict("records"))


def _sentences(evidence: Evidence, curve: pd.DataFrame, errors: pd.DataFrame, text: Catalogue) -> list[str]:
    """Meaning of the curve, and how far it holds here."""
    margin, top = evidence.spec.verdict.loss_margin, max(evidence.spec.ranks)
    allowed, truncated = percent(margin), curve[curve["kind"] != "trained"]
    found = [text("cuts.bound", rank=top)]
    if errors.empty:
        found.append(text("cuts.unknown"))
    for steps, part in errors.groupby("recover_steps"):
        found.append(text("cuts.holds", name=_name(steps, text), where=_where(part, allowed, text)))
    trained = lowest_rank_within(curve[curve["kind"] == "trained"], margin)
    for steps, part in truncated.groupby("recover_steps"):
        lowest = lowest_rank_within(part, margin) if (part["rank"] == top).any() else None
        if lowest is not None and not errors.empty:
            ranks = {"top": top, "cut": lowest, "trained": trained}
            found.append(text("cuts.lowest", name=_name(steps, text), margin=allowed, **ranks))
    losses = {(row["recover_steps"], row["rank"]): row["eval_loss"] for row in truncated.to_dict("records")}
    for steps in sorted({steps for steps, rank in losses if steps and rank == top and (0, top) in losses}):
        change = losses[steps, top] - losses[0, top]
        found.append(text("cuts.more_steps", steps=steps, rank=top, change=signed(change)))
    return found


def _where(errors: pd.DataFrame, margin: str, text: Catalogue) -> str:
    """Ranks by how far the estimate holds: `within 1% at rank 32, 64; undecided at rank 1`."""
    phrases = []
    for state, key in ((True, "held"), (None, "unclear"), (False, "missed")):
        ranks = sorted(row["rank"] for row in errors.to_dict("records") if row["within"] is state)
        if ranks:
            values = {"ranks": ", ".join(map(str, ranks))} | ({} if state is None else {"margin": margin})
            phrases.append(text(f"cuts.{key}", **values))
    return "; ".join(phrases)
