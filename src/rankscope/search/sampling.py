"""Candidates drawn by Optuna, and their ends reported to it. Imported by the child process alone.

A candidate ends in one of these ways, which its Optuna trial has as the attribute `ended`:

    done         trained to its last step                                  COMPLETE
    stopped      by the pruner, at a rung                                  PRUNED
    diverged     a loss, gradient or weight is no finite number            PRUNED, so that the sampler keeps away
    out of budget                                                          PRUNED
    asked before  not trained: the same candidate was drawn before         FAIL
"""

import math
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from rankscope.search.folder import Spent
from rankscope.search.space import Point, RateRange, SearchSpec
from rankscope.spec.candidates import all_linear_or_names

NAME = "rankscope"  # name of the study within Optuna's journal

DONE, STOPPED, DIVERGED, OUT_OF_BUDGET, DRAWN_BEFORE = "done", "stopped", "diverged", "out of budget", "asked before"
_STATES = {DONE: TrialState.COMPLETE, DRAWN_BEFORE: TrialState.FAIL}
RANDOM_TRIALS = 5
"""Number of candidates drawn at random before TPE learns from them. With Optuna's own ten a small budget is nearly all
random search: docs/results/search.md."""

REPEATS = 10  # how often the sampler may repeat candidates; then one is drawn from those that were never drawn


def open_journal(file: Path, spec: SearchSpec) -> optuna.Study:
    """Open the study in a journal file, or create it. A torn last line is removed first."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    path = str(file)
    return make_study(spec, JournalStorage(JournalFileBackend(path, lock_obj=JournalFileOpenLock(path))))


def make_study(spec: SearchSpec, storage: optuna.storages.BaseStorage | None = None) -> optuna.Study:
    """Create or load a study with the search's sampler; without storage it is kept in memory. See also `set_pruner`."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, study_name=NAME, direction="minimize", load_if_exists=True)
    seed = (spec.seed + 1_000_003 * len(study.trials)) % (1 << 32)  # one that goes on is not to draw the same again
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
    if spec.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=RANDOM_TRIALS
        )
    return study


def set_pruner(study: optuna.Study, spec: SearchSpec, steps: int) -> None:
    """Set the pruner: asynchronous successive halving (Li et al. 2020, arXiv:1810.05934) at `SearchSpec.rung_steps`."""
    study.pruner = optuna.pruners.NopPruner()
    if rungs := spec.rung_steps(steps):
        study.pruner = optuna.pruners.SuccessiveHalvingPruner(min_resource=rungs[0], reduction_factor=spec.reduction)


def interrupted(study: optuna.Study) -> list[optuna.Trial]:
    """Return the candidates that an earlier run left in training."""
    left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [optuna.Trial(study, trial._trial_id) for trial in left]


class Suggestion(NamedTuple):
    trial: optuna.Trial
    point: Point


def draw(study: optuna.Study, spec: SearchSpec) -> Suggestion | None:
    """Draw the next candidate, which was not drawn before; None where none is left."""
    seen = {point_of(trial) for trial in study.get_trials(deepcopy=False) if "point" in trial.user_attrs}
    if len(seen) >= spec.space.size:
        return None
    for _ in range(REPEATS):
        drawn = suggested(study.ask(), spec)
        if drawn.point not in seen:
            return drawn
        end(study, drawn.trial, DRAWN_BEFORE)
    if spec.space.size == math.inf:
        return None
    untried = [point for point in spec.points() if point not in seen]
    chosen = random.Random(spec.seed + len(seen)).choice(untried)
    values = chosen._asdict() | {"target_modules": modules_text(chosen.target_modules)}
    study.enqueue_trial({name: values[name] for name, choices in _choices(spec).items() if len(choices) > 1})
    return suggested(study.ask(), spec)


def suggested(trial: optuna.Trial, spec: SearchSpec) -> Suggestion:
    """Return the trial with its point. A part with a single value is no parameter of Optuna's."""
    space, values = spec.space, {}
    for name, choices in _choices(spec).items():
        stored = list(choices)
        values[name] = choices[trial.suggest_categorical(name, stored) if len(stored) > 1 else stored[0]]
    if isinstance(space.learning_rates, RateRange):
        rate = trial.suggest_float("learning_rate", space.learning_rates.low, space.learning_rates.high, log=True)
        values["learning_rate"] = float(f"{rate:.2e}")
    point = Point(**values)
    if "point" not in trial.user_attrs:
        trial.set_user_attr("point", list(point))
    return Suggestion(trial, point)


