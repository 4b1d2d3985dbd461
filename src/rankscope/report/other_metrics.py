"""Perplexity, token accuracy, forgetting, divergence and the full fine-tuning baseline; facts on data and machine."""

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import pandas as pd

from rankscope.hub import HUB_ID
from rankscope.report.frames import comparable, compared_rows, counted
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue, flatten
from rankscope.text.formats import Columns, Table, interval, loss, percent, rate, shown, signed, size, tabulate
from rankscope.text.verdict import Verdict


def metrics_by_candidate(results: pd.DataFrame) -> pd.DataFrame:
    """One row per candidate of `rankscope.report.frames.comparable` results, in their order.

    Columns: `candidate rank learning_rate trials finished diverged eval_loss eval_perplexity eval_accuracy
    general_change`. From `eval_loss` on, means over finished trials (NaN without one); `general_change` is the loss on
    the general text after training minus before, in nats per token.
    """
    change = results["general_loss_after"] - results["general_loss_before"]
    done = results.assign(general_change=change)[results["status"] == "done"]
    means = done.groupby("candidate")[["eval_loss", "eval_perplexity", "eval_accuracy", "general_change"]].mean()
    return counted(results, ["rank", "learning_rate"]).join(means).reset_index(names="candidate")


def full_fine_tuning(evidence: Evidence, verdict: Verdict) -> pd.DataFrame:
    """Full fine-tuning's row of `metrics_by_candidate` at its best rate by the verdict, else at its first; empty
    without a reference."""
    if evidence.reference_results is None or evidence.reference_results.empty:
        return pd.DataFrame()
    results = comparable(evidence.reference_results, evidence.reference, compared_rows(evidence))
    table = metrics_by_candidate(results)
    best = table[table["candidate"] == (verdict or {}).get("reference_candidate")]
    return table.head(1) if best.empty else best


def metrics_table(evidence: Evidence, verdict: Verdict, text: Catalogue) -> Table:
    """One row per candidate and one of full fine-tuning. Forgetting and the loss over full fine-tuning's have columns
    in studies that measure them."""
    full = full_fine_tuning(evidence, verdict)
    compared = {row["candidate"]: row for row in (verdict or {}).get("comparison", [])}

    def over_full(candidate: str) -> str:
        row = compared.get(candidate, {})
        ends = interval(row.get("over_full_low"), row.get("over_full_high"), signed)
        return shown(row.get("over_full"), signed, text) + ends

    columns: Columns = {
        "rank": lambda row: rank_name(row["rank"], text),
        "learning_rate": lambda row: rate(row["learning_rate"]),
        "eval_loss": lambda row: shown(row["eval_loss"], loss, text),
    }
    if not full.empty:
        columns["over_full"] = lambda row: over_full(row["candidate"])
    columns["perplexity"] = lambda row: shown(row["eval_perplexity"], "{:.4g}".format, text)
    columns["accuracy"] = lambda row: shown(row["eval_accuracy"], percent, text)
    if evidence.spec.measure.forgetting is not None:
        columns["forgetting"] = lambda row: shown(row["general_change"], signed, text)
    columns["diverged"] = lambda row: f"{row['diverged']} / {row['trials']}"
    results = comparable(evidence.results, evidence.examples, compared_rows(evidence))
    records = metrics_by_candidate(results).to_dict("records") + full.to_dict("records")
    return tabulate(text("also.caption"), {text(f"table.{name}"): cell for name, cell in columns.items()}, records)


def metrics_notes(evidence: Evidence, text: Catalogue) -> list[str]:
    notes = []
    before = evidence.results["general_loss_before"].dropna()
    if evidence.spec.measure.forgetting is not None and not before.empty:
        notes.append(text("also.forgetting", text=evidence.spec.measure.forgetting, before=loss(before.iloc[0])))
    rates = sorted({trial.learning_rate for trial in evidence.spec.reference_trials()})
    if rates:
        notes.append(text("also.full", rates=", ".join(map(rate, rates))))
    return notes


def rank_name(rank: int, text: Catalogue) -> str:
    """The rank, or the name of full fine-tuning, stored as rank 0."""
    return str(rank) if rank else text("table.full")


def base_names(source: str) -> str:
    """Sources without the folders of files: `/data/a.jsonl + owner/name` -> `a.jsonl + owner/name`."""
    names = source.split(" + ")
    return " + ".join(name if HUB_ID.fullmatch(name) else PurePath(name).name or name for name in names)


def data_facts(facts: Mapping[str, Any], text: Catalogue) -> list[list[str]]:
    """Label and value of each fact in data/facts.json, in order, with masked tokens (context only) after label tokens.
    Its warnings are not among them: the report begins with them."""
    facts = {key: value for key, value in _with_masked(facts).items() if key != "warnings"}
    facts |= {key: base_names(str(facts[key])) for key in ("id", "eval_id", "general_text") if facts.get(key)}
    return [[text.get(f"fact.{key}", key), _show(key, value, text)] for key, value in flatten(facts).items()]


def machine_facts(machine: Mapping[str, Any], text: Catalogue) -> list[list[str]]:
    """Label and value of each fact in machine.json, in order; versions are named by their packages."""
    facts = []
    for key, value in flatten(machine).items():
        group, _, name = key.partition(".")
        label = {"hardware": name, "model": f"model_{name}"}.get(group, key if group != "versions" else "")
        shown = text.get(f"machine.{label}", name or key)
        value = base_names(value) if label == "model_id" else value
        empty_gpus = label == "gpus" and not value
        facts.append([shown, text("machine.no_gpu") if empty_gpus else _show(name or key, value, text)])
    return facts


def _with_masked(facts: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in facts.items():
        found[key] = value
        side, of_labels, _ = key.partition("_label_tokens")
        tokens = facts.get(f"{side}_tokens")
        if of_labels and isinstance(value, int) and isinstance(tokens, int) and tokens:
            found[f"{side}_masked_tokens"] = f"{tokens - value:,} ({percent(1 - value / tokens)})"
    return found


def _show(key: str, value: Any, text: Catalogue) -> str:
    if value is None:
        return text("none")
    if isinstance(value, bool):
        return text("table.yes" if value else "table.no")
    if key.endswith("_bytes") and isinstance(value, int | float):
        return size(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):  # such as a GPU: name (memory)
        parts = [_show(name, part, text) for name, part in value.items()]
        return f"{parts[0]} ({', '.join(parts[1:])})" if len(parts) > 1 else "".join(parts)
    if isinstance(value, list | tuple):
        between = "; " if key == "notes" else ", "  # notes have commas of their own
        return between.join(_show(key, part, text) for part in value) or text("none")
    return str(value)
