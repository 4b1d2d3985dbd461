"""What a study will take, told before anything is trained: memory of each candidate by part, and time."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.plan.memory import CostModel, PeakMemory, largest_rank, predict_peak
from rankscope.plan.packs import MAX_PACK_MEMORY_FRACTION, longest_first, lower_bound, simulate
from rankscope.spec.candidates import CONTROL, PLAIN, Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.flops import Cost, product_rate
from rankscope.train.step import batch_at, eval_steps, total_steps

RATE_SECONDS = 2.0
"""At most, for timing plain matrix products."""

SMALL_MODEL_PARAMS = 50_000_000

PRODUCT_SHARE = {"small": 0.5, "large": 0.7}
"""How much of plain products' rate a step's useful FLOPs reach on a CPU, below and above that size."""

START_SECONDS = 6.0
"""Of a process: Python, libraries and a small model, on two cores."""


@dataclass(frozen=True)
class Forecast:
    """Of one candidate, trained alone. Times are None where the device's speed is not known."""

    trainable_params: int
    parts: dict[str, int] | None
    """Peak memory in bytes: see `rankscope.plan.memory.MemoryBreakdown`; None where it cannot be told."""
    peak_bytes: int | None
    forward_tokens: int | None
    """Of the largest forward."""
    step_seconds: float | None
    """Mean over the schedule."""
    runtime_seconds: float | None
    """Of the schedule with its evaluations, as a profile counts it."""
    recomputed_tokens: int = 0
    """Of the longest sequence whose layers run again in the backward; 0 where none does."""


class StudyForecast(NamedTuple):
    """Of all candidates, by name."""

    candidates: dict[str, Forecast]
    reason: str | None
    """Why memory, or a part of it, cannot be told."""
    product_flops_per_second: float | None
    """Of plain matrix products: as it was given, else on this machine, now."""
    product_share: float
    """How much of it training is taken to reach."""

    def describe(self, prediction: CostModel) -> dict[str, Any]:
        """prediction.json."""
        return {
            "schema": 1,
            "device": prediction.device,
            "dtype": str(prediction.dtype).removeprefix("torch."),
            "engine": prediction.engine,
            "reason": self.reason,
            "product_flops_per_second": self.product_flops_per_second,
            "product_share": self.product_share,
            "candidates": {name: asdict(forecast) for name, forecast in self.candidates.items()},
        }


class _Work(NamedTuple):
    """Tokens that a trial's schedule computes, padding included."""

    steps: int
    tokens: int
    labels: int
    eval_tokens: int
    eval_labels: int

    def train_flops(self, cost: Cost) -> float:
        return cost.flops(self.tokens, self.labels)

    def eval_flops(self, cost: Cost) -> float:
        """A forward alone is half of a step: the frozen weights need no gradient of their own."""
        return cost.flops(self.eval_tokens, self.eval_labels) / 2


def forecast(
    spec: StudySpec,
    prediction: CostModel,
    data: TokenizedData,
    free: int,
    here: bool = True,
    product_flops_per_second: float | None = None,
) -> StudyForecast:
    """Forecasts every candidate on a device with `free` bytes.

    `product_flops_per_second` is its rate of plain matrix products; where it is not given it is measured, if the device
    is this machine's, which `here` says.
    """
    peaks: dict[str, PeakMemory] = {}  # by profile: a learning rate changes nothing, and a rehearsal takes seconds
    reason = prediction.reason
    for name, candidate in spec.profiled().items():
        if name == CONTROL:
            continue
        found = predict_peak(spec, prediction, [_trial(spec, candidate)], data.train, free)
        if isinstance(found, PeakMemory):
            peaks[name] = found
        else:
            reason = reason or found
    rate = product_flops_per_second or (_rate(peaks, prediction) if here else None)
    share = PRODUCT_SHARE["small" if prediction.base_params < SMALL_MODEL_PARAMS else "large"]
    engines = {c.name: prediction.engine if c.packable else "peft" for c in spec.candidates()}
    works = {engine: _work(spec, engine, data) for engine in set(engines.values())}
    candidates = {}
    for candidate in spec.candidates():
        peak, cost = peaks.get(candidate.profile_name), prediction.costs.get(candidate.name)
        work = works[engines[candidate.name]]
        train = runtime = None
        if rate and cost:
            train = work.train_flops(cost) / (rate * share)
            runtime = train + work.eval_flops(cost) / (rate * share)
        candidates[candidate.name] = Forecast(
            trainable_params=prediction.params[candidate.name],
            parts=peak.parts._asdict() if peak else None,
            peak_bytes=peak.parts.total if peak else None,
            forward_tokens=peak.forward_tokens if peak else None,
            step_seconds=train / work.steps if train is not None else None,
            runtime_seconds=runtime,
            recomputed_tokens=peak.recomputed_tokens if peak else 0,
        )
    return StudyForecast(candidates, reason, rate, share)


