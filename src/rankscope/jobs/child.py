"""The study, its tokens and the base model, as every job opens them in the child process."""

from pathlib import Path

from transformers import PreTrainedModel

from rankscope.data.tokens import TokenizedData, load
from rankscope.errors import ModelError
from rankscope.model.load import fingerprint, load_model
from rankscope.study.folder import StudyFolder


def open_study(folder: Path) -> tuple[StudyFolder, TokenizedData]:
    study = StudyFolder.open(folder)
    return study, load(study.path / "data")


def load_base(study: StudyFolder) -> tuple[PreTrainedModel, str]:
    """Load the base model, and return it with its fingerprint. Raises ModelError: it cannot be loaded, or is not the
    one that a trial was trained on."""
    model = load_model(study.spec.model)
    weights = fingerprint(model)
    known = study.with_known_model()  # one is enough: each was checked against one before it
    if known is not None and study.trial_record(known).model_sha256 != weights:
        todo = "Give the model that the study began with (machine.json has its commit on the hub), or another --out."
        raise ModelError(f"{study.spec.model.id}: not the weights that {known.name} was trained on", todo)
    return model, weights
