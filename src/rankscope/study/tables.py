"""A study's tables: tidy pandas DataFrames, whose columns are their contract, as methods of `Study`.

Trials are in the order of the study's question. A study may have ten thousand of them, so each trial's files are read
once a table, and columns are made whole, not row by row.
"""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rankscope.files import file_sha256, read_whole, understood, unlike_its_hash
from rankscope.spec.candidates import CONTROL, FULL, AnyTrial, Candidate, Trial
from rankscope.study.curve_table import CurveTable, find_table, write_table
from rankscope.study.folder import StudyFolder
from rankscope.study.metrics import FIELDS, Steps, parse_steps, read_steps

if TYPE_CHECKING:
    import pandas as pd

IDENTITY_FIELDS = ("trial", "candidate", "variant", "rank", "learning_rate", "seed")
NAMES = IDENTITY_FIELDS[:3]
OUTCOME_FIELDS = ("status", "reason", "engine", "pack")
RESULT_FIELDS = (
    "steps",
    "tokens",
    "trainable_params",
    "adapter_bytes",
    "train_loss",
    "eval_loss",
    "eval_perplexity",
    "eval_accuracy",
    "general_loss_before",
    "general_loss_after",
    "train_seconds",
    "eval_seconds",
    "tokens_per_second",
)
EXAMPLE_FIELDS = ("example", "loss", "label_tokens", "correct_tokens")

BATCH_BYTES = 1 << 24
"""Of metrics.jsonl that are parsed at once."""

VERIFIED_AT_ONCE = 100
"""Files by one thread."""

LEAST_BYTES = 100_000_000
"""Of all metrics.jsonl together, from which on a table is kept: docs/results/scale.md."""


def results(study: StudyFolder) -> "pd.DataFrame":
    """One row a trial: `trial candidate variant rank learning_rate lora_alpha scaling use_rslora target_modules
    seed status reason engine pack steps tokens trainable_params adapter_bytes train_loss eval_loss eval_perplexity
    eval_accuracy general_loss_before general_loss_after train_seconds eval_seconds tokens_per_second`.

    `train_loss` is the mean over the last tenth of the steps, `eval_loss` the final held-out loss (nats a label
    token); both are NaN for a trial that did not finish. `train_seconds` is the time of its pack's steps,
    `eval_seconds` of its evaluations; loading and saving are in neither. `tokens_per_second` counts the trial's own
    tokens over the time of the pack it shared. `general_loss_…` is the loss on `measure.forgetting` before training
    and after (nats a token); NaN without one.
    """
    import pandas as pd

    rows = [
        {
            **identity(trial),
            "lora_alpha": trial.candidate.lora_alpha,
            "scaling": trial.candidate.scaling,
            "use_rslora": trial.candidate.use_rslora,
            "target_modules": _modules(trial.candidate),
            **_outcome(study, trial),
        }
        for trial in study.trials
    ]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return pd.DataFrame(columns).astype(dict.fromkeys(RESULT_FIELDS, "float64"))


def reference_results(study: StudyFolder) -> "pd.DataFrame":
    """The columns of `results()` that say something of full fine-tuning, one row a trial; the rank is 0. Empty
    where the study has no reference.
    """
    import pandas as pd

    rows = [{**identity(trial), **_outcome(study, trial)} for trial in study.reference_trials]
    frame = pd.DataFrame(rows, columns=[*IDENTITY_FIELDS, *OUTCOME_FIELDS, *RESULT_FIELDS])
    return frame.astype(dict.fromkeys(RESULT_FIELDS, "float64"))


def _outcome(study: StudyFolder, trial: AnyTrial) -> dict[str, Any]:
    record = study.trial_record(trial)
    found = record.get("results") or {}
    return {name: record.get(name) for name in OUTCOME_FIELDS} | {name: found.get(name) for name in RESULT_FIELDS}


class _Metrics(NamedTuple):
    """A trial's metrics.jsonl."""

    trial: str
    file: Path
    sha256: str | None
    """None where the trial has not ended."""


class _Part(NamedTuple):
    """Steps of some trials, by their numbers among all."""

    trials: list[int]
    steps: Steps


