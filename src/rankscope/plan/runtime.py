"""Forecast of a study before anything is trained: memory of each candidate by part, time, and cost."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from rankscope.data.batches import eval_steps, total_steps
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.plan.costs import CostModel
from rankscope.plan.memory import MAX_PACK_MEMORY_FRACTION, StudyMemory
from rankscope.plan.packs import longest_first, lower_bound, simulate
from rankscope.spec.candidates import CONTROL, PLAIN, AnyTrial, Trial
from rankscope.spec.models import StudySpec
from rankscope.study.missing import START_SECONDS, StudySeconds, missing_profiles, scoring_seconds, work_seconds
from rankscope.train.step import batch_at

EVALUATION_FASTER = 2  # than a step, a token: the frozen weights need no gradient of their own

SMALL_MODEL_PARAMS = 50_000_000

PRODUCT_SHARE = {"small": 0.5, "large": 0.7}
"""Rate of a step's useful FLOPs, as a share of plain products' rate, on a CPU: below and above `SMALL_MODEL_PARAMS`."""


class Forecast(NamedTuple):
    """Memory and time of one candidate, trained alone. Times are None where the device's speed is not known."""

    trainable_params: int
    parts: dict[str, int] | None  # see `rankscope.plan.memory.MemoryBreakdown`; None where it cannot be predicted
    peak_bytes: int | None
    forward_tokens: int | None  # tokens of the largest forward
    step_seconds: float | None  # mean over the schedule
    runtime_seconds: float | None  # whole schedule with its evaluations, as a profile counts it
    recomputed_tokens: int = 0  # tokens of the longest sequence with gradient checkpointing; 0 where none has it


class StudyForecast(NamedTuple):
    """Forecasts of all candidates, by name."""

    candidates: dict[str, Forecast]
    reason: str | None  # for memory, or a part of it, that cannot be predicted
    product_flops_per_second: float | None  # of plain matrix products, where it was given
    product_share: float  # of that rate which training is taken to reach

    def describe(self, prediction: CostModel) -> dict[str, Any]:
        """prediction.json."""
        return {
            "schema": 1,
            "device": prediction.device,
            "dtype": str(prediction.dtype).removeprefix("torch."),
            "engine": prediction.engine,
            "reason": self.reason,
            "coverage": prediction.coverage and prediction.coverage._asdict(),
            "product_flops_per_second": self.product_flops_per_second,
            "product_share": self.product_share,
            "candidates": {name: forecast._asdict() for name, forecast in self.candidates.items()},
        }


def forecast(
    spec: StudySpec, memory: StudyMemory, data: TokenizedData, here: bool = True, product_flops: float | None = None
) -> StudyForecast:
    """Forecast every candidate. Time follows from a few layers that are timed, if the device is this machine's, which
    `here` says; else from `product_flops`, the device's rate of plain matrix products, a second."""
    prediction, candidates = memory.costs, dict[str, Forecast]()
    share = PRODUCT_SHARE["small" if prediction.base_params < SMALL_MODEL_PARAMS else "large"]
    engines = {one.name: prediction.engine if one.packable else "peft" for one in spec.candidates()}
    works = {engine: _work(spec, engine, data) for engine in set(engines.values())}
    peaks = {
        name: memory.peak([Trial(candidate=one, seed=spec.seeds[0])])
        for name, one in spec.profiled().items()
        if name != CONTROL
    }
    for candidate in spec.candidates():
        name, cost, work = candidate.name, prediction.costs.get(candidate.name), works[engines[candidate.name]]
        peak, train, runtime = peaks[candidate.profile_name], None, None
        if product_flops and cost:
            rate = product_flops * share
            train = cost.flops(work.tokens, work.labels) / rate
            runtime = train + cost.flops(work.eval_tokens, work.eval_labels) / rate / EVALUATION_FASTER
        elif here and (own := memory.seconds_per_token(candidate)):
            train, runtime = work.tokens * own, (work.tokens + work.eval_tokens / EVALUATION_FASTER) * own
        candidates[name] = Forecast(
            trainable_params=prediction.params[name],
            parts=peak.parts._asdict() if peak else None,
            peak_bytes=peak.parts.total if peak else None,
            forward_tokens=peak.forward_tokens if peak else None,
            step_seconds=train / work.steps if train is not None else None,
            runtime_seconds=runtime,
            recomputed_tokens=peak.recomputed_tokens if peak else 0,
        )
    return StudyForecast(candidates, prediction.reason or memory.reason, product_flops, share)


