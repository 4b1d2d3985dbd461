"""Full fine-tuning, the reference: every weight of the model is trained, on the batches that the candidates see.

Engine, loss, schedule, clipping and loop are those of packs (`rankscope.train.loop`); only what is trained differs.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel

from rankscope.data.tokens import TokenizedData
from rankscope.errors import RankscopeError, WorkerError
from rankscope.jobs.context import GPU_HOST_BYTES, WRONG, Place, Progress
from rankscope.jobs.job import Job
from rankscope.jobs.queue import run_jobs
from rankscope.model.device import resolve_device, resolve_dtype
from rankscope.model.load import fingerprint, load_model
from rankscope.plan.memory import BYTES_PER_PARAMETER, PROCESS_BYTES
from rankscope.spec.candidates import FullTrial
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import missing_reference
from rankscope.train.loop import choose_engine, train_trials
from rankscope.train.optimizer import make_optimizer
from rankscope.train.step import TrainState, make_scheduler, total_steps
from rankscope.train.stopping import StopRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankscope.data.tokens import TokenizedData

NOT_SAVED = "the weights are not saved: they are as large as the model"


def make_full_train_state(model: PreTrainedModel, trial: FullTrial, training: TrainingSpec, steps: int) -> TrainState:
    """Lets every weight of `model` be trained, and gives the trial its optimizer and schedule. Tied weights are one."""
    model.requires_grad_(True)
    weights = dict(model.named_parameters())
    optimizer = make_optimizer({trial.learning_rate: list(weights.values())}, training)
    return TrainState(trial, None, weights, optimizer, make_scheduler(optimizer, training, steps))


def train_full(spec: StudySpec, trial: FullTrial, folder: Path, data: TokenizedData, stop: StopRequest) -> None:
    """Loads the model and trains all of it; the files in `folder` are those of any trial, without the weights.

    The weights are float32, as an adapter's are; over a bfloat16 base their products are in bfloat16 too (mixed
    precision, Micikevicius et al. 2018, arXiv:1710.03740). A model that cannot be packed is trained on padded batches,
    by its own forward.
    """
    model = load_model(spec.model.model_copy(update={"dtype": "float32"}))
    weights = fingerprint(model)
    member = make_full_train_state(model, trial, spec.training, total_steps(spec.training, len(data.train)))
    choice = choose_engine(model, [member], spec.training, data.longest_row)
    choice.engine.mixed = resolve_dtype(spec.model.dtype, resolve_device(spec.model.device)) == torch.bfloat16
    facts = {
        "engine": "packed" if choice.engine.name == "packed" else "padded",
        "engine_reason": choice.reason,
        "model_sha256": weights,
        "tokens_sha256": data.sha256,
        "weights": NOT_SAVED,
    }
    checkpoints = folder / "checkpoints"
    train_trials(model, spec.training, [member], choice, {trial.name: folder}, checkpoints, data, facts, stop)
    shutil.rmtree(checkpoints, ignore_errors=True)


def train_reference(study: StudyFolder, place: Place, progress: Progress) -> None:
    """Trains what is missing of full fine-tuning, each trial in a process of its own; one that fails ends no study."""
    prediction = place.prediction
    trials = {trial.name: trial for trial in missing_reference(study)}
    memory = prediction.base_bytes + GPU_HOST_BYTES
    if prediction.device == "cpu":
        memory = PROCESS_BYTES["cpu"] + BYTES_PER_PARAMETER * prediction.base_params

    def ended(job: Job, error: RankscopeError | None) -> list[Job]:
        name = job.content["trial"]
        if error is not None and error.exit_code in WRONG:
            raise error
        if error is not None:
            study.mark_ended(trials[name], getattr(error, "status", WorkerError.status), error.what)
            progress.say(f"{name} did not finish: {error}")
        return []

    jobs = [Job({"kind": "reference", "trial": name}, f"reference/{name}", (), memory) for name in trials]
    run_jobs(place.launcher, study.path, jobs, progress.poll, ended)
