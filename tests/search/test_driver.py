"""The search's loop, over made-up losses: places, rungs, the budget, what was stopped and goes on."""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import pytest

from rankscope.search import sampling
from rankscope.search.driver import StepResult, drive
from rankscope.search.folder import Spent
from rankscope.search.sampling import make_study, open_journal, point_of, summary
from rankscope.search.space import SearchSpec, SearchTrial, resolve_search
from rankscope.spec.candidates import Candidate

VALUES: dict[str, Any] = {"model": {"id": "m"}, "data": {"id": "d"}}
STEP_TOKENS = [10, 11] * 9
"""Tokens of each of 18 steps; rungs are at steps 2 and 6."""
WHOLE = sum(STEP_TOKENS)


def asked(**options: Any) -> SearchSpec:
    return resolve_search(VALUES, {"ranks": "4..64", "learning_rates": "1e-5,1e-4,1e-3"} | options)


def good(candidate: Candidate) -> float:
    """The best of these is rank 16 at 1e-4."""
    return 2.0 + abs(math.log10(candidate.learning_rate) + 4) + 0.1 * abs(math.log2(candidate.rank) - 4)


class Pretended:
    """A trainer whose losses are known."""

    def __init__(self, loss: Callable[[Candidate], float] = good) -> None:
        self.loss = loss
        self.training: dict[str, SearchTrial] = {}
        self.steps: dict[str, int] = {}
        self.most = 0

    def add(self, asked: SearchTrial) -> None:
        assert asked.name not in self.training
        self.training[asked.name], self.steps[asked.name] = asked, 0
        self.most = max(self.most, len(self.training))

    def remove(self, name: str) -> None:
        del self.training[name]

    def step(self, steps: Mapping[str, int]) -> dict[str, float]:
        assert steps == {name: self.steps[name] for name in self.training}, "each at its own step, and all of them"
        for name in steps:
            self.steps[name] += 1
        return {name: self.loss(self.training[name].candidate) for name in steps}

    def evaluate(self, steps: Mapping[str, int]) -> dict[str, float]:
        return {name: self.loss(self.training[name].candidate) + 1 / step for name, step in steps.items()}


def run(spec: SearchSpec, trainer: Pretended, places: int = 4, study: optuna.Study | None = None) -> list[StepResult]:
    return list(drive(study or make_study(spec), spec, trainer, STEP_TOKENS, places))


def test_a_stopped_candidate_s_place_is_taken_at_once() -> None:
    trainer, spec = Pretended(), asked(trials=15)
    moments = run(spec, trainer)
    assert len(trainer.steps) == 15
    assert trainer.most == 4
    assert set(trainer.steps.values()) <= {2, 6, 18}, "candidates are stopped at rungs only"
    assert sum(step < 18 for step in trainer.steps.values()) >= 9
    begun: set[str] = set()
    for before, after in itertools.pairwise(moments):
        begun |= before.losses.keys()
        taken = after.losses.keys() - begun
        assert len(taken) == min(len(before.ended), 15 - len(begun)), "as many begin as have ended"
        assert {after.losses[name][0] for name in taken} <= {1}


def test_nothing_is_drawn_once_no_candidate_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[object] = []
    original = sampling.draw
    monkeypatch.setattr(sampling, "draw", lambda *arguments: draws.append(original(*arguments)) or draws[-1])
    run(asked(trials=3), Pretended())
    assert [one is None for one in draws] == [False, False, False, True]


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_the_best_of_a_small_space_is_found(sampler: str) -> None:
    """15 candidates, and a budget of all: each is asked for once, by either sampler."""
    spec = asked(trials=100, sampler=sampler, pruner="none")
    study, trainer = make_study(spec), Pretended()
    run(spec, trainer, study=study)
    result = summary(study, spec, Spent(), True)
    points = [(c["rank"], c["learning_rate"]) for c in result["candidates"]]
    assert sorted(points) == sorted((point.rank, point.learning_rate) for point in spec.space.points())
    best = next(c for c in result["candidates"] if c["trial"] == result["best"])
    assert (best["rank"], best["learning_rate"]) == (16, 1e-4)
    assert result["share_stopped"] == 0


def test_halving_finds_it_too_and_stops_most() -> None:
    spec = asked(trials=15)
    study, trainer = make_study(spec), Pretended()
    moments = run(spec, trainer, study=study)
    result = summary(study, spec, Spent(), True)
    best = next(c for c in result["candidates"] if c["trial"] == result["best"])
    assert (best["rank"], best["learning_rate"]) == (16, 1e-4)
    assert result["share_stopped"] >= 0.6
    assert moments[-1].spent.tokens < 15 * WHOLE / 2