def study_seconds(spec: StudySpec, forecasts: Mapping[str, Forecast]) -> tuple[float, float] | None:
    """Of all trials, and of all profiles, one after the other; None where times are not known."""
    if any(found.runtime_seconds is None for found in forecasts.values()):
        return None
    starts = len(spec.trials()) if spec.training.isolated else 1
    trials = starts * START_SECONDS + sum(
        forecasts[trial.candidate.name].runtime_seconds or 0 for trial in spec.trials()
    )
    if not spec.measure.profiles:
        return trials, 0.0
    steps = spec.measure.warmup_steps + spec.measure.steps
    profiled = spec.profiled().values()
    once = sum(START_SECONDS + steps * (forecasts[candidate.name].step_seconds or 0) for candidate in profiled)
    return trials, spec.measure.repeats * once


def pack_seconds(packs: Mapping[str, Sequence[Trial]], forecasts: Mapping[str, Forecast]) -> dict[str, float]:
    """Of each pack in a process of its own: its start, and its trials' steps and evaluations one after the other.

    That is what a pack takes whose step fills the device; one that does not fill it takes less.

    Raises:
        ValueError: times are not known.
    """
    runtimes = {name: found.runtime_seconds for name, found in forecasts.items()}
    seconds = {}
    for pack, trials in packs.items():
        own = [runtimes[trial.candidate.name] for trial in trials]
        if None in own:
            raise ValueError("no times are forecast")
        seconds[pack] = START_SECONDS + sum(second or 0.0 for second in own)
    return seconds


def largest_fitting_rank(
    spec: StudySpec, prediction: CostModel, forecasts: Mapping[str, Forecast], tokens: Tokens, free: int
) -> int | None:
    """The largest rank whose predicted peak fits in `free` bytes, at most the full rank of the adapted layers; 0 where
    none fits, None where peaks cannot be told."""
    totals = {
        candidate.rank: forecasts[candidate.name].peak_bytes or 0
        for candidate in spec.candidates()
        if forecasts[candidate.name].peak_bytes and candidate.variant == PLAIN
    }
    if len(totals) == 1:
        candidate = spec.candidates()[0]
        rank, other = candidate.rank, candidate.model_copy(update={"rank": 2 * candidate.rank})
        both = prediction._replace(
            params=prediction.params | {other.name: 2 * prediction.params[candidate.name]},
            costs=prediction.costs | {other.name: prediction.costs[candidate.name]},
        )
        found = predict_peak(spec, both, [_trial(spec, other)], tokens, free)
        if isinstance(found, PeakMemory):
            totals[2 * rank] = found.parts.total
    if len(totals) < 2:
        return None
    first = spec.candidates()[0]
    return largest_rank(totals, prediction.full_rank, free * MAX_PACK_MEMORY_FRACTION, prediction.rank_bytes(first))


