"""What `rankscope plan` shows: what would run, what it would take, and what fits. Nothing is trained or written."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from rankscope.data.tokens import TokenizedData
from rankscope.errors import StudyError
from rankscope.fleet import COUNTED, NOT_COUNTED, Fleet, Takes, takes
from rankscope.jobs.local import LocalLauncher
from rankscope.pipeline import check_ranks, describe_data, prepare_data
from rankscope.plan.checks import too_large
from rankscope.plan.memory import Peak, Prediction, predict, predict_peak
from rankscope.plan.packs import (
    SHARE_OF_FREE_MEMORY,
    disk_bytes,
    divide_into_packs,
    missing_profiles,
    missing_reference,
)
from rankscope.plan.runtime import Forecast, StudyForecast, forecast, largest_fitting_rank, study_seconds
from rankscope.spec.models import StudySpec, Trial
from rankscope.study.folder import FINISHED, Division, Study
from rankscope.text.catalogue import load
from rankscope.text.formats import duration, percent, size
from rankscope.train.step import total_steps
from rankscope.units import parse_bytes, parse_flops

Number = TypeVar("Number", int, float)


def parse_gpu_memory(text: str | None) -> int | None:
    """The bytes of `--gpu-memory 24GB`; None where it is not given.

    Raises:
        StudyError: it is not a size.
    """
    return _parsed("--gpu-memory", text, parse_bytes, "24GB")


def parse_gpu_flops(text: str | None) -> float | None:
    """The operations a second of `--gpu-flops 400TFLOPS`; None where it is not given.

    Raises:
        StudyError: it is not a rate.
    """
    return _parsed("--gpu-flops", text, parse_flops, "400TFLOPS")


def _parsed(option: str, text: str | None, parse: Callable[[str], Number], example: str) -> Number | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise StudyError(f"{option} {text}: {error}", f"For example {option} {example}.") from None


def make_fleet(devices: int | None, price: float | None) -> Fleet | None:
    """The fleet of `--devices` (one, where only a price is given); None where neither is.

    Raises:
        StudyError: there are no such devices, or there is no such price.
    """
    if devices is not None and devices < 1:
        raise StudyError(f"--devices {devices}: expected 1 or more", "For example --devices 8.")
    if price is not None and not 0 < price < math.inf:
        raise StudyError(f"--price {price}: expected a price above 0", "Of one device for an hour: --price 2.5.")
    return None if devices is None and price is None else Fleet(devices or 1, price)


class Plan(NamedTuple):
    """What a run would do and take."""

    spec: StudySpec
    prediction: Prediction
    data: TokenizedData
    forecast: StudyForecast
    packs: dict[str, list[Trial]]
    steps: int  # of each trial
    free_bytes: int
    hypothetical: bool
    """The device need not be here."""
    fleet: Fleet | None
    """Where it was asked for."""

    @property
    def disk_bytes(self) -> int:
        """At most, of the whole study."""
        packs, reference = list(self.packs.values()), self.spec.reference_trials()
        devices = self.fleet.devices if self.fleet else 1
        return sum(disk_bytes(self.spec, self.prediction, packs, reference, self.data, devices))

    @property
    def takes(self) -> Takes | None:
        """Of the fleet; None without one, or where times are not known."""
        return takes(self.spec, self.packs, self.forecast.candidates, self.fleet) if self.fleet else None

    @property
    def largest_rank(self) -> int | None:
        """See `largest_fitting_rank`."""
        return largest_fitting_rank(
            self.spec, self.prediction, self.forecast.candidates, self.data.train, self.free_bytes
        )


def make_plan(
    spec: StudySpec, gpu_memory: int | None = None, gpu_flops: float | None = None, fleet: Fleet | None = None
) -> Plan:
    """Works out the plan. `gpu_memory` is the size in bytes of a GPU that need not exist, and `gpu_flops` its rate of
    plain matrix products; without them this machine counts. `fleet` has several such devices; without it this
    machine's GPUs count.

    Raises:
        StudyError, DataError, ModelError: as a run would; and where a GPU's rate is given and not its memory.
    """
    if gpu_flops and not gpu_memory:
        raise StudyError(
            "--gpu-flops is given, and --gpu-memory is not", "Describe the GPU by both: --gpu-memory 80GB."
        )
    if gpu_memory:
        prediction, free, places = predict(spec, torch.device("cuda")), gpu_memory, 1
    else:
        here = LocalLauncher(spec.model)
        prediction, free, places = predict(spec), here.site().free_bytes, here.places()
    check_ranks(spec, prediction)
    data = prepare_data(spec)
    found = forecast(spec, prediction, data, free, not gpu_memory, gpu_flops)
    if fleet is None and places > 1:
        fleet = Fleet(places, None)
    devices = fleet.devices if fleet else 1
    divided = divide_into_packs(spec.trials(), prediction, free, spec.training, data.train, devices)
    packs, steps = Division({}, {}).named(divided), total_steps(spec.training, len(data.train))
    return Plan(spec, prediction, data, found, packs, steps, free, gpu_memory is not None, fleet)


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    spec, prediction, data, found, packs, steps, free, _, _ = plan
    console.print(f"Model {spec.model.id}: {prediction.base_params:,} parameters", markup=False)
    console.print(describe_data(data.facts), markup=False, soft_wrap=True)
    console.print(_candidates(spec, found, free))
    for line in _notes(plan):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{len(spec.trials())} trials of {steps:,} steps in {len(packs)} packs:")
    for line in _packs(spec, prediction, found.candidates, packs, data, free):
        console.print(line, markup=False, soft_wrap=True)
    if reference := spec.reference_trials():
        console.print(
            f"{len(reference)} trials of full fine-tuning, each alone: their memory and time are not predicted."
        )
    console.print(f"On the disk: at most about {size(plan.disk_bytes)}.")


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan as data, for `--json`: bytes, seconds, tokens."""
    seconds = study_seconds(plan.spec, plan.forecast.candidates)
    return {
        "model": {"id": plan.spec.model.id, "parameters": plan.prediction.base_params},
        "data": plan.data.facts,
        "prediction": plan.forecast.describe(plan.prediction),
        "steps": plan.steps,
        "packs": {pack: [trial.name for trial in trials] for pack, trials in plan.packs.items()},
        "reference": [trial.name for trial in plan.spec.reference_trials()],
        "free_bytes": plan.free_bytes,
        "largest_rank_that_fits": plan.largest_rank,
        "disk_bytes": plan.disk_bytes,
        "seconds": {"trials": seconds[0], "profiles": seconds[1]} if seconds else None,
        "fleet": found.describe() if (found := plan.takes) else None,
    }


