"""The loop of a search. A candidate trains in one of the pack's slots, at a step of its own schedule.

At a rung its held-out loss is compared with those of all candidates that have been there; where it is stopped, the slot
goes to the next candidate. The trainer is a parameter: `benchmarks/search.py` replays searches over recorded curves.

The budget of tokens is never exceeded, since a step's tokens are known beforehand: a candidate starts only where the
budget covers its whole schedule beside the others' way to their next rungs, and it goes on from a rung only where the
budget lasts to its end. A budget of hours is converted to tokens at the rate so far.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from rankscope.search import sampling
from rankscope.search.folder import Spent
from rankscope.search.sampling import DIVERGED, DONE, OUT_OF_BUDGET, STOPPED
from rankscope.search.space import SearchSpec
from rankscope.search.trainer import PackTrainer


@dataclass
class Running:
    trial: optuna.Trial
    step: int = 0
    seconds: float = 0.0  # of the steps that it took part in, divided among all that did


@dataclass
class StepResult:
    """One step of the pack and its consequences, before Optuna and the trainer know which candidates have ended."""

    spent: Spent  # by the search so far
    losses: dict[str, tuple[int, float | None]]  # step and training loss by candidate; None for one that is not finite
    held_out: dict[str, float] = field(default_factory=dict)
    ended: dict[str, str] = field(default_factory=dict)  # ends of candidates, by name: see `rankscope.search.sampling`


def drive(
    study: optuna.Study,
    spec: SearchSpec,
    trainer: PackTrainer,
    step_tokens: Sequence[int],
    slots: int,
    spent: Spent = Spent(),  # noqa: B008  # immutable
    stopped: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[StepResult]:
    """Search until the budget or the space is exhausted, and yield the result of each step of the pack.

    `step_tokens` are the tokens of each step of the schedule, the same for all candidates; `spent` is what earlier runs
    used. Once `stopped` returns True the search ends between two steps, and leaves candidates in training as they are.
    """
    steps, upto = len(step_tokens), list(itertools.accumulate(step_tokens, initial=0))
    stops, start, running = [*spec.rung_steps(steps), steps], clock(), dict[str, Running]()
    exhausted = False  # whether no candidate is left to draw

    def affords(step: int, others: Iterable[Running]) -> bool:
        """Whether a candidate at `step` can be trained to its end beside the others' way to their next rungs."""
        reserved = sum(upto[next(stop for stop in stops if stop > one.step)] - upto[one.step] for one in others)
        return left_tokens(spec, spent) - reserved >= upto[steps] - upto[step]

    while not stopped():
        while not exhausted and len(running) < slots and affords(0, running.values()):
            if (drawn := sampling.draw(study, spec)) is None:
                exhausted = True
                break
            trial, point = drawn
            asked = spec.trial(point, trial.number)
            trial.set_user_attr("trial", asked.name)
            running[asked.name] = Running(trial)
            trainer.add(asked)
        if not running:
            return

        tokens = sum(step_tokens[one.step] for one in running.values())
        losses, held_out = _train(trainer, running, stops)
        seconds = clock() - start
        start, spent = start + seconds, Spent(spent.tokens + tokens, spent.seconds + seconds)
        result = StepResult(spent, {name: (running[name].step, loss) for name, loss in losses.items()})
        result.held_out = {name: loss for name, loss in held_out.items() if loss is not None}
        result.ended = {name: DIVERGED for name, loss in (losses | held_out).items() if loss is None}
        going = [one for name, one in running.items() if name not in result.ended and name not in held_out]
        for name in sorted(result.held_out, key=result.held_out.__getitem__):  # the best first, which stops more
            one = running[name]
            if how := _end_of(study, spec, one, result.held_out[name], steps, affords(one.step, going)):
                result.ended[name] = how
            else:
                going.append(one)
        if spec.budget.hours is not None and spent.seconds >= 3600 * spec.budget.hours:
            result.ended = dict.fromkeys(running, OUT_OF_BUDGET) | result.ended
        for one in running.values():
            one.seconds += seconds / len(running)
        yield result

        for name, how in result.ended.items():
            one = running.pop(name)
            facts: dict[str, Any] = {"steps": one.step, "tokens": upto[one.step], "seconds": one.seconds}
            if how == DIVERGED:
                what = "held-out loss" if name in held_out else "loss or gradient"
                facts["reason"] = f"{what} not finite at step {one.step}"
            sampling.end(study, one.trial, how, result.held_out[name] if how == DONE else None, facts)
            trainer.remove(name)


def _train(
    trainer: PackTrainer, running: Mapping[str, Running], stops: Sequence[int]
) -> tuple[dict[str, float | None], dict[str, float | None]]:
    """Train each candidate by a step, and evaluate those at a rung or at their end. Return training and held-out losses
    by candidate, None where one is not finite."""
    losses = trainer.step({name: one.step for name, one in running.items()})
    for one in running.values():
        one.step += 1
    due = {name: one.step for name, one in running.items() if one.step in stops and math.isfinite(losses[name])}
    held_out = trainer.evaluate(due) if due else {}
    found = [{name: loss if math.isfinite(loss) else None for name, loss in of.items()} for of in (losses, held_out)]
    return found[0], found[1]


def _end_of(study: optuna.Study, spec: SearchSpec, one: Running, loss: float, steps: int, paid: bool) -> str | None:
    """How a candidate ends that was evaluated, if it does; `paid` is whether the budget lasts to its end."""
    if one.step == steps:
        return DONE
    if not sampling.passes(study, spec, one.trial, one.step, loss):
        return STOPPED
    return None if paid else OUT_OF_BUDGET


def left_tokens(spec: SearchSpec, spent: Spent) -> float:
    """Tokens that the budget still allows: of its tokens, and of its hours at the rate so far."""
    budget = spec.budget
    left = math.inf if budget.tokens is None else float(budget.tokens - spent.tokens)
    if budget.hours is not None and spent.seconds:
        left = min(left, (3600 * budget.hours - spent.seconds) * spent.tokens / spent.seconds)
    return left
