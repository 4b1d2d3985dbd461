"""Time of all candidates, measured in one process in which they take turns on the same batches.

A machine's speed drifts, and other programs take it in bursts. Within a round all candidates and the control meet the
same machine and the same batch, so the ratio of a candidate's time to the control's holds where seconds do not.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from rankscope.data.batches import eval_steps, total_steps
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.measure.cores import cpu_pressure, stalled_seconds
from rankscope.model.device import synchronize
from rankscope.model.load import load_model
from rankscope.spec.candidates import CONTROL, Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.study.missing import EXTRA_ROUNDS, MAX_EXTRA_SECONDS
from rankscope.study.records import BUSY_PRESSURE
from rankscope.train.engine import EVAL_TOKENS, Engine
from rankscope.train.loop import choose_engine
from rankscope.train.step import TrainState, batch_at, make_train_state, train_step

RATIO_WIDTH = 0.02  # of a ratio's 95% interval, from which on more rounds are not worth their time

MAD_TO_MEDIAN_SE = 1.4826 * math.sqrt(math.pi / 2)
"""Standard error of a median, over the median absolute deviation and the root of the count: of normal values, and no
more than that of others' centre; outliers, which other programs cause, do not count."""


class Turn(NamedTuple):
    """Seconds of one candidate in one round."""

    step: float
    evaluation: float
    step_cpu: float  # processor time, of all threads
    evaluation_cpu: float


class Rounds(NamedTuple):
    """Measurements of one process."""

    turns: list[dict[str, Turn]]  # of each candidate, by round
    tokens: list[int]  # of each round's batch
    first_step_seconds: float  # of the first step of all, which is slower
    cpu_pressure: float | None = None  # share of the time in which a program here waited for a processor
    on_cpu: bool = True  # whether the steps are the processor's own work, and not a GPU's

    @property
    def clock(self) -> str:
        """What candidates are compared by: `wall` time, or `cpu` time where others take their share of the wall's."""
        return "cpu" if self.on_cpu and (self.cpu_pressure or 0.0) > BUSY_PRESSURE else "wall"

    def compared(self, name: str, field: str) -> np.ndarray:
        """Seconds of one candidate by `clock`, (rounds,)."""
        return self.seconds(name, f"{field}_cpu" if self.clock == "cpu" else field)

    def seconds(self, name: str, field: str) -> np.ndarray:
        """Seconds of one candidate, (rounds,)."""
        return np.array([getattr(turns[name], field) for turns in self.turns])


def time_candidates(spec: StudySpec, candidates: Mapping[str, Candidate], data: TokenizedData) -> dict[str, Any]:
    """Time each of `candidates`, by profile name, over one base model; one is `CONTROL`, which ratios are to.

    Returns {"seconds": {column: {name: [...]}}, "tokens": [...], "summaries": {name: {column: number}}, ...} with one
    number a round in each list. See `summarise` for the summaries.
    """
    model, training = load_model(spec.model), spec.training
    steps, states = total_steps(training, len(data.train)), dict[str, TrainState]()
    for name, candidate in candidates.items():
        if name == CONTROL:  # under a name of its own: it is one of the candidates once more
            candidate = candidate.model_copy(update={"alpha_in_name": not candidate.alpha_in_name})
        trial = Trial(candidate=candidate, seed=spec.seeds[0])
        states[name] = make_train_state(model, trial, training, steps)
    engine = choose_engine(model, list(states.values()), training).engine
    held_out = first_examples(data.eval, min(EVAL_TOKENS, engine.tokens_per_forward))
    rounds, control = take_turns(spec, states, engine, data.train, held_out), states[CONTROL].trial
    batches = (batch_at(control, data.train, training, step) for step in range(steps))
    trained = sum(int(data.train.lengths[examples].sum()) for examples in batches)
    evaluated = float(data.eval.offsets[-1] / held_out.offsets[-1]) * (1 + len(eval_steps(training, steps)))
    return {
        "seconds": {field: {name: rounds.seconds(name, field).tolist() for name in states} for field in Turn._fields},
        "tokens": rounds.tokens,
        "engine": engine.name,
        "control": candidates[CONTROL].name,
        "clock": rounds.clock,
        "cpu_pressure": rounds.cpu_pressure,
        "summaries": {name: summarise(rounds, name, trained, evaluated) for name in states},
    }


GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it, modulo 1, are spread evenly over a schedule however many there are


def take_turns(
    spec: StudySpec, states: Mapping[str, TrainState], engine: Engine, tokens: Tokens, held_out: Tokens
) -> Rounds:
    """Rounds in which all trials, in random order, take the same step of the schedule and evaluate `held_out`.

    `measure.warmup_steps` do not count. Then there are `measure.rounds`, and more until no ratio to the control's has
    an interval wider than `RATIO_WIDTH`: `EXTRA_ROUNDS` times as many and `MAX_EXTRA_SECONDS` at most.
    """
    steps, shuffle, measure = total_steps(spec.training, len(tokens)), random.Random(spec.seeds[0]), spec.measure
    rounds, end = Rounds([], [], 0.0, on_cpu=engine.model.device.type == "cpu"), math.inf
    began, stalled = time.perf_counter(), stalled_seconds()
    for number in range(-measure.warmup_steps, (1 + EXTRA_ROUNDS) * measure.rounds):
        if number == measure.rounds:
            end = time.perf_counter() + MAX_EXTRA_SECONDS
        rounds = rounds._replace(cpu_pressure=cpu_pressure(began, stalled))
        if number >= measure.rounds and (time.perf_counter() > end or _narrow(rounds)):
            break
        step, turns, trained = int(steps * (number * GOLDEN % 1)), {}, 0
        for name in shuffle.sample(list(states), len(states)):
            turns[name], trained = _turn(engine, states[name], spec, tokens, step, held_out)
            rounds = rounds._replace(first_step_seconds=rounds.first_step_seconds or turns[name].step)
        if number >= 0:
            rounds.turns.append(turns)
            rounds.tokens.append(trained)
    return rounds