def curves(study: StudyFolder) -> "pd.DataFrame":
    """One row a step of a trial: `trial candidate variant rank learning_rate seed step epoch train_loss eval_loss
    grad_norm step_learning_rate tokens label_tokens step_seconds`; `eval_loss` is NaN between evaluations, and
    step 0 is the evaluation before training. `trial`, `candidate` and `variant` are categories.
    """
    import pandas as pd

    metrics = _metrics(study)
    table = find_table(study.file("tables"))
    known = _known(table, metrics)
    parts = list(_parse(metrics, [number for number in range(len(metrics)) if number not in known]))
    counts = np.zeros(len(metrics), np.int64)
    for part in parts:
        counts[part.trials] = part.steps.counts
    for number, rows in known.items():
        counts[number] = len(rows)
    starts = (np.cumsum(counts) - counts).tolist()

    def verify(numbers: Sequence[int]) -> None:
        buffer = bytearray(1 << 18)
        for number in numbers:
            if file_sha256(metrics[number].file, buffer) != metrics[number].sha256:
                raise unlike_its_hash(metrics[number].file)

    def column(name: str) -> "np.ndarray":
        whole = np.empty(int(counts.sum()), np.int64 if name == "step" else np.float64)
        for part in parts:
            values = part.steps.step if name == "step" else part.steps.values.pop(name)  # it is needed no more
            first = 0
            for number, count in zip(part.trials, part.steps.counts, strict=True):
                whole[starts[number] : starts[number] + count] = values[first : first + count]
                first += count
        if table is not None:
            table.read(name, whole, {metrics[number].trial: starts[number] for number in known})
        return whole

    numbers = list(known)
    batches = [numbers[first : first + VERIFIED_AT_ONCE] for first in range(0, len(numbers), VERIFIED_AT_ONCE)]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing and decoding do without the interpreter
        verified = [pool.submit(verify, batch) for batch in batches]
        columns = dict(zip(("step", *FIELDS), pool.map(column, ("step", *FIELDS)), strict=True))
        for one in verified:
            one.result()  # raises what it raised
    return pd.DataFrame(_repeated(study.trials, counts) | columns, copy=False)


def _metrics(study: StudyFolder) -> list[_Metrics]:
    return [_Metrics(trial.name, *study.find_file(trial, "metrics.jsonl")) for trial in study.trials]


def _known(table: CurveTable | None, metrics: Sequence[_Metrics]) -> dict[int, range]:
    """Where the table has the steps of a trial, by the trial's number: as its metrics.jsonl is now."""
    if table is None:
        return {}
    return {
        number: table.rows[one.trial]
        for number, one in enumerate(metrics)
        if one.sha256 is not None and table.sha256.get(one.trial) == one.sha256
    }


def _parse(metrics: Sequence[_Metrics], numbers: Sequence[int]) -> Iterator[_Part]:
    """The steps of the trials of these numbers, from their own files: many ended trials at once, or where that cannot
    be, one by one and line by line."""
    batch: list[int] = []
    contents: list[bytes] = []
    for place, number in enumerate(numbers):
        file, sha256 = metrics[number].file, metrics[number].sha256
        if sha256 is None:
            yield _Part([number], read_steps(file))
        else:
            batch.append(number)
            contents.append(read_whole(file, sha256))
        if batch and (sum(map(len, contents)) >= BATCH_BYTES or place == len(numbers) - 1):
            steps = parse_steps(contents)
            if steps is not None:
                yield _Part(list(batch), steps)
            else:
                singles = (
                    parse_steps([content]) or read_steps(metrics[n].file)
                    for n, content in zip(batch, contents, strict=True)
                )
                yield from (_Part([n], steps) for n, steps in zip(batch, singles, strict=True))
            batch.clear()
            contents.clear()


def trial_steps(study: StudyFolder, trial: AnyTrial) -> Steps:
    """What metrics.jsonl of a trial that has ended says of each step.

    Raises:
        DamagedError: it is not what was written.
    """
    file, sha256 = study.find_file(trial, "metrics.jsonl")
    return parse_steps([read_whole(file, sha256)]) or read_steps(file)


