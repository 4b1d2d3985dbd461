"""Forecast of a study before anything is trained: memory of each candidate by part, time, and cost."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from rankscope.data.batches import eval_steps, total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.plan.costs import CostModel
from rankscope.plan.memory import MAX_PACK_MEMORY_FRACTION, StudyMemory
from rankscope.plan.packs import longest_first, lower_bound, simulate
from rankscope.spec.candidates import CONTROL, PLAIN, AnyTrial, Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.study.missing import START_SECONDS, StudySeconds, missing_profiles, work_seconds
from rankscope.train.step import batch_at

EVALUATION_FASTER = 2  # than a step, a token: the frozen weights need no gradient of their own

SMALL_MODEL_PARAMS = 50_000_000

PRODUCT_SHARE = {"small": 0.5, "large": 0.7}
"""Rate of a step's useful FLOPs, as a share of plain products' rate, on a CPU: below and above `SMALL_MODEL_PARAMS`."""


@dataclass(frozen=True)
class Forecast:
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
            "candidates": {name: asdict(forecast) for name, forecast in self.candidates.items()},
        }


class _Work(NamedTuple):
    """Tokens that a trial's schedule computes, padding included."""

    steps: int
    tokens: int
    labels: int
    eval_tokens: int
    eval_labels: int


def forecast(
    spec: StudySpec,
    memory: StudyMemory,
    data: TokenizedData,
    here: bool = True,
    product_flops_per_second: float | None = None,
) -> StudyForecast:
    """Forecast every candidate.

    Time follows from a few layers that are timed, if the device is this machine's, which `here` says; else from
    `product_flops_per_second`, the device's rate of plain matrix products.
    """
    prediction = memory.costs
    profiled = {name: candidate for name, candidate in spec.profiled().items() if name != CONTROL}
    peaks = {name: memory.peak([_trial(spec, candidate)]) for name, candidate in profiled.items()}
    reason = prediction.reason or memory.reason
    rate = product_flops_per_second
    share = PRODUCT_SHARE["small" if prediction.base_params < SMALL_MODEL_PARAMS else "large"]
    engines = {c.name: prediction.engine if c.packable else "peft" for c in spec.candidates()}
    works = {engine: _work(spec, engine, data) for engine in set(engines.values())}
    candidates = {}
    for candidate in spec.candidates():
        peak, cost = peaks[candidate.profile_name], prediction.costs.get(candidate.name)
        work = works[engines[candidate.name]]
        train = runtime = None
        if rate and cost:
            train = cost.flops(work.tokens, work.labels) / (rate * share)
            runtime = train + cost.flops(work.eval_tokens, work.eval_labels) / (rate * share) / EVALUATION_FASTER
        elif here and (own := memory.seconds_per_token(candidate)):
            train, runtime = work.tokens * own, (work.tokens + work.eval_tokens / EVALUATION_FASTER) * own
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


def study_seconds(spec: StudySpec, forecasts: Mapping[str, Forecast]) -> StudySeconds | None:
    """Seconds of a study that has not begun; None where times are not known."""
    if any(found.runtime_seconds is None for found in forecasts.values()):
        return None
    steps = {name: found.step_seconds or 0.0 for name, found in forecasts.items()}
    runtimes = {name: found.runtime_seconds or 0.0 for name, found in forecasts.items()}
    trials: list[AnyTrial] = [*spec.trials(), *spec.reference_trials()]
    left = {trial.name: 1.0 for trial in trials}
    answering = 1 + len(spec.candidates()) if spec.measure.answers else 0
    return work_seconds(spec, steps, runtimes, left, missing_profiles(spec, None), answering)


def shorter(spec: StudySpec, steps: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
    """Seconds of the study by the same forecasts with fewer seeds, ranks or `steps`, and with all of these, by the
    options that ask for it. Two seeds and two ranks are the least: one gives no interval, or nothing to compare. Empty
    where times are not known."""
    if study_seconds(spec, forecasts) is None:
        return {}
    ranks, seeds, half = sorted(spec.ranks), spec.seeds[:2], max(1, steps // 2)
    fewer: dict[str, dict[str, Any]] = {}
    if len(spec.seeds) > len(seeds):
        fewer[f"--seeds {','.join(map(str, seeds))}"] = {"seeds": seeds}
    if len(ranks) > 2:
        fewer[f"--ranks {ranks[0]},{ranks[-1]}{',full' * spec.reference.full}"] = {"ranks": (ranks[0], ranks[-1])}
    sooner = {
        name: replace(one, runtime_seconds=(one.runtime_seconds or 0) - (steps - half) * (one.step_seconds or 0))
        for name, one in forecasts.items()
    }
    found = {option: study_seconds(spec.model_copy(update=update), forecasts) for option, update in fewer.items()}
    found[f"--steps {half}"] = study_seconds(spec, sooner)
    if fewer:
        both = {field: value for update in fewer.values() for field, value in update.items()}
        found[" ".join(found)] = study_seconds(spec.model_copy(update=both), sooner)
    return {option: sum(seconds) for option, seconds in found.items() if seconds}


def pack_seconds(packs: Mapping[str, Sequence[Trial]], forecasts: Mapping[str, Forecast]) -> dict[str, float]:
    """Seconds of each pack in a process of its own: its start, and its trials' steps and evaluations one by one.

    So long takes a pack with steps that fill the device; others take less.

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


def largest_fitting_rank(spec: StudySpec, memory: StudyMemory) -> int | None:
    """The largest rank of plain LoRA with a predicted peak that fits, at most the full rank of the adapted layers.

    0 where none fits, None where peaks cannot be predicted or no candidate is plain LoRA.
    """
    plain = next((candidate for candidate in spec.candidates() if candidate.variant == PLAIN), None)
    if plain is None or memory.peak([_trial(spec, plain)]) is None:
        return None
    fits, too_large = 0, memory.costs.full_rank + 1
    while too_large - fits > 1:
        rank = (fits + too_large) // 2
        if memory.peak_at(plain, rank) <= memory.free * MAX_PACK_MEMORY_FRACTION:
            fits = rank
        else:
            too_large = rank
    return fits


def _trial(spec: StudySpec, candidate: Candidate) -> Trial:
    return Trial(candidate=candidate, seed=spec.seeds[0])


def _work(spec: StudySpec, engine: str, data: TokenizedData) -> _Work:
    """Work of the first seed's schedule. PEFT's engine computes the padding too, and the logits of every position."""
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
    """Time that the study takes on the fleet; None where times are not known."""
    alone = study_seconds(spec, forecasts)
    if alone is None:
        return None
    trials, profiles, _ = alone
    jobs = pack_seconds(packs, forecasts) if fleet.devices > 1 else {"all packs in one process": trials}
    schedule = simulate(longest_first(jobs), jobs, fleet.devices)
    busy = schedule.busy_seconds + profiles
    return FleetEstimate(schedule.makespan, profiles, lower_bound(jobs, fleet.devices), busy, fleet)
