"""`run --until-settled` and `--hours`: seeds of the ranks in contention, and what a time limit leaves out."""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import rankscope
from launchers import FakeLauncher
from rankscope import pipeline
from rankscope.errors import RankscopeError, StudyError
from rankscope.files import write_json
from rankscope.jobs.job import Job, Settings
from rankscope.jobs.queue import TimeLimit
from rankscope.report.finish import Conclusion
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import unfinished
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui.outcome import show_failures, show_untried
from recording import RecordingProgress
from study.planting import plant_trial

UNTRAINED = 3.0
Losses = Callable[[int, int], float]  # by rank and seed


@pytest.fixture
def study(trained: Study, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> Study:
    """A copy of the shared study: ranks 2 and 8 with seeds 0 and 1."""
    monkeypatch.setattr("rankscope.report.finish.write_cards", lambda *_: None)  # whose hashes are planted as well
    shutil.copytree(trained.path, tmp_path / "study")
    return Study.open(tmp_path / "study")


def train(study: StudyFolder, name: str, losses: Losses) -> None:
    """Leave what a trial leaves, with these losses, from the files of one that was trained."""
    (trial,) = [trial for trial in study.trials if trial.name == name]
    source = study.path / "trials" / "r002-lr3e-2-s0"
    folder = study.trial_folder(trial)
    shutil.copytree(source, folder, dirs_exist_ok=True)
    done = StudyFolder.open(study.path).trial_record(study.trials[0])
    update = {"trial": name, "status": "done", "reason": None, **trial.model_dump(mode="json")}
    done.model_copy(update=update).write(folder / "trial.json")
    plant_trial(study, trial, UNTRAINED, losses(trial.candidate.rank, trial.seed), noise=0.01)


def launcher(losses: Losses, fails: Callable[[str], bool] = lambda _: False) -> FakeLauncher:
    """Trains packs at once; a trial that `fails` leaves nothing, and ends the run as a kill would."""

    def ends(path: Path, job: Job) -> RankscopeError | None:
        study = StudyFolder.open(path)
        for pack, names in job.content.get("packs", {}).items():
            for name in names:
                if fails(name):
                    raise KeyboardInterrupt
                train(study, name, losses)
            write_json(path / "packs" / pack / "pack.json", {"pack": pack, "trials": names, "results": {"steps": 5}})
        return None

    return FakeLauncher(ends)


def look(study: Study, losses: Losses, until_settled: bool = True, **more: Any) -> tuple[Conclusion, list[str]]:
    fails, limit = more.pop("fails", lambda _: False), more.pop("limit", None)
    for trial in study.trials:
        if study.trial_record(trial).status == "done":
            plant_trial(study, trial, UNTRAINED, losses(trial.candidate.rank, trial.seed), noise=0.01)
    spec, progress = study.spec.model_copy(update=more), RecordingProgress()
    how = Settings(limit=limit, until_settled=until_settled)
    found = pipeline.run_looks(spec, study.path, launcher(losses, fails), progress, how)
    return found, progress.lines


def seeds(study: Study) -> dict[int, list[int]]:
    """Seeds of each rank that have finished."""
    done: dict[int, list[int]] = {rank: [] for rank in sorted(study.spec.ranks)}
    for trial in study.trials:
        if study.trial_record(trial).status == "done":
            done[trial.candidate.rank].append(trial.seed)
    return done


def open_below(rank: int, seed: int) -> float:
    """Rank 2 far behind, 4 on the margin with much noise, and 8 the best."""
    return {2: 2.5, 4: 2.05 + 0.03 * (-1) ** seed, 8: 2.0}[rank] + 0.0005 * (seed % 3)


def test_seeds_are_added_to_ranks_in_contention_alone(study: Study) -> None:
    found, lines = look(study, open_below, ranks=(2, 4, 8))
    assert seeds(found.study)[2] == [0, 1, 2], "shown to be worse at the first planned look"
    assert seeds(found.study)[4] == seeds(found.study)[8] == list(range(12)), "the last look"
    assert found.study.spec.seeds == (0, 1)
    assert found.study.spec.seeds_by_rank == {2: (2,), 4: tuple(range(2, 12)), 8: tuple(range(2, 12))}
    assert found.verdict["next_look"] is None
    assert {row["rank"]: row["seeds"] for row in found.verdict["comparison"]} == {2: 3, 4: 12, 8: 12}
    said = [line for line in lines if line.startswith("Not settled")]
    assert said == [
        "Not settled: ranks 2, 4, 8 get seeds, up to 3",
        *(f"Not settled: ranks 4, 8 get seeds, up to {planned}" for planned in (5, 8, 12)),
    ]


def test_a_settled_study_gets_no_seed(study: Study) -> None:
    found, lines = look(study, lambda rank, seed: {2: 2.9, 8: 2.0}[rank] + 1e-5 * seed)
    assert (found.verdict["outcome"], found.verdict["undetermined"]) == ("recommended", [])
    assert seeds(found.study) == {2: [0, 1], 8: [0, 1]}
    assert not [line for line in lines if line.startswith("Not settled")]


@pytest.mark.slow
def test_a_killed_run_is_taken_up_and_ends_as_one_that_was_not(study: Study, tmp_path: Path) -> None:
    shutil.copytree(study.path, tmp_path / "other")
    whole, _ = look(Study.open(tmp_path / "other"), open_below, ranks=(2, 4, 8))
    with pytest.raises(KeyboardInterrupt):
        look(study, open_below, ranks=(2, 4, 8), fails=lambda name: name.endswith("s4"))
    killed = Study.open(study.path)
    assert killed.spec.seeds_by_rank == {2: (2,), 4: (2, 3, 4), 8: (2, 3, 4)}
    assert unfinished(killed)
    found, _ = look(killed, open_below)
    assert seeds(found.study) == seeds(whole.study)
    assert found.verdict == whole.verdict


def test_one_seed_is_no_look(study: Study) -> None:
    found, _ = look(study, open_below, until_settled=False, ranks=(2, 4, 8))
    assert found.verdict["next_look"] == {"ranks": [2, 4, 8], "seeds": 3}
    assert seeds(found.study) == {rank: [0, 1] for rank in (2, 4, 8)}


def hour(monkeypatch: pytest.MonkeyPatch, runtimes: Mapping[int, float]) -> TimeLimit:
    """A limit of an hour on a clock that stands, and forecasts of these seconds for a trial of each rank."""
    monkeypatch.setattr("rankscope.jobs.queue.time.monotonic", lambda: 0.0)
    monkeypatch.setattr(TimeLimit, "count", lambda *_: None)  # jobs end at once here
    monkeypatch.setattr("rankscope.plan.plan.Plan.seconds", lambda _, trial: runtimes[trial.candidate.rank])
    return TimeLimit(3600.0)


def test_what_would_end_after_the_limit_is_not_begun_and_is_named(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packs of a run with a limit have one seed each. That of the first seed, of rank 4 alone, still fits."""
    limit = hour(monkeypatch, {2: 60.0, 4: 60.0, 8: 4000.0})
    found, _ = look(study, open_below, False, limit=limit, ranks=(2, 4, 8), seeds=(0, 1, 2))
    assert seeds(found.study) == {2: [0, 1], 4: [0, 1], 8: [0, 1]}, "not the third seed, of all three ranks"
    console = Console(record=True, width=200)
    show_untried(found.study, console, load("en"))
    assert show_failures(found.study, console, load("en")), "the exit code tells that trials are missing"
    told = console.export_text()
    assert "Not tried, since it would have ended after the time given: r002-lr3e-2 (seeds 2); r004-lr3e-2" in told
    assert f"To go on:\n  rankscope run {found.study.path}" in told
    assert "pending" not in told
    later, _ = look(Study.open(study.path), open_below, False)
    assert seeds(later.study) == {rank: [0, 1, 2] for rank in (2, 4, 8)}


def test_a_look_that_would_end_after_the_limit_is_the_last(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = hour(monkeypatch, dict.fromkeys((2, 4, 8), 1500.0))
    found, _ = look(study, open_below, limit=limit, ranks=(2, 4, 8))
    assert seeds(found.study) == {rank: [0, 1] for rank in (2, 4, 8)}
    assert found.study.spec.seeds_by_rank == dict.fromkeys((2, 4, 8), (2,)), "the next run goes on from here"


@pytest.mark.parametrize("hours", [0.0, -1.0, float("nan"), float("inf")])
def test_hours_are_above_zero(hours: float) -> None:
    with pytest.raises(StudyError, match=r"--hours .*: expected hours above 0\n.*--hours 2"):
        rankscope.run(hours=hours)