def show_progress_so_far(study: Study, console: Console) -> None:
    """Says what a study that has begun has already: a run does only the rest."""
    trials = study.spec.trials()
    done = sum(study.trial_record(trial)["status"] in FINISHED for trial in trials)
    console.print(
        f"{study.path} has {done} of the {len(trials)} trials; {len(missing_profiles(study))} repeats of profiles and "
        f"{len(missing_reference(study))} trials of full fine-tuning are missing too. A run would do what is missing.",
        markup=False,
        soft_wrap=True,
    )


def _candidates(spec: StudySpec, found: StudyForecast, free: int) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = ["candidate", "scaling", "trainable", "base", "adapter", "activations", "logits", "other", "total", "fits"]
    for name in [*names, "s/step", "runtime"]:
        table.add_column(name, justify="left" if name == "candidate" else "right", no_wrap=True)
    for candidate in spec.candidates():
        row = found.candidates[candidate.name]
        memory = ["–"] * 7
        if row.parts and row.peak_bytes:
            parts = row.parts
            adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
            other = parts["process"] + parts["retained"]
            columns = (parts["base"], adapter, parts["activations"], parts["logits"], other, row.peak_bytes)
            memory = [*map(size, columns), "yes" if row.peak_bytes <= free * SHARE_OF_FREE_MEMORY else "no"]
        times = ["–"] * 2
        if row.step_seconds is not None and row.runtime_seconds is not None:
            times = [f"{row.step_seconds:.2g}", duration(row.runtime_seconds, load("en"))]
        table.add_row(candidate.name, f"{candidate.scaling:.3g}", f"{row.trainable_params:,}", *memory, *times)
    return table