class _Work(NamedTuple):
    """What a trial's schedule computes, padding included."""

    steps: int
    tokens: int
    labels: int
    eval_tokens: int
    eval_labels: int


def _work(spec: StudySpec, engine: str, data: TokenizedData) -> _Work:
    """Work of the first seed's schedule."""
    training, steps = spec.training, total_steps(spec.training, len(data.train))
    trial, rows = Trial(candidate=spec.candidates()[0], seed=spec.seeds[0]), training.batch_size * (engine == "peft")
    batches = [batch_at(trial, data.train, training, step) for step in range(steps)]
    tokens, labels = np.sum([_computed(data.train, batch, rows) for batch in batches], axis=0).tolist()
    rounds, evaluated = 1 + len(eval_steps(training, steps)), _computed(data.eval, np.arange(len(data.eval)), rows)
    return _Work(steps, tokens, labels, rounds * evaluated[0], rounds * evaluated[1])


def _computed(tokens: Tokens, examples: np.ndarray, rows: int) -> tuple[int, int]:
    """Tokens and labels of some examples. PEFT's engine, with so many rows a forward, computes the padding too, and the
    logits of every position."""
    if not rows:
        return int(tokens.lengths[examples].sum()), int(tokens.label_counts[examples].sum())
    parts = [tokens.lengths[examples[start : start + rows]] for start in range(0, len(examples), rows)]
    padded = sum(len(part) * int(part.max()) for part in parts)
    return padded, padded


def study_seconds(spec: StudySpec, forecasts: Mapping[str, Forecast], facts: Mapping[str, Any]) -> StudySeconds | None:
    """Seconds of a study that has not begun, on data with these `facts`; None where times are not known."""
    if any(found.runtime_seconds is None for found in forecasts.values()):
        return None
    steps = {name: found.step_seconds or 0.0 for name, found in forecasts.items()}
    runtimes = {name: found.runtime_seconds or 0.0 for name, found in forecasts.items()}
    trials: list[AnyTrial] = [*spec.trials(), *spec.reference_trials()]
    left = dict.fromkeys([trial.name for trial in trials], 1.0)
    answering = 1 + len(spec.candidates()) if spec.measure.answers else 0
    scoring = scoring_seconds(spec, steps, facts, 1 + len(spec.trials()))
    return work_seconds(spec, steps, runtimes, left, missing_profiles(spec, None), answering, scoring)


