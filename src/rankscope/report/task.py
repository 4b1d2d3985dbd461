"""Scores of a task by rank."""

from typing import Any

import altair as alt
import pandas as pd

from rankscope.report import charts
from rankscope.report.figures import Figure, Section, make_section, say
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, column, percent, share, tabulate, with_interval
from rankscope.text.verdict import Verdict


def task_sections(verdict: Verdict, text: Catalogue) -> list[Section]:
    """One section, or none in a study without a task."""
    if "task" not in verdict:
        return []
    table = task_table(verdict, text)
    if table is None:
        return [make_section("task", [text("cause.unscored")])]
    return [make_section("task", [_figure(verdict["task"], text)], [], [table])]


def task_table(verdict: Verdict, text: Catalogue) -> Table | None:
    """One row for the untrained model and one for each rank; None without scores."""
    if not (task := verdict.get("task", {})).get("scores"):
        return None
    ends = ("", "_low", "_high")
    untrained = {f"score{end}": task[f"untrained{end}"] for end in ends} | {f"behind{end}": None for end in ends}
    records = [untrained | {"rank": 0, "within_margin": None}, *task["scores"]]
    columns: Columns = {
        text("table.rank"): column("rank", lambda rank: str(rank) if rank else text("task.base"), text),
        text("task.score"): with_interval("score", share, text),
        text("task.behind"): with_interval("behind", _points, text),
        text("table.within"): column("within_margin", lambda within: text("table.yes" if within else "table.no"), text),
    }
    values = {"confidence": percent(verdict["confidence"]), "items": text.count("items", task["items"])}
    caption = text("task.caption", margin=percent(task["margin"]), **values)
    chosen = next((number for number, row in enumerate(records) if row["rank"] == task["rank"]), None)
    return tabulate(caption, columns, records, chosen=chosen)


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _figure(task: dict[str, Any], text: Catalogue) -> Figure:
    """A point with its interval for each rank, beside the line of the untrained model."""
    names = ["score", "score_low", "score_high"]
    frame = pd.DataFrame(task["scores"])[["rank", *names]].astype(dict.fromkeys(names, "float64"))
    ranks, title = list(frame["rank"]), text("task.title")
    y = charts.y_axis(text("task.score"), charts.reach(task["untrained"], *(frame[name] for name in names)))
    channels = {"x": charts.rank_axis(text, ranks), "color": charts.colour(ranks)}
    base = alt.Chart(pd.DataFrame({"base": [task["untrained"]], "label": [text("task.base")]})).encode(y=y("base"))
    label = base.mark_text(align="left", dy=-8).encode(x=alt.value(8), text="label:N")
    kinds = zip(names, ("mean", "lowest", "highest"), strict=True)
    titles = {"rank:O": text("chart.rank")} | {f"{name}:Q": text(f"chart.{kind}") for name, kind in kinds}
    points = alt.Chart(frame).mark_point(filled=True, size=130, opacity=1)
    points = points.encode(y=y("score"), shape=charts.shape(ranks), tooltip=charts.tooltips(titles, ".1%"), **channels)
    bars = charts.intervals(frame, y, channels, "score", strokeWidth=2.5)
    chart = charts.layered(base.mark_rule(strokeDash=[4, 4]), label, *bars, points)
    return Figure("task-scores", title, text("task.note"), say(title, frame, "score", percent, text), {"": chart})
