"""The rank curve: losses of the largest rank's adapters truncated to lower ranks, beside those of trained ranks."""

from collections.abc import Iterator
from typing import Any

import altair as alt
import pandas as pd

from rankscope.analysis.curve import curve_errors, loss_curve, lowest_rank_within
from rankscope.report import charts
from rankscope.report.figures import Figure, Section, make_section, numbers
from rankscope.study.evidence import Evidence
from rankscope.text import formats
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, column, with_interval

LOSSES = ["eval_loss", "eval_loss_low", "eval_loss_high"]


def rank_curve_sections(evidence: Evidence, text: Catalogue) -> list[Section]:
    """One section, or none without a curve; without a table where no lower rank was trained."""
    if evidence.cuts.empty:
        return []
    curve, errors = loss_curve(evidence), curve_errors(evidence)
    tables = [] if errors.empty else [_error_table(evidence, errors, text)]
    return [make_section("cuts", [_figure(curve, text)], list(_sentences(evidence, curve, errors, text)), tables)]


def _name(steps: Any, text: Catalogue) -> str:
    return text("cuts.recovered" if steps else "cuts.cut", steps=steps)


def _figure(curve: pd.DataFrame, text: Catalogue) -> Figure:
    title, trained = text("cuts.title"), curve["kind"] == "trained"
    named = curve.assign(name=curve["recover_steps"].map(lambda steps: _name(steps, text)))
    named.loc[trained, "name"] = text("cuts.trained")
    names = named["name"].unique().tolist()
    wide = named.pivot(index="rank", columns="name", values="eval_loss").reset_index()
    points = named[named["kind"] == "cut"].sort_values("rank").to_dict("records")
    values = "; ".join(text("chart.value", rank=row["rank"], value=formats.loss(row["eval_loss"])) for row in points)
    alternative = text("chart.values", title=f"{title}. {_name(0, text)}", values=values)
    table_of = numbers(title, wide, {name: column(name, formats.loss, text) for name in names}, text)
    return Figure("cut-loss-rank", title, text("cuts.note"), alternative, {"": _chart(named, names, text)}, table_of)


def _chart(points: pd.DataFrame, names: list[str], text: Catalogue) -> alt.Chart:
    """`rank name eval_loss eval_loss_low eval_loss_high`: one line per `name`, over the logarithm of the rank."""
    scale = alt.Scale(type="log", base=2, nice=False, padding=16)
    axis = alt.Axis(values=sorted(map(int, points["rank"].unique())), format="d", labelOverlap=True)
    x = alt.X("rank:Q", title=text("chart.rank"), scale=scale, axis=axis)
    y = charts.y_axis(text("chart.eval_steps.y"), charts.reach(*(points[name] for name in LOSSES)))
    legend = alt.Legend(title=None, columns=2, symbolOpacity=1, symbolSize=110)
    common: dict[str, Any] = {"sort": names, "legend": legend}
    colour = alt.Color("name:N", scale=alt.Scale(domain=names), **common)
    dash = alt.StrokeDash("name:N", scale=charts.cycle(names, charts.DASHES), **common)
    shape = alt.Shape("name:N", scale=charts.cycle(names, charts.SHAPES), **common)
    base = alt.Chart(points).encode(x=x, y=y("eval_loss"), color=colour)
    layers = [base.mark_line(strokeWidth=1.5).encode(strokeDash=dash)]
    for number, name in enumerate(names):  # side by side, or at one rank they would hide each other
        mark: dict[str, Any] = {"strokeWidth": 1.5, "opacity": 0.6, "xOffset": 6 * (number - (len(names) - 1) / 2)}
        layers += charts.intervals(points[points["name"] == name], y, {"x": x, "color": colour}, "eval_loss", **mark)
    titles = dict(zip(LOSSES, ("mean", "lowest", "highest"), strict=True))
    of_losses = {f"{name}:Q": text(f"chart.{title}") for name, title in titles.items()}
    tooltip = charts.tooltips({"name:N": text("cuts.kind"), "rank:O": text("chart.rank"), **of_losses}, ".4f")
    dots = base.mark_point(filled=True, size=80, opacity=1)
    return charts.layered(*layers, dots.encode(shape=shape, tooltip=tooltip))


def _error_table(evidence: Evidence, errors: pd.DataFrame, text: Catalogue) -> Table:
    verdict, states = evidence.spec.verdict, {True: "table.yes", False: "table.no", None: "cuts.open"}
    columns: Columns = {
        text("table.rank"): column("rank", str, text),
        text("cuts.steps"): column("recover_steps", str, text),
        text("cuts.trained_loss"): column("trained", formats.loss, text),
        text("cuts.cut_loss"): column("cut", formats.loss, text),
        text("cuts.error"): with_interval("error", formats.signed, text),
        text("cuts.share"): column("error_share", formats.signed_percent, text),
        text("cuts.sd"): column("error_sd", formats.loss, text),
        text("cuts.within", margin=formats.percent(verdict.loss_margin)): lambda row: text(states[row["within"]]),
    }
    caption = text("cuts.caption", confidence=formats.percent(verdict.confidence))
    return formats.tabulate(caption, columns, errors.sort_values(["recover_steps", "rank"]).to_dict("records"))


def _sentences(evidence: Evidence, curve: pd.DataFrame, errors: pd.DataFrame, text: Catalogue) -> Iterator[str]:
    """Meaning of the curve, and how far it holds here."""
    margin, top = evidence.spec.verdict.loss_margin, max(evidence.spec.ranks)
    allowed, truncated = formats.percent(margin), curve[curve["kind"] != "trained"]
    yield text("cuts.bound", rank=top)
    if errors.empty:
        yield text("cuts.unknown")
    for steps, part in errors.groupby("recover_steps"):
        yield text("cuts.holds", name=_name(steps, text), where=_where(part, allowed, text))
    trained = lowest_rank_within(curve[curve["kind"] == "trained"], margin)
    at_top = truncated[truncated["rank"] == top].set_index("recover_steps")["eval_loss"]
    for steps, part in truncated.groupby("recover_steps"):
        if steps in at_top and not errors.empty:
            ranks = {"top": top, "cut": lowest_rank_within(part, margin), "trained": trained}
            yield text("cuts.lowest", name=_name(steps, text), margin=allowed, **ranks)
    for steps in sorted(at_top.index):
        if steps and 0 in at_top:
            yield text("cuts.more_steps", steps=steps, rank=top, change=formats.signed(at_top[steps] - at_top[0]))


def _where(errors: pd.DataFrame, margin: str, text: Catalogue) -> str:
    """Ranks by how far the estimate holds: `within 1% at rank 32, 64; undecided at rank 1`."""
    phrases = []
    for state, key in ((True, "held"), (None, "unclear"), (False, "missed")):
        ranks = ", ".join(str(row["rank"]) for row in errors.to_dict("records") if row["within"] is state)
        if ranks:
            phrases.append(text(f"cuts.{key}", ranks=ranks, margin=margin))
    return "; ".join(phrases)