def _notes(plan: Plan) -> list[str]:
    """What the table's columns mean, the largest rank that fits, and the time of the whole study."""
    spec, prediction, _, found, _, _, free, hypothetical, _ = plan
    kind = str(prediction.dtype).removeprefix("torch.")
    where = f"a GPU with {size(free)}" if hypothetical else f"the {size(free)} that are free here"
    tokens = max((row.forward_tokens or 0 for row in found.candidates.values()), default=0)
    notes = [
        f"Memory: predicted peak of each candidate trained alone ({prediction.device}, {kind}, forwards of up to "
        f"{tokens:,} tokens).",
        "  adapter: with gradients and optimizer. other: the process, and what the allocator keeps of freed tensors.",
        f"  fits: within {percent(SHARE_OF_FREE_MEMORY)} of {where}.",
    ]
    if found.reason:
        notes.append(f"  Not all of it can be predicted: {found.reason}")
    notes += [*_checkpointing(found), *(too_large(spec.model, prediction, free) or ())]
    largest = plan.largest_rank
    if largest is not None:
        notes.append(_largest(spec, prediction, largest))
    seconds = study_seconds(spec, found.candidates)
    if seconds is None or found.product_flops_per_second is None:
        known = " --gpu-flops says what it reaches." if hypothetical else ""
        return [*notes, f"Time: not predicted, since this device's speed is not known here.{known}"]
    trials, profiles = (duration(part, load("en")) for part in seconds)
    measured = (
        "where packs reached 45% to 75% on one CPU: a rough guide, within about a third"
        if prediction.device == "cpu"
        else "a share that was measured on a CPU and never on a GPU: this can be far off"
    )
    return [
        *notes,
        f"Time: about; FLOPs at {found.product_share:.0%} of plain matrix products "
        f"({found.product_flops_per_second / 1e9:,.0f} GFLOP/s {'as given' if hypothetical else 'here'}), {measured}.",
        f"The whole study: about {duration(sum(seconds), load('en'))} on one device: trials {trials}, profiles "
        f"{profiles}.",
        *_fleet(plan),
    ]


def _checkpointing(found: StudyForecast) -> list[str]:
    """Which candidates have sequences that are longer than a forward may be."""
    longest = {name: row.recomputed_tokens for name, row in found.candidates.items() if row.recomputed_tokens}
    if not longest:
        return []
    names = "all candidates" if len(longest) == len(found.candidates) else ", ".join(longest)
    return [
        f"  Gradient checkpointing: {names}. Sequences that are longer than a forward may be here, the longest of "
        f"{max(longest.values()):,} tokens, keep their layers' inputs only, and run each layer again in the backward."
    ]


def _fleet(plan: Plan) -> list[str]:
    """Time, device hours and cost, where several devices or a price were asked for."""
    found, text = plan.takes, load("en")
    if found is None:
        return []
    devices, price = found.fleet
    several = "s" * (devices > 1)
    kind = f"GPU{several} of {size(plan.free_bytes)}" if plan.hypothetical else f"device{several} like this one"
    trials, least = duration(found.trials_seconds, text), duration(found.least_trials_seconds, text)
    cost = "" if found.cost is None else f" Cost: {found.cost:,.2f}, at {price:,.2f} a device hour."
    return [
        f"On {devices:,} {kind}: about {duration(found.makespan_seconds, text)}: trials {trials} (no order of these "
        f"packs is shorter than {least}), then profiles {duration(found.profiles_seconds, text)}.",
        f"  {found.device_hours:,.3g} device hours from beginning to end, {found.busy_seconds / 3600:,.3g} of them "
        f"busy.{cost}",
        f"  Counted: {COUNTED}.",
        f"  Not counted: {NOT_COUNTED}.",
    ]


def _largest(spec: StudySpec, prediction: Prediction, rank: int) -> str:
    modules = spec.adapter.target_modules
    on = modules if isinstance(modules, str) else ", ".join(modules)
    if rank == 0:
        return f"Largest rank that fits: none, on {on}."
    if rank == prediction.full_rank:
        return f"Largest rank that fits: {rank:,} on {on}, the full rank of its layers: more would add nothing."
    return f"Largest rank that fits: {rank:,} on {on} (as a power of two: {1 << (rank.bit_length() - 1):,})."


def _packs(
    spec: StudySpec,
    prediction: Prediction,
    forecasts: Mapping[str, Forecast],
    packs: Mapping[str, Sequence[Trial]],
    data: TokenizedData,
    free: int,
) -> list[str]:
    """One line a pack. Packs of the same candidates need the same memory."""
    known: dict[tuple[str, ...], int | None] = {(name,): row.peak_bytes for name, row in forecasts.items()}
    step_tokens = float(data.train.lengths.mean()) * spec.training.effective_batch_size
    lines = []
    for pack, trials in packs.items():
        names = tuple(trial.candidate.name for trial in trials)
        if names not in known:
            peak = predict_peak(spec, prediction, trials, data.train, free)
            known[names] = peak.parts.total if isinstance(peak, Peak) else None
        total = known[names] or prediction.peak_bytes(trials, free, len(trials) * step_tokens)
        fits = "" if total <= free else f", more than the {size(free)} there are"
        lines.append(f"  {pack}  {', '.join(trial.name for trial in trials)}: about {size(total)}{fits}")
    return lines
