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
from rankscope.text.catalogue import load
from rankscope.text.formats import duration, loss, percent, signed, size
from rankscope.ui.console import make_table, out_console, show

_SHOWN = 5  # skipped files that are named
_COLUMNS = ("alpha", "seed", "learning_rate", "steps", "epochs", "batch_size")
"""Settings that have a column where they differ. What else differs is said of the confounders."""
_LOSSES = ("train_loss", "eval_loss", "best_loss", "score")
_TITLES = {"best_loss": "lowest", "memory_gib": "memory", "seconds": "time"}
_WIDEST = 9  # columns of one table; more are two tables, of settings and of results


def show_judged(found: Judged, out: Path | None) -> None:
    """Print what was found; the study itself where it was not written to `out`."""
    _show_runs(found.runs)
    more = len(found.skipped) - _SHOWN
    sections = {
        "Skipped": [f"{o.path}: {o.reason}" for o in found.skipped[:_SHOWN]] + [f"{more} more"] * (more > 0),
        "Confounded with rank, so that losses are not compared": [o.text for o in found.confounders if o.blocks],
        "Confounded with rank": [o.text for o in found.confounders if not o.blocks],
        "Missing or doubtful": [f"{names(o.runs, len(found.runs))}: {o.text}" for o in found.limits],
    }
    concluded = [one for one in found.differences if one["outcome"]]
    for title, lines in sections.items():
        if lines:
            out_console.print(f"\n{title}", style="bold")
        show(*(f"- {line}" for line in lines))
    if not concluded:
        out_console.print("\nThese runs support no conclusion about rank.", style="bold")
    for one in found.differences:
        show("", *([_difference_table(one)] if one["outcome"] else []), f"{_where(one)}{_said(one)}")
    if concluded:
        others = "what others would show cannot be said without the loss of each row"
        has_rows = found.runs["tool"].eq("rankscope").all()  # a study's, of which only the table was read
        show(f"This holds for these held-out rows: {others}{', which `rankscope report DIR` reads' * bool(has_rows)}.")
    if any(one["at"] for one in found.differences):
        several = ", and at 95% by itself: that all hold is less sure" if len(concluded) > 1 else ""
        show(f"Each holds at its own settings, none at the best rate of each rank{several}.")
    show("\nA study to run instead" + (f": {out}" if out else f", which --out FILE writes:\n{study_text(found)}"))


def _show_runs(runs: pd.DataFrame) -> None:
    """Print runs with their losses and costs, and with the settings in which they differ."""
    text, settings = load("en"), ("alpha", "seed", *SETTINGS)
    shared = [name for name in settings if runs[name].nunique(dropna=False) == 1]
    facts = [f"{label(name)} {in_words(runs[name].iloc[0])}" for name in shared if runs[name].notna().any()]
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
        out_console.print(make_table([_TITLES.get(name, label(name)) for name in part], cells))
    out_console.print(f"The same in all: {', '.join(facts)}." if facts and len(runs) > 1 else "")


def _difference_table(found: dict[str, Any]) -> RichTable:
    """Ranks with their losses over seeds."""
    states = {True: "yes", False: "no", None: "open"}
    within = f"at most {percent(found['margin'])} of the {found['margin_of']}"
    rows = [
        [str(row["rank"]), loss(row["mean"]), signed(row["regret"]),
         f"{signed(row['low'])} to {signed(row['high'])}" if row["high"] else "best", states[row["within_margin"]]]
        for row in found["rows"]
    ]  # fmt: skip
    title = f"{_where(found)}seeds {', '.join(map(str, found['seeds']))}, all recorded settings alike:"
    headers = ["rank", "eval loss", "above the best", "95% interval", within]
    return make_table(headers, rows, left=(), title=title[0].upper() + title[1:])


def _where(found: dict[str, Any]) -> str:
    """Settings and runs of a difference, before what is said of it; nothing where all runs have these settings."""
    at = [
        f"{label(name)} {'not recorded' if value is None else in_words(value)}" for name, value in found["at"].items()
    ]
    return f"At {', '.join(at)} ({names(found['runs'])}): " if at else ""


def _said(found: dict[str, Any]) -> str:
    """What comparable runs show, and what would settle the rest."""
    listed, more = ", ".join(map(str, found["ranks"])), found["more_seeds"]
    within = f"at most {percent(found['margin'])} of the {found['margin_of']} above the best"
    if found["coarse"]:
        return f"Ranks {listed} differ by the same at every seed: losses that were rounded, or copied, show no spread."
    if len(found["seeds"]) < 2:
        spread = largest_spread(found["gap"], len(found["ranks"]))
        would = ", ".join(f"{seeds} seeds if it is at most {most:.4f}" for seeds, most in spread.items())
        return (
            f"Ranks {listed} with one seed, all recorded settings alike, differ by at most {found['gap']:.4f}. How "
            f"much that varies between seeds is unknown. By its standard deviation it would be shown by {would}."
        )
    said = {
        "recommended": f"Rank {found['rank']} is the smallest shown to be {within}.",
        "not_distinguishable": f"No two ranks differ visibly; the cheapest is rank {found['rank']}.",
        "not_trained_enough": "Training gained too little to tell ranks apart: train longer.",
    }
    line = said.get(found["outcome"], f"Which rank is {within} is open.")
    if found["undetermined"]:
        line += f" Undecided among lower ranks: {', '.join(found['undetermined'])}."
    if found["undetermined"] or found["outcome"] != "recommended":
        none = f"no planned number of seeds ({', '.join(map(str, PLANNED))})"
        ahead = f"{more} more seeds of each rank" if more else none
        line += f" If means and spreads stay as they are, {ahead} would settle it."
    return line
