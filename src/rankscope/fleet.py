"""What a study takes on several equal devices: makespan, device hours, cost."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rankscope.plan.runtime import START_SECONDS, Forecast, pack_seconds, study_seconds
from rankscope.schedule import longest_first, lower_bound, simulate
from rankscope.spec.models import StudySpec, Trial


class Fleet(NamedTuple):
    """Equal devices, and what they cost."""

    devices: int
    hourly_price: float | None
    """Of one device for an hour, in any currency."""


class Takes(NamedTuple):
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


def takes(
    spec: StudySpec, packs: Mapping[str, Sequence[Trial]], forecasts: Mapping[str, Forecast], fleet: Fleet
) -> Takes | None:
    """What the study takes of the fleet; None where times are not known."""
    alone = study_seconds(spec, forecasts)
    if alone is None:
        return None
    trials, profiles = alone
    jobs = pack_seconds(packs, forecasts) if fleet.devices > 1 else {"all packs in one process": trials}
    schedule = simulate(longest_first(jobs), jobs, fleet.devices)
    busy = schedule.busy_seconds + profiles
    return Takes(schedule.makespan, profiles, lower_bound(jobs, fleet.devices), busy, fleet)
