"""The loop of a search. A candidate trains in one of the pack's slots, at a step of its own schedule.

At a rung its held-out loss is reported to Optuna; where the pruner stops it, the slot goes to the next candidate. The
trainer is a parameter, so that a search can be replayed over recorded curves.

The budget of tokens is never exceeded, since a step's tokens are known beforehand: a candidate starts only where the
budget covers its whole schedule beside the others' way to their next rungs, and it goes on from a rung only where the
budget lasts to its end. A budget of hours is converted to tokens at the rate so far.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna

from rankscope.search import sampling
from rankscope.search.folder import Spent
from rankscope.search.space import SearchSpec, SearchTrial


class Trainer(Protocol):
    """Trainer of candidates. `steps` are the completed steps of candidates, by name."""

    def add(self, asked: SearchTrial) -> None:
        """Give a candidate a slot, at step 0."""

    def remove(self, name: str) -> None:
        """Free the slot of a candidate."""

    def step(self, steps: Mapping[str, int]) -> Mapping[str, float]:
        """Train each candidate by one step and return its loss, which is not finite where it diverged."""

    def evaluate(self, steps: Mapping[str, int]) -> Mapping[str, float]:
        """Return the held-out loss of each candidate."""


@dataclass
class Running:
    asked: SearchTrial
    trial: optuna.Trial
    step: int = 0
    seconds: float = 0.0  # of the steps that it took part in, divided among all that did
    reported: int = 0  # last rung with a loss in Optuna, possibly from an earlier run that was stopped


@dataclass
class StepResult:
    """One step of the pack and its consequences, before Optuna and the trainer know which candidates have ended."""

    spent: Spent  # by this step
    losses: dict[str, tuple[int, float | None]]  # step and training loss by candidate; None for one that is not finite
    held_out: dict[str, float] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)  # ends of candidates, by name: see `rankscope.search.sampling`

    def row(self) -> dict[str, Any]:
        row: dict[str, Any] = {**self.spent._asdict(), "losses": self.losses}
        return row | {name: values for name in ("held_out", "ended") if (values := getattr(self, name))}


def drive(
    study: optuna.Study,
    spec: SearchSpec,
    trainer: Trainer,
    step_tokens: Sequence[int],
    slots: int,
    spent: Spent = Spent(),  # noqa: B008  # immutable
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[StepResult]:
    """Search until the budget or the space is exhausted, and yield the result of each step of the pack.

    `step_tokens` are the tokens of each step of the schedule, the same for all candidates; `spent` is what earlier runs
    used. Candidates that an earlier run left in training start again, with the same parameters. Once `stopped` returns
    True the search ends between two steps, and leaves candidates in training as they are.
    """
    steps, upto = len(step_tokens), list(itertools.accumulate(step_tokens, initial=0))
    sampling.set_pruner(study, spec, steps)
    stops, waiting = [*spec.rung_steps(steps), steps], sampling.interrupted(study)
    asked = sum("trial" in trial.user_attrs for trial in study.get_trials(deepcopy=False))
    running: dict[str, Running] = {}
    exhausted, start = False, clock()

    def affords(step: int, others: Sequence[Running]) -> bool:
        """Whether a candidate at `step` can be trained to its end beside the others' way to their next rungs."""
        reserved = sum(upto[next(stop for stop in stops if stop > one.step)] - upto[one.step] for one in others)
        return left_tokens(spec, spent) - reserved >= upto[steps] - upto[step]

    while not stopped():
        while len(running) < slots and affords(0, list(running.values())):
            if waiting:
                drawn = sampling.suggested(waiting.pop(0), spec)
            elif exhausted or (spec.budget.trials is not None and asked >= spec.budget.trials):
                break
            elif (found := sampling.draw(study, spec)) is None:
                exhausted = True
                break
            else:
                drawn = found
            trial, number = drawn.trial, drawn.trial.number
            candidate, seed = spec.candidate(drawn.point), spec.study.seeds[0]
            one = Running(SearchTrial(candidate=candidate, seed=seed, number=number), trial)
            asked += "trial" not in trial.user_attrs
            one.reported = max(map(int, study.trials[number].intermediate_values), default=0)
            trial.set_user_attr("trial", one.asked.name)
            running[one.asked.name] = one
            trainer.add(one.asked)
        if not running:
            for left in waiting:  # what an earlier run began, and the budget does not reach
                sampling.end(study, left, sampling.OUT_OF_BUDGET)
            return

        losses = trainer.step({name: one.step for name, one in running.items()})
        tokens = sum(step_tokens[one.step] for one in running.values())
        for one in running.values():
            one.step += 1
        finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        moment = StepResult(spent, {name: (running[name].step, finite.get(name)) for name in losses})
        moment.ended |= {name: sampling.DIVERGED for name in losses if name not in finite}
        due = {n: one.step for n, one in running.items() if one.step in stops and n not in moment.ended}
        held_out = dict(trainer.evaluate(due)) if due else {}
        moment.held_out = {name: loss for name, loss in held_out.items() if math.isfinite(loss)}
        moment.ended |= dict.fromkeys(held_out.keys() - moment.held_out.keys(), sampling.DIVERGED)
        now = clock()
        moment.spent = Spent(tokens, now - start)
        start, spent = now, Spent(spent.tokens + tokens, spent.seconds + now - start)
        for one in running.values():
            one.seconds += moment.spent.seconds / len(running)

        # The best first: the pruner compares with what it was told before, and else the first would go on unopposed.
        undecided = sorted(moment.held_out, key=moment.held_out.__getitem__)
        for position, name in enumerate(undecided):
            one, loss = running[name], moment.held_out[name]
            others = [running[other] for other in running.keys() - moment.ended.keys() - set(undecided[position:])]
            if one.step == steps:
                moment.ended[name] = sampling.DONE
            elif _stops(one, loss):
                moment.ended[name] = sampling.STOPPED
            elif not affords(one.step, others):
                moment.ended[name] = sampling.OUT_OF_BUDGET
        if spec.budget.hours is not None and spent.seconds >= 3600 * spec.budget.hours:
            moment.ended |= {name: sampling.OUT_OF_BUDGET for name in running if name not in moment.ended}
        yield moment

        for name, how in moment.ended.items():
            one = running.pop(name)
            facts: dict[str, Any] = {"steps": one.step, "tokens": upto[one.step], "seconds": one.seconds}
            if how == sampling.DIVERGED:
                what = "held-out loss" if name in held_out else "loss or gradient"
                facts["reason"] = f"{what} not finite at step {one.step}"
            for fact, value in facts.items():
                one.trial.set_user_attr(fact, value)
            sampling.end(study, one.trial, how, moment.held_out[name] if how == sampling.DONE else None)
            trainer.remove(name)


def left_tokens(spec: SearchSpec, spent: Spent) -> float:
    """Tokens that the budget still allows: of its tokens, and of its hours at the rate so far."""
    budget = spec.budget
    left = math.inf if budget.tokens is None else float(budget.tokens - spent.tokens)
    if budget.hours is not None and spent.seconds:
        left = min(left, (3600 * budget.hours - spent.seconds) * spent.tokens / spent.seconds)
    return left


def _stops(one: Running, loss: float) -> bool:
    """Report the loss at a rung, and return whether the pruner stops the candidate. An earlier run's rungs stand."""
    if one.step < one.reported:
        return False
    if one.step > one.reported:
        one.trial.report(loss, one.step)
    return one.trial.should_prune()
