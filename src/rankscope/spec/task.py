"""`measure.task`: how answers are scored, and which code that runs. Nothing is executed here."""

import ast
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankscope.errors import StudyError, did_you_mean
from rankscope.files import file_hashes, no_such

CHOICE = {"choice": "acc", "choice_norm": "acc_norm"}  # tasks by likelihood, and what the harness calls their metrics
BASE = "base"  # the model without an adapter, among the trials that are scored


class Task(NamedTuple):
    kind: str  # exact_match, choice, choice_norm, regex, function or lm_eval
    detail: str = ""  # the pattern, the function's name, or the harness's tasks
    file: str = ""  # of the function

    @property
    def names(self) -> list[str]:
        """Tasks of the harness."""
        return [name.strip() for name in self.detail.split(",") if name.strip()]

    @property
    def code(self) -> list[str]:
        """Files and folders whose code it runs. A task file of the harness is code: it names functions, and its
        templates are rendered without a sandbox."""
        if self.kind == "lm_eval":
            return [name for name in self.names if "/" in name or name.endswith((".yaml", ".yml"))]
        return [self.file] if self.file else []


def parse_task(text: str) -> Task:
    """Raises ValueError: the text is no task, or its pattern is wrong."""
    kind, _, detail = text.partition(":")
    file, _, name = text.rpartition(":")
    if text in ("exact_match", *CHOICE):
        return Task(text)
    if kind == "regex" and detail:
        compiled(detail)
        return Task(kind, detail)
    if kind == "lm_eval" and detail.strip(" ,"):
        return Task(kind, detail)
    if file.endswith(".py") and name.isidentifier():
        return Task("function", name, file)
    hint = did_you_mean(text, ("exact_match", *CHOICE)) or "."
    forms = "exact_match, choice, choice_norm, regex:PATTERN, FILE.py:FUNCTION, lm_eval:TASK[,TASK]"
    raise ValueError(f"{text!r} is no task{hint} Expected one of: {forms}")


def checked_task(text: str) -> str:
    parse_task(text)
    return text


def compiled(pattern: str) -> Any:
    """The pattern for RE2, which matches in linear time. Raises ValueError: it is wrong."""
    import re2

    options = re2.Options()
    options.log_errors = False  # they are raised
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode(errors="replace")
        raise ValueError(f"{pattern!r}: {reason} (RE2 has no look-around and no back-references)") from None


def check_code(text: str | None, allowed: Sequence[str | Path] | None) -> None:
    """Raise StudyError where the task runs code that is missing, or that was not `allowed` by its path: a study's file,
    which may be somebody else's, does not decide alone what is executed. None allows all, for a plan, which executes
    nothing."""
    task = parse_task(text) if text else Task("")
    for name in task.code:
        if not Path(name).exists():
            raise StudyError(f"measure.task: {no_such(name, 'file')}", "Give its path from the current directory.")
        if allowed is not None and Path(name).resolve() not in [Path(one).resolve() for one in allowed]:
            what = f"measure.task: {name} is code, and a study's file alone does not have it run"
            raise StudyError(what, f"Read it, then repeat its name: --allow-code {name} (Python: allow_code={name!r}).")
    if task.kind == "function":
        try:
            names = [getattr(part, "name", None) for part in ast.parse(Path(task.file).read_bytes()).body]
        except (SyntaxError, ValueError) as error:
            raise StudyError(f"measure.task: {task.file} is not valid Python: {error}", "Correct it.") from None
        if task.detail not in names:
            what = f"measure.task: {task.file} has no function {task.detail}"
            raise StudyError(what, f"Define it there: def {task.detail}(prompt, answer, reference).")


def code_sha256(text: str) -> str | None:
    """Hash of the code that a task runs: a file's, or that of all Python and YAML files of a task file's folder. None
    where it runs none of its own, or the code is not here."""
    paths = [Path(name) for name in parse_task(text).code]
    if not paths or not all(path.exists() for path in paths):
        return None
    everything = ("**/*.py", "**/*.yaml", "**/*.yml")
    hashes = [
        file_hashes(path if path.is_dir() else path.parent, [path.name] if path.suffix == ".py" else everything)
        for path in paths
    ]
    return hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
