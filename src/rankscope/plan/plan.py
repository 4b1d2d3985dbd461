"""The plan of a study: what would run, what it would take, and what fits."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch

from rankscope.data.tokens import TokenizedData
from rankscope.errors import StudyError
from rankscope.jobs.local import LocalLauncher
from rankscope.plan.checks import check_ranks, disk_bytes
from rankscope.plan.memory import CostModel, predict
from rankscope.plan.packs import divide_into_packs
from rankscope.plan.runtime import (
    Fleet,
    FleetEstimate,
    StudyForecast,
    estimate_fleet,
    forecast,
    largest_fitting_rank,
    study_seconds,
)
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.study.folder import Division
from rankscope.text.formats import parse_bytes, parse_flops
from rankscope.train.prepare import prepare_data
from rankscope.train.step import total_steps

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
    prediction: CostModel
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
    def takes(self) -> FleetEstimate | None:
        """Of the fleet; None without one, or where times are not known."""
        return estimate_fleet(self.spec, self.packs, self.forecast.candidates, self.fleet) if self.fleet else None

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