@pytest.mark.parametrize("pruner", ["halving", "none"])
@pytest.mark.parametrize("tokens", [WHOLE, WHOLE + 1, 3 * WHOLE - 1, 5 * WHOLE + 7])
def test_the_budget_of_tokens_is_kept(tokens: int, pruner: str) -> None:
    spec = asked(tokens=tokens, pruner=pruner)
    study, trainer = make_study(spec), Pretended()
    moments = run(spec, trainer, study=study)
    spent = moments[-1].spent.tokens
    assert spent == sum(sum(STEP_TOKENS[:step]) for step in trainer.steps.values())
    assert spent <= tokens
    result = summary(study, spec, Spent(), True)
    assert result["best"], "a budget of one schedule trains one candidate to its end"
    assert sum(candidate["tokens"] for candidate in result["candidates"]) == spent
    if pruner == "none":
        assert len(trainer.steps) == tokens // WHOLE


def test_the_budget_of_time_is_kept() -> None:
    """Each look at the clock takes a second; 30 seconds are given."""
    seconds = iter(range(10_000))
    spec = asked(hours=30 / 3600, pruner="none")
    study = make_study(spec)
    moments = list(drive(study, spec, Pretended(), STEP_TOKENS, 2, clock=lambda: float(next(seconds))))
    assert 18 <= len(moments) <= 30
    assert not any("training" in c["state"] for c in summary(study, spec, Spent(), True)["candidates"])


def test_a_diverged_candidate_harms_no_other_and_is_avoided() -> None:
    def loss(candidate: Candidate) -> float:
        return math.nan if candidate.learning_rate == 1e-3 else good(candidate)

    spec = asked(trials=15)
    study, trainer = make_study(spec), Pretended(loss)
    run(spec, trainer, study=study)
    result = summary(study, spec, Spent(), True)
    states = {(c["rank"], c["learning_rate"]): c for c in result["candidates"]}
    diverged = [c for (_, rate), c in states.items() if rate == 1e-3]
    assert diverged
    assert {c["state"] for c in diverged} == {"diverged"}
    assert {c["reason"] for c in diverged} == {"loss or gradient not finite at step 1"}
    assert {c["state"] for (_, rate), c in states.items() if rate != 1e-3} <= {"done", "stopped"}
    assert result["best"]


def test_what_was_stopped_goes_on_with_the_same_candidates(tmp_path: Path) -> None:
    """The process dies in mid-training, with half a line in the journal."""
    spec, file = asked(trials=8, learning_rates="1e-5..1e-3"), tmp_path / "optuna.log"
    first, moments = Pretended(), []
    for moment in drive(open_journal(file, spec), spec, first, STEP_TOKENS, 3):
        moments.append(moment)
        if len(moments) == 5:
            break
    with file.open("a") as journal:
        journal.write('{"op_code":5,"wor')
    left = dict(first.training)
    assert len(left) == 3
    ended = {name: step for name, step in first.steps.items() if name not in left}
    assert ended

    spent = moments[-1].spent
    study, second = open_journal(file, spec), Pretended()
    goes_on = drive(study, spec, second, STEP_TOKENS, 3, spent)
    next(goes_on)
    again, before = ([one.candidate for one in of.training.values()] for of in (second, first))
    assert again == before, "the same candidates, from their first step"
    list(goes_on)
    result = summary(study, spec, spent, True)
    assert len(result["candidates"]) == 8, "no candidate counts twice"
    assert not ended.keys() & second.steps.keys(), "what had ended stays ended"
    assert {c["state"] for c in result["candidates"]} <= {"done", "stopped"}
    loaded = optuna.load_study(study_name="rankscope", storage=study._storage)
    assert len(loaded.trials) == 8 + len(left)
    failed = [trial for trial in loaded.trials if trial.state == optuna.trial.TrialState.FAIL]
    assert {trial.user_attrs["trial"] for trial in failed} == left.keys()


def test_it_ends_between_two_steps_where_asked_to() -> None:
    spec, trainer = asked(trials=8), Pretended()
    study = make_study(spec)
    count: Iterator[int] = iter(range(100))
    moments = list(drive(study, spec, trainer, STEP_TOKENS, 3, stopped=lambda: next(count) >= 4))
    assert len(moments) == 4
    running = study.get_trials(states=[optuna.trial.TrialState.RUNNING])
    assert len(running) == len(trainer.training) > 0


def test_the_same_seed_gives_the_same_search() -> None:
    def order(seed: int) -> list[tuple[int, float]]:
        spec = asked(trials=12, learning_rates="1e-5..1e-3").model_copy(update={"seed": seed})
        study = make_study(spec)
        run(spec, Pretended(), study=study)
        return [point_of(trial)[:2] for trial in study.trials]

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_a_candidate_that_begins_again_does_not_compete_with_itself(tmp_path: Path) -> None:
    """Its loss at the first rung is slightly higher this time; it is the best there is."""
    spec, file = asked(trials=1), tmp_path / "optuna.log"
    for loss, ends in ((2.0, 4), (2.0001, 18)):
        trainer = Pretended(lambda _, loss=loss: loss)  # type: ignore[misc]
        for moment in drive(open_journal(file, spec), spec, trainer, STEP_TOKENS, 1):
            if next(iter(moment.losses.values()))[0] == ends:
                break
    assert set(trainer.steps.values()) == {18}
