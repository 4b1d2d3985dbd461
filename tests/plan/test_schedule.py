"""Jobs on several devices: the order, how far from the bound, and what a study takes of them."""

import random
from collections.abc import Callable
from itertools import permutations

import pytest
import torch

from rankscope.plan.costs import CostModel
from rankscope.plan.memory import StudyMemory
from rankscope.plan.packs import FULL_STEP_TOKENS, divide_into_packs, longest_first, lower_bound, simulate
from rankscope.plan.runtime import Fleet, Forecast, estimate_fleet, study_seconds
from rankscope.spec.models import DataSpec, ModelSpec, StudySpec
from rankscope.study.folder import Division
from rankscope.study.missing import START_SECONDS
from rows import rows_of

PLENTY = 10**15


def test_the_longest_begins_first_and_names_decide_between_equals() -> None:
    assert longest_first({"b": 1.0, "a": 1.0, "c": 3.0, "d": 2.0}) == ["c", "d", "a", "b"]
    assert longest_first({}) == []


def test_a_device_that_is_free_takes_the_next() -> None:
    seconds = {"a": 5.0, "b": 3.0, "c": 3.0, "d": 2.0, "e": 1.0}
    schedule = simulate(longest_first(seconds), seconds, 2)
    assert list(schedule.devices.items()) == [("a", 0), ("b", 1), ("c", 1), ("d", 0), ("e", 1)]
    assert schedule.makespan == 7
    assert lower_bound(seconds, 2) == 7
    assert lower_bound(seconds, 4) == 5  # the longest is not divided
    assert simulate([], {}, 3).makespan == lower_bound({}, 3) == 0


def test_the_makespan_keeps_grahams_bound() -> None:
    """At most (4 - 1/N) / 3 of the best makespan, found here by trying every order; and some draws need that room."""
    draws, worse = random.Random(0), 0
    for _ in range(60):
        devices = draws.choice((2, 3))
        seconds = {str(job): float(draws.randint(1, 9)) for job in range(6)}
        made = simulate(longest_first(seconds), seconds, devices).makespan
        best = min(simulate(order, seconds, devices).makespan for order in permutations(seconds))
        assert best >= lower_bound(seconds, devices)
        assert best <= made <= (4 - 1 / devices) / 3 * best
        worse += made > best
    assert worse


@pytest.fixture(scope="module")
def spec() -> StudySpec:
    model = ModelSpec(id="embedded", device="cpu", dtype="float32")
    return StudySpec(model=model, data=DataSpec(id="unused"), ranks=(8, 32, 128, 256), seeds=tuple(range(25)))


@pytest.fixture(scope="module")
def prediction(spec: StudySpec, predicted_once: Callable[[StudySpec, torch.device], CostModel]) -> CostModel:
    return predicted_once(spec, torch.device("cpu"))


@pytest.mark.parametrize("devices", [2, 3, 7, 10, 33, 100, 250])
def test_packs_for_several_devices_keep_all_of_them_busy(spec: StudySpec, prediction: CostModel, devices: int) -> None:
    rows, trials = rows_of(FULL_STEP_TOKENS["cpu"] // (6 * spec.training.batch_size)), spec.trials()  # six fill a step
    packs = divide_into_packs(trials, prediction, lambda pack: True, spec.training, rows, devices)
    assert sorted(trial.name for pack in packs for trial in pack) == sorted(trial.name for trial in trials)
    assert len(packs) >= min(devices, len(trials))
    assert max(map(len, packs)) <= 6
    flops = {name: float(cost.flops_per_token) for name, cost in prediction.costs.items()}
    alone = {trial.name: flops[trial.candidate.name] for trial in trials}
    jobs = {pack[0].name: sum(alone[trial.name] for trial in pack) for pack in packs}
    makespan = simulate(longest_first(jobs), jobs, devices).makespan
    singles = simulate(longest_first(alone), alone, devices).makespan
    if devices != 33:  # of 100 trials, 33 devices have three and one has four: nothing comes nearer
        assert makespan <= 1.05 * lower_bound(alone, devices)
    assert makespan <= 1.05 * singles
    assert len(packs) < len(trials) or devices >= 33, "no more processes than it takes"


def test_packs_for_several_devices_fit_in_each(spec: StudySpec, prediction: CostModel) -> None:
    rows, trials = rows_of(5), spec.trials()
    two = [trial for trial in trials if trial.candidate.rank == 256][:2]
    memory = StudyMemory(spec, prediction, rows, PLENTY)
    memory.free = int(memory.peak_bytes(two) / 0.9) + 1000
    packs = divide_into_packs(trials, prediction, memory.fits, spec.training, rows, 2)
    assert max(map(memory.peak_bytes, packs)) <= 0.9 * memory.free
    assert max(map(len, packs)) > 2


def test_trials_that_train_alone_count_as_work_too(spec: StudySpec, prediction: CostModel) -> None:
    mixed = spec.model_copy(update={"variants": ("dora",), "seeds": (0, 1)})
    unknown = prediction._replace(params={one.name: 1000 for one in mixed.candidates()}, costs={})
    packs = divide_into_packs(mixed.trials(), unknown, lambda pack: True, mixed.training, rows_of(5), 4)
    alone = [pack for pack in packs if not pack[0].candidate.packable]
    assert [len(pack) for pack in alone] == [1] * 8
    assert packs[-8:] == alone
    assert [len(pack) for pack in packs[:-8]] == [2] * 4, "two rounds of eight, and these four: 16 / 4 on each device"


def forecast_of(seconds: float | None) -> Forecast:
    return Forecast(1, None, None, None, None if seconds is None else seconds / 100, seconds)


def test_what_a_study_takes_of_a_fleet(spec: StudySpec) -> None:
    spec = spec.model_copy(update={"ranks": (8, 128), "seeds": (0, 1, 2)})
    forecasts = {"r008-lr2e-4": forecast_of(100.0), "r128-lr2e-4": forecast_of(200.0)}
    low, high = spec.trials()[::2], spec.trials()[1::2]
    packs = Division({}, {}).named([[low[0], high[0]], [high[1]], [high[2]], [low[1], low[2]]])
    alone = study_seconds(spec, forecasts, {})
    assert alone is not None
    found = estimate_fleet(alone, packs, forecasts, Fleet(2, 2.5))
    assert found is not None
    # 300 | 200, then 200 where 200 has ended, and last 200 where 300 has
    assert found.trials_seconds == 500 + 2 * START_SECONDS
    assert found.least_trials_seconds == 450 + 2 * START_SECONDS
    assert found.profiles_seconds == alone[1] > 0, "one at a time, whatever devices there are"
    assert found.busy_seconds == 900 + 4 * START_SECONDS + alone[1]
    assert found.device_hours == 2 * (found.trials_seconds + alone[1]) / 3600
    assert found.cost == 2.5 * found.device_hours
    assert found.describe()["busy_device_hours"] == found.busy_seconds / 3600
    single = estimate_fleet(alone, packs, forecasts, Fleet(1, None))
    assert single is not None
    assert (single.trials_seconds, single.cost) == (900 + START_SECONDS, None)  # one process trains them all
    unknown = study_seconds(spec, forecasts | {"r008-lr2e-4": forecast_of(None)}, {})
    assert estimate_fleet(unknown, packs, forecasts, Fleet(2, None)) is None
