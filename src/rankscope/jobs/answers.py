"""Answers of each candidate to the same held-out prompts: for the eye, not for the verdict."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.data.questions import questions
from rankscope.errors import RankscopeError
from rankscope.jobs.child import load_base, open_study
from rankscope.jobs.generate import answers_of, text_of
from rankscope.jobs.job import Job, Run, failure_of
from rankscope.model.load import load_tokenizer, most_positions
from rankscope.spec.task import BASE
from rankscope.study.folder import ANSWERS
from rankscope.study.records import AnswersRecord


def jobs(run: Run) -> list[Job]:
    """Return the job of all answers, where they are wanted and missing."""
    study = run.study
    trials = study.unanswered() if study.spec.measure.answers else []
    if not trials:
        return []
    counts = {"candidates": len(trials), "prompts": study.spec.measure.answers}
    run.say(run.text("notice.answers", **{name: run.text.count(name, n) for name, n in counts.items()}))
    reads = [f"trials/{trial.name}/trial.json" for trial in study.trials]
    reads += [f"trials/{trial.name}/adapter" for trial in trials]
    return [Job(__name__, {}, "answers", reads, run.plan.host_bytes(trials[:1]), alone=True)]


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Let the base model and one trial of each candidate answer the prompts, each by itself, and write answers.json."""
    study, data = open_study(study_path)
    (model, _), tokenizer, measure = load_base(study), load_tokenizer(study.spec.model), study.spec.measure
    asked = questions(data.eval, measure.answers, study.spec.data.max_length)
    texts = [
        {"example": one.example, "prompt": text_of(tokenizer, one.prompt_ids)}
        | {"reference": text_of(tokenizer, one.reference_ids)}
        for one in asked
    ]
    answers, positions = study.kept_answers(), most_positions(study.spec.model)
    folders = {BASE: None} | {trial.name: study.adapter_file(trial).parent for trial in study.unanswered()}
    for name, folder in folders.items():
        answers |= answers_of(model, tokenizer, positions, {name: folder}, asked, measure.answer_tokens)
    answers = {name: answers[name] for name in (BASE, *(trial.name for trial in study.answered()))}
    record = AnswersRecord(questions=texts, answers=answers, asked=[measure.answers, measure.answer_tokens])
    record.write(study.file("answers", "answers.json"))


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record a failure, whatever it is: answers are optional, and the study concludes without them."""
    run.study.write_failure(ANSWERS, None if error is None else failure_of(error))
    if error is not None:
        run.say(run.text("notice.failed", what=run.text("notice.all_answers"), error=error))
    return list(waiting)
