"""Variants of LoRA beside plain LoRA: one sentence and one row per variant and rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from rankscope.report import charts
from rankscope.report.figures import Figure, Panel, Section, make_section
from rankscope.report.frames import by_candidate
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import (
    Columns,
    Table,
    interval,
    known,
    loss,
    percent,
    rate,
    shown,
    signed,
    signed_percent,
    size,
    tabulate,
)
from rankscope.text.verdict import Verdict


def variant_sections(evidence: Evidence, verdict: Verdict, text: Catalogue) -> list[Section]:
    """One section, or none without variants."""
    table = variant_table(evidence, verdict, text)
    if table is None:
        return []
    judged = [row for row in (verdict or {}).get("variants", []) if known(row["low"])]
    figures = [_figure(judged, text)] if judged else []
    return [make_section("variants", figures, variant_sentences(verdict, text), [table])]


def _figure(judged: Sequence[Mapping[str, Any]], text: Catalogue) -> Figure:
    """A point with its interval per variant and rank, beside the line of plain LoRA."""
    rows = [{**row, "name": _name(row, text)} for row in judged]
    title = text("variant.title")
    values = "; ".join(f"{row['name']}: {signed(row['difference'])}" for row in rows)
    alternative = text("chart.values", title=title, values=values)
    return Figure("variants", title, text("variant.note"), alternative, [Panel("", _chart(pd.DataFrame(rows), text))])


def _name(row: Mapping[str, Any], text: Catalogue) -> str:
    variant = text(f"variant.{row['variant']}")
    return f"{variant}, {text('name.rank', rank=row['rank'])}"


def _chart(frame: pd.DataFrame, text: Catalogue) -> alt.Chart:
    """`name rank difference low high`: one row per variant and rank."""
    ranks = sorted(int(rank) for rank in frame["rank"].unique())
    y, title, of_rank = alt.Y("name:N", sort=None, title=None), text("variant.difference"), charts.colour(ranks)
    scale = alt.Scale(domain=list(charts.reach(0.0, frame["low"], frame["high"])), nice=True)
    titles = {"name:N": text("variant.name"), "difference:Q": title}
    titles |= {"low:Q": text("chart.lowest"), "high:Q": text("chart.highest")}
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 4]).encode(x="zero:Q")
    base = alt.Chart(frame[["name", "rank", "difference", "low", "high"]]).encode(y=y, color=of_rank)
    interval = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title, scale=scale), x2="high:Q")
    dots = base.mark_point(filled=True, size=90, opacity=1)
    x, tooltip = alt.X("difference:Q", title=title, scale=scale), charts.tooltips(titles, "+.4f")
    return charts.layered(zero, interval, dots.encode(x=x, shape=charts.shape(ranks), tooltip=tooltip))


def variant_sentences(verdict: Verdict, text: Catalogue) -> list[str]:
    """Conclusion on each variant at each rank."""
    sentences = []
    for row in (verdict or {}).get("variants", []):
        named = {"variant": text(f"variant.{row['variant']}"), "rank": row["rank"]}
        if row["outcome"] is None:
            sentences.append(text("variant.one_seed", **named))
            continue
        values = {"difference": signed(row["difference"]), "low": signed(row["low"]), "high": signed(row["high"])}
        sentences.append(text(f"variant.{row['outcome']}", **named, **values))
    return sentences


def variant_table(evidence: Evidence, verdict: Verdict, text: Catalogue) -> Table | None:
    """One row per variant and rank, or None without variants."""
    if evidence.variants is None:
        return None
    judged = {row["candidate"]: row for row in (verdict or {}).get("variants", [])}
    variants = {candidate.name: candidate.variant for candidate in evidence.variants.spec.candidates()}
    table = by_candidate(evidence.variants, None, evidence)
    records = [row | {"judged": judged.get(row["candidate"], {})} for row in table.to_dict("records")]
    words = [text("variant.name"), text("variant.outcome")]

    def difference(judged: Mapping[str, Any]) -> str:
        return shown(judged.get("difference"), signed, text) + interval(judged.get("low"), judged.get("high"), signed)

    columns: Columns = {
        words[0]: lambda row: text(f"variant.{variants[row['candidate']]}"),
        text("table.rank"): lambda row: str(row["rank"]),
        text("table.learning_rate"): lambda row: rate(row["learning_rate"]),
        text("table.finished"): lambda row: f"{row['finished']} / {row['trials']}",
        text("table.params"): lambda row: shown(row["trainable_params"], "{:,.0f}".format, text),
        text("table.adapter"): lambda row: shown(row["adapter_bytes"], size, text),
        text("table.eval_loss"): lambda row: shown(row["eval_loss"], loss, text),
        text("variant.difference"): lambda row: difference(row["judged"]),
        words[1]: lambda row: text.get(f"variant.outcome_{row['judged'].get('outcome')}", text("none")),
        text("variant.memory"): lambda row: shown(row["judged"].get("memory"), signed_percent, text),
        text("variant.step_seconds"): lambda row: shown(row["judged"].get("step_seconds"), signed_percent, text),
    }
    confidence = percent((verdict or {}).get("confidence", evidence.spec.verdict.confidence))
    return tabulate(text("variant.caption", confidence=confidence), columns, records, words)


def pattern_table(modules: pd.DataFrame, rank: int, text: Catalogue) -> Table:
    """Proposed ranks of each module; `modules` is `rankscope.resize.pattern.by_module`."""
    module = text("pattern.module")
    columns: Columns = {
        module: lambda row: str(row["module"]),
        text("pattern.layers"): lambda row: str(row["layers"]),
        text("pattern.mean"): lambda row: f"{row['mean']:.1f}",
        text("pattern.lowest"): lambda row: str(row["lowest"]),
        text("pattern.highest"): lambda row: str(row["highest"]),
    }
    return tabulate(text("pattern.caption", rank=rank), columns, modules.to_dict("records"), [module])
