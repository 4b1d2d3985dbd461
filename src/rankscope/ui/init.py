"""`rankscope init`: five questions, each answer checked at once, and a study's file with comments."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import typer
import yaml

from rankscope.data.records import load_records
from rankscope.errors import RankscopeError, StudyError
from rankscope.jobs.queue import time_limit
from rankscope.model.checks import check_inputs
from rankscope.spec.models import EMBEDDED, DataSpec
from rankscope.spec.options import assemble, quick_look
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import parse_bytes
from rankscope.ui.options import INIT

TASKS = {"auto": "auto", "instructions": "alpaca", "questions": "prompt_completion", "chat": "messages", "text": "text"}
"""What a row is, by the format that reads it."""

DEVICES = ("auto", "cpu", "cuda", "mps")
ROWS_TO_CHECK = 256
LEAST_GPU_BYTES = 10**8  # less is a number whose unit was forgotten


def answers_to(given: Mapping[str, str | None], text: Catalogue) -> dict[str, str]:
    """Answers to the questions: those given; else, in a terminal, typed ones, asked for until they are right; else the
    defaults. Raises StudyError: a given one is wrong, or the model or the data is not given without a terminal."""
    answers: dict[str, str] = {}

    def typed(answer: str) -> str:
        try:
            return checked(name, answer.strip(), answers)
        except StudyError as error:
            raise typer.BadParameter(str(error)) from None

    for name, (_, _, _, default, *_) in INIT.items():
        answer = given[name]
        if answer is None and sys.stdin.isatty():
            answers[name] = typer.prompt(text(f"init.{name}"), default=default, value_proc=typed)
        elif answer is None and name in ("model", "dataset"):
            raise StudyError(f"--{name} is missing", "Give it, or run `rankscope init` in a terminal, which asks.")
        else:
            answers[name] = checked(name, answer or default, answers)
    return answers


def checked(name: str, answer: str, known: Mapping[str, str]) -> str:
    """The answer. Raises StudyError: it cannot be used, or does not fit those before."""
    try:
        if name in ("model", "dataset"):
            check_inputs(assemble({}, {"model": EMBEDDED, "dataset": EMBEDDED, name: answer}))
        elif name == "hours":
            time_limit(float(answer))
        elif name == "hardware" and answer.partition(":")[0] not in DEVICES:
            if parse_bytes(answer) < LEAST_GPU_BYTES:
                raise ValueError("expected a size such as 24GB")
        elif name == "task":
            data = DataSpec.model_validate({"id": known["dataset"], "format": TASKS[answer], "max_rows": ROWS_TO_CHECK})
            if os.path.exists(data.name):
                load_records(data)
    except RankscopeError as error:
        raise StudyError(error.what, error.todo) from None
    except (KeyError, ValueError) as error:
        why = "no such task" if isinstance(error, KeyError) else str(error)
        raise StudyError(f"{name} {answer}: {why}", INIT[name].help) from None
    return answer


def write_study(file: Path, answers: Mapping[str, str], text: Catalogue) -> None:
    """Write the study of these answers, with comments."""
    device = answers["hardware"] if answers["hardware"].partition(":")[0] in DEVICES else ""
    spec = assemble({}, {"model": answers["model"], "dataset": answers["dataset"]})
    spec = quick_look(spec) if float(answers["hours"]) < 1 else spec
    written = text(
        "init.study",
        file=file,
        hours=answers["hours"],
        plan_for="" if device else f" --gpu-memory {answers['hardware']}",
        name=spec.name,
        model=json.dumps(spec.model.id, ensure_ascii=False),
        device=device or "auto",
        data=json.dumps(spec.data.id, ensure_ascii=False),
        format=TASKS[answers["task"]],
        rows=f"max_rows: {spec.data.max_rows}" if spec.data.max_rows else "# max_rows: 2000",
        ranks=list(spec.ranks),
        rates=list(spec.learning_rates),
        seeds=list(spec.seeds),
        limit="# max_gpu_memory: 24GB" if device else f"max_gpu_memory: {answers['hardware']}",
    )
    assemble(yaml.safe_load(written), {})
    file.write_text(written, encoding="utf-8")
