"""What would run: which trials train together, and what is still missing of a study."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.spec import AnyTrial, FullTrial, StudySpec, TrainingSpec, Trial
from rankscope.study import FINISHED, Division, Study
from rankscope.train.checkpoint import KEPT
from rankscope.train.memory import FULL_STEP_TOKENS, Prediction
from rankscope.train.pack import total_steps

SHARE_OF_FREE_MEMORY = 0.9
"""What a pack may take of the memory that is free: the prediction is not exact."""

LINE_BYTES = 250
"""Of a step in metrics.jsonl."""

REST_BYTES = 30_000_000
"""Of a study's report, profiles and logs: measured 3 to 12 MB."""


class ProfileJob(NamedTuple):
    """One repeat of one of `StudySpec.profiled`."""

    profile: str
    repeat: int


def most_per_pack(training: TrainingSpec) -> int | None:
    """How many trials may train together at most; None means as many as pay and fit.

    With the base's own dropout kept, trials draw from one random stream, so only one at a time is independent.
    """
    return 1 if training.isolated or training.base_dropout == "keep" else training.trials_per_pack


def divide_into_packs(
    trials: Sequence[Trial], prediction: Prediction, free: int, training: TrainingSpec, tokens: Tokens
) -> list[list[Trial]]:
    """Consecutive trials that train together: no more than fit in `free` bytes, nor more than fill the device.

    A trial that does not fit even alone is a pack all the same: the prediction is no proof, and its step is divided
    down to single sequences.
    """
    step_tokens = float(tokens.lengths.mean()) * training.effective_batch_size
    filled = max(1, int(FULL_STEP_TOKENS[prediction.device] / step_tokens))
    most = most_per_pack(training) or filled
    longest = int(tokens.lengths.max())
    packs: list[list[Trial]] = []
    for trial in trials:
        grown = [*packs[-1], trial] if packs else []
        needed = prediction.fixed_bytes(grown) + longest * prediction.bytes_per_token(grown)
        if grown and len(grown) <= most and needed <= free * SHARE_OF_FREE_MEMORY:
            packs[-1] = grown
        else:
            packs.append([trial])
    return packs


def disk_bytes(spec: StudySpec, prediction: Prediction, packs: Sequence[Sequence[Trial]], data: TokenizedData) -> int:
    """What a study still writes at most: adapters, the checkpoints of its largest pack, tokens, curves and the rest."""
    steps = total_steps(spec.training, len(data.train))
    trials = [trial for pack in packs for trial in pack]
    adapters = sum(4 * prediction.params[trial.candidate.name] for trial in trials)
    trained = [sum(prediction.params[trial.candidate.name] for trial in pack) for pack in packs]
    reference = [prediction.base_params] if spec.reference_trials() else []
    checkpoints = 12 * (KEPT + 1) * max(trained + reference, default=0)  # weights and two moments, in float32
    tokens = 5 * (len(data.train.ids) + len(data.eval.ids))
    return adapters + checkpoints + tokens + LINE_BYTES * steps * len(trials) + REST_BYTES


def open_packs(study: Study, prediction: Prediction, free: int, tokens: Tokens) -> dict[str, list[Trial]]:
    """Packs with a trial that has no result yet, in their order; the study is divided into packs where it is not."""
    division = study.division()
    if not division.packs:
        trials = study.spec.trials()
        division = Division(
            division.named(divide_into_packs(trials, prediction, free, study.spec.training, tokens)), {}
        )
        study.write_division(division)
    return {pack: trials for pack, trials in division.packs.items() if any(not _finished(study, t) for t in trials)}


def missing_trials(study: Study) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if not _finished(study, trial)]


def _finished(study: Study, trial: AnyTrial) -> bool:
    return study.trial_record(trial)["status"] in FINISHED


def missing_reference(study: Study) -> list[FullTrial]:
    """Trials of full fine-tuning without a result yet."""
    return [trial for trial in study.spec.reference_trials() if not _finished(study, trial)]


def missing_profiles(study: Study) -> list[ProfileJob]:
    """Repeats not yet measured: repeat by repeat, in each all candidates and the control in a random order.

    Interleaved, so that a drift of the machine does not look like an effect of rank; the order is the same each time
    for one study.
    """
    if not study.spec.measure.profiles:
        return []
    done = {name: len(study.profile_repeats(name)) for name in study.spec.profiled()}
    jobs = []
    for repeat in range(study.spec.measure.repeats):
        order = random.Random(repeat).sample(list(done), len(done))
        jobs += [ProfileJob(name, repeat) for name in order if repeat >= done[name]]
    return jobs
