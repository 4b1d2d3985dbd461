"""Full fine-tuning, the reference: every weight of the model is trained, on the batches that the candidates see.

Engine, loss, schedule, clipping and loop are those of packs (`rankscope.train.loop`); only what is trained differs.
"""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rankscope.data.tokens import TokenizedData
from rankscope.model.load import fingerprint, load_model, resolve_device, resolve_dtype
from rankscope.spec.models import FullTrial, StudySpec, TrainingSpec
from rankscope.train.loop import choose_engine, train_members
from rankscope.train.optimizer import make_optimizer
from rankscope.train.step import Member, make_scheduler, total_steps
from rankscope.train.stopping import StopRequest

NOT_SAVED = "the weights are not saved: they are as large as the model"


def make_full_member(model: PreTrainedModel, trial: FullTrial, training: TrainingSpec, steps: int) -> Member:
    """Lets every weight of `model` be trained, and gives the trial its optimizer and schedule. Tied weights are one."""
    model.requires_grad_(True)
    weights = dict(model.named_parameters())
    optimizer = make_optimizer({trial.learning_rate: list(weights.values())}, training)
    return Member(trial, None, weights, optimizer, make_scheduler(optimizer, training, steps))


def train_full(spec: StudySpec, trial: FullTrial, folder: Path, data: TokenizedData, stop: StopRequest) -> None:
    """Loads the model and trains all of it; the files in `folder` are those of any trial, without the weights.

    The weights are float32, as an adapter's are; over a bfloat16 base their products are in bfloat16 too (mixed
    precision, Micikevicius et al. 2018, arXiv:1710.03740). A model that cannot be packed is trained on padded batches,
    by its own forward.
    """
    model = load_model(spec.model.model_copy(update={"dtype": "float32"}))
    weights = fingerprint(model)
    member = make_full_member(model, trial, spec.training, total_steps(spec.training, len(data.train)))
    choice = choose_engine(model, [member], spec.training)
    choice.engine.mixed = resolve_dtype(spec.model.dtype, resolve_device(spec.model.device)) == torch.bfloat16
    facts = {
        "engine": "packed" if choice.engine.name == "packed" else "padded",
        "engine_reason": choice.reason,
        "model_sha256": weights,
        "tokens_sha256": data.sha256,
        "weights": NOT_SAVED,
    }
    checkpoints = folder / "checkpoints"
    train_members(model, spec.training, [member], choice, {trial.name: folder}, checkpoints, data, facts, stop)
    shutil.rmtree(checkpoints, ignore_errors=True)
