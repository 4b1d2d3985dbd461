"""Checks before anything is loaded or written: ranks, the base model on its device, room on the disk."""

import heapq
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.errors import MissingExtraError, ModelError, StudyDirectoryError, StudyError
from rankscope.files import folder_bytes
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS
from rankscope.model.load import skeleton
from rankscope.model.quantized import base_bytes
from rankscope.plan.costs import CostModel
from rankscope.spec.candidates import FullTrial, Trial
from rankscope.spec.models import ModelSpec, StudySpec
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import is_finished
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import size
from rankscope.train.checkpoint import KEPT


def check_base_fits(model: ModelSpec, prediction: CostModel, free: int) -> None:
    """Raise ModelError where the base alone is larger than the `free` bytes of its device."""
    if found := too_large(model, prediction, free, load("en")):
        raise ModelError(*found)


def too_large(model: ModelSpec, prediction: CostModel, free: int, text: Catalogue) -> tuple[str, str] | None:
    """Return what is wrong and what to do where the base is larger than its device, else None."""
    if prediction.base_bytes <= free:
        return None
    kind = model.quantization or str(prediction.dtype).removeprefix("torch.")
    base, room = size(prediction.base_bytes), size(free)
    smaller = []  # options under which it fits, the most exact first
    for field, value in (("dtype", "bfloat16"), ("quantization", "int8"), ("quantization", "nf4")):
        other = model.model_copy(update={field: value})
        with suppress(MissingExtraError, ModelError):  # no bitsandbytes, or nothing that it could quantize
            held = base_bytes(skeleton(other, torch.bfloat16 if other.dtype == "bfloat16" else prediction.dtype))
            smaller += [f"--{field} {value} ({size(held)})"] if held <= free else []
    todo = text("plan.use_smaller", options=", ".join(smaller)) if smaller else text("plan.use_larger")
    return text("plan.too_large", id=model.id, base=base, kind=kind, free=room), todo


def check_ranks(spec: StudySpec, prediction: CostModel) -> None:
    """Raise StudyError where a rank is larger than any update of an adapted layer can have."""
    if (rank := max(spec.ranks)) > prediction.full_rank:
        raise StudyError(
            f"ranks: {rank:,} is larger than {prediction.full_rank:,}, the full rank of the model's layers",
            "Leave it out: it adds parameters and nothing else.",
        )


def check_disk(out: Path, needed: int) -> None:
    """Raise StudyDirectoryError where the disk of `out` has less than `needed` bytes."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StudyDirectoryError(
            f"{out}: about {size(needed)} are needed on the disk, and {size(free)} are free",
            "Make room, choose another --out, or try fewer or lower ranks.",
        )


LINE_BYTES = 250
"""Length of a line of metrics.jsonl."""

REST_BYTES = 30_000_000
"""Size of a study's report, profiles and logs: measured 3 to 12 MB."""


class Disk(NamedTuple):
    """Bytes on the disk, by what takes them."""

    trials: int = 0  # adapters and curves, full fine-tuning's curves included
    checkpoints: int = 0  # of the packs or trials that can train at once; removed when they have ended
    tokens: int = 0
    rest: int = 0  # report, profiles and logs

    def beside(self, there: "Disk") -> int:
        """Bytes still to be written where `there` is on the disk already, of the same trials."""
        return sum(max(0, needed - lies) for needed, lies in zip(self, there, strict=True))


def disk_bytes(
    spec: StudySpec,
    prediction: CostModel,
    packs: Sequence[Sequence[Trial]],
    reference: Sequence[FullTrial],
    data: TokenizedData,
    devices: int = 1,
) -> Disk:
    """Most bytes that a study writes for these packs and trials of full fine-tuning. Each device trains one of them at
    a time."""
    trials = [trial for pack in packs for trial in pack]
    # A trial that starts from the base's weights is saved at twice its rank: `rankscope.lora.variants.as_plain_lora`.
    ranks = ((trial.candidate.name, 1 + (trial.candidate.variant in WEIGHT_INIT_VARIANTS)) for trial in trials)
    adapters = sum(4 * prediction.params[name] * times for name, times in ranks)
    # Full fine-tuning keeps weights and two moments, in float32.
    kept = [*map(prediction.checkpoint_bytes, packs), *(12 * prediction.base_params for _ in reference)]
    lines = total_steps(spec.training, len(data.train)) * (len(trials) + len(reference))
    return Disk(
        trials=adapters + LINE_BYTES * lines,
        checkpoints=(KEPT + 1) * sum(heapq.nlargest(devices, kept)),
        tokens=5 * (len(data.train.ids) + len(data.eval.ids)),
        rest=REST_BYTES,
    )


def disk_taken(study: StudyFolder) -> Disk:
    """Bytes on the disk already: of the trials that have no result yet, and of what all trials share."""
    missing = [study.trial_folder(trial) for trial in study.all_trials() if not is_finished(study, trial)]
    own = [folder / "checkpoints" for folder in missing]
    checkpoints = [folder_bytes(folder) for folder in (*own, *study.path.glob("packs/*/checkpoints"))]
    trials = sum(map(folder_bytes, missing)) - sum(checkpoints[: len(own)])
    rest = sum(folder_bytes(study.file(name)) for name in ("report", "profiles"))
    return Disk(trials, sum(checkpoints), folder_bytes(study.file("data")), rest)
