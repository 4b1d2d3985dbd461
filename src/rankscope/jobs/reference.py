"""Full fine-tuning, the reference: every weight of the model is trained, on the batches that the candidates see.

Engine, loss, schedule, clipping and loop are those of packs (`rankscope.train.loop`); only the trained weights differ.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.errors import RankscopeError
from rankscope.jobs.child import open_study
from rankscope.jobs.job import Job, Run, failure_of, raise_fatal
from rankscope.model.device import resolve_device
from rankscope.model.load import fingerprint, load_model, resolve_dtype
from rankscope.plan.memory import BYTES_PER_PARAMETER
from rankscope.plan.plan import GPU_HOST_BYTES
from rankscope.spec.candidates import FullTrial, Trial
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.train.loop import choose_engine, train_trials
from rankscope.train.optimizer import make_optimizer
from rankscope.train.step import TrainState, make_scheduler
from rankscope.train.stopping import StopRequest

NOT_SAVED = "the weights are not saved: they are as large as the model"


def jobs(run: Run) -> list[Job]:
    """Return a job for each trial of full fine-tuning without a result."""
    for trial in run.plan.reference:
        if run.study.is_stale(run.study.saved_record(trial)):
            shutil.rmtree(run.study.trial_folder(trial))
            run.say(run.text("notice.again", name=trial.name))
    prediction, seconds = run.plan.prediction, 0.0
    memory = prediction.base_bytes + GPU_HOST_BYTES
    if prediction.device == "cpu":
        memory = prediction.process_bytes + BYTES_PER_PARAMETER * prediction.base_params
    names = [trial.name for trial in run.plan.reference]
    if names and run.plan.timed:  # its own time is not forecast: it takes longer than the largest candidate
        seconds = run.plan.seconds(Trial(candidate=run.study.spec.candidates()[-1], seed=0))
    return [Job(__name__, {"trial": name}, f"reference/{name}", (), memory, seconds) for name in names]


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    study, data = open_study(study_path)
    (trial,) = [trial for trial in study.reference_trials if trial.name == content["trial"]]
    with StopRequest() as stop:
        train_full(study.spec, trial, study.trial_folder(trial), data, stop)


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Mark a trial that failed as ended; it ends no study."""
    raise_fatal(error)
    if error is not None:
        name = job.content["trial"]
        (trial,) = [trial for trial in run.study.reference_trials if trial.name == name]
        failure = failure_of(error)
        run.study.mark_ended(trial, failure.status, failure.reason)
        run.say(run.text("notice.failed", what=name, error=error))
    return list(waiting)


def make_full_train_state(model: PreTrainedModel, trial: FullTrial, training: TrainingSpec, steps: int) -> TrainState:
    """Make all weights of `model` trainable, and create the trial's optimizer and schedule. Tied weights count once."""
    model.requires_grad_(True)
    weights = dict(model.named_parameters())
    optimizer = make_optimizer({trial.learning_rate: list(weights.values())}, training)
    return TrainState(trial, None, weights, optimizer, make_scheduler(optimizer, training, steps))


def train_full(spec: StudySpec, trial: FullTrial, folder: Path, data: TokenizedData, stop: StopRequest) -> None:
    """Load the model and train all of it; `folder` receives the files of any trial but the weights. The weights are
    float32, as an adapter's are; over a bfloat16 base their products are in bfloat16 too (mixed precision, Micikevicius
    et al. 2018, arXiv:1710.03740). A model that cannot be packed is trained on padded batches, by its own forward."""
    model = load_model(spec.model.model_copy(update={"dtype": "float32"}))
    weights = fingerprint(model)
    member = make_full_train_state(model, trial, spec.training, total_steps(spec.training, len(data.train)))
    choice = choose_engine(model, [member], spec.training)
    choice.engine.mixed = resolve_dtype(spec.model, resolve_device(spec.model.device)) == torch.bfloat16
    engine = "packed" if choice.engine.name == "packed" else "padded"
    facts = {"engine": engine, "engine_reason": choice.reason, "weights": NOT_SAVED}
    facts |= {"model_sha256": weights, "tokens_sha256": data.sha256}
    checkpoints = folder / "checkpoints"
    train_trials(model, spec.training, [member], choice, {trial.name: folder}, checkpoints, data, facts, stop)
    shutil.rmtree(checkpoints, ignore_errors=True)
