"""Candidates drawn by Optuna, and their ends reported to it. Imported by the child process alone.

A candidate ends in one of these ways, which its Optuna trial has as the attribute `ended`:

    done       trained to its last step                               COMPLETE
    stopped    at a rung: see `passes`                                PRUNED
    diverged   a loss, gradient or weight is no finite number         PRUNED, so that the sampler keeps away
    out of budget                                                     PRUNED

Trials that FAIL are no candidates: drawn before, or left in training by a run that was stopped and begun again.
"""

import math
import os
import random
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, TrialState

from rankscope.search.folder import Spent
from rankscope.search.space import Point, RateRange, SearchSpec, modules_text
from rankscope.spec.candidates import alpha_of

NAME = "rankscope"  # name of the study within Optuna's journal

DONE, STOPPED, DIVERGED, OUT_OF_BUDGET = "done", "stopped", "diverged", "out of budget"
RANDOM_TRIALS = 5
"""Number of candidates drawn at random before TPE learns from them. With Optuna's own ten a small budget is nearly all
random search: docs/results/search.md."""

REPEATS = 10  # how often the sampler may repeat candidates; then one is drawn from those that were never drawn


def open_journal(file: Path, spec: SearchSpec) -> optuna.Study:
    """Open the study in a journal file, or create it. A torn last line is removed, and candidates that an earlier run
    left in training wait to begin again with the same parameters."""
    if file.exists():
        os.truncate(file, file.read_bytes().rfind(b"\n") + 1)
    study = make_study(spec, JournalStorage(JournalFileBackend(str(file), lock_obj=JournalFileOpenLock(str(file)))))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.enqueue_trial(trial.params)
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def make_study(spec: SearchSpec, storage: BaseStorage | None = None) -> optuna.Study:
    """Create or load a study with the search's sampler; without storage it is kept in memory."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(storage=storage, study_name=NAME, direction="minimize", load_if_exists=True)
    seed = (spec.seed + 1_000_003 * len(study.trials)) % (1 << 32)  # one that goes on is not to draw the same again
    study.sampler = optuna.samplers.RandomSampler(seed=seed)
    if spec.sampler == "tpe":
        study.sampler = optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=RANDOM_TRIALS
        )
    return study


def draw(study: optuna.Study, spec: SearchSpec) -> tuple[optuna.Trial, Point] | None:
    """Draw the next candidate, which was not drawn before; None where none is left, or the budget is spent."""
    trials = study.get_trials(deepcopy=False)
    seen = {point_of(trial) for trial in trials if trial.state not in (TrialState.WAITING, TrialState.FAIL)}
    if len(seen) >= min(spec.space.size, spec.budget.trials or math.inf):
        return None
    for _ in range(REPEATS):
        trial = study.ask()
        if (point := suggested(trial, spec)) not in seen:
            return trial, point
        study.tell(trial, state=TrialState.FAIL)
    if not (untried := [point for point in spec.space.points() if point not in seen]):
        return None
    study.enqueue_trial(random.Random(spec.seed + len(seen)).choice(untried)._asdict())
    trial = study.ask()
    return trial, suggested(trial, spec)


def suggested(trial: optuna.Trial, spec: SearchSpec) -> Point:
    values = {name: trial.suggest_categorical(name, choices) for name, choices in spec.space.choices().items()}
    if isinstance(rates := spec.space.learning_rates, RateRange):
        rate = trial.suggest_float("learning_rate", rates.low, rates.high, log=True)
        values["learning_rate"] = float(f"{rate:.2e}")
    point = Point(**values)
    trial.set_user_attr("point", list(point))
    return point


def point_of(trial: FrozenTrial) -> Point:
    rank, rate, alpha, modules = trial.user_attrs["point"]
    return Point(rank, rate, alpha, modules_text(modules))


def passes(study: optuna.Study, spec: SearchSpec, trial: optuna.Trial, step: int, loss: float) -> bool:
    """Report a loss at a rung, and return whether the candidate goes on: whether it is among the best share
    1/reduction of those that have been there (asynchronous successive halving, Li et al. 2020, arXiv:1810.05934)."""
    trial.report(loss, step)
    there = [one.intermediate_values for one in study.get_trials(deepcopy=False) if one.state != TrialState.FAIL]
    losses = sorted(values[step] for values in there if step in values)
    return loss <= losses[max(1, len(losses) // spec.reduction) - 1]


def end(study: optuna.Study, trial: optuna.Trial, how: str, loss: float | None, facts: dict[str, Any]) -> None:
    """Report to Optuna that a candidate has ended; `loss` is the final held-out loss of one that is done."""
    for name, value in facts.items():
        trial.set_user_attr(name, value)
    trial.set_user_attr("ended", how)
    study.tell(trial, loss, TrialState.COMPLETE if how == DONE else TrialState.PRUNED)


def summary(study: optuna.Study, spec: SearchSpec, spent: Spent, finished: bool) -> dict[str, Any]:
    """Return the search so far as the plain data of result.json.

    `candidates`: one object each, in the order in which they were drawn: see `_describe`. `best`, `within_margin`
    (names, best first) and `smallest_rank` (the one of these with the lowest rank) consider candidates that are done;
    null and empty before. `share_stopped` is the share of ended candidates.
    """
    trials = study.get_trials(deepcopy=False)
    begun = [trial for trial in trials if "trial" in trial.user_attrs and trial.state != TrialState.FAIL]
    candidates = [_describe(trial) for trial in begun]
    done = sorted((c for c in candidates if c["state"] == DONE), key=lambda c: (c["eval_loss"], c["rank"]))
    margin = spec.study.verdict.loss_margin
    within = [candidate for candidate in done if candidate["eval_loss"] <= done[0]["eval_loss"] * (1 + margin)]
    ended = [candidate["state"] for candidate in candidates if candidate["state"] != "training"]
    return {
        "finished": finished,
        "budget": spec.budget.model_dump(mode="json"),
        "spent": {"trials": len(candidates), **spent._asdict()},
        "margin": margin,
        "best": done[0]["trial"] if done else None,
        "within_margin": [candidate["trial"] for candidate in within],
        "smallest_rank": min(within, key=lambda c: (c["rank"], c["eval_loss"]))["trial"] if within else None,
        "share_stopped": sum(how in (STOPPED, DIVERGED) for how in ended) / len(ended) if ended else None,
        "candidates": candidates,
    }


def _describe(trial: FrozenTrial) -> dict[str, Any]:
    """One candidate: `alpha` may be a multiple such as `2r`; `state` is how it ended, or `training`; losses are in nats
    a label token: `losses` at the rungs, by step, `eval_loss` that of all held-out rows at the end."""
    point, known = point_of(trial), trial.user_attrs
    return {
        "trial": known["trial"],
        **point._asdict(),
        "lora_alpha": alpha_of(point.alpha, point.rank),
        "state": known.get("ended", "training"),
        "reason": known.get("reason"),
        **{name: known.get(name, 0) for name in ("steps", "tokens", "seconds")},
        "eval_loss": trial.value if trial.state == TrialState.COMPLETE else None,
        "losses": {str(step): loss for step, loss in sorted(trial.intermediate_values.items())},
    }
