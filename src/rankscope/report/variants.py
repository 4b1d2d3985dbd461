"""Variants of LoRA beside plain LoRA: one sentence and one row per variant and rank."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from rankscope.report import charts
from rankscope.report.figures import Figure, Section, make_section
from rankscope.report.frames import by_candidate
from rankscope.study.evidence import Evidence
from rankscope.text import formats
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Columns, Table, column, with_interval
from rankscope.text.verdict import Verdict


def variant_sections(evidence: Evidence, verdict: Verdict, text: Catalogue) -> list[Section]:
    """One section, or none without variants."""
    table = variant_table(evidence, verdict, text)
    if table is None:
        return []
    judged = [row for row in verdict.get("variants", []) if formats.known(row["low"])]
    figures = [_figure(judged, text)] if judged else []
    return [make_section("variants", figures, variant_sentences(verdict, text), [table])]


def _figure(judged: Sequence[Mapping[str, Any]], text: Catalogue) -> Figure:
    """A point with its interval per variant and rank, beside the line of plain LoRA."""
    names = [_name(row, text) for row in judged]
    title, frame = text("variant.title"), pd.DataFrame(judged).assign(name=names)
    values = "; ".join(f"{name}: {formats.signed(row['difference'])}" for name, row in zip(names, judged, strict=True))
    alternative = text("chart.values", title=title, values=values)
    return Figure("variants", title, text("variant.note"), alternative, {"": _chart(frame, text)})


def _name(row: Mapping[str, Any], text: Catalogue) -> str:
    variant = text(f"variant.{row['variant']}")
    return f"{variant}, {text('name.rank', rank=row['rank'])}"


def _chart(frame: pd.DataFrame, text: Catalogue) -> alt.Chart:
    """`name rank difference low high`: one row per variant and rank."""
    ranks, title = sorted(int(rank) for rank in frame["rank"].unique()), text("variant.difference")
    scale = alt.Scale(domain=list(charts.reach(0.0, frame["low"], frame["high"])), nice=True)
    titles = {"name:N": text("variant.name"), "difference:Q": title}
    titles |= {"low:Q": text("chart.lowest"), "high:Q": text("chart.highest")}
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 4]).encode(x="zero:Q")
    base = alt.Chart(frame[["name", "rank", "difference", "low", "high"]])
    base = base.encode(y=alt.Y("name:N", sort=None, title=None), color=charts.colour(ranks))
    bars = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title, scale=scale), x2="high:Q")
    dots = base.mark_point(filled=True, size=90, opacity=1)
    x, tooltip = alt.X("difference:Q", title=title, scale=scale), charts.tooltips(titles, "+.4f")
    return charts.layered(zero, bars, dots.encode(x=x, shape=charts.shape(ranks), tooltip=tooltip))


def variant_sentences(verdict: Verdict, text: Catalogue) -> list[str]:
    """Conclusion on each variant at each rank."""
    sentences = []
    for row in verdict.get("variants", []):
        numbers = {name: formats.signed(row[name]) for name in ("difference", "low", "high") if row["outcome"]}
        named = {"variant": text(f"variant.{row['variant']}"), "rank": row["rank"]}
        sentences.append(text(f"variant.{row['outcome'] or 'one_seed'}", **named, **numbers))
    return sentences


def better_variants(verdict: Verdict, text: Catalogue) -> list[str]:
    """A sentence that names the variants that are better than plain LoRA, or none: the verdict's own does not."""
    better = [row for row in verdict.get("variants", []) if row["outcome"] == "better"]
    names = [_name(row, text) for row in better]
    return [text("variant.caveat", names="; ".join(names))] if names else []


def variant_table(evidence: Evidence, verdict: Verdict, text: Catalogue) -> Table | None:
    """One row per variant and rank, or None without variants."""
    if evidence.variants is None:
        return None
    renamed = {"low": "difference_low", "high": "difference_high", "memory": "memory_change"}
    renamed["step_seconds"] = "time_change"
    fields = ["candidate", "difference", "outcome", *renamed]
    judged = pd.DataFrame(verdict.get("variants", []), columns=fields).rename(columns=renamed)
    table = by_candidate(evidence.variants, {}, evidence).join(judged.set_index("candidate"), on="candidate")
    variants = {candidate.name: candidate.variant for candidate in evidence.variants.spec.candidates()}
    words = [text("variant.name"), text("variant.outcome")]
    columns: Columns = {
        words[0]: lambda row: text(f"variant.{variants[row['candidate']]}"),
        text("table.rank"): column("rank", str, text),
        text("table.learning_rate"): column("learning_rate", formats.rate, text),
        text("table.finished"): lambda row: f"{row['finished']} / {row['trials']}",
        text("table.params"): column("trainable_params", "{:,.0f}".format, text),
        text("table.adapter"): column("adapter_bytes", formats.sizes(table["adapter_bytes"]), text),
        text("table.eval_loss"): column("eval_loss", formats.loss, text),
        text("variant.difference"): with_interval("difference", formats.signed, text),
        words[1]: lambda row: text.get(f"variant.outcome_{row['outcome']}", text("none")),
        text("variant.memory"): column("memory_change", formats.signed_percent, text),
        text("variant.step_seconds"): column("time_change", formats.signed_percent, text),
    }
    confidence = formats.percent(verdict.get("confidence", evidence.spec.verdict.confidence))
    return formats.tabulate(text("variant.caption", confidence=confidence), columns, table.to_dict("records"), words)


def pattern_table(modules: pd.DataFrame, rank: int, text: Catalogue) -> Table:
    """Proposed ranks of each module; `modules` is `rankscope.resize.pattern.by_module`."""
    forms: dict[str, Callable[[Any], str]] = dict.fromkeys(("module", "layers", "mean", "lowest", "highest"), str)
    forms["mean"] = "{:.1f}".format
    columns = {text(f"pattern.{name}"): column(name, form, text) for name, form in forms.items()}
    words = [text("pattern.module")]
    return formats.tabulate(text("pattern.caption", rank=rank), columns, modules.to_dict("records"), words)
