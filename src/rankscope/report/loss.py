"""The figures of loss: against steps, against rank, and the map of learning rate and rank."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from rankscope.report import charts, charts_by_rank
from rankscope.report import frames as series
from rankscope.report.figures import (
    Figure,
    Panel,
    absent,
    by_rate,
    curve_numbers,
    numbers,
    ranks_of,
    say,
    with_rates,
)
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import known, loss, percent, rate


def loss_figures(
    evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue
) -> list[Figure]:
    """Training loss against steps, held-out loss against rank and steps, and of rates where there are several."""
    found = [
        _training_loss(evidence, table, text),
        _heldout_by_rank(evidence, verdict, table, text),
        _heldout_by_step(evidence, table, text),
    ]
    return [*found, _rate_map(evidence, table, text)] if len(evidence.spec.learning_rates) > 1 else found


def _training_loss(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure:
    name, title = "train-loss", text("chart.train_loss.title")
    frame, steps_a_point = series.training_loss(evidence)
    if frame.empty:
        return absent(name, title, text("chart.train_loss.absent"))
    ranks = ranks_of(evidence)
    note = text("chart.train_loss.note", bins=text.count("steps", steps_a_point))
    panels = by_rate(frame, text, lambda rows, y: charts.training_loss(rows, text, ranks, y))
    alternative = say(title, table, "train_loss", loss, text)
    return Figure(name, title, note, alternative, panels, curve_numbers(title, frame, "smooth_mean", loss, text))


def _heldout_by_rank(
    evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue
) -> Figure:
    name, title = "heldout-loss-rank", text("chart.eval_by_rank.title")
    seeds = series.heldout_by_seed(evidence)
    if seeds.empty:
        return absent(name, title, text("chart.eval_by_rank.absent"))
    finished = series.heldout_by_candidate(evidence, table)
    margin, note = None, text("chart.eval_by_rank.note")
    if verdict is not None and verdict["comparison"]:
        best = min(row["eval_loss"] for row in verdict["comparison"])
        margin = (best, best * (1 + verdict["margin"]))
        note = text(
            "chart.eval_by_rank.note_margin",
            confidence=percent(verdict["confidence"]),
            margin=percent(verdict["margin"]),
        )
        if finished["learning_rate"].nunique() > 1:
            note = f"{note} {text('chart.eval_by_rank.rates')}"
    columns = ["candidate", "rank", "learning_rate", "eval_loss", "eval_loss_low", "eval_loss_high"]
    chart = charts_by_rank.heldout_by_rank(seeds, finished[columns], text, ranks_of(evidence), margin)
    rows = [
        [
            str(row["rank"]),
            rate(row["learning_rate"]),
            *(loss(row[end]) if known(row[end]) else text("none") for end in columns[3:]),
            ", ".join(map(loss, seeds.loc[seeds["candidate"] == row["candidate"], "eval_loss"])),
        ]
        for row in finished.to_dict("records")
    ]
    headers = [text(f"table.{name}") for name in ("rank", "learning_rate")]
    headers += [text(f"chart.{name}") for name in ("mean", "lowest", "highest", "seeds")]
    return Figure(
        name,
        title,
        with_rates(note, finished, text),
        say(title, finished, "eval_loss", loss, text),
        [Panel("", chart)],
        numbers(title, headers, rows, text),
    )


def _heldout_by_step(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure:
    name, title = "heldout-loss-steps", text("chart.eval_steps.title")
    frame, _ = series.heldout_loss(evidence)
    if frame.empty:
        return absent(name, title, text("chart.eval_steps.absent"))
    ranks = ranks_of(evidence)
    panels = by_rate(frame, text, lambda rows, y: charts.heldout_by_step(rows, text, ranks, y))
    alternative = say(title, table, "eval_loss", loss, text)
    table_of = curve_numbers(title, frame, "mean", loss, text)
    return Figure(name, title, text("chart.eval_steps.note"), alternative, panels, table_of)


def _rate_map(evidence: Evidence, table: pd.DataFrame, text: Catalogue) -> Figure:
    name, title = "learning-rate-map", text("chart.rate_map.title")
    if table["eval_loss"].isna().all():
        return absent(name, title, text("chart.eval_by_rank.absent"))
    best = table.loc[table.groupby("rank")["eval_loss"].transform("min") == table["eval_loss"], "candidate"]
    diverged = evidence.results[evidence.results["status"] == "diverged"]["candidate"]
    frame = table[["candidate", "rank", "learning_rate", "eval_loss"]].assign(
        best=table["candidate"].isin(best),
        note=[text("status.diverged") if c in set(diverged) else text("none") for c in table["candidate"]],
    )
    chart = charts_by_rank.rate_map(frame, text, ranks_of(evidence))
    cells = {(row["rank"], row["learning_rate"]): row for row in frame.to_dict("records")}
    ranks = ranks_of(evidence)
    rows = []
    for value in sorted(frame["learning_rate"].unique()):
        of_rate = [cells.get((rank, value)) for rank in ranks]
        shown = [loss(row["eval_loss"]) if row and known(row["eval_loss"]) else text("none") for row in of_rate]
        rows.append([rate(value), *shown])
    headers = [text("table.learning_rate"), *(text("name.rank", rank=rank) for rank in ranks)]
    alternative = say(title, table, "eval_loss", loss, text)
    table_of = numbers(title, headers, rows, text)
    return Figure(name, title, text("chart.rate_map.note"), alternative, [Panel("", chart)], table_of)
