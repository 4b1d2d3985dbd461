"""The plan of a study: which trials train together, which work is missing, and its memory, disk and time.

`rankscope plan` and `run --dry-run` print a `Plan`; a run executes the same object.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import torch

from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.errors import StudyError
from rankscope.files import exists
from rankscope.measure.machine import Site, changes_of_costs
from rankscope.plan import runtime
from rankscope.plan.checks import Disk, check_base_fits, check_disk, check_ranks, disk_bytes, disk_taken
from rankscope.plan.costs import CostModel, predict
from rankscope.plan.memory import StudyMemory
from rankscope.plan.packs import divide_into_packs
from rankscope.spec.candidates import FullTrial, Trial
from rankscope.spec.models import ModelSpec, StudySpec
from rankscope.study.folder import Division, StudyFolder
from rankscope.study.missing import ProfileJob, StudySeconds, missing_profiles, without_result

GPU_HOST_BYTES = 4 << 30
"""Assumed memory of the host for a process that works on a GPU, beside the base model as it is loaded; not measured."""


@dataclass(frozen=True)
class Plan:
    """Packs, missing work, memory, disk and time of a run, fixed before it starts."""

    spec: StudySpec
    site: Site
    data: TokenizedData
    prediction: CostModel
    memory: StudyMemory  # peaks of packs and of other ranks
    packs: dict[str, list[Trial]]  # with trials that have no result yet, by name, in their order
    reference: list[FullTrial]  # trials of full fine-tuning without a result
    profiles: list[ProfileJob]  # repeats to be measured
    disk_bytes: int  # at most, still to be written
    fleet: runtime.Fleet  # the devices that jobs run on
    product_flops: float | None = None  # the device's rate of plain matrix products, a second; None: to be measured
    remeasure: bool = False  # whether the profiles replace those that the study has
    timed: bool = False  # whether the run has a time limit: then jobs are small, and have forecasts
    unmeasured: dict[str, str] | None = None  # costs that are missing and not measured here, as those are of elsewhere

    @property
    def steps(self) -> int:
        """Optimizer steps of each trial."""
        return total_steps(self.spec.training, len(self.data.train))

    @cached_property
    def forecast(self) -> runtime.StudyForecast:
        """Memory by part and time of each candidate; takes seconds."""
        return runtime.forecast(self.spec, self.memory, self.data, self.site.here, self.product_flops)

    @property
    def whole_seconds(self) -> StudySeconds | None:
        """Forecast of the whole study on one device; None where times are not known."""
        return runtime.study_seconds(self.spec, self.forecast.candidates, self.data.facts)

    @property
    def on_one_device(self) -> bool:
        """Whether jobs follow one another on one device of this machine, and so can share a process."""
        return self.site.here and self.fleet.devices == 1

    @property
    def fleet_estimate(self) -> runtime.FleetEstimate | None:
        """Makespan, device hours and cost on the fleet; None on one device without a price, or without known times."""
        if self.fleet == runtime.Fleet(1, None):
            return None
        return runtime.estimate_fleet(self.whole_seconds, self.packs, self.forecast.candidates, self.fleet)

    @property
    def hypothetical(self) -> bool:
        """Whether the device need not exist: see `imagined_gpu`."""
        return not self.site.hardware

    @cached_property
    def largest_rank(self) -> int | None:
        """See `rankscope.plan.runtime.largest_fitting_rank`."""
        return runtime.largest_fitting_rank(self.spec, self.memory)

    def host_bytes(self, trials: Sequence[Trial]) -> int:
        """Predicted memory of the host for a process that trains `trials` together."""
        if self.prediction.device == "cuda":
            return self.prediction.base_bytes + GPU_HOST_BYTES
        return self.memory.peak_bytes(trials)

    def fitting(self, trials: Mapping[str, Trial], names: Sequence[str]) -> list[list[str]]:
        """`names`, of which the first is the control, divided into parts with it that fit into memory together."""
        control, *others = names
        parts: list[list[str]] = [[control]]
        for name in others:
            if len(parts[-1]) > 1 and not self.memory.fits([trials[one] for one in (*parts[-1], name)]):
                parts.append([control])
            parts[-1].append(name)
        return parts

    def seconds(self, trial: Trial) -> float:
        """Forecast of a trial's steps and evaluations, alone; 0 where no time is forecast."""
        return self.forecast.candidates[trial.candidate.name].runtime_seconds or 0.0

    def check(self, out: Path) -> None:
        """Raise where what is missing cannot be trained here or written to `out`: StudyError for a time limit without a
        forecast, ModelError for a base model that is larger than its device, StudyDirectoryError for too little room on
        the disk."""
        if self.packs or self.reference:
            check_base_fits(self.spec.model, self.prediction, self.site.free_bytes)
            check_disk(out, self.disk_bytes)
        if self.timed and any(one.runtime_seconds is None for one in self.forecast.candidates.values()):
            raise StudyError("--hours: no time can be forecast on this device", "Run it without --hours.")