def keep_curves(study: StudyFolder) -> None:
    """Writes tables/, from which curves are read in a tenth of the time, where there are so many rows that it
    matters: see `rankscope.study.curve_table`. For the process that holds the lock, when trials have ended.
    """
    metrics = _metrics(study)
    ended = [number for number, one in enumerate(metrics) if one.sha256 is not None]
    if sum(metrics[number].file.stat().st_size for number in ended if metrics[number].file.exists()) < LEAST_BYTES:
        return
    folder = study.file("tables")
    if len(_known(find_table(folder), metrics)) < len(ended):
        parts = (([metrics[number].trial for number in part.trials], part.steps) for part in _parse(metrics, ended))
        write_table(folder, {one.trial: one.sha256 for one in metrics if one.sha256 is not None}, parts)


def examples(study: StudyFolder) -> "pd.DataFrame":
    """One row a held-out example of a finished trial: `trial candidate variant rank learning_rate seed example loss
    label_tokens correct_tokens` (`loss` is the mean over the example's label tokens, in nats).
    """
    return _examples(study, study.trials)


def reference_examples(study: StudyFolder) -> "pd.DataFrame":
    """`examples()` of full fine-tuning; the rank is 0."""
    return _examples(study, study.reference_trials)


def _examples(study: StudyFolder, trials: Sequence[AnyTrial]) -> "pd.DataFrame":
    import pandas as pd

    done = [trial for trial in trials if study.trial_record(trial)["status"] == "done"]
    columns: dict[str, list[Any]] = {name: [] for name in EXAMPLE_FIELDS}
    counts = []
    for trial in done:
        found = study.held_out(trial)
        for name, values in columns.items():
            values += found[name]
        counts.append(len(found["example"]))
    if not done:
        return pd.DataFrame(columns=[*IDENTITY_FIELDS, *EXAMPLE_FIELDS])
    frame = pd.DataFrame(_repeated(done, np.array(counts)) | columns, copy=False)
    return frame.astype(dict.fromkeys(NAMES, "str"))


def _repeated(trials: Sequence[AnyTrial], counts: "np.ndarray") -> dict[str, Any]:
    """The identity of each trial, so many times: names as categories, which take a byte or two a row."""
    import pandas as pd

    columns: dict[str, Any] = {}
    rows = [identity(trial) for trial in trials]
    for name in IDENTITY_FIELDS:
        values = [row[name] for row in rows]
        if name in NAMES:  # categories in the order of their names: so tables are sorted and grouped
            each = pd.Categorical(values, categories=sorted(set(values)))
            columns[name] = pd.Categorical.from_codes(np.repeat(each.codes, counts), dtype=each.dtype)
        else:
            kind = np.float64 if name == "learning_rate" else np.int64
            columns[name] = np.repeat(np.array(values, kind), counts)
    return columns


def profiles(study: StudyFolder) -> "pd.DataFrame":
    """One row a repeat of a candidate's profile: `candidate variant rank learning_rate repeat control` and the
    columns of `rankscope.measure.profile.profile_candidate`'s summary; empty where nothing was profiled.

    A rank is profiled once, so that its learning rates have the same numbers. Rows with `control` are those of the
    second profile of the first candidate: what differs between them and its own is noise.
    """
    import pandas as pd

    rows = [
        {**candidate_identity(candidate), "repeat": number, "control": name == CONTROL, **repeat["summary"]}
        for name, measured in study.spec.profiled().items()
        for candidate in study.spec.candidates()
        if candidate == measured or candidate.profile_name == name
        for number, repeat in enumerate(study.whole_repeats(name))
    ]
    frame = pd.DataFrame(rows)
    numbers = [name for name in frame if str(name).endswith(("_bytes", "_per_token"))]  # None without a GPU
    return frame.astype(dict.fromkeys(numbers, "float64"))


