"""The Python API: `run`, and the study that it returns. What takes seconds to import waits until something is run."""

import inspect
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

from rankscope.begin import run_in
from rankscope.jobs.job import Progress, Settings
from rankscope.spec.names import description_of
from rankscope.spec.option_table import OPTIONS
from rankscope.spec.options import assemble, read_study_file
from rankscope.study import study as directory

PathOrId: TypeAlias = str | os.PathLike[str]

Function = TypeVar("Function", bound=Callable[..., Any])


def _with_fields(function: Function) -> Function:
    """Describe the options among a function's parameters, in place of `{fields}` in its docstring: each in the words of
    its field of a study."""
    lines, text = [], function.__doc__ or ""
    indent = re.search(r"^( *){fields}$", text, re.MULTILINE)
    for name in inspect.signature(function).parameters:
        if name in OPTIONS and indent:
            words = " ".join(description_of(OPTIONS[name].field).split())
            lines.append(f"{indent[1]}{name}: {words}")
    function.__doc__ = text.replace(indent[0], "\n".join(lines)) if indent else text
    return function


class Study(directory.Study):
    """A study: its directory, tables, verdict, adapters and report. Opening reads nothing but study.yaml; a table is
    read when its method is called. Tables are tidy pandas DataFrames, with trials in the order of the question."""

    @_with_fields
    def conclude(
        self,
        *,
        margin: float | str | None = None,
        margin_of: Literal["gain", "loss"] | None = None,
        by: Literal["loss", "task"] | None = None,
        confidence: float | str | None = None,
        max_gpu_memory: int | str | None = None,
        max_runtime: float | str | None = None,
        language: str = "en",
    ) -> dict[str, Any]:
        """Judge the same results by other criteria, and return the verdict; nothing is trained. The study then has
        these criteria, and its verdict.json, report and `best` follow them. Without criteria it is judged by its own.

        Example: `study.conclude(margin="2%")`

        Args:
            {fields}
            language: Language of the report: `en` or `ko`.

        Raises:
            StudyError: a criterion is wrong, or the study lacks what it needs.
            StudyDirectoryError: a run holds the study, or a file of it is missing.
        """
        criteria = {option: value for option, value in locals().items() if option in OPTIONS}
        from rankscope.report.finish import judge_by

        judged = judge_by(self, criteria, language)
        self.spec, self.log = judged.study.spec, judged.study.log
        vars(self).pop("verdict", None)  # what was read before
        return self.verdict


@_with_fields
def run(
    *,
    model: PathOrId | None = None,
    dataset: PathOrId | Sequence[PathOrId] | None = None,
    ranks: int | str | Sequence[int | Literal["full"]] | None = None,
    learning_rates: float | str | Sequence[float] | None = None,
    seeds: int | str | Sequence[int] | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    max_length: int | None = None,
    alpha: float | str | None = None,
    alphas: Sequence[float | str] | None = None,
    variants: str | Sequence[str] | None = None,
    lora_dropout: float | None = None,
    use_rslora: bool | None = None,
    target_modules: str | Sequence[str] | None = None,
    adapter_config: PathOrId | None = None,
    name: str | None = None,
    revision: str | None = None,
    eval_dataset: PathOrId | Sequence[PathOrId] | None = None,
    columns: Mapping[str, str] | str | None = None,
    chat_template: PathOrId | None = None,
    loss_on: Literal["assistant", "last", "completion", "all"] | None = None,
    skip_bad_rows: bool | None = None,
    force: bool | None = None,
    device: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16"] | None = None,
    quantization: Literal["nf4", "int8"] | None = None,
    dequantize: bool | None = None,
    engine: Literal["packed", "peft"] | None = None,
    isolated: bool | None = None,
    task: str | None = None,
    margin: float | str | None = None,
    margin_of: Literal["gain", "loss"] | None = None,
    by: Literal["loss", "task"] | None = None,
    confidence: float | str | None = None,
    max_gpu_memory: int | str | None = None,
    max_runtime: float | str | None = None,
    study: Mapping[str, Any] | PathOrId | None = None,
    sets: Sequence[str] = (),
    out: PathOrId | None = None,
    report_to: str | Sequence[str] = (),
    progress: Progress | None = None,
    launcher: Literal["local", "ray"] = "local",
    ray_address: str | None = None,
    remeasure: bool = False,
    until_settled: bool = False,
    hours: float | None = None,
    allow_code: PathOrId | Sequence[PathOrId] = (),
    **others: Any,
) -> Study:
    """Train every rank, measure what it costs, conclude, and return the study.

    On a directory that holds a study, what is new is added to it and only what is missing is done. What is None has the
    default of its field of the study.

    Example: `rankscope.run(model="facebook/opt-350m", dataset="code.jsonl", ranks=[8, 64], steps=200)`

    Args:
        {fields}
        study: A study's YAML file, or a mapping like it; the options above override its fields.
        sets: Further fields, such as `measure.answers=0`; they override both.
        out: The study's directory. Default: its name.
        report_to: Trackers that follow the run: `wandb`, `tensorboard`, `mlflow`, `trackio`.
        progress: What is told of the run, and when. Default: nothing.
        launcher: Where jobs run: here, or on the Ray cluster at `ray_address`.
        ray_address: Address of the cluster. Default: the one that Ray finds, or one on this machine.
        remeasure: Measure the costs of all ranks again.
        until_settled: Add seeds to the ranks in contention, look by planned look, until nothing is open.
        hours: Conclude by then: start nothing whose forecast would end later.
        allow_code: Files of code that `task` may run.
        others: Other tools' names of the options, such as `lr` or `num_train_epochs`.

    Raises:
        StudyError: the question is wrong, a tracker or launcher is unknown, or `out` holds another study.
        MissingExtraError: a tracker, or Ray, is not installed.
        DataError, ModelError: the data or the model cannot be used.
        WorkerError: a child process ended without finishing its work.
    """
    options = {option: _plain(value) for option, value in locals().items() if option in OPTIONS} | others
    from rankscope.jobs.launchers import check_launcher
    from rankscope.jobs.queue import time_limit
    from rankscope.track import choose_trackers

    check_launcher(launcher, ray_address)
    code = [allow_code] if isinstance(allow_code, str | os.PathLike) else allow_code
    trackers, limit = choose_trackers(report_to), time_limit(hours)
    how = Settings(trackers, "en", remeasure, until_settled, limit, [*map(Path, code)])
    file = Path(study) if isinstance(study, str | os.PathLike) else None
    values = study if isinstance(study, Mapping) else read_study_file(file) if file else {}
    asked = assemble(values, options, sets, file)
    path = Path(out or asked.name)
    run_in(path, asked, Study.begun_at(path, asked), progress or _Silent(), how, launcher, ray_address)
    return Study.open(path)


def _plain(value: Any) -> Any:
    """An option as a study's YAML would have it: paths are text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


class _Silent:
    def say(self, message: str) -> None: ...
    def poll(self) -> None: ...
