"""What a report says, in one language, before it has a form: HTML and Markdown render the same content."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pandas as pd

from rankscope.report.answers import Answered, answered
from rankscope.report.costs import Saving, cost_tables, noise_sentence, prediction_tables, savings
from rankscope.report.curve import cut_section
from rankscope.report.figures import Figure, Section
from rankscope.report.frames import by_candidate, chosen_row, has_gpu
from rankscope.report.loss import loss_figures
from rankscope.report.memory import memory_figures
from rankscope.report.other_metrics import Fact, also_measured, also_notes, data_facts, machine_facts, rank_name
from rankscope.report.runtime import speed_figures, trade_off_figures
from rankscope.report.variants import variant_section
from rankscope.spec.models import EMBEDDED
from rankscope.spec.resolve import write_yaml
from rankscope.study.evidence import Evidence
from rankscope.study.folder import ANSWERS
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, duration, known, loss, percent, rate, signed, size
from rankscope.text.verdict import claim_sentences, verdict_sentence


class Content(NamedTuple):
    """Everything in the order in which it is shown."""

    title: str
    subtitle: str
    outcome: str
    rank: str
    sentence: str
    savings_title: str
    savings: list[Saving]
    savings_note: str
    cost: str
    cost_notes: list[str]
    caveats: list[str]
    sections: list[Section]
    claims: list[str]
    answers: list[Answered]
    candidates: Table
    noise: str
    costs: list[Table]
    also: Table
    also_notes: list[str]
    trials: Table
    data: list[Fact]
    machine: list[Fact]
    reproduce: str
    study: str
    limits: list[str]
    version: str

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]


def compose(
    evidence: Evidence, verdict: Mapping[str, Any] | None, text: Catalogue, study_name: str, reproduce: str
) -> Content:
    """Puts the report together. `verdict` may be None, and any table of the evidence may be empty."""
    table = by_candidate(evidence, verdict)
    rank = (verdict or {}).get("rank")
    saved = savings(evidence, verdict, table, text)
    cost, cost_notes = _cost(verdict, table, text)
    caveats = [text.get(f"caveat.{code}", str(code)) for code in (verdict or {}).get("caveats", [])]
    return Content(
        title=text("page.title", study=study_name),
        subtitle=_subtitle(evidence, text),
        outcome=text(f"outcome.{verdict['outcome'] if verdict else 'none'}"),
        rank="" if rank is None else str(rank),
        sentence=verdict_sentence(verdict, text.language),
        savings_title=saved.title,
        savings=saved.savings,
        savings_note=saved.note,
        cost=cost,
        cost_notes=cost_notes,
        caveats=caveats,
        sections=[
            Section("loss", loss_figures(evidence, verdict, table, text)),
            *variant_section(evidence, verdict, text),
            *cut_section(evidence, text),
            Section("memory", memory_figures(evidence, table, text)),
            Section("time", speed_figures(evidence, text)),
            Section("trade_off", trade_off_figures(evidence, verdict, table, text)),
        ],
        claims=claim_sentences(verdict, text.language),
        answers=answered(evidence, verdict, text),
        candidates=_candidates(evidence, verdict, table, text),
        noise=noise_sentence(evidence.profiles, text),
        costs=[*cost_tables(evidence, text), *prediction_tables(evidence, text)],
        also=also_measured(evidence, verdict, text),
        also_notes=also_notes(evidence, text),
        trials=_trials(evidence, text),
        data=data_facts(evidence.data_facts, text),
        machine=machine_facts(evidence.machine, text),
        reproduce=reproduce,
        study=write_yaml(evidence.parts[-1].spec),
        limits=_limits(evidence, verdict, text),
        version=str((evidence.machine.get("versions") or {}).get("rankscope") or ""),
    )


def _subtitle(evidence: Evidence, text: Catalogue) -> str:
    model, data = evidence.spec.model.id, evidence.spec.data.id
    return text(
        "page.subtitle",
        model=text("page.embedded_model") if model == EMBEDDED else model,
        data=text("page.embedded_data") if data == EMBEDDED else data,
    )


def _cost(verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue) -> tuple[str, list[str]]:
    chosen = chosen_row(verdict, table)
    if chosen is None or verdict is None:
        return "", []
    if verdict["candidate"] == verdict["best_candidate"]:
        return "", [text("cost.nothing")]
    if not known(chosen["regret"]):
        return "", [text("cost.unknown")]
    notes = []
    if known(chosen["regret_share"]):
        notes.append(text("cost.share", share=percent(chosen["regret_share"])))
    if known(chosen["regret_low"]) and known(chosen["regret_high"]):
        notes.append(
            text(
                "cost.interval",
                confidence=percent(verdict["confidence"]),
                low=signed(chosen["regret_low"]),
                high=signed(chosen["regret_high"]),
            )
        )
    else:
        notes.append(text("cost.no_interval"))
    return text("cost.nats", value=signed(chosen["regret"])), notes


def _candidates(evidence: Evidence, verdict: Mapping[str, Any] | None, table: pd.DataFrame, text: Catalogue) -> Table:
    none, gpu = text("none"), has_gpu(evidence)

    def show(value: float, number: Callable[[float], str]) -> str:
        return number(value) if known(value) else none

    def interval(low: float, high: float, number: Callable[[float], str]) -> str:
        return f"\n[{number(low)}, {number(high)}]" if known(low) and known(high) else ""

    def both(average_bytes: float, peak_bytes: float) -> str:
        average, peak = show(average_bytes, size), show(peak_bytes, size)
        return average if average == peak == none else f"{average} /\n{peak}"

    rows = []
    for row in table.to_dict("records"):
        spread = f"\n± {loss(row['eval_loss_sd'])}" if known(row["eval_loss_sd"]) else ""
        within = none if not known(row["within_margin"]) else text("table.yes" if row["within_margin"] else "table.no")
        rows.append(
            [
                str(row["rank"]),
                rate(row["learning_rate"]),
                f"{row['lora_alpha']:g}",
                f"{row['scaling']:.4g}",
                show(row["trainable_params"], lambda value: f"{value:,.0f}"),
                show(row["adapter_bytes"], size),
                f"{row['finished']} / {row['trials']}",
                show(row["train_loss"], loss),
                show(row["eval_loss"], loss) + spread,
                show(row["regret"], loss) + interval(row["regret_low"], row["regret_high"], loss),
                within,
                both(row["rss_mean_bytes"], row["rss_peak_bytes"]),
                both(row["gpu_allocated_mean_bytes"], row["gpu_allocated_peak_bytes"]) if gpu else text("table.no_gpu"),
                show(row["step_seconds"], lambda value: f"{value:.3g}"),
                show(row["runtime_seconds"], lambda value: duration(value, text)),
            ]
        )
    names = ["rank", "learning_rate", "alpha", "scaling", "params", "adapter", "finished", "train_loss"]
    names += ["eval_loss", "regret", "within", "cpu_memory", "gpu_memory", "step_seconds", "runtime"]
    confidence = (verdict or {}).get("confidence", evidence.spec.verdict.confidence)
    return Table(
        text("table.candidates", confidence=percent(confidence)),
        [text(f"table.{name}") for name in names],
        [True] * len(names),
        rows,
        next(
            (index for index, name in enumerate(table["candidate"]) if name == (verdict or {}).get("candidate")),
            None,
        ),
    )


def _trials(evidence: Evidence, text: Catalogue) -> Table:
    none = text("none")
    records = [row for part in evidence.parts for row in part.results.to_dict("records")]
    if evidence.reference_results is not None:
        records += evidence.reference_results.to_dict("records")
    rows = [
        [
            str(row["trial"]),
            rank_name(row["rank"], text),
            rate(row["learning_rate"]),
            str(row["seed"]),
            text.get(f"status.{row['status']}", str(row["status"])),
            str(row["reason"]) if isinstance(row["reason"], str) else none,
            f"{row['steps']:,.0f}" if known(row["steps"]) else none,
            loss(row["train_loss"]) if known(row["train_loss"]) else none,
            loss(row["eval_loss"]) if known(row["eval_loss"]) else none,
        ]
        for row in records
    ]
    names = ["trial", "rank", "learning_rate", "seed", "status", "reason", "steps", "train_loss", "eval_loss"]
    numeric = [name not in ("trial", "status", "reason") for name in names]
    return Table(text("table.trials"), [text(f"table.{name}") for name in names], numeric, rows)


def _limits(evidence: Evidence, verdict: Mapping[str, Any] | None, text: Catalogue) -> list[str]:
    spec = evidence.spec
    margin = (verdict or {}).get("margin", spec.verdict.margin)
    limits = [
        text("limit.scope"),
        text("limit.loss"),
        text("limit.margin", margin=percent(margin)),
        text("limit.seeds"),
    ]
    if len(spec.ranks) > 1:
        limits.append(text("limit.selection"))
    if len(spec.learning_rates) > 1:
        limits.append(text("limit.rates"))
    if len(spec.ranks) > 1 and not isinstance(spec.adapter.alpha, str) and not spec.adapter.use_rslora:
        limits.append(text("limit.alpha"))
    if not evidence.profiles.empty:
        limits.append(text("limit.costs", steps=int(evidence.profiles["steps"].max())))
    if (evidence.results["status"] == "diverged").any():
        limits.append(text("limit.diverged"))
    if evidence.divided:
        limits.append(text("limit.divided", trials=", ".join(evidence.divided)))
    if evidence.left:
        limits.append(text("limit.left", trials=", ".join(evidence.left)))
    for name, failure in evidence.failures.items():
        what = text("limit.answers") if name == ANSWERS else text("limit.profile", name=name)
        limits.append(text("limit.failed", what=what, reason=failure["reason"]))
    truncated = evidence.data_facts.get("truncated")
    if isinstance(truncated, int) and truncated:
        limits.append(text("limit.truncated", rows=f"{truncated:,}"))
    return limits