def samples(study: StudyFolder) -> "pd.DataFrame":
    """One row a memory sample: `candidate variant rank learning_rate repeat phase step seconds rss_bytes
    gpu_allocated_bytes gpu_reserved_bytes gpu_nvml_bytes` (`phase`: load, warmup, train or eval; GPU columns are
    NaN without one). Of each rank the candidate that was measured; the control's are left out.
    """
    import pandas as pd

    frames = []
    for name, candidate in study.spec.profiled().items():
        for number, repeat in enumerate([] if name == CONTROL else study.whole_repeats(name)):
            with understood(study.profile_file(name)):
                frames.append(pd.DataFrame({**candidate_identity(candidate), "repeat": number, **repeat["samples"]}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def answers(study: StudyFolder) -> "pd.DataFrame":
    """One row an answer: `example prompt reference candidate rank answer`; `example` counts held-out rows,
    `reference` is the row's own answer, and the candidate `base`, of rank 0, is the model without an adapter.
    """
    import pandas as pd

    record, trials = study.answers_record(), {trial.name: trial.candidate for trial in study.trials}
    with understood(study.file("answers", "answers.json")):
        rows = [
            question | {"candidate": trials[name].name, "rank": trials[name].rank, "answer": text}
            if name in trials
            else question | {"candidate": name, "rank": 0, "answer": text}
            for name, texts in record["answers"].items()
            for question, text in zip(record["questions"], texts, strict=True)
        ]
    return pd.DataFrame(rows, columns=["example", "prompt", "reference", "candidate", "rank", "answer"])


def cuts(study: StudyFolder) -> "pd.DataFrame":
    """One row a cut of `rankscope curve`: `trial candidate variant rank learning_rate seed cut_rank recover_steps
    kept_energy eval_loss`. `rank` is the trained one, and where `cut_rank` is the same nothing was cut; `eval_loss`
    is in nats a label token, NaN where recovery training diverged.
    """
    import pandas as pd

    columns = [*IDENTITY_FIELDS, "cut_rank", "recover_steps", "kept_energy", "eval_loss"]
    trials = {trial.name: trial for trial in study.trials}
    rows = [
        {**identity(trials[cut["trial"]]), **cut, "rank": trials[cut["trial"]].candidate.rank, "cut_rank": cut["rank"]}
        for cut in study.curve_record()
    ]
    frame = pd.DataFrame(rows, columns=columns).astype({"eval_loss": "float64"})
    return frame.sort_values(["seed", "recover_steps", "cut_rank"], ignore_index=True)


def cut_examples(study: StudyFolder) -> "pd.DataFrame":
    """One row a held-out example of a cut: the columns of `examples()` but `correct_tokens`, and `cut_rank
    recover_steps`; without those whose recovery diverged.
    """
    import pandas as pd

    columns = [*IDENTITY_FIELDS, "cut_rank", "recover_steps", "example", "loss", "label_tokens"]
    trials, frames = {trial.name: trial for trial in study.trials}, []
    for cut in study.curve_record():
        if cut["losses"] is not None:
            losses = {"loss": cut["losses"], "label_tokens": cut["label_tokens"]}
            same = {"cut_rank": cut["rank"], "recover_steps": cut["recover_steps"]}
            with understood(study.curve_file):
                frame = pd.DataFrame({**losses, **identity(trials[cut["trial"]]), **same})
            frames.append(frame.assign(example=range(len(frame))))
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def identity(trial: AnyTrial) -> dict[str, Any]:
    """`IDENTITY_FIELDS` of a trial."""
    if isinstance(trial, Trial):
        return {"trial": trial.name, **candidate_identity(trial.candidate), "seed": trial.seed}
    names = {"trial": trial.name, "candidate": trial.candidate_name}
    return names | {"variant": FULL, "rank": 0, "learning_rate": trial.learning_rate, "seed": trial.seed}


def candidate_identity(candidate: Candidate) -> dict[str, Any]:
    return {
        "candidate": candidate.name,
        "variant": candidate.variant,
        "rank": candidate.rank,
        "learning_rate": candidate.learning_rate,
    }


def _modules(candidate: Candidate) -> str:
    modules = candidate.target_modules
    return modules if isinstance(modules, str) else ",".join(modules)
