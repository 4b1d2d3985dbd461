"""Checkpoints of a pack, from which training resumes bitwise.

    packs/p000/checkpoints/step-00000120/
      tensors.safetensors   weights and optimizer states of each trial
      state.json            step, time so far, number of valid lines in metrics.jsonl, trials still in training
      manifest.json         sha256 of both, written last: without it, or where it differs, the checkpoint is not used

Batches and dropout are functions of (seed, step), and learning rates of the step, so no data or random state is saved.
Two checkpoints are kept: where the newer one is corrupt, the older is used.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rankscope.errors import DamagedError
from rankscope.files import corrupt_on_error, damaged_error, file_sha256, published, read_json, reading, write_json
from rankscope.train.optimizer import restore_state, saved_state
from rankscope.train.step import TrainState

KEPT = 2  # checkpoints kept, the newest ones
_FILES = ("tensors.safetensors", "state.json")

log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, states: Sequence[TrainState], progress: Mapping[str, Any]) -> None:
    """Write the checkpoint after `step` steps, and remove all but the last `KEPT`. `states` are the trials still in
    training. `progress` is plain data for the loop: its `trials` are all trials of the pack, and `lines` has the number
    and hash of the lines in metrics.jsonl for each trial that is not done."""
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)  # an unfinished checkpoint of the same step
    with published(target / "tensors.safetensors") as file:
        save_file(_tensors(states), file)
    active = [state.trial.name for state in states]
    write_json(target / "state.json", {"schema": 1, "step": step, "active": active, **progress})
    write_json(target / "manifest.json", {"schema": 1, "files": {name: file_sha256(target / name) for name in _FILES}})
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, states: Sequence[TrainState], logs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Restore the newest valid checkpoint into `states`, and return its progress; None without one.

    The progress has `active`, the names of the trials that were in training and are restored. A checkpoint is valid if
    it is of exactly these trials and the lines in their `logs` are those that it counts; a corrupt one is removed.
    Raises StudyDirectoryError: a checkpoint cannot be read, or a newer version wrote it.
    """
    for target in sorted(folder.glob("step-*"), reverse=True):
        try:
            _check(target)
            progress = read_json(target / "state.json")
            with reading(target / "tensors.safetensors"):
                tensors = load_file(target / "tensors.safetensors")
            with corrupt_on_error(target / "state.json"):
                if progress["trials"] != [state.trial.name for state in states]:
                    raise damaged_error(target, "of other trials")
                for trial, (count, sha256) in progress["lines"].items():
                    _check_lines(logs[trial], count, sha256)
        except DamagedError as error:
            log.warning("checkpoint not used: %s", error)
            shutil.rmtree(target, ignore_errors=True)
            continue
        for state in states:
            if state.trial.name in progress["active"]:
                _restore(state, tensors, progress["step"])
        return progress
    return None


def _check(target: Path) -> None:
    """Raise DamagedError if a file differs from the one that was saved."""
    hashes = read_json(target / "manifest.json").get("files")
    for name in _FILES:
        file = target / name
        if not isinstance(hashes, dict) or file_sha256(file) != hashes.get(name):
            raise damaged_error(file, "not what its manifest says")


def _check_lines(file: Path, count: int, sha256: str) -> None:
    with reading(file):
        lines = file.read_bytes().splitlines(keepends=True)[:count]
    if len(lines) < count or hashlib.sha256(b"".join(lines)).hexdigest() != sha256:
        raise damaged_error(file, "not the lines that were there")


def _tensors(states: Sequence[TrainState]) -> dict[str, torch.Tensor]:
    tensors = {}
    for state in states:
        for name, weight in state.weights.items():
            tensors[f"{state.trial.name}/{name}/weight"] = weight.detach()
            for part, value in saved_state(state.optimizer, weight).items():
                tensors[f"{state.trial.name}/{name}/{part}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _restore(state: TrainState, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    for name, weight in state.weights.items():
        key = f"{state.trial.name}/{name}/"
        own = {full.removeprefix(key): value for full, value in tensors.items() if full.startswith(key)}
        weight.data.copy_(own.pop("weight"))
        restore_state(state.optimizer, weight, own)
    scheduler = state.scheduler
    scheduler.last_epoch = step
    rates = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    scheduler._last_lr = [base * rate(step) for base, rate in rates]
    for group, learning_rate in zip(state.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = learning_rate
