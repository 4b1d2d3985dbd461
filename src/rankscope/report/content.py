"""Content of a report in one language, which HTML and Markdown render."""

import shlex
from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
from altair.utils.schemapi import debug_mode

from rankscope.analysis.next_step import NextStep, next_step
from rankscope.data.doubts import DOUBTS, data_warnings, doubts
from rankscope.report import curve, tables, task, variants
from rankscope.report.answers import Answered, answered
from rankscope.report.costs import Savings, cost_tables, noise_sentence, prediction_tables, savings
from rankscope.report.figures import Figure, Section, make_section
from rankscope.report.frames import by_candidate, chosen_row, compared_rows
from rankscope.report.loss import heldout_by_step, loss_figures
from rankscope.report.memory import memory_curves, memory_figures
from rankscope.report.runtime import runtime_figure, trade_off_figures
from rankscope.spec.models import EMBEDDED
from rankscope.spec.resolve import write_yaml
from rankscope.study.evidence import Evidence
from rankscope.study.folder import ANSWERS, TASK
from rankscope.text import verdict as words
from rankscope.text.catalogue import Catalogue
from rankscope.text.coverage import coverage_sentences
from rankscope.text.formats import Table, known, percent, signed, two_digits
from rankscope.text.verdict import Verdict


class Content(NamedTuple):
    """Parts of a report in the order in which they are shown: from `answers` on, they are its details."""

    title: str
    subtitle: str
    outcome: str
    rank: str
    sentence: str
    next_step: NextStep | None
    warnings: list[str]
    ranks: Table
    margins: Table | None
    gain: words.Gain
    cost: words.Gain
    savings: Savings
    caveats: list[str]
    how_to_read: list[str]
    sections: list[Section]
    answers: list[Answered]
    details: list[Section]
    reproduce: str
    study: str
    version: str

    def section(self, name: str) -> Section:
        return next(section for section in [*self.sections, *self.details] if section.name == name)

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in [*self.sections, *self.details] for figure in section.figures]


@debug_mode(False)  # tests validate the charts; at each step of their making it takes longer than all else
def compose(evidence: Evidence, verdict: Verdict, text: Catalogue, directory: str = "") -> Content:
    """Content of the report. The verdict and any table of the evidence may be empty. `directory` is the study's, as
    commands name it (default: its name)."""
    study_name = evidence.spec.name
    table = by_candidate(evidence, verdict)
    rank = verdict.get("rank")
    caveats = verdict.get("caveats", [])
    alphas = ["alphas"] if isinstance(evidence.spec.adapter.alpha, tuple) else []
    half = [] if compared_rows(evidence) is None else ["half"]
    faults = [fault for part in evidence.parts for fault in part.results.get("adapter_fault", pd.Series()).dropna()]
    return Content(
        title=text("page.title", study=study_name),
        subtitle=" · ".join(_about(evidence, text)),
        outcome=words.outcome_label(verdict, text),
        rank="" if rank is None else str(rank),
        sentence=words.verdict_sentence(verdict, text.language),
        next_step=next_step(verdict, evidence, directory or study_name, text),
        warnings=data_warnings(evidence.data_facts, text),
        ranks=tables.rank_table(evidence, verdict, table, text),
        margins=words.margin_table(verdict, text),
        gain=words.gained(verdict, text),
        cost=_cost(verdict, table, text),
        savings=savings(evidence, verdict, table, text),
        caveats=[
            *variants.better_variants(verdict, text),
            *(words.caveat_sentence(verdict, code, text) for code in caveats if code not in DOUBTS),
            *(text("caveat.adapter_fault", fault=fault) for fault in dict.fromkeys(faults)),
        ],
        how_to_read=[text(f"how.{name}") for name in ("averages", "axes", "memory", "alone", "noise", *alphas, *half)],
        sections=[
            make_section("loss", loss_figures(evidence, verdict, table, text), words.rate_sentences(verdict, text)),
            *task.task_sections(verdict, text),
            *variants.variant_sections(evidence, verdict, text),
            *curve.rank_curve_sections(evidence, text),
            make_section("costs", [*memory_figures(evidence, table, text), runtime_figure(evidence, text)]),
            make_section("trade_off", trade_off_figures(evidence, verdict, table, text)),
        ],
        answers=answered(evidence, verdict, text),
        details=_details(evidence, verdict, table, text),
        reproduce=f"rankscope run study.yaml --out {shlex.quote(study_name)}",
        study=write_yaml(evidence.parts[-1].spec),
        version=str((evidence.machine.get("versions") or {}).get("rankscope") or ""),
    )


