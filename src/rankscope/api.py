"""The Python API: `run`, and the study that it returns. What takes seconds to import waits until something is run."""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rankscope.jobs.job import Progress
from rankscope.spec.option_table import OPTIONS
from rankscope.spec.options import assemble, read_study_file
from rankscope.study import study as directory

PathOrId: TypeAlias = str | os.PathLike[str]


class Study(directory.Study):
    """A study: its directory, tables, verdict, adapters and report. Opening reads nothing but study.yaml; a table is
    read when its method is called. Tables are tidy pandas DataFrames, with trials in the order of the question."""

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
            margin: Largest loss above the best of a rank that is good enough: 0.02, or `2%`.
            margin_of: What the margin is a share of.
            by: What the verdict follows, in a study with a task.
            confidence: Confidence level of intervals and verdict, above a half: 0.9, or `90%`.
            max_gpu_memory: Largest GPU memory of a recommended rank, in bytes or as `24GB`.
            max_runtime: Longest training of a recommended rank, in seconds or as `2h`.
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
        model: Base model: hub id, folder or .gguf file.
        dataset: Instruction data: hub id, file or folder, or several of them.
        ranks: LoRA ranks to compare: `[8, 64]`, or `4..64` for 4, 8, 16 up to 64; `full` adds full fine-tuning.
        learning_rates: Peak learning rates. Of several, each rank is judged at its best.
        seeds: Seeds to train each candidate with: `[0, 1, 2]`, or `0..2`.
        steps: Optimizer steps per trial.
        epochs: Passes over the training rows, instead of `steps`.
        batch_size: Examples per trial and step.
        max_length: Longest sequence, in tokens; longer rows are truncated and counted.
        alpha: `lora_alpha`: a number, or a multiple of the rank such as `2r`.
        alphas: Several of them, instead of `alpha`: each rank is judged at its best.
        variants: Variants beside plain LoRA: `rslora`, `pissa`, `olora`, `loraplus`, `dora`.
        lora_dropout: Dropout probability of an adapter's inputs.
        use_rslora: Scale updates by alpha/sqrt(rank) instead of alpha/rank.
        target_modules: `all-linear`, `all-linear+experts`, or names such as `q_proj`.
        adapter_config: An adapter_config.json of PEFT, or its folder, to take its options from.
        name: Name of the study.
        revision: Hub revision of the model: branch, tag or commit.
        eval_dataset: Data to evaluate on, instead of held-out rows.
        columns: Columns of other names: `{"prompt": "question", "completion": "answer"}`.
        chat_template: Template of conversations: a Jinja file, its text, or `chatml`.
        loss_on: Tokens to learn.
        skip_bad_rows: Leave out rows that cannot be read, and count them.
        force: Train even on fewer than 8 rows.
        device: `auto`, `cpu`, `cuda`, `cuda:1` or `mps`.
        dtype: Type of the base model.
        quantization: Quantize the base's linear layers, to 4 bits or to 8.
        dequantize: Load a checkpoint in FP8 or MXFP4 as weights of `dtype`.
        engine: `packed`, or `peft`: one trial at a time with PEFT's own forward.
        isolated: Train every trial alone, in its own process.
        task: Score on a task too: `exact_match`, `choice`, `regex:PATTERN`, `my.py:score`, `lm_eval:TASK`.
        margin: Largest loss above the best of a rank that is good enough: 0.02, or `2%`.
        margin_of: What the margin is a share of.
        by: What the verdict follows, in a study with a task.
        confidence: Confidence level of intervals and verdict, above a half: 0.9, or `90%`.
        max_gpu_memory: Largest GPU memory of a recommended rank, in bytes or as `24GB`.
        max_runtime: Longest training of a recommended rank, in seconds or as `2h`.
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it warns whenever PEFT is imported
    from rankscope.jobs.launchers import make_launcher
    from rankscope.jobs.queue import time_limit
    from rankscope.model.checks import pinned
    from rankscope.pipeline import run_looks
    from rankscope.track import choose_trackers

    limit, shown = time_limit(hours), progress or _Silent()
    file = Path(study) if isinstance(study, str | os.PathLike) else None
    values = study if isinstance(study, Mapping) else read_study_file(file) if file else {}
    asked, trackers = assemble(values, options, sets, file), choose_trackers(report_to)
    path = Path(out or asked.name)
    begun = Study.begun_at(path, asked)
    spec = begun.spec if begun else pinned(asked)  # first: the launcher reads the model's configuration too
    with make_launcher(launcher, spec.model, ray_address, shown.say) as launching:
        allowed = [allow_code] if isinstance(allow_code, str | os.PathLike) else allow_code
        run_looks(
            spec,
            path,
            launching,
            shown,
            trackers,
            "en",
            remeasure,
            limit,
            until_settled,
            allow_code=[*map(Path, allowed)],
        )
    return Study.open(path)


def _plain(value: Any) -> Any:
    """An option as a study's YAML would have it: paths are text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


class _Silent:
    def say(self, message: str) -> None: ...
    def poll(self) -> None: ...
