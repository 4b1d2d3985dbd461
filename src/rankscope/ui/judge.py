"""Runs of other tools in the terminal: what they show of rank, what is confounded, and what would settle it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from rich.table import Table as RichTable

from rankscope.analysis.outcome import PLANNED
from rankscope.judge.command import Judged, study_text
from rankscope.judge.confounders import SETTINGS, label, names
from rankscope.judge.confounders import show as in_words
from rankscope.judge.differences import largest_spread
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import duration, loss, percent, signed, size
from rankscope.ui.console import make_table, out_console, show

_SHOWN = 5  # skipped files that are named
_COLUMNS = ("alpha", "seed", "learning_rate", "steps", "epochs", "batch_size")
"""Settings that have a column where they differ. What else differs is said of the confounders."""
_LOSSES = ("train_loss", "eval_loss", "best_loss", "score")
_WIDEST = 9  # columns of one table; more are two tables, of settings and of results


def show_judged(found: Judged, out: Path | None, text: Catalogue) -> None:
    """Print what was found; the study itself where it was not written to `out`."""
    _show_runs(found.runs, text)
    more = len(found.skipped) - _SHOWN
    sections = {
        "skipped": [f"{o.path}: {o.reason}" for o in found.skipped[:_SHOWN]]
        + [text("judge.more", n=more)] * (more > 0),
        "blocks": [o.text for o in found.confounders if o.blocks],
        "confounded": [o.text for o in found.confounders if not o.blocks],
        "doubtful": [f"{names(o.runs, text, len(found.runs))}: {o.text}" for o in found.limits],
    }
    concluded = [one for one in found.differences if one["outcome"]]
    for title, lines in sections.items():
        if lines:
            out_console.print("\n" + text(f"judge.{title}"), style="bold")
        show(*(f"- {line}" for line in lines))
    if not concluded:
        out_console.print("\n" + text("judge.nothing"), style="bold")
    for one in found.differences:
        show("", *([_difference_table(one, text)] if one["outcome"] else []), _where(one, text) + _said(one, text))
    if concluded:
        has_rows = found.runs["tool"].eq("rankscope").all()  # a study's, of which only the table was read
        show(text("judge.these_rows_report" if has_rows else "judge.these_rows"))
    if any(one["at"] for one in found.differences):
        show(text("judge.each_alone" if len(concluded) > 1 else "judge.each"))
    instead = text("judge.written", file=out) if out else text("judge.instead", study=study_text(found, text))
    show(f"\n{instead}")


def _show_runs(runs: pd.DataFrame, text: Catalogue) -> None:
    """Print runs with their losses and costs, and with the settings in which they differ."""
    shared = [name for name in ("alpha", "seed", *SETTINGS) if runs[name].nunique(dropna=False) == 1]
    facts = [f"{label(name, text)} {in_words(runs[name].iloc[0])}" for name in shared if runs[name].notna().any()]
    shown: dict[str, Callable[[Any], str]] = {"run": str, "rank": str}
    shown |= {name: in_words for name in _COLUMNS if name not in shared} | dict.fromkeys(_LOSSES, loss)
    shown |= {"memory_gib": lambda gib: size(gib * 2**30), "seconds": lambda seconds: duration(seconds, text)}
    if not (runs["best_loss"] < runs["eval_loss"]).any():
        del shown["best_loss"]
    columns = [name for name in shown if runs[name].notna().any()]
    rows = runs.sort_values(["rank", "seed", "run"]).to_dict("records")
    settled = [name for name in columns if name in ("run", "rank", *_COLUMNS)]
    halves = [settled, ["run", "rank", *(name for name in columns if name not in settled)]]
    for part in halves if len(columns) > _WIDEST else [columns]:
        cells = [[shown[name](row[name]) if pd.notna(row[name]) else text("none") for name in part] for row in rows]
        out_console.print(make_table([label(name, text) for name in part], cells))
    out_console.print(text("judge.shared", facts=", ".join(facts)) if facts and len(runs) > 1 else "")


def _difference_table(found: dict[str, Any], text: Catalogue) -> RichTable:
    """Ranks with their losses over seeds."""
    states = {True: text("table.yes"), False: text("table.no"), None: text("gain.open")}
    rows = []
    for row in found["rows"]:
        ends = {end: signed(row[end]) for end in ("low", "high") if row["high"]}
        about = text("range", **ends) if ends else text("judge.best")
        rows.append([str(row["rank"]), loss(row["mean"]), signed(row["regret"]), about, states[row["within_margin"]]])
    title = _where(found, text) + text("judge.seeds", seeds=", ".join(map(str, found["seeds"])))
    headers = [label("rank", text), label("eval_loss", text), text("judge.above"), text("judge.interval")]
    return make_table([*headers, _within(found, text)], rows, left=(), title=title[0].upper() + title[1:])


def _within(found: dict[str, Any], text: Catalogue) -> str:
    return text(f"judge.within_{found['margin_of']}", margin=percent(found["margin"]))


def _where(found: dict[str, Any], text: Catalogue) -> str:
    """Settings and runs of a difference, before what is said of it; nothing where all runs have these settings."""
    values = {name: text("judge.unknown") if one is None else in_words(one) for name, one in found["at"].items()}
    at = ", ".join(f"{label(name, text)} {value}" for name, value in values.items())
    return text("judge.where", settings=at, runs=names(found["runs"], text)) + " " if at else ""


def _said(found: dict[str, Any], text: Catalogue) -> str:
    """What comparable runs show, and what would settle the rest."""
    listed, more, outcome = ", ".join(map(str, found["ranks"])), found["more_seeds"], found["outcome"]
    if found["coarse"]:
        return text("judge.coarse", ranks=listed)
    if len(found["seeds"]) < 2:
        spread = largest_spread(found["gap"], len(found["ranks"]))
        would = ", ".join(text("judge.spread", n=seeds, most=loss(most)) for seeds, most in spread.items())
        return text("judge.one_seed", ranks=listed, gap=loss(found["gap"]), would=would)
    known = outcome in ("recommended", "not_distinguishable", "not_trained_enough")
    lines = [text(f"judge.{outcome if known else 'open'}", rank=found["rank"], within=_within(found, text))]
    if found["undetermined"]:
        lines.append(text("judge.undecided", ranks=", ".join(found["undetermined"])))
    if found["undetermined"] or outcome != "recommended":
        ahead = {"more": text.count("more_seeds", more)} if more else {"planned": ", ".join(map(str, PLANNED))}
        lines.append(text("judge.more_seeds" if more else "judge.no_seeds", **ahead))
    return " ".join(lines)