def _turn(
    engine: Engine, state: TrainState, spec: StudySpec, tokens: Tokens, step: int, held_out: Tokens
) -> tuple[Turn, int]:
    """Seconds of one candidate's turn, and the tokens of its step."""
    clocks = [(time.perf_counter(), time.process_time())]
    (metrics,) = train_step(engine, [state], tokens, spec.training, step)
    synchronize(engine.model.device)
    clocks.append((time.perf_counter(), time.process_time()))
    engine.evaluate(held_out, [state.trial.name])
    clocks.append((time.perf_counter(), time.process_time()))
    (step_wall, step_cpu), (wall, cpu) = np.diff(clocks, axis=0).tolist()
    return Turn(step_wall, wall, step_cpu, cpu), metrics.tokens


def first_examples(tokens: Tokens, count: int) -> Tokens:
    """First examples with at most `count` tokens together, at least one."""
    examples = max(1, int((tokens.offsets[1:] <= count).sum()))
    return Tokens.from_examples([tokens[number] for number in range(examples)])


def _narrow(rounds: Rounds) -> bool:
    if len(rounds.turns) < 2:
        return False
    reach = special.stdtrit(len(rounds.turns) - 1, 0.975)
    return bool(2 * reach * max(step_ratio(rounds, name).se for name in rounds.turns[0]) < RATIO_WIDTH)


class Ratio(NamedTuple):
    """Median of paired ratios."""

    ratio: float
    se: float  # standard error of the ratio's logarithm


def median_ratio(seconds: np.ndarray, control: np.ndarray) -> Ratio:
    """Ratio of two series of seconds, each (rounds,), that were measured side by side."""
    logs = np.log(seconds / control)
    middle = float(np.median(logs))
    spread = float(np.median(np.abs(logs - middle)))
    return Ratio(math.exp(middle), MAD_TO_MEDIAN_SE * spread / math.sqrt(len(logs)))


def step_ratio(rounds: Rounds, name: str) -> Ratio:
    return median_ratio(rounds.compared(name, "step"), rounds.compared(CONTROL, "step"))


def summarise(rounds: Rounds, name: str, trained: int, evaluated: float) -> dict[str, float | None]:
    """Summary of a candidate's time. A whole schedule trains on so many tokens, and evaluates so many times what a
    round does.

    - `step_ratio step_ratio_se`: a step's time by `Rounds.clock` over the control's on the same batch, the median over
      rounds, and the standard error of its logarithm; `runtime_ratio runtime_ratio_se` the same of a whole schedule's
      steps and evaluations; `cpu_ratio` of a step's processor time, whatever the clock
    - `step_seconds_median tokens_per_second runtime_seconds`: the control's median, times the ratio. `runtime_seconds`
      is of a whole schedule trained alone: by tokens, with its evaluations and the first step's excess
    - `step_seconds_p10 step_seconds_p90 step_cpu_seconds`: percentiles of the candidate's own steps, and the median of
      their processor time
    - `rounds cpu_pressure`: see `Rounds`
    """
    tokens, wall = np.array(rounds.tokens), rounds.seconds

    def schedule(of: str, seconds: Callable[[str, str], np.ndarray] = rounds.compared) -> np.ndarray:
        total: np.ndarray = seconds(of, "evaluation") * evaluated + seconds(of, "step") / tokens * trained
        return total

    step, runtime = step_ratio(rounds, name), median_ratio(schedule(name), schedule(CONTROL))
    per_token = float(np.median(wall(CONTROL, "step") / tokens)) * step.ratio
    low, high = np.percentile(wall(name, "step"), (10, 90))
    excess = max(0.0, rounds.first_step_seconds - per_token * float(tokens.mean()))
    return {
        "rounds": len(rounds.turns),
        "step_ratio": step.ratio,
        "step_ratio_se": step.se,
        "runtime_ratio": runtime.ratio,
        "runtime_ratio_se": runtime.se,
        "cpu_ratio": median_ratio(wall(name, "step_cpu"), wall(CONTROL, "step_cpu")).ratio,
        "step_seconds_median": float(np.median(wall(CONTROL, "step"))) * step.ratio,
        "step_seconds_mean": per_token * float(tokens.mean()),
        "step_seconds_p10": float(low),
        "step_seconds_p90": float(high),
        "step_cpu_seconds": float(np.median(wall(name, "step_cpu"))),
        "tokens_per_second": 1 / per_token,
        "runtime_seconds": excess + float(np.median(schedule(CONTROL, wall))) * runtime.ratio,
        "cpu_pressure": rounds.cpu_pressure,
    }