def _trial(spec: StudySpec, candidate: Candidate) -> Trial:
    return Trial(candidate=candidate, seed=spec.seeds[0])


def _rate(peaks: Mapping[str, PeakMemory], prediction: CostModel) -> float | None:
    if not peaks:
        return None
    products = next(iter(peaks.values())).products
    return product_rate(products, torch.device(prediction.device), prediction.dtype, RATE_SECONDS)


def _work(spec: StudySpec, engine: str, data: TokenizedData) -> _Work:
    """Of the first seed's schedule; PEFT's engine computes the padding too, and the logits of every position."""
    training, tokens = spec.training, data.train
    steps = total_steps(training, len(tokens))
    trial = _trial(spec, spec.candidates()[0])
    size, trained, labels = training.batch_size, 0, 0
    for step in range(steps):
        examples = batch_at(trial, tokens, training, step)
        if engine == "peft":
            rows = [examples[start : start + size] for start in range(0, len(examples), size)]
            padded = sum(len(row) * int(tokens.lengths[row].max()) for row in rows)
            trained, labels = trained + padded, labels + padded
        else:
            trained += int(tokens.lengths[examples].sum())
            labels += int(tokens.label_counts[examples].sum())
    rounds = 1 + len(eval_steps(training, steps))
    eval_tokens, eval_labels = int(data.eval.offsets[-1]), int(data.eval.is_label.sum())
    if engine == "peft":
        starts = range(0, len(data.eval), size)
        eval_tokens = sum(
            len(data.eval.lengths[s : s + size]) * int(data.eval.lengths[s : s + size].max()) for s in starts
        )
        eval_labels = eval_tokens
    return _Work(steps, trained, labels, rounds * eval_tokens, rounds * eval_labels)


class Fleet(NamedTuple):
    """Equal devices, and what they cost."""

    devices: int
    hourly_price: float | None
    """Of one device for an hour, in any currency."""


class FleetEstimate(NamedTuple):
    """What all packs and profiles take of a fleet. Times are in seconds."""

    trials_seconds: float
    """Until the last pack has ended: packs run side by side, the longest first, each in a process of its own."""
    profiles_seconds: float
    """Of all profiles, which follow one at a time, so that nothing disturbs them, while the other devices wait."""
    least_trials_seconds: float
    """No order of these packs is shorter."""
    busy_seconds: float
    """Of all devices together."""
    fleet: Fleet

    @property
    def makespan_seconds(self) -> float:
        return self.trials_seconds + self.profiles_seconds

    @property
    def device_hours(self) -> float:
        """Of all devices, from the beginning to the end, whether busy or not."""
        return self.fleet.devices * self.makespan_seconds / 3600

    @property
    def cost(self) -> float | None:
        """Of these hours; None where no price is known."""
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
            "counted": COUNTED,
            "not_counted": NOT_COUNTED,
        }


COUNTED = (
    f"steps and evaluations of all trials, {START_SECONDS:.0f} s for each process to start (as measured with a small "
    "model on two cores), and the profiles, which run one at a time while the other devices wait"
)

NOT_COUNTED = (
    "loading a large model's weights, preparing the data, checkpoints, answers, the report, full fine-tuning, waiting "
    "for devices, and what fails and is done again"
)


def estimate_fleet(
    spec: StudySpec, packs: Mapping[str, Sequence[Trial]], forecasts: Mapping[str, Forecast], fleet: Fleet
) -> FleetEstimate | None:
    """What the study takes of the fleet; None where times are not known."""
    alone = study_seconds(spec, forecasts)
    if alone is None:
        return None
    trials, profiles = alone
    jobs = pack_seconds(packs, forecasts) if fleet.devices > 1 else {"all packs in one process": trials}
    schedule = simulate(longest_first(jobs), jobs, fleet.devices)
    busy = schedule.busy_seconds + profiles
    return FleetEstimate(schedule.makespan, profiles, lower_bound(jobs, fleet.devices), busy, fleet)
