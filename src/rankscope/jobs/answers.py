"""Answers of each candidate to the same held-out prompts: for the eye, not for the verdict."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel

from rankscope.data.conversations import Tokenizer
from rankscope.data.tokens import Tokens
from rankscope.errors import RankscopeError
from rankscope.jobs.child import load_base, open_study
from rankscope.jobs.job import Job, Run, failure_of
from rankscope.lora.adapters import remove_adapters
from rankscope.lora.saved import attach, read_adapter
from rankscope.model.load import load_tokenizer, most_positions
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.study.folder import ANSWERS
from rankscope.study.records import AnswersRecord


def jobs(run: Run) -> list[Job]:
    """Return the job of all answers, where they are wanted and missing."""
    study = run.study
    trials = study.unanswered() if study.spec.measure.answers else []
    if not trials:
        return []
    run.say(f"Answers of {len(trials)} candidates to {study.spec.measure.answers} held-out prompts")
    reads = [f"trials/{trial.name}/trial.json" for trial in study.trials]
    reads += [f"trials/{trial.name}/adapter" for trial in trials]
    return [Job(__name__, {}, "answers", reads, run.plan.host_bytes(trials[:1]), alone=True)]


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Let the base model and one trial of each candidate answer the prompts, and write answers.json."""
    study, data = open_study(study_path)
    model, _ = load_base(study)
    kept, measure = study.kept_answers(), study.spec.measure
    found = answer(model, study.spec, {trial: study.adapter_file(trial) for trial in study.unanswered()}, data.eval)
    answers = kept | found["answers"]
    answers = {name: answers[name] for name in ("base", *(trial.name for trial in study.answered()))}
    asked = [measure.answers, measure.answer_tokens]
    record = AnswersRecord(questions=found["questions"], answers=answers, asked=asked)
    record.write(study.file("answers", "answers.json"))


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record a failure, whatever it is: answers are optional, and the study concludes without them."""
    run.study.write_failure(ANSWERS, None if error is None else failure_of(error))
    if error is not None:
        run.say(f"The answers did not finish: {error}")
    return list(waiting)


class Question(NamedTuple):
    """The prompt of a held-out row, and the row's own answer."""

    example: int
    prompt_ids: list[int]
    reference_ids: list[int]


def questions(held_out: Tokens, count: int, max_length: int) -> list[Question]:
    """Return the first `count` held-out rows; truncated rows come last, since their own answer is not whole."""
    asked = []
    for number in np.argsort(held_out.lengths >= max_length, kind="stable")[:count].tolist():
        example = held_out[number]
        labels = np.flatnonzero(example.is_label)
        first = int(labels[np.flatnonzero(np.diff(labels, prepend=-2) > 1)[-1]])  # of a conversation, the last answer
        if first == 1:  # the loss is on all of the row, which has no answer of its own: ask for its second half
            first = max(1, len(example.ids) // 2)
        asked.append(Question(number, example.ids[:first].tolist(), example.ids[first : labels[-1] + 1].tolist()))
    return asked


def answer(model: PreTrainedModel, spec: StudySpec, adapters: Mapping[Trial, Path], held_out: Tokens) -> dict[str, Any]:
    """Generate greedy answers of `model` and of each trial in `adapters` (its file of weights), by PEFT's own forward.
    Return {"questions": [{"example", "prompt", "reference"}], "answers": {"base" or trial: [text]}}; each text has at
    most `measure.answer_tokens` tokens, without the special ones. One prompt at a time, so that nothing is padded."""
    tokenizer = load_tokenizer(spec.model)
    asked = questions(held_out, spec.measure.answers, spec.data.max_length)
    most, positions = spec.measure.answer_tokens, most_positions(spec.model)
    answers = {"base": list(_generate(model, tokenizer, asked, most, positions))}
    for trial, file in adapters.items():
        attach(model, trial.name, read_adapter(file.parent))
        answers[trial.name] = list(_generate(model, tokenizer, asked, most, positions))
        remove_adapters(model)
    texts = [
        {"example": number, "prompt": _text(tokenizer, prompt), "reference": _text(tokenizer, reference)}
        for number, prompt, reference in asked
    ]
    return {"questions": texts, "answers": answers}


def _generate(
    model: PreTrainedModel, tokenizer: Tokenizer, asked: Sequence[Question], most: int, positions: int | None
) -> Iterator[str]:
    ends = _ids(tokenizer.eos_token_id) | _ids(getattr(model.generation_config, "eos_token_id", None))
    for question in asked:
        room = positions - len(question.prompt_ids) if positions else most
        # A configuration of our own: the model's may ask for sampling, and two runs are to give the same answers.
        length = max(1, min(most, room))
        model.generation_config = GenerationConfig(
            do_sample=False, max_new_tokens=length, eos_token_id=sorted(ends), pad_token_id=min(ends), use_cache=True
        )
        prompt = torch.tensor([question.prompt_ids], device=model.device)
        with torch.no_grad():
            found: Any = model.generate(prompt, attention_mask=torch.ones_like(prompt))  # type: ignore[operator]
        yield _text(tokenizer, found[0, len(question.prompt_ids) :].tolist())


def _ids(value: int | Sequence[int] | None) -> set[int]:
    """Return the ids of a field that holds one, several or none."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)


def _text(tokenizer: Tokenizer, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))