def _details(evidence: Evidence, verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> list[Section]:
    """Sections of the second level: rules of thumb, curves, all that was measured, and the conclusion's limits."""
    candidates = tables.candidate_table(evidence, verdict, table, text)
    costs = [*cost_tables(evidence, text), *prediction_tables(evidence, table, text)]
    coverage = coverage_sentences(evidence.prediction.get("coverage"), evidence.spec.ranks, text)
    notes = filter(None, [noise_sentence(evidence.profiles, text), *coverage, text("unit.note")])
    claims, metrics = words.claim_sentences(verdict, text.language), tables.metrics_table(evidence, verdict, text)
    facts = {
        "data": tables.data_table(evidence.data_facts, text),
        "machine": tables.machine_table(evidence.machine, text),
    }
    return [
        make_section("claims", [] if claims else [text("claim.absent")], claims),
        make_section("curves", [heldout_by_step(evidence, table, text), *memory_curves(evidence, table, text)]),
        make_section("candidates", [], list(notes), [candidates, *costs]),
        make_section("also", [], tables.metrics_notes(evidence, text), [metrics]),
        make_section("trials", [], [], [tables.trial_table(evidence, text)]),
        *(
            make_section(name, [], [], [table]) if table.rows else make_section(name, [text("table.missing")])
            for name, table in facts.items()
        ),
        make_section("limits", [], _limits(evidence, verdict, text)),
    ]


def _about(evidence: Evidence, text: Catalogue) -> Iterator[str]:
    """What was trained on what, for how long, where and when, as far as it is known."""
    spec, machine = evidence.spec, evidence.machine
    ids = {"model": spec.model.id, "data": spec.data.name}
    names = {what: text(f"page.embedded_{what}") if name == EMBEDDED else name for what, name in ids.items()}
    yield text("page.subtitle", **{what: tables.base_names(name) for what, name in names.items()})
    if "rows_train" in evidence.data_facts:
        yield text.count("rows", evidence.data_facts["rows_train"])
    if known(steps := evidence.results["steps"].max()):
        yield text.count("training_steps", int(steps))
    yield text.count("seeds", len(spec.seeds))
    hardware = machine.get("hardware") or {}
    if gpus := hardware.get("gpus"):
        yield ", ".join(dict.fromkeys(str(gpu["name"]) for gpu in gpus))
    elif "cpu" in hardware:
        yield text("page.cpu", name=hardware["cpu"], cores=hardware.get("cores") or text("unknown"))
    if "date" in machine:
        yield str(machine["date"])


def _cost(verdict: Verdict, table: pd.DataFrame, text: Catalogue) -> words.Gain:
    """The chosen candidate's loss above the best one's, and notes on it."""
    chosen = chosen_row(verdict, table)
    if chosen is None:
        return words.Gain("", [])
    if verdict["candidate"] == verdict["best_candidate"]:
        return words.Gain("", [text("cost.nothing")])
    if not known(chosen["regret"]):
        return words.Gain("", [text("cost.unknown")])
    notes, low, high = [], chosen["regret_low"], chosen["regret_high"]
    if known(chosen["kept"]):
        share = chosen["regret"] / verdict["gain"]
        notes.append(text(f"cost.share_{words.margin_unit(verdict)}", share=f"{two_digits(100 * share)}%"))
    elif known(chosen["regret_share"]):
        notes.append(text("cost.share", share=f"{two_digits(100 * chosen['regret_share'])}%"))
    ends = {"low": signed(low), "high": signed(high), "confidence": percent(verdict["confidence"])}
    notes.append(text("cost.interval", **ends) if known(low) and known(high) else text("cost.no_interval"))
    return words.Gain(text("cost.nats", value=signed(chosen["regret"])), notes)


def _limits(evidence: Evidence, verdict: Verdict, text: Catalogue) -> list[str]:
    spec, facts = evidence.spec, evidence.data_facts
    asked = {"margin": spec.verdict.margin, "margin_of": spec.verdict.margin_of} | dict(verdict)
    shares = {"least": percent(1 - asked["margin"]), "margin": percent(asked["margin"])}
    one_alpha = len(spec.ranks) > 1 and isinstance(spec.adapter.alpha, float) and not spec.adapter.use_rslora
    steps = 0 if evidence.profiles.empty else int(evidence.profiles["steps"].max())
    cut = 0 if "rows_cut" in doubts(facts) else facts.get("truncated") or 0
    limits = {
        text("limit.scope"): True,
        text(f"limit.margin_{words.margin_unit(asked)}", **shares): True,
        text("limit.seeds"): True,
        text("limit.rates"): len(spec.learning_rates) > 1 or isinstance(spec.adapter.alpha, tuple),
        text("limit.alpha"): one_alpha,
        text("limit.costs", steps=steps): not evidence.profiles.empty,
        text("limit.diverged"): (evidence.results["status"] == "diverged").any(),
        text("limit.divided", trials=", ".join(evidence.divided)): evidence.divided,
        text("limit.left", trials=", ".join(evidence.survivors)): evidence.survivors,
    }
    for name, failure in evidence.failures.items():
        what = text(f"limit.{name}") if name in (ANSWERS, TASK) else text("limit.profile", name=name)
        limits[text("limit.failed", what=what, reason=failure.reason)] = True
    limits[text("limit.truncated", rows=f"{cut:,}")] = cut
    return [limit for limit, holds in limits.items() if holds]
