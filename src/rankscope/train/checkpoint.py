"""Checkpoints of a pack: what is needed to go on from a step as if nothing had happened.

    packs/p000/checkpoints/step-00000120/
      tensors.safetensors   each trial's weights and the optimizer's states
      state.json            step, time so far, how many lines of metrics.jsonl count, which trials have left the pack
      manifest.json         sha256 of the two, written last: a checkpoint without it, or that it contradicts, is not one

Batches and dropout are functions of (seed, step), and learning rates of the step, so there is no data or random state
to keep. Two checkpoints are kept: should the newer be damaged, the older is used.
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
from rankscope.files import corrupt_on_error, damaged, file_sha256, published, read_json, reading, write_json
from rankscope.train.optimizer import restore_state, saved_state
from rankscope.train.step import Member

KEPT = 2

_FILES = ("tensors.safetensors", "state.json")

log = logging.getLogger(__name__)


def save_checkpoint(folder: Path, step: int, members: Sequence[Member], state: Mapping[str, Any]) -> None:
    """Writes the checkpoint after `step` steps, and removes those before the last `KEPT`.

    `members` are the trials still in training; `state` is what the loop wants back, as plain data: `trials` are all
    trials of the pack, and `lines` the number and the hash of the lines in metrics.jsonl of those not done.
    """
    target = folder / f"step-{step:08d}"
    shutil.rmtree(target, ignore_errors=True)  # an unfinished one of the same step
    with published(target / "tensors.safetensors") as file:
        save_file(_tensors(members), file)
    active = [member.trial.name for member in members]
    write_json(target / "state.json", {"schema": 1, "step": step, "active": active, **state})
    write_json(target / "manifest.json", {"schema": 1, "files": {name: file_sha256(target / name) for name in _FILES}})
    for old in sorted(folder.glob("step-*"))[:-KEPT]:
        shutil.rmtree(old)


def load_checkpoint(folder: Path, members: Sequence[Member], logs: Mapping[str, Path]) -> dict[str, Any] | None:
    """Restores the newest whole checkpoint into those `members` that it holds, and returns its state with `active`,
    their names; None where there is none. It must be one of these `members` together, and the lines that were in
    `logs`, by trial, must still be there; one that is damaged is removed.

    Raises:
        StudyDirectoryError: one cannot be read, or a newer version wrote it.
    """
    for target in sorted(folder.glob("step-*"), reverse=True):
        try:
            _check(target)
            state = read_json(target / "state.json")
            with reading(target / "tensors.safetensors"):
                tensors = load_file(target / "tensors.safetensors")
            with corrupt_on_error(target / "state.json"):
                if state["trials"] != [member.trial.name for member in members]:
                    raise damaged(target, "of other trials")
                for trial, (count, sha256) in state["lines"].items():
                    _check_lines(logs[trial], count, sha256)
        except DamagedError as error:
            log.warning("checkpoint not used: %s", error)
            shutil.rmtree(target, ignore_errors=True)
            continue
        for member in members:
            if member.trial.name in state["active"]:
                _restore(member, tensors, state["step"])
        return state
    return None


def _check(target: Path) -> None:
    """Raises DamagedError where a file is not the one that was saved."""
    hashes = read_json(target / "manifest.json").get("files")
    for name in _FILES:
        file = target / name
        if not isinstance(hashes, dict) or file_sha256(file) != hashes.get(name):
            raise damaged(file, "not what its manifest says")


def _check_lines(file: Path, count: int, sha256: str) -> None:
    with reading(file):
        lines = file.read_bytes().splitlines(keepends=True)[:count]
    if len(lines) < count or hashlib.sha256(b"".join(lines)).hexdigest() != sha256:
        raise damaged(file, "not the lines that were there")


def _tensors(members: Sequence[Member]) -> dict[str, torch.Tensor]:
    tensors = {}
    for member in members:
        for name, weight in member.weights.items():
            tensors[f"{member.trial.name}/{name}/weight"] = weight.detach()
            for state, value in saved_state(member.optimizer, weight).items():
                tensors[f"{member.trial.name}/{name}/{state}"] = value
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def _restore(member: Member, tensors: Mapping[str, torch.Tensor], step: int) -> None:
    for name, weight in member.weights.items():
        key = f"{member.trial.name}/{name}"
        weight.data.copy_(tensors[f"{key}/weight"])
        own = {full.removeprefix(f"{key}/"): value for full, value in tensors.items() if full.startswith(f"{key}/")}
        restore_state(member.optimizer, weight, {state: value for state, value in own.items() if state != "weight"})
    scheduler = member.scheduler
    scheduler.last_epoch = step
    scheduler._last_lr = [
        base * rate(step) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    for group, learning_rate in zip(member.optimizer.param_groups, scheduler._last_lr, strict=True):
        group["lr"] = learning_rate