def make_plan(
    spec: StudySpec,
    data: TokenizedData,
    site: Site,
    fleet: runtime.Fleet,
    study: StudyFolder | None = None,
    product_flops: float | None = None,
    remeasure: bool = False,
    timed: bool = False,
) -> Plan:
    """Work out the plan of a study on the equal devices of `fleet`, which are like that of `site`.

    New packs of a `timed` run have one seed each, so that what ends in time can be compared.

    A `study` that has begun keeps its division into packs, and only what it lacks is planned: trials that no pack has
    get new ones. Costs measured elsewhere are not mixed with new ones: only `remeasure`, which measures all of them
    again, does so on another machine or with other versions. Raises StudyError: a rank is larger than any update of the
    adapted layers can have, or nothing can be adapted; ModelError: transformers has no causal language model of this
    architecture.
    """
    prediction = predict(with_site_dtype(spec, site), torch.device(site.kind))
    memory = StudyMemory(spec, prediction, data.train, site.free_bytes)
    check_ranks(spec, prediction)
    reference = without_result(study, spec.reference_trials())
    missing = {trial.name for trial in without_result(study, spec.trials())}
    division = study.division() if study else Division({}, {})
    known, packs = division.trials(), dict(division.packs)
    if added := [trial for trial in spec.trials() if trial.name not in known]:
        seeds = sorted({trial.seed for trial in added})
        groups = [[trial for trial in added if trial.seed == seed] for seed in seeds] if timed else [added]
        fits, training, devices = memory.fits, spec.training, fleet.devices
        made = [divide_into_packs(group, prediction, fits, training, data.train, devices) for group in groups]
        packs |= division.named([*chain(*made)])
    unwritten = {pack: [trial for trial in members if trial.name in missing] for pack, members in packs.items()}
    packs = {pack: packs[pack] for pack, members in unwritten.items() if members}
    whole = disk_bytes(spec, prediction, list(unwritten.values()), reference, data, fleet.devices)
    elsewhere = changes_of_costs(study.machine, site) if study and exists(study.file("machine.json")) else []
    measured = study is not None and any(map(study.profile_repeats, spec.profiled()))
    remeasure = spec.measure.profiles and (remeasure if measured else bool(elsewhere))  # machine.json is the costs'
    profiles, unmeasured = missing_profiles(spec, study, remeasure), None
    if study and profiles and elsewhere and not remeasure:
        unmeasured = {
            "names": ", ".join(sorted({name for job in profiles for name in job.members or [job.profile]})),
            "elsewhere": "; ".join(elsewhere),
            "command": f"rankscope run {shlex.quote(str(study.path))} --remeasure",
        }
        profiles = []
    return Plan(
        spec=spec,
        site=site,
        data=data,
        prediction=prediction,
        memory=memory,
        packs=packs,
        reference=reference,
        profiles=profiles,
        disk_bytes=whole.beside(disk_taken(study) if study else Disk()),
        fleet=fleet,
        product_flops=product_flops,
        remeasure=remeasure,
        unmeasured=unmeasured,
        timed=timed,
    )


def with_site_dtype(spec: StudySpec, site: Site) -> StudySpec:
    """Return the study with the dtype that `auto` is where it runs."""
    return spec.model_copy(update={"model": spec.model.model_copy(update={"dtype": site.dtype})})


def imagined_gpu(model: ModelSpec, memory_bytes: int) -> Site:
    """Return the site of a GPU that need not exist; `auto` is bfloat16 there."""
    return Site("cuda", False, memory_bytes, "cuda", "bfloat16" if model.dtype == "auto" else model.dtype, {}, {})


def make_fleet(devices: int | None, price: float | None, slots: int = 1) -> runtime.Fleet:
    """Return the fleet of `--devices` and `--price`; without `devices` it has the launcher's slots. Raises StudyError:
    one of the two is out of range."""
    if devices is not None and devices < 1:
        raise StudyError(f"--devices {devices}: expected 1 or more", "For example --devices 8.")
    if price is not None and not 0 < price < math.inf:
        raise StudyError(f"--price {price}: expected a price above 0", "Price of one device-hour, e.g. --price 2.5.")
    return runtime.Fleet(devices or slots, price)