def shorter(
    spec: StudySpec, steps: int, forecasts: Mapping[str, Forecast], facts: Mapping[str, Any]
) -> dict[str, float]:
    """Seconds of the study by the same forecasts with fewer seeds, ranks or `steps`, and with all of these, by the
    options that ask for it; those that save less than a tenth are left out. Two seeds and two ranks are the least: one
    gives no interval, or nothing to compare. Empty where times are not known."""
    whole = study_seconds(spec, forecasts, facts)
    if whole is None:
        return {}
    ranks, seeds, half = sorted(spec.ranks), spec.seeds[:2], max(1, steps // 2)
    fewer: dict[str, dict[str, Any]] = {}
    if len(spec.seeds) > len(seeds):
        fewer[f"--seeds {','.join(map(str, seeds))}"] = {"seeds": seeds}
    if len(ranks) > 2:
        fewer[f"--ranks {ranks[0]},{ranks[-1]}{',full' * spec.reference.full}"] = {"ranks": (ranks[0], ranks[-1])}
    sooner = {
        name: one._replace(runtime_seconds=(one.runtime_seconds or 0) - (steps - half) * (one.step_seconds or 0))
        for name, one in forecasts.items()
    }
    found = {
        option: study_seconds(spec.model_copy(update=update), forecasts, facts) for option, update in fewer.items()
    }
    found[f"--steps {half}"] = study_seconds(spec, sooner, facts)
    if fewer:
        both = {field: value for update in fewer.values() for field, value in update.items()}
        found[" ".join(found)] = study_seconds(spec.model_copy(update=both), sooner, facts)
    return {option: sum(seconds) for option, seconds in found.items() if seconds and sum(seconds) < 0.9 * sum(whole)}


def largest_fitting_rank(spec: StudySpec, memory: StudyMemory) -> int | None:
    """The largest rank of plain LoRA with a predicted peak that fits, at most the full rank of the adapted layers; 0
    where none fits, None where peaks cannot be predicted or no candidate is plain LoRA."""
    plain = next((candidate for candidate in spec.candidates() if candidate.variant == PLAIN), None)
    if plain is None or memory.peak([Trial(candidate=plain, seed=spec.seeds[0])]) is None:
        return None
    room, ranks = memory.free * MAX_PACK_MEMORY_FRACTION, range(1, memory.costs.full_rank + 1)
    return bisect_right(ranks, room, key=partial(memory.peak_at, plain))


class Fleet(NamedTuple):
    """Equal devices, and their price."""

    devices: int
    hourly_price: float | None  # of one device, in any currency


class FleetEstimate(NamedTuple):
    """Time of all packs and profiles on a fleet, in seconds."""

    trials_seconds: float  # until the last pack has ended: side by side, the longest first, each in its own process
    profiles_seconds: float  # all profiles, which follow one at a time, undisturbed, while the other devices wait
    least_trials_seconds: float  # bound that no order of these packs beats
    busy_seconds: float  # summed over devices
    fleet: Fleet

    @property
    def makespan_seconds(self) -> float:
        return self.trials_seconds + self.profiles_seconds

    @property
    def device_hours(self) -> float:
        """Hours of all devices from the beginning to the end, busy or not."""
        return self.fleet.devices * self.makespan_seconds / 3600

    @property
    def cost(self) -> float | None:
        """Price of these hours; None where no price is known."""
        price = self.fleet.hourly_price
        return None if price is None else price * self.device_hours

    def describe(self) -> dict[str, Any]:
        return {
            "devices": self.fleet.devices,
            "makespan_seconds": self.makespan_seconds,
            "trials_seconds": self.trials_seconds,
            "profiles_seconds": self.profiles_seconds,
            "least_trials_seconds": self.least_trials_seconds,
            "device_hours": self.device_hours,
            "busy_device_hours": self.busy_seconds / 3600,
            "price_per_device_hour": self.fleet.hourly_price,
            "cost": self.cost,
        }


def estimate_fleet(
    alone: StudySeconds | None, packs: Mapping[str, Sequence[Trial]], forecasts: Mapping[str, Forecast], fleet: Fleet
) -> FleetEstimate | None:
    """Time on the fleet of the study that takes `alone` on one device; None where times are not known. On several
    devices each pack has a process of its own, and is taken to last as long as its trials one by one: so does one whose
    steps fill the device, others are faster."""
    if alone is None:
        return None
    jobs = {"all packs in one process": alone.trials}
    if fleet.devices > 1:
        runtimes = {name: found.runtime_seconds or 0.0 for name, found in forecasts.items()}
        jobs = {
            pack: START_SECONDS + sum(runtimes[trial.candidate.name] for trial in trials)
            for pack, trials in packs.items()
        }
    makespan = simulate(longest_first(jobs), jobs, fleet.devices).makespan
    busy = sum(jobs.values()) + alone.profiles
    return FleetEstimate(makespan, alone.profiles, lower_bound(jobs, fleet.devices), busy, fleet)