def _choices(spec: SearchSpec) -> dict[str, dict[Any, Any]]:
    """Return, for each part of a candidate that is chosen from a list, its values by the form that Optuna stores."""
    space = spec.space
    found: dict[str, dict[Any, Any]] = {"rank": {rank: rank for rank in space.ranks}}
    if not isinstance(space.learning_rates, RateRange):
        found["learning_rate"] = {rate: rate for rate in space.learning_rates}
    found["alpha"] = {alpha: alpha for alpha in space.alphas}
    found["target_modules"] = {modules_text(modules): modules for modules in space.target_modules}
    return found


def modules_text(modules: str | tuple[str, ...]) -> str:
    return modules if isinstance(modules, str) else ",".join(modules)


def point_of(trial: FrozenTrial) -> Point:
    rank, rate, alpha, modules = trial.user_attrs["point"]
    return Point(rank, rate, alpha, all_linear_or_names(modules))


def end(study: optuna.Study, trial: optuna.Trial, how: str, loss: float | None = None) -> None:
    """Report to Optuna that a candidate has ended; `loss` is the final held-out loss of one that is done."""
    trial.set_user_attr("ended", how)
    study.tell(trial, loss, _STATES.get(how, TrialState.PRUNED))


def summary(study: optuna.Study, spec: SearchSpec, spent: Spent, finished: bool) -> dict[str, Any]:
    """Return the search so far as the plain data of result.json.

    `candidates`: one object each, in the order in which they were drawn: `trial rank learning_rate alpha
    lora_alpha target_modules state reason steps tokens seconds eval_loss losses`; `alpha` may be a multiple such as
    `2r`; `state` is how it ended, or `training`; `losses` are held-out losses at the rungs, by step; `eval_loss` is the
    loss of all held-out rows at the end, in nats a label token.
    `best`, `within_margin` (names, best first) and `smallest_rank` (the one of these with the lowest rank) consider
    candidates that are done; null and empty before. `share_stopped` is the share of ended candidates.
    """
    candidates = [
        _describe(trial, spec)
        for trial in study.get_trials(deepcopy=False)
        if "trial" in trial.user_attrs  # others were asked before, or not begun
    ]
    done = sorted((c for c in candidates if c["state"] == DONE), key=lambda c: (c["eval_loss"], c["rank"]))
    limit = done[0]["eval_loss"] * (1 + spec.study.verdict.loss_margin) if done else 0.0
    within = [candidate for candidate in done if candidate["eval_loss"] <= limit]
    ended = [candidate for candidate in candidates if candidate["state"] != "training"]
    stopped = sum(candidate["state"] in (STOPPED, DIVERGED) for candidate in ended)
    return {
        "finished": finished,
        "budget": spec.budget.model_dump(mode="json"),
        "spent": {"trials": len(candidates), **spent._asdict()},
        "margin": spec.study.verdict.loss_margin,
        "best": done[0]["trial"] if done else None,
        "within_margin": [candidate["trial"] for candidate in within],
        "smallest_rank": min(within, key=lambda c: (c["rank"], c["eval_loss"]))["trial"] if within else None,
        "share_stopped": stopped / len(ended) if ended else None,
        "candidates": candidates,
    }


def _describe(trial: FrozenTrial, spec: SearchSpec) -> dict[str, Any]:
    attributes: Mapping[str, Any] = trial.user_attrs
    point = point_of(trial)
    candidate = spec.candidate(point)
    return {
        "trial": attributes["trial"],
        "rank": candidate.rank,
        "learning_rate": candidate.learning_rate,
        "alpha": point.alpha,
        "lora_alpha": candidate.lora_alpha,
        "target_modules": modules_text(candidate.target_modules),
        "state": attributes.get("ended", "training") if trial.state.is_finished() else "training",
        **{"reason": None, "steps": 0, "tokens": 0, "seconds": 0.0},
        **{name: attributes[name] for name in ("reason", "steps", "tokens", "seconds") if name in attributes},
        "eval_loss": trial.value if trial.state == TrialState.COMPLETE else None,
        "losses": {str(step): loss for step, loss in sorted(trial.intermediate_values.items())},
    }
