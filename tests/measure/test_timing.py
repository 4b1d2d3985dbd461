"""Time measured side by side: differences that are planted, and none, are found on a machine with other work."""

import math
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankscope.data.tokens import TokenizedData
from rankscope.measure import timing
from rankscope.measure.timing import Rounds, Turn, median_ratio, summarise, time_candidates
from rankscope.spec.candidates import CONTROL
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import resolve_spec
from rankscope.train.prepare import prepare_data

ROUNDS = 6


@pytest.fixture(scope="module")
def spec(root: Path) -> StudySpec:
    return resolve_spec(
        {
            "model": {"id": str(root / "model"), "device": "cpu"},
            "data": {"id": str(root / "data.json"), "eval_rows": 4},
            "ranks": [2, 4],
            "training": {"steps": 20, "batch_size": 2},
            "measure": {"warmup_steps": 1, "rounds": ROUNDS},
        }
    )


@pytest.fixture(scope="module")
def data(spec: StudySpec) -> TokenizedData:
    return prepare_data(spec)


def timed(spec: StudySpec, data: TokenizedData, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Rank 4 takes three times as long as it does, on batches that all candidates share."""
    own = timing.train_step

    def step(engine: Any, states: Any, *rest: Any) -> Any:
        start = time.perf_counter()
        metrics = own(engine, states, *rest)
        share = 2 if states[0].trial.candidate.rank == 4 else 0
        end = time.perf_counter() + share * (time.perf_counter() - start)
        while time.perf_counter() < end:
            pass
        return metrics

    monkeypatch.setattr(timing, "train_step", step)
    monkeypatch.setattr(timing, "MAX_EXTRA_SECONDS", 0.0)
    return time_candidates(spec, spec.profiled(), data)


def test_a_candidate_that_takes_longer_is_told_from_its_equals(
    spec: StudySpec, data: TokenizedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = timed(spec, data, monkeypatch)
    summaries = found["summaries"]
    assert set(summaries) == {"r002", "r004", CONTROL}
    assert summaries["r004"]["step_ratio"] == pytest.approx(3, rel=0.25)
    assert summaries["r002"]["step_ratio"] == pytest.approx(1, rel=0.25)
    assert (summaries[CONTROL]["step_ratio"], summaries[CONTROL]["step_ratio_se"]) == (1, 0)
    assert summaries["r004"]["rounds"] == len(found["tokens"]) == ROUNDS
    assert len(set(found["tokens"])) > 1, "the schedule's batches, not one of them"
    assert all(len(of_each) == ROUNDS for column in found["seconds"].values() for of_each in column.values())
    assert found["engine"] == "packed"


def test_rounds_go_on_until_the_ratio_is_narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounds(spread: float, count: int = 50) -> Rounds:
        draw = random.Random(0)
        turns = [
            {n: Turn(math.exp(draw.gauss(0, spread)), 1.0, 1.0, 1.0) for n in (CONTROL, "r008")} for _ in range(count)
        ]
        return Rounds(turns, [1] * count, 1.0, None)

    assert timing._narrow(rounds(0.01))
    assert not timing._narrow(rounds(0.1))
    assert not timing._narrow(rounds(0.0, count=1)), "one round tells nothing of its error"


def test_a_burst_of_other_work_does_not_move_the_ratio() -> None:
    draw = np.random.default_rng(0)
    speed = np.exp(draw.normal(0, 0.5, 101))  # of the machine, which both meet
    control, other = speed * np.exp(draw.normal(0, 0.02, (2, 101)))
    other = other * np.where(np.arange(101) % 5 == 0, 20, 1.05)
    found = median_ratio(other, control)
    assert found.ratio == pytest.approx(1.05, rel=0.03)
    assert 0.001 < found.se < 0.01


def test_the_error_of_a_ratio_is_that_of_a_median() -> None:
    draw = np.random.default_rng(1)
    logs = draw.normal(0, 0.1, (2000, 25))
    found = [median_ratio(np.exp(row), np.ones(25)) for row in logs]
    spread = float(np.std([math.log(one.ratio) for one in found]))
    assert np.mean([one.se for one in found]) == pytest.approx(spread, rel=0.1)


def test_a_schedule_is_its_tokens_its_evaluations_and_a_slow_first_step() -> None:
    turns = [{CONTROL: Turn(1.0, 0.1, 2.0, 0.1), "r008": Turn(1.5, 0.1, 3.2, 0.2)}] * 4
    work = 100, 400 / 20  # tokens, and evaluations
    rounds = Rounds(turns, [10] * 4, first_step_seconds=3.0, cpu_pressure=0.05)
    control, other = (summarise(rounds, name, *work) for name in (CONTROL, "r008"))
    assert control["runtime_seconds"] == pytest.approx(100 / 10 * 1.0 + 400 / 20 * 0.1 + 2.0)
    assert other["runtime_ratio"] == pytest.approx((15 + 2) / (10 + 2))
    assert other["step_ratio"] == pytest.approx(1.5)
    assert other["cpu_ratio"] == pytest.approx(1.6)
    assert other["tokens_per_second"] == pytest.approx(10 / 1.5)
    assert other["step_seconds_median"] == pytest.approx(1.5)
    assert other["cpu_pressure"] == 0.05


def test_a_busy_machine_is_compared_by_processor_time() -> None:
    rounds = Rounds([{CONTROL: Turn(1.0, 0.1, 2.0, 0.2), "r008": Turn(9.0, 0.1, 3.0, 0.2)}] * 4, [10] * 4, 1.0)
    work = 100, 400 / 20  # tokens, and evaluations
    busy = summarise(rounds._replace(cpu_pressure=0.5), "r008", *work)
    assert busy["step_ratio"] == pytest.approx(1.5)
    assert busy["runtime_ratio"] == pytest.approx((30 + 4) / (20 + 4))
    assert summarise(rounds._replace(cpu_pressure=0.05), "r008", *work)["step_ratio"] == pytest.approx(9)
    assert summarise(rounds._replace(cpu_pressure=0.5, on_cpu=False), "r008", *work)["step_ratio"] == pytest.approx(9)


def test_more_rounds_are_taken_while_ratios_are_uncertain(
    spec: StudySpec, data: TokenizedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "RATIO_WIDTH", 0.0)
    monkeypatch.setattr(timing, "MAX_EXTRA_SECONDS", 60.0)
    spec = spec.model_copy(update={"measure": spec.measure.model_copy(update={"rounds": 2})})
    assert len(time_candidates(spec, spec.profiled(), data)["tokens"]) == (1 + timing.EXTRA_ROUNDS) * 2


def test_the_order_of_candidates_changes_no_adapter(
    spec: StudySpec, data: TokenizedData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a neighbour: an adapter's start depends on its seed alone."""
    losses: dict[str, list[float]] = {}
    own = timing.train_step

    def step(engine: Any, states: Any, *rest: Any) -> Any:
        metrics = own(engine, states, *rest)
        losses.setdefault(states[0].trial.name, []).append(metrics[0].loss)
        return metrics

    monkeypatch.setattr(timing, "train_step", step)
    monkeypatch.setattr(timing, "MAX_EXTRA_SECONDS", 0.0)
    spec = spec.model_copy(update={"measure": spec.measure.model_copy(update={"rounds": 2})})
    candidates = spec.profiled()
    time_candidates(spec, candidates, data)
    forwards, losses = dict(losses), {}
    time_candidates(spec, dict(reversed(list(candidates.items()))), data)
    assert losses == forwards
    first, control, other = (losses[name] for name in sorted(losses))
    assert first == control != other, "the control is the first candidate once more"
