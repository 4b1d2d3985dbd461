"""What people also ask for: perplexity, token accuracy, forgetting, diverged trials, and full fine-tuning beside it."""

from collections.abc import Callable

import pandas as pd

from rankscope.report.catalogue import Catalogue
from rankscope.report.formats import Table, known, loss, percent, rate, signed
from rankscope.study import Evidence

_MEANS = ["eval_loss", "eval_perplexity", "eval_accuracy", "general_change"]


def also_by_candidate(results: pd.DataFrame) -> pd.DataFrame:
    """One row a candidate of `Study.results()`, or of `Study.reference_results()`, in their order.

    Columns: `candidate rank learning_rate trials finished diverged eval_loss eval_perplexity eval_accuracy
    general_change`. `general_change` is the loss on the general text after training minus before (nats a token). From
    `eval_loss` on, means over finished trials; NaN where there is none.
    """
    change = results["general_loss_after"] - results["general_loss_before"]
    status, candidate = results["status"], results["candidate"]
    everything = results.groupby("candidate", sort=False)
    table = everything[["rank", "learning_rate"]].first()
    table["trials"] = everything.size()
    table["finished"] = (status == "done").groupby(candidate).sum()
    table["diverged"] = (status == "diverged").groupby(candidate).sum()
    done = results.assign(general_change=change)[status == "done"]
    return table.join(done.groupby("candidate")[_MEANS].mean()).reset_index(names="candidate")


def full_fine_tuning(evidence: Evidence) -> pd.DataFrame:
    """The row of `also_by_candidate` of full fine-tuning at its best rate; none where the study has no reference.

    The best is the lowest mean held-out loss among the rates with the most finished trials.
    """
    if evidence.reference_results is None or evidence.reference_results.empty:
        return pd.DataFrame()
    table = also_by_candidate(evidence.reference_results)
    most: pd.DataFrame = table[table["finished"] == table["finished"].max()]
    return most.sort_values("eval_loss", na_position="last").head(1)


def also_measured(evidence: Evidence, text: Catalogue) -> Table:
    """The table: a row a candidate, and one of full fine-tuning. Forgetting has a column where it was asked for."""
    none = text("none")

    def show(value: float, number: Callable[[float], str]) -> str:
        return number(value) if known(value) else none

    records = also_by_candidate(evidence.results).to_dict("records")
    records += full_fine_tuning(evidence).to_dict("records")
    forgetting = evidence.spec.measure.forgetting is not None
    rows = [
        [
            rank_name(row["rank"], text),
            rate(row["learning_rate"]),
            show(row["eval_loss"], loss),
            show(row["eval_perplexity"], lambda value: f"{value:.4g}"),
            show(row["eval_accuracy"], percent),
            *([show(row["general_change"], signed)] if forgetting else []),
            f"{row['diverged']} / {row['trials']}",
        ]
        for row in records
    ]
    names = ["rank", "learning_rate", "eval_loss", "perplexity", "accuracy"]
    names += ["forgetting", "diverged"] if forgetting else ["diverged"]
    return Table(text("also.caption"), [text(f"table.{name}") for name in names], [True] * len(names), rows)


def also_notes(evidence: Evidence, text: Catalogue) -> list[str]:
    """What forgetting means and what full fine-tuning is, in a sentence or two each, where the study has them."""
    notes = []
    before = evidence.results["general_loss_before"].dropna()
    if evidence.spec.measure.forgetting is not None and not before.empty:
        notes.append(text("also.forgetting", text=evidence.spec.measure.forgetting, before=loss(before.iloc[0])))
    rates = sorted({trial.learning_rate for trial in evidence.spec.reference_trials()})
    if rates:
        notes.append(text("also.full", rates=", ".join(map(rate, rates))))
    return notes


def rank_name(rank: int, text: Catalogue) -> str:
    """The rank, or the words for full fine-tuning, which has none (0)."""
    return str(rank) if rank else text("table.full")
