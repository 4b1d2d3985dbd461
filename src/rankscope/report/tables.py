"""Tables of the report: ranks, candidates and their other metrics, trials, and facts on data and machine."""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import PurePath
from typing import Any

import pandas as pd

from rankscope.hub import HUB_ID
from rankscope.report.frames import best_of, comparable, compared_rows, has_gpu, means_of
from rankscope.study.evidence import Evidence
from rankscope.text import formats
from rankscope.text.catalogue import Catalogue, flatten
from rankscope.text.formats import Columns, Table, column, known, shown, tabulate, with_interval
from rankscope.text.verdict import Verdict

PEAKS = {"cpu_peak", "gpu_peak"}
"""Columns of the table of ranks; that of candidates has them beside the averages."""


def rank_table(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> Table:
    """What each rank brings and takes, as its best candidate does: the first table of a report."""
    rates = ["learning_rate"] if len(evidence.spec.learning_rates) > 1 else []
    quality = "kept" if table["kept"].notna().any() else "eval_loss"
    peak = "gpu_peak" if has_gpu(evidence) else "cpu_peak"
    only = ["rank", *rates, quality, peak, "runtime", "adapter"]
    found = candidate_table(evidence, verdict, best_of(table, ["rank"]), text, only)
    return found._replace(caption=text("table.ranks"))


def candidate_table(
    evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue, only: Collection[str] = ()
) -> Table:
    """One row per row of `by_candidate`, with the columns `only` (default: all but `PEAKS`)."""
    gpu, chosen, of = has_gpu(evidence), verdict.get("candidate"), partial(column, text=text)
    of_kind = {kind: [table[f"{kind}_{end}_bytes"] for end in ("mean", "peak")] for kind in ("cpu", "gpu_allocated")}
    size = {kind: formats.sizes(pd.concat(ends)) for kind, ends in of_kind.items()}

    def memory(row: Any, kind: str) -> str:
        average, peak = (shown(row[f"{kind}_{end}_bytes"], size[kind], text) for end in ("mean", "peak"))
        return average if average == peak == text("none") else f"{average} /\n{peak}"

    def eval_loss(row: Any) -> str:
        if row["diverged"]:
            return text("status.diverged")
        spread = f"\n± {formats.loss(row['eval_loss_sd'])}" if known(row["eval_loss_sd"]) else ""
        worse = f"\n{text('table.worse_than_untrained')}" if row["gain"] < 0 else ""
        return shown(row["eval_loss"], formats.loss, text) + spread + worse

    def kept(row: Any) -> str:
        least = text("table.at_least", share=formats.at_least(row["kept_low"])) if known(row["kept_low"]) else ""
        return "\n".join(filter(None, [shown(row["kept"], formats.share, text), least]))

    def regret(row: Any) -> str:  # has no ends where its interval is unknown
        few = f"\n{text('table.few_seeds')}" if row["few_seeds"] else ""
        return with_interval("regret", formats.loss, text)(row) + few

    columns: Columns = {
        "rank": of("rank", str),
        "learning_rate": of("learning_rate", formats.rate),
        "alpha": of("lora_alpha", "{:g}".format),
        "scaling": of("scaling", "{:.4g}".format),
        "params": of("trainable_params", "{:,.0f}".format),
        "finished": lambda row: f"{row['finished']} / {row['trials']}",
        "train_loss": of("train_loss", formats.loss),
        "eval_loss": eval_loss,
        "regret": regret,
        **({"kept": kept} if table["kept"].notna().any() else {}),
        "within": of("within_margin", lambda within: text("table.yes" if within else "table.no")),
        "cpu_memory": lambda row: memory(row, "cpu"),
        "gpu_memory": lambda row: memory(row, "gpu_allocated") if gpu else text("table.no_gpu"),
        "cpu_peak": of("cpu_peak_bytes", size["cpu"]),
        "gpu_peak": of("gpu_allocated_peak_bytes", size["gpu_allocated"]),
        "step_seconds": of("step_seconds", formats.fixed(table["step_seconds"])),
        "runtime": of("runtime_seconds", formats.durations(table["runtime_seconds"], text)),
        "adapter": of("adapter_bytes", formats.sizes(table["adapter_bytes"])),
    }
    confidence = verdict.get("confidence", evidence.spec.verdict.confidence)
    return tabulate(
        text("table.candidates", confidence=formats.percent(confidence)),
        {text(f"table.{name}"): cell for name, cell in columns.items() if name in (only or columns.keys() - PEAKS)},
        table.to_dict("records"),
        chosen=next((number for number, name in enumerate(table["candidate"]) if name == chosen), None),
    )


def metrics_by_candidate(results: pd.DataFrame) -> pd.DataFrame:
    """One row per candidate of `rankscope.report.frames.comparable` results, in their order.

    Columns: `candidate rank learning_rate trials finished diverged eval_loss eval_perplexity eval_accuracy
    general_change`. From `eval_loss` on, means over finished trials (NaN without one); `general_change` is the loss on
    the general text after training minus before, in nats per token.
    """
    results = results.assign(general_change=results["general_loss_after"] - results["general_loss_before"])
    means = ["eval_loss", "eval_perplexity", "eval_accuracy", "general_change"]
    return means_of(results, ["rank", "learning_rate"], means).reset_index(names="candidate")


def full_fine_tuning(evidence: Evidence, verdict: Verdict) -> pd.DataFrame:
    """Full fine-tuning's row of `metrics_by_candidate` at its best rate by the verdict, else at its first; empty
    without a reference."""
    if evidence.reference_results.empty:
        return pd.DataFrame()
    results = comparable(evidence.reference_results, evidence.reference, compared_rows(evidence))
    table = metrics_by_candidate(results)
    best = table[table["candidate"] == verdict.get("reference_candidate")]
    return table.head(1) if best.empty else best


def metrics_table(evidence: Evidence, verdict: Verdict, text: Catalogue) -> Table:
    """One row per candidate and one of full fine-tuning. Forgetting and the loss over full fine-tuning's have columns
    in studies that measure them."""
    full, of = full_fine_tuning(evidence, verdict), partial(column, text=text)
    over = ["over_full", "over_full_low", "over_full_high"]
    compared = pd.DataFrame(verdict.get("comparison", []), columns=["candidate", *over])
    results = comparable(evidence.results, evidence.examples, compared_rows(evidence))
    own = metrics_by_candidate(results)
    table = own if full.empty else pd.concat([own, full]).join(compared.set_index("candidate"), on="candidate")
    columns: Columns = {
        "rank": rank_column(text),
        "learning_rate": of("learning_rate", formats.rate),
        "eval_loss": of("eval_loss", formats.loss),
        **({} if full.empty else {"over_full": with_interval("over_full", formats.signed, text)}),
        "perplexity": of("eval_perplexity", "{:,.3f}".format),
        "accuracy": of("eval_accuracy", formats.share),
        **({} if evidence.spec.measure.forgetting is None else {"forgetting": of("general_change", formats.signed)}),
        "diverged": lambda row: f"{row['diverged']} / {row['trials']}",
    }
    headed = {text(f"table.{name}"): cell for name, cell in columns.items()}
    return tabulate(text("also.caption"), headed, table.to_dict("records"))


def metrics_notes(evidence: Evidence, text: Catalogue) -> list[str]:
    notes = []
    before = evidence.results["general_loss_before"].dropna()
    general = evidence.spec.measure.forgetting
    if general is not None and not before.empty:
        notes.append(text("also.forgetting", text=general, before=formats.loss(before.iloc[0])))
    rates = sorted({trial.learning_rate for trial in evidence.spec.reference_trials()})
    return [*notes, text("also.full", rates=", ".join(map(formats.rate, rates)))] if rates else notes


def trial_table(evidence: Evidence, text: Catalogue) -> Table:
    of, tables = partial(column, text=text), [*(part.results for part in evidence.parts), evidence.reference_results]
    columns: Columns = {
        "trial": of("trial", str),
        "rank": rank_column(text),
        "learning_rate": of("learning_rate", formats.rate),
        "seed": of("seed", str),
        "status": of("status", lambda status: text.get(f"status.{status}", status)),
        "reason": of("reason", str),
        "steps": of("steps", "{:,.0f}".format),
        "train_loss": of("train_loss", formats.loss),
        "eval_loss_all": of("eval_loss", formats.loss),
    }
    headed = {text(f"table.{name}"): cell for name, cell in columns.items()}
    words = [text(f"table.{name}") for name in ("trial", "status", "reason")]
    return tabulate(text("table.trials"), headed, [row for table in tables for row in table.to_dict("records")], words)


def rank_column(text: Catalogue) -> Callable[[Any], str]:
    """The rank, or the name of full fine-tuning, stored as rank 0."""
    return column("rank", lambda rank: str(rank) if rank else text("table.full"), text)


def base_names(source: str) -> str:
    """Sources without the folders of files: `/data/a.jsonl + owner/name` -> `a.jsonl + owner/name`."""
    names = source.split(" + ")
    return " + ".join(name if HUB_ID.fullmatch(name) else PurePath(name).name or name for name in names)


def data_table(facts: Mapping[str, Any], text: Catalogue) -> Table:
    """Label and value of each fact in data/facts.json, in order, with masked tokens (context only) after label tokens.
    Its warnings are not among them: the report begins with them."""
    found: dict[str, Any] = {}
    for key, value in flatten(facts).items():
        if key == "warnings":
            continue
        found[key] = base_names(value) if key in ("id", "eval_id", "general_text") and value else value
        side, of_labels, _ = key.partition("_label_tokens")
        if of_labels and isinstance(value, int) and (tokens := facts.get(f"{side}_tokens")):
            found[f"{side}_masked_tokens"] = f"{tokens - value:,} ({formats.percent(1 - value / tokens)})"
    return _facts([[text.get(f"fact.{key}", key), _show(key, value, text)] for key, value in found.items()], text)


def machine_table(machine: Mapping[str, Any], text: Catalogue) -> Table:
    """Label and value of each fact in machine.json, in order; versions are named by their packages."""
    facts = []
    for key, value in flatten(machine).items():
        group, _, name = key.partition(".")
        label = {"hardware": name, "model": f"model_{name}", "versions": ""}.get(group, key)
        shown = base_names(value) if label == "model_id" else value
        known = _show(name or key, shown, text) if shown or label != "gpus" else text("machine.no_gpu")
        facts.append([text.get(f"machine.{label}", name or key), known])
    return _facts(facts, text)


def _facts(rows: list[list[str]], text: Catalogue) -> Table:
    return Table("", [text("table.key"), text("table.value")], [False, False], rows)


def _show(key: str, value: Any, text: Catalogue) -> str:
    match value:
        case None:
            return text("none")
        case bool():
            return text("table.yes" if value else "table.no")
        case int() | float() if key.endswith("_bytes"):
            return formats.size(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:.4g}"
        case Mapping():  # such as a GPU: name (memory)
            parts = [_show(name, part, text) for name, part in value.items()]
            return f"{parts[0]} ({', '.join(parts[1:])})" if len(parts) > 1 else "".join(parts)
        case list() | tuple():
            between = "; " if key == "notes" else ", "  # notes have commas of their own
            return between.join(_show(key, part, text) for part in value) or text("none")
    return str(value)
