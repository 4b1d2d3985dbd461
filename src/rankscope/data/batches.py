"""Batches: the examples of a step, a pure function of (seed, step), so that a resume has nothing to restore."""

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from rankscope.errors import StudyError
from rankscope.spec.models import TrainingSpec

MAX_STEPS = 1_000_000  # of a trial: more are taken for a mistake; a plan looks at the batch of each


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Number of batches that cover every example once; the last may be smaller (as with transformers' Trainer)."""
    return -(-examples // batch_size)


def total_steps(training: TrainingSpec, examples: int) -> int:
    """Number of optimizer steps of the whole schedule. Raises StudyError if it exceeds `MAX_STEPS`."""
    of_epochs = (training.epochs or 1.0) * steps_per_epoch(examples, training.effective_batch_size)
    steps = of_epochs if training.steps is None else training.steps
    if steps > MAX_STEPS:
        raise StudyError(
            f"training: {steps:,.6g} optimizer steps a trial, more than {MAX_STEPS:,}", "Lower its steps or epochs."
        )
    return max(1, math.ceil(steps))


def eval_steps(training: TrainingSpec, steps: int) -> set[int]:
    """Steps after which the held-out loss is measured: evenly spaced, including the last one."""
    return {math.ceil(steps * (i + 1) / training.evals) for i in range(training.evals)}


def batch_indices(examples: int, batch_size: int, seed: int, step: int) -> npt.NDArray[np.int64]:
    """Indices of the examples of `step`, counted from 0 over the whole schedule: (batch_size,) or fewer. Epoch e is the
    permutation of `numpy.random.default_rng([seed, e])`, divided into batches, so trials with the same seed see the
    same examples in the same order, whatever their rank."""
    epoch, batch = divmod(step, steps_per_epoch(examples, batch_size))
    start = batch * batch_size
    return _permutation(examples, seed, epoch)[start : start + batch_size].copy()  # a copy of the cached permutation


@lru_cache(maxsize=16)  # a pack asks for its seeds in turn at each step; 8 bytes an example each
def _permutation(examples: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(examples)
