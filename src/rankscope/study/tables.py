"""A study's tables: tidy pandas DataFrames, whose columns are their contract, as methods of `Study`.

Trials are in the order of the study's question. Tables are built by column: a study may have a million steps.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from rankscope.files import corrupt_on_error
from rankscope.spec.candidates import CONTROL, FULL, TIME, AnyTrial, Candidate, Trial
from rankscope.study.folder import StudyFolder
from rankscope.study.metrics import FIELDS, Steps, read_steps
from rankscope.study.records import TrialResults

IDENTITY_FIELDS = ("trial", "candidate", "variant", "rank", "learning_rate", "seed")
NAMES = IDENTITY_FIELDS[:3]
OUTCOME_FIELDS = ("status", "reason", "engine", "pack", "adapter_fault")
RESULT_FIELDS = tuple(TrialResults.model_fields)
EXAMPLE_FIELDS = ("example", "loss", "label_tokens", "correct_tokens")


def results(study: StudyFolder) -> pd.DataFrame:
    """One row per trial: `trial candidate variant rank learning_rate lora_alpha scaling use_rslora target_modules
    seed status reason engine pack adapter_fault steps tokens trainable_params adapter_bytes train_loss eval_loss
    eval_perplexity eval_accuracy general_loss_before general_loss_after train_seconds eval_seconds tokens_per_second`.

    `train_loss` is the mean over the last tenth of the steps, `eval_loss` the final held-out loss (nats per label
    token); both are NaN for a trial that did not finish. `train_seconds` is the time of its pack's steps,
    `eval_seconds` that of its evaluations; neither includes loading and saving. `tokens_per_second` is the trial's own
    tokens over the time of the pack it shared. `general_loss_…` is the loss on `measure.forgetting` before and after
    training (nats per token); NaN without one.
    """
    rows = []
    for trial in study.trials:
        adapter = {name: getattr(trial.candidate, name) for name in ("lora_alpha", "scaling", "use_rslora")}
        modules = trial.candidate.target_modules
        adapter["target_modules"] = modules if isinstance(modules, str) else ",".join(modules)
        rows.append(identity(trial) | adapter | _outcome(study, trial))
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return pd.DataFrame(columns).astype(dict.fromkeys(RESULT_FIELDS, "float64"))


def lowest_loss(results: pd.DataFrame) -> str | None:
    """The trial with the lowest held-out loss of those that are done; None where none is."""
    done = results[(results["status"] == "done") & results["eval_loss"].notna()]
    return None if done.empty else str(done["trial"].iloc[int(done["eval_loss"].to_numpy().argmin())])


def reference_results(study: StudyFolder) -> pd.DataFrame:
    """Columns of `results()` that apply to full fine-tuning, one row per trial, with rank 0. Empty without a
    reference."""
    rows = [{**identity(trial), **_outcome(study, trial)} for trial in study.reference_trials]
    frame = pd.DataFrame(rows, columns=[*IDENTITY_FIELDS, *OUTCOME_FIELDS, *RESULT_FIELDS])
    return frame.astype(dict.fromkeys(RESULT_FIELDS, "float64"))


def _outcome(study: StudyFolder, trial: AnyTrial) -> dict[str, Any]:
    record = study.trial_record(trial)
    return {name: getattr(record, name) for name in OUTCOME_FIELDS} | {
        name: getattr(record.results, name, None) for name in RESULT_FIELDS
    }


def curves(study: StudyFolder) -> pd.DataFrame:
    """One row per step of a trial: `trial candidate variant rank learning_rate seed step epoch train_loss eval_loss
    grad_norm step_learning_rate tokens label_tokens step_seconds`; `eval_loss` is NaN between evaluations, and
    step 0 is the evaluation before training. `trial`, `candidate` and `variant` are categories."""
    steps = [trial_steps(study, trial) for trial in study.trials]
    columns = {name: np.concatenate([of_trial.values[name] for of_trial in steps]) for name in FIELDS}
    frame = _repeated(study.trials, [len(of_trial.step) for of_trial in steps])
    return frame.assign(step=np.concatenate([of_trial.step for of_trial in steps]), **columns)


def trial_steps(study: StudyFolder, trial: AnyTrial) -> Steps:
    """Steps of a trial, from its metrics.jsonl: see `read_steps`."""
    return read_steps(*study.find_file(trial, "metrics.jsonl"))


def examples(study: StudyFolder) -> pd.DataFrame:
    """One row per held-out example of a finished trial: `trial candidate variant rank learning_rate seed example loss
    label_tokens correct_tokens` (`loss` is the mean over the example's label tokens, in nats)."""
    return _examples(study, study.trials)


def untrained_examples(study: StudyFolder) -> pd.DataFrame:
    """One row per held-out example before training: `example loss label_tokens correct_tokens`, from the finished trial
    whose name comes first: trials differ by rounding alone, but a study grows in any order. Empty in a study of an
    earlier version."""
    for trial in sorted(study.trials, key=lambda trial: trial.name):
        if study.trial_record(trial).sha256("untrained.json"):
            found = study.held_out(trial, "untrained.json")
            return pd.DataFrame({name: getattr(found, name) for name in EXAMPLE_FIELDS})
    return pd.DataFrame(columns=list(EXAMPLE_FIELDS))


def reference_examples(study: StudyFolder) -> pd.DataFrame:
    """`examples()` of full fine-tuning, with rank 0."""
    return _examples(study, study.reference_trials)


def _examples(study: StudyFolder, trials: Sequence[AnyTrial]) -> pd.DataFrame:
    done = [trial for trial in trials if study.trial_record(trial).status == "done"]
    if not done:
        return pd.DataFrame(columns=[*IDENTITY_FIELDS, *EXAMPLE_FIELDS])
    found = [study.held_out(trial) for trial in done]
    columns = {name: [value for part in found for value in getattr(part, name)] for name in EXAMPLE_FIELDS}
    frame = _repeated(done, [len(part.example) for part in found])
    return frame.assign(**columns).astype(dict.fromkeys(NAMES, "str"))


def _repeated(trials: Sequence[AnyTrial], counts: Sequence[int]) -> pd.DataFrame:
    """Identity of each trial, repeated `counts` times; names are categories, of a byte or two per row."""
    rows = pd.DataFrame([identity(trial) for trial in trials]).astype(dict.fromkeys(NAMES, "category"))
    return rows.loc[np.repeat(rows.index, counts)].reset_index(drop=True)


def profiles(study: StudyFolder) -> pd.DataFrame:
    """One row per repeat of a candidate's profile: `candidate variant rank learning_rate repeat control`, the columns
    of `rankscope.measure.profile.profile_candidate`'s summary, and those of `times`, the same in each repeat; empty
    where nothing was profiled.

    A peak is that of training and evaluation together. A rank is profiled once, so that its learning rates and alphas
    have the same numbers. Rows with `control` are the second profile of one candidate, the study's first, which differs
    from the first by noise alone.
    """
    timed = times(study)
    rows = [
        candidate_identity(candidate)
        | {"repeat": number, "control": name == CONTROL, **repeat["summary"], **timed.get(name, {})}
        for name, measured in study.profiled().items()
        for candidate in study.spec.candidates()
        if candidate == measured or candidate.profile_name == name
        for number, repeat in enumerate(study.whole_repeats(name))
    ]
    frame = pd.DataFrame(rows)
    if rows:  # not timed yet, or in vain
        frame[[name for name in (*BY_RATIO, *OF_STEPS) if name not in frame]] = np.nan
    numbers = [name for name in map(str, frame) if name.endswith(("_bytes", "_per_token"))]  # None without a GPU
    frame = frame.astype(dict.fromkeys(numbers, "float64"))
    peaks = {name: f"eval_{name}" for name in numbers if f"eval_{name}" in frame and name.endswith("_peak_bytes")}
    return frame.assign(**{name: frame[[name, of_eval]].max(axis="columns") for name, of_eval in peaks.items()})


BY_RATIO = {"step_seconds_median": "step_ratio", "step_seconds_mean": "step_ratio", "runtime_seconds": "runtime_ratio"}
"""Seconds of `times`, and the ratio that gives them."""

OF_STEPS = ("step_seconds_p10", "step_seconds_p90", "tokens_per_second")


def times(study: StudyFolder) -> dict[str, dict[str, Any]]:
    """Time of each candidate and the control, by profile name: the columns of `rankscope.measure.timing.summarise`. Its
    seconds are the control's, times the ratio: candidates that were timed later, beside the control once more, stay
    comparable on a machine whose speed has changed."""
    found: dict[str, dict[str, Any]] = {}
    controls: dict[str, dict[str, Any]] = {}
    for session in study.whole_repeats(TIME):
        own = session["summaries"]
        first = controls.setdefault(session["control"], own[CONTROL])
        for name, summary in own.items():
            seconds = {column: first[column] * summary[ratio] for column, ratio in BY_RATIO.items()}
            rate = {"tokens_per_second": first["tokens_per_second"] / summary["step_ratio"]}
            found.setdefault(name, summary | seconds | rate)
    return found


def samples(study: StudyFolder) -> pd.DataFrame:
    """One row per memory sample: `candidate variant rank learning_rate repeat phase step seconds rss_bytes
    private_bytes mapped_bytes gpu_allocated_bytes gpu_reserved_bytes gpu_nvml_bytes` (`phase`: load, warmup, train or
    eval; GPU columns are NaN without one). Each rank has the samples of the candidate that was measured, without the
    control's."""
    frames = []
    for name, candidate in study.profiled().items():
        for number, repeat in enumerate([] if name == CONTROL else study.whole_repeats(name)):
            with corrupt_on_error(study.profile_file(name)):
                frames.append(pd.DataFrame({**candidate_identity(candidate), "repeat": number, **repeat["samples"]}))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def answers(study: StudyFolder) -> pd.DataFrame:
    """One row per answer: `example prompt reference candidate rank answer`; `example` is the held-out row's number,
    `reference` the row's own answer, and the candidate `base`, of rank 0, the model without an adapter."""
    record, trials = study.answers_record(), {trial.name: trial.candidate for trial in study.trials}
    with corrupt_on_error(study.file("answers", "answers.json")):
        rows = [
            question | {"candidate": candidate, "rank": rank, "answer": text}
            for name, texts in record.answers.items()
            for candidate, rank in [(trials[name].name, trials[name].rank) if name in trials else (name, 0)]
            for question, text in zip(record.questions, texts, strict=True)
        ]
    return pd.DataFrame(rows, columns=["example", "prompt", "reference", "candidate", "rank", "answer"])


def cuts(study: StudyFolder) -> pd.DataFrame:
    """One row per truncation of `rankscope curve`: `trial candidate variant rank learning_rate seed cut_rank
    recover_steps kept_energy eval_loss`. `rank` is the trained one, and where `cut_rank` equals it nothing was
    truncated; `eval_loss` is in nats per label token, NaN where recovery training diverged."""
    columns = [*IDENTITY_FIELDS, "cut_rank", "recover_steps", "kept_energy", "eval_loss"]
    trials = {trial.name: trial for trial in study.trials}
    rows = [{**cut.model_dump(), **identity(trials[cut.trial]), "cut_rank": cut.rank} for cut in study.rank_curve()]
    frame = pd.DataFrame(rows, columns=columns).astype({"eval_loss": "float64"})
    return frame.sort_values(["seed", "recover_steps", "cut_rank"], ignore_index=True)


def cut_examples(study: StudyFolder) -> pd.DataFrame:
    """One row per held-out example of a truncation whose recovery did not diverge: columns of `examples()` without
    `correct_tokens`, and `cut_rank recover_steps`."""
    columns = [*IDENTITY_FIELDS, "cut_rank", "recover_steps", "example", "loss", "label_tokens"]
    trials, frames = {trial.name: trial for trial in study.trials}, []
    for cut in study.rank_curve():
        if cut.losses is not None:
            own = cut.model_dump(include={"recover_steps", "label_tokens"}) | {"loss": cut.losses, "cut_rank": cut.rank}
            with corrupt_on_error(study.rank_curve_file):
                frame = pd.DataFrame(own | identity(trials[cut.trial]))
            frames.append(frame.assign(example=range(len(frame))))
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def identity(trial: AnyTrial) -> dict[str, Any]:
    """`IDENTITY_FIELDS` of a trial."""
    if isinstance(trial, Trial):
        return {"trial": trial.name, **candidate_identity(trial.candidate), "seed": trial.seed}
    names = {"trial": trial.name, "candidate": trial.candidate_name}
    return names | {"variant": FULL, "rank": 0, "learning_rate": trial.learning_rate, "seed": trial.seed}


def candidate_identity(candidate: Candidate) -> dict[str, Any]:
    own = {name: getattr(candidate, name) for name in ("variant", "rank", "learning_rate")}
    return {"candidate": candidate.name} | own
