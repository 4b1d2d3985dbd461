"""The curve from one training: the largest rank's adapters cut to lower ranks, beside ranks that were trained."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import pandas as pd

from rankscope.analysis.curve import curve_errors, loss_curve, lowest_rank_within
from rankscope.report.figures import Figure, Panel, Section, numbers, sized
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, known, loss, percent, signed, signed_percent

SHAPES = ["circle", "triangle-down", "triangle-up", "diamond", "cross", "square"]
DASHES = [[1, 0], [6, 3], [2, 2], [9, 3, 2, 3], [12, 4], [4, 2, 1, 2]]


class CutCurve(NamedTuple):
    """What is shown of it."""

    figure: Figure
    errors: Table | None
    """None where no lower rank was trained."""
    sentences: list[str]

    @property
    def tables(self) -> list[Table]:
        """All of it in numbers."""
        return [table for table in (self.figure.numbers, self.errors) if table]


def cut_section(evidence: Evidence, text: Catalogue) -> list[Section]:
    """One section, or none where no curve was taken."""
    if evidence.cuts is None or evidence.cuts.empty:
        return []
    found = cut_curve(evidence, text)
    return [Section("cuts", [found.figure], found.sentences, [found.errors] if found.errors else [])]


def cut_curve(evidence: Evidence, text: Catalogue) -> CutCurve:
    """`Evidence.cuts` must not be empty."""
    curve, errors = loss_curve(evidence), curve_errors(evidence)
    table = None if errors.empty else _error_table(evidence, errors, text)
    return CutCurve(_figure(curve, text), table, _sentences(evidence, curve, errors, text))


def _name(kind: str, steps: int, text: Catalogue) -> str:
    return text(f"cuts.{kind}", steps=steps)


def _figure(curve: pd.DataFrame, text: Catalogue) -> Figure:
    title = text("cuts.title")
    shown = curve.assign(
        name=[_name(kind, steps, text) for kind, steps in zip(curve["kind"], curve["recover_steps"], strict=True)]
    )
    names = list(dict.fromkeys(shown["name"]))
    wide = shown.pivot(index="rank", columns="name", values="eval_loss")[names]
    rows = [
        [str(rank), *(loss(value) if known(value) else text("none") for value in values)]
        for rank, values in zip(wide.index, wide.to_numpy(), strict=True)
    ]
    points = shown[shown["kind"] == "cut"].sort_values("rank").to_dict("records")
    values = "; ".join(text("chart.value", rank=row["rank"], value=loss(row["eval_loss"])) for row in points)
    return Figure(
        "cut-loss-rank",
        title,
        text("cuts.note"),
        text("chart.values", title=f"{title}. {_name('cut', 0, text)}", values=values),
        [Panel("", _chart(shown, names, text))],
        numbers(title, [text("table.rank"), *names], rows, text),
    )


def _chart(points: pd.DataFrame, names: Sequence[str], text: Catalogue) -> alt.Chart:
    """`rank name eval_loss eval_loss_low eval_loss_high`: a line a `name`, over the logarithm of the rank."""
    x = alt.X(
        "rank:Q",
        title=text("chart.rank"),
        scale=alt.Scale(type="log", base=2, nice=False, padding=16),
        axis=alt.Axis(values=sorted(map(int, points["rank"].unique())), format="d", labelOverlap=True),
    )
    title, scale = text("chart.eval_by_rank.y"), alt.Scale(zero=False, nice=True, padding=12)
    y = alt.Y("eval_loss:Q", title=title, scale=scale)
    legend = alt.Legend(title=None, columns=2, symbolOpacity=1, symbolSize=110)
    domain = alt.Scale(domain=list(names))
    colour = alt.Color("name:N", sort=list(names), scale=domain, legend=legend)
    dash = alt.StrokeDash("name:N", sort=list(names), scale=_cycle(names, DASHES), legend=legend)
    shape = alt.Shape("name:N", sort=list(names), scale=_cycle(names, SHAPES), legend=legend)
    tooltip = [
        alt.Tooltip("name:N", title=text("cuts.kind")),
        alt.Tooltip("rank:Q", title=text("chart.rank")),
        alt.Tooltip("eval_loss:Q", title=text("chart.mean"), format=".4f"),
        alt.Tooltip("eval_loss_low:Q", title=text("chart.lowest"), format=".4f"),
        alt.Tooltip("eval_loss_high:Q", title=text("chart.highest"), format=".4f"),
    ]
    layers = [alt.Chart(points).mark_line(strokeWidth=1.5).encode(x=x, y=y, color=colour, strokeDash=dash)]
    low = alt.Y("eval_loss_low:Q", title=title, scale=scale)
    for number, name in enumerate(names):
        sure = points[(points["name"] == name) & points["eval_loss_low"].notna() & points["eval_loss_high"].notna()]
        if not sure.empty:  # side by side, for at one rank they would hide each other
            offset = 6 * (number - (len(names) - 1) / 2)
            rule = alt.Chart(sure).mark_rule(strokeWidth=1.5, opacity=0.6, xOffset=offset)
            layers.append(rule.encode(x=x, y=low, y2="eval_loss_high:Q", color=colour))
    dots = alt.Chart(points).mark_point(filled=True, size=80, opacity=1)
    layers.append(dots.encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip))
    return sized(alt.layer(*layers))


def _cycle(names: Sequence[str], values: Sequence[Any]) -> alt.Scale:
    return alt.Scale(domain=list(names), range=[values[number % len(values)] for number in range(len(names))])


def _error_table(evidence: Evidence, errors: pd.DataFrame, text: Catalogue) -> Table:
    verdict, states = evidence.spec.verdict, {True: "table.yes", False: "table.no", None: "cuts.open"}
    rows = []
    for row in errors.sort_values(["recover_steps", "rank"]).to_dict("records"):
        ends = (row["error_low"], row["error_high"])
        interval = f"\n[{signed(ends[0])}, {signed(ends[1])}]" if all(map(known, ends)) else ""
        rows.append(
            [
                str(row["rank"]),
                str(row["recover_steps"]),
                loss(row["trained"]),
                loss(row["cut"]),
                signed(row["error"]) + interval,
                signed_percent(row["error_share"]),
                loss(row["error_sd"]) if known(row["error_sd"]) else text("none"),
                text(states[row["within"]]),
            ]
        )
    names = ["table.rank", "cuts.steps", "cuts.trained_loss", "cuts.cut_loss", "cuts.error", "cuts.share", "cuts.sd"]
    headers = [text(name) for name in names] + [text("cuts.within", margin=percent(verdict.margin))]
    caption = text("cuts.caption", confidence=percent(verdict.confidence))
    return Table(caption, headers, [True] * len(headers), rows)


def _sentences(evidence: Evidence, curve: pd.DataFrame, errors: pd.DataFrame, text: Catalogue) -> list[str]:
    """What the curve is, where it holds and where it misleads."""
    margin, top = evidence.spec.verdict.margin, max(evidence.spec.ranks)
    shown, cuts = percent(margin), curve[curve["kind"] != "trained"]
    found = [text("cuts.bound", rank=top)]
    if errors.empty:
        found.append(text("cuts.unknown"))
    for steps, part in errors.groupby("recover_steps"):
        name = _name("recovered" if steps else "cut", int(str(steps)), text)
        found.append(text("cuts.holds", name=name, where=_where(part, shown, text)))
    trained = lowest_rank_within(curve[curve["kind"] == "trained"], margin)
    for steps, part in cuts.groupby("recover_steps"):
        lowest = lowest_rank_within(part, margin) if (part["rank"] == top).any() else None
        if lowest is not None and not errors.empty:
            name = _name("recovered" if steps else "cut", int(str(steps)), text)
            found.append(text("cuts.lowest", name=name, margin=shown, top=top, cut=lowest, trained=trained))
    losses = {(row["recover_steps"], row["rank"]): row["eval_loss"] for row in cuts.to_dict("records")}
    for steps in sorted({steps for steps, rank in losses if steps and rank == top and (0, top) in losses}):
        change = losses[steps, top] - losses[0, top]
        found.append(text("cuts.more_steps", steps=steps, rank=top, change=signed(change)))
    return found


def _where(errors: pd.DataFrame, margin: str, text: Catalogue) -> str:
    """`within 1% at rank 32, 64; not clear at rank 1`: what is shown of the ranks."""
    phrases = []
    for state, key in ((True, "held"), (None, "unclear"), (False, "missed")):
        ranks = sorted(row["rank"] for row in errors.to_dict("records") if row["within"] is state)
        if ranks:
            values = {"ranks": ", ".join(map(str, ranks))} | ({} if state is None else {"margin": margin})
            phrases.append(text(f"cuts.{key}", **values))
    return "; ".join(phrases)
