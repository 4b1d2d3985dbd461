"""Results of a run for the terminal and for scripts."""

import shlex
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

from rankscope.analysis.curve import curve_errors, loss_curve
from rankscope.analysis.next_step import NextStep, next_step
from rankscope.data.doubts import data_warnings
from rankscope.report import costs, curve, frames, tables, task, variants
from rankscope.report.finish import Conclusion
from rankscope.spec.candidates import Trial
from rankscope.study.folder import ANSWERS, TASK
from rankscope.study.missing import missing_profiles, unfinished
from rankscope.study.records import Failure, TrialRecord
from rankscope.study.study import Study
from rankscope.study.tables import lowest_loss
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import Table, percent
from rankscope.text.verdict import ALARMS, caveat_sentence, gained, margin_table, rate_sentences, verdict_sentence
from rankscope.ui.console import make_table, show

COLUMNS = ("train_loss", "eval_loss", "regret", "kept", "cpu_memory", "step_seconds", "runtime")
"""Columns of the report's table of candidates that a terminal has room for; `gpu_memory` beside them on a GPU."""


def show_outcome(conclusion: Conclusion, console: Console, text: Catalogue) -> None:
    """Print the report's numbers for each candidate, what they show, and at last the verdict: see `show_verdict`."""
    _, evidence, verdict = conclusion
    candidates = frames.by_candidate(evidence, verdict)
    gpu = ("gpu_memory",) if frames.has_gpu(evidence) else ()
    table = tables.candidate_table(evidence, verdict, candidates, text, COLUMNS + gpu)
    rows = [[name, *cells] for name, cells in zip(candidates["candidate"], table.rows, strict=True)]
    half = text("how.half") if frames.compared_rows(evidence) is not None else ""
    noise = costs.noise_sentence(evidence.profiles, text)
    sentences = filter(None, [half, noise, *rate_sentences(verdict, text), *variants.variant_sentences(verdict, text)])
    show(make_table([text("table.candidate"), *table.headers], rows), *sentences, "", console=console)
    show_verdict(conclusion, console, text)


def show_verdict(conclusion: Conclusion, console: Console, text: Catalogue) -> None:
    """Print the gain, the verdict, what is doubtful, where the adapter and the report are, and what to do next."""
    study, evidence, verdict = conclusion
    if (gain := gained(verdict, text)).value:
        show(f"{text('gain.title')}: {'; '.join([gain.value, *gain.notes])}.", console=console)
    if (margins := margin_table(verdict, text)) is not None:
        show(f"{margins.caption}:", make_table(margins.headers, margins.rows, left=(0, 1)), console=console)
    if (scores := task.task_table(verdict, text)) is not None:
        show(f"{scores.caption}:", make_table(scores.headers, scores.rows), console=console)
    console.print()
    console.print(verdict_sentence(verdict, text.language), style="bold", soft_wrap=True)
    alarms = [caveat_sentence(verdict, code, text) for code in verdict["caveats"] if code in ALARMS]
    for sentence in [*data_warnings(evidence.data_facts, text), *alarms]:
        console.print(text("caveat.warning", sentence=sentence), style="yellow", soft_wrap=True)
    best = lowest_loss(evidence.results[evidence.results["candidate"] == verdict["candidate"]])
    if best is not None:  # else the verdict names no candidate
        show(f"{text('outcome.adapter')}: {Path(study.path, 'trials', best, 'adapter')}", console=console)
    show(f"{text('outcome.report')}: {study.report}", console=console)
    if step := next_step(verdict, evidence, str(study.path), text) or _after(verdict, str(study.path), text):
        show(f"{step.title}:\n  {step.command}", console=console)


def _after(verdict: dict[str, Any], directory: str, text: Catalogue) -> NextStep | None:
    """What to do where all is settled: try lower ranks, judge by another margin, or take the adapter."""
    rank = verdict["rank"]
    if rank is None:
        return None
    if rank > 1 and rank == min(row["rank"] for row in verdict["comparison"]):
        lower = ",".join(str(one) for one in (rank // 4, rank // 2) if one)
        return NextStep(text("settle.lower"), shlex.join(["rankscope", "run", directory, "--ranks", lower]))
    if verdict.get("by") == "task":
        return NextStep(text("settle.export"), shlex.join(["rankscope", "export", directory]))
    command = ["rankscope", "report", directory, "--margin", percent(verdict["margin"] / 2)]
    return NextStep(text("settle.margin"), shlex.join(command))


def describe_outcome(conclusion: Conclusion) -> dict[str, Any]:
    """Results as data, for `--json`: null for unknown values; bytes, seconds, nats per label token."""
    study, evidence, verdict = conclusion
    results = pd.concat(map(frames.scored_results, evidence.parts))
    order = {trial.name: number for number, trial in enumerate(study.trials)}
    return {
        "study": str(study.path),
        "report": str(study.report),
        "verdict": verdict,
        "candidates": _records(frames.by_candidate(evidence, verdict)),
        "trials": _records(results.sort_values("trial", key=lambda names: names.map(order))),
    }


def describe_curve(conclusion: Conclusion) -> dict[str, Any]:
    """Curve as data, for `rankscope curve --json`: nats per label token, null for unknown values."""
    study, evidence, _ = conclusion
    return {
        "study": str(study.path),
        "report": str(study.report),
        "cuts": _records(study.cuts()),
        "curve": _records(loss_curve(evidence)),
        "errors": _records(curve_errors(evidence)),
    }


def curve_parts(conclusion: Conclusion, text: Catalogue) -> Iterator[str | Table]:
    sections = curve.rank_curve_sections(conclusion.evidence, text)
    for section in sections:
        yield from filter(None, [*(figure.numbers for figure in section.figures), *section.tables])
    for section in sections:
        yield from section.sentences
    yield f"{text('outcome.report')}: {conclusion.study.report}"


def show_untried(study: Study, console: Console, text: Catalogue) -> None:
    """Print what a run with a time limit did not start, and the command that goes on."""
    seeds = dict[str, list[str]]()
    for trial in unfinished(study):
        if study.trial_record(trial).status == "pending":
            name = trial.candidate.name if isinstance(trial, Trial) else trial.candidate_name
            seeds.setdefault(name, []).append(str(trial.seed))
    unmeasured = sorted({job.profile for job in missing_profiles(study.spec, study)} - study.failures().keys())
    names = [text("untried.trials", name=name, seeds=", ".join(own)) for name, own in seeds.items()]
    lines = [text("untried.not_started", names="; ".join(names))] if names else []
    lines += [text("untried.not_measured", names=", ".join(unmeasured))] if unmeasured else []
    lines += [text("untried.next", command=f"rankscope run {shlex.quote(str(study.path))}")] if lines else []
    show(*lines, console=console)


def show_failures(study: Study, console: Console, text: Catalogue) -> bool:
    """Print every trial, profile and answer that was begun and did not finish, and why. Whether any did not finish."""
    failures: dict[str, TrialRecord | Failure] = {t.name: study.trial_record(t) for t in unfinished(study)}
    for name, unmeasured in study.open_failures().items():
        failures[name if name in (ANSWERS, TASK) else text("notice.profile", name=name)] = unmeasured
    for name, failure in failures.items():
        if failure.status != "pending":  # `show_untried` names those
            console.print(f"{name}: {failure.status}: {failure.reason}", style="yellow")
    return bool(failures)


def _records(frame: pd.DataFrame) -> list[dict[Hashable, Any]]:
    """One object per row, in full precision, with None for NaN."""
    values = frame.astype(object)
    return values.where(values.notna(), None).to_dict("records")
