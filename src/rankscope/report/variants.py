"""Variants of LoRA beside plain LoRA: a sentence and a row for each at each rank."""

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd

from rankscope.report.figures import Figure, Panel, Section, colour, shape, sized
from rankscope.report.frames import by_candidate
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, known, loss, percent, rate, signed, signed_percent, size


def variant_section(evidence: Evidence, verdict: Mapping[str, Any] | None, text: Catalogue) -> list[Section]:
    """The section; none where the study has no variants."""
    table = variant_table(evidence, verdict, text)
    if table is None:
        return []
    judged = [row for row in (verdict or {}).get("variants", []) if known(row["low"])]
    figures = [_figure(judged, text)] if judged else []
    return [Section("variants", figures, variant_sentences(verdict, text), [table])]


def _figure(judged: Sequence[Mapping[str, Any]], text: Catalogue) -> Figure:
    """A point and an interval for each variant at each rank, beside the line of plain LoRA."""
    rows = [{**row, "name": text(f"variant.{row['variant']}")} for row in judged]
    title = text("variant.title")
    values = "; ".join(
        text("variant.value", variant=row["name"], rank=row["rank"], value=signed(row["difference"])) for row in rows
    )
    alternative = text("chart.values", title=title, values=values)
    return Figure("variants", title, text("variant.note"), alternative, [Panel("", _chart(pd.DataFrame(rows), text))])


def _chart(frame: pd.DataFrame, text: Catalogue) -> alt.Chart:
    """`name rank difference low high eval_loss`: a row a variant, its ranks one below the other."""
    ranks, names = sorted(int(rank) for rank in frame["rank"].unique()), list(dict.fromkeys(frame["name"]))
    y = {"y": alt.Y("name:N", sort=names, title=None), "yOffset": alt.YOffset("rank:N", sort=ranks)}
    title, of_rank = text("variant.difference"), colour(ranks, text, legend="symbol")
    x = alt.X("difference:Q", title=title, scale=alt.Scale(zero=True, nice=True, padding=12))
    tooltip = [
        alt.Tooltip("name:N", title=text("variant.name")),
        alt.Tooltip("rank:O", title=text("chart.rank")),
        alt.Tooltip("difference:Q", title=title, format="+.4f"),
        alt.Tooltip("low:Q", title=text("chart.lowest"), format="+.4f"),
        alt.Tooltip("high:Q", title=text("chart.highest"), format="+.4f"),
    ]
    zero = alt.Chart(pd.DataFrame({"zero": [0.0]})).mark_rule(strokeDash=[4, 4]).encode(x="zero:Q")
    base = alt.Chart(frame)
    interval = base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q", color=of_rank, **y)
    dots = base.mark_point(filled=True, size=90, opacity=1).encode(
        x=x, color=of_rank, shape=shape(ranks, text, legend="symbol"), tooltip=tooltip, **y
    )
    return sized(alt.layer(zero, interval, dots))


def variant_sentences(verdict: Mapping[str, Any] | None, text: Catalogue) -> list[str]:
    """What is shown of each variant, in words."""
    sentences = []
    for row in (verdict or {}).get("variants", []):
        named = {"variant": text(f"variant.{row['variant']}"), "rank": row["rank"]}
        if row["outcome"] is None:
            sentences.append(text("variant.one_seed", **named))
            continue
        values = {"difference": signed(row["difference"]), "low": signed(row["low"]), "high": signed(row["high"])}
        sentences.append(text(f"variant.{row['outcome']}", **named, **values))
    return sentences


def variant_table(evidence: Evidence, verdict: Mapping[str, Any] | None, text: Catalogue) -> Table | None:
    """A row a variant and rank; None where the study has no variants."""
    if evidence.variants is None:
        return None
    none = text("none")
    table = {row["candidate"]: row for row in by_candidate(evidence.variants, None).to_dict("records")}
    judged = {row["candidate"]: row for row in (verdict or {}).get("variants", [])}
    rows = []
    for candidate in evidence.variants.spec.candidates():
        if candidate.name not in table:
            continue
        row, found = table[candidate.name], judged.get(candidate.name, {})
        interval = f"\n[{signed(found['low'])}, {signed(found['high'])}]" if known(found.get("low")) else ""
        rows.append(
            [
                text(f"variant.{candidate.variant}"),
                str(candidate.rank),
                rate(candidate.learning_rate),
                f"{row['finished']} / {row['trials']}",
                f"{row['trainable_params']:,.0f}" if known(row["trainable_params"]) else none,
                size(row["adapter_bytes"]) if known(row["adapter_bytes"]) else none,
                loss(row["eval_loss"]) if known(row["eval_loss"]) else none,
                signed(found["difference"]) + interval if known(found.get("difference")) else none,
                text(f"variant.outcome_{found['outcome']}") if found.get("outcome") else none,
                *(
                    signed_percent(found[cost]) if known(found.get(cost)) else none
                    for cost in ("memory", "step_seconds")
                ),
            ]
        )
    names = ["variant.name", "table.rank", "table.learning_rate", "table.finished", "table.params", "table.adapter"]
    names += ["table.eval_loss", "variant.difference", "variant.outcome", "variant.memory", "variant.step_seconds"]
    confidence = percent((verdict or {}).get("confidence", evidence.spec.verdict.confidence))
    numeric = [name not in ("variant.name", "variant.outcome") for name in names]
    return Table(text("variant.caption", confidence=confidence), [text(name) for name in names], numeric, rows)


def pattern_table(modules: pd.DataFrame, rank: int, text: Catalogue) -> Table:
    """What a proposal of ranks by layer gives to each module; `modules` is `rankscope.resize.pattern.by_module`'s."""
    names = ["module", "layers", "mean", "lowest", "highest"]
    rows = [
        [str(row["module"]), str(row["layers"]), f"{row['mean']:.1f}", str(row["lowest"]), str(row["highest"])]
        for row in modules.to_dict("records")
    ]
    headers = [text(f"pattern.{name}") for name in names]
    return Table(text("pattern.caption", rank=rank), headers, [name != "module" for name in names], rows)
