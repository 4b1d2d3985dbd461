"""One suite over all kinds of job: what holds for each of them, whatever it does."""

import importlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import rankscope
from folders import write_data, write_model
from launchers import HERE, FakeLauncher
from rankscope.errors import KilledError, ModelError, OutOfMemoryError, RankscopeError, StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.jobs import answers, curve, packs, profiles, reference, rows, task
from rankscope.jobs.job import Job, Run
from rankscope.jobs.queue import run_jobs
from rankscope.pipeline import KINDS
from rankscope.plan.plan import make_fleet, make_plan
from rankscope.search import job as search
from rankscope.search.run import run as run_search
from rankscope.search.space import resolve_search
from rankscope.study.records import LogEntry
from rankscope.study.scores import task_file
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.train.prepare import study_data
from recording import RecordingProgress

OPTIONS: dict[str, Any] = {"ranks": [2, 4], "seeds": [0], "steps": 3, "learning_rates": [1e-2], "device": "cpu"}
SETS = (
    "measure.repeats=1", "measure.steps=1", "measure.rounds=2",
    "measure.warmup_steps=1", "measure.answers=1", "measure.answer_tokens=2",
    "data.eval_rows=4", "training.evals=1", "training.batch_size=2", "reference.full=true",
    "measure.task=exact_match", "measure.task_tokens=2",
)  # fmt: skip

WORDS, HANGUL = load("ko"), re.compile("[가-힣]")
Ended = Callable[[Job, RankscopeError | None, Sequence[Job]], list[Job]]


class Kind(NamedTuple):
    """A kind of job on a folder that lacks what it makes."""

    module: Any
    folder: Path
    missing: Callable[[], list[Job]]  # the jobs that the folder still needs
    ended: Ended
    said: list[str]  # what the user is told


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Study:
    root = tmp_path_factory.mktemp("kinds")
    files = {"model": str(write_model(root / "model")), "dataset": str(write_data(root / "data.json"))}
    return rankscope.run(out=root / "study", sets=SETS, progress=RecordingProgress(), **files, **OPTIONS)


MADE = {
    packs: ("trials", "packs"),
    profiles: ("profiles",),
    reference: ("reference",),
    answers: ("answers",),
    task: ("task",),
    curve: (),
    rows: (),
}
"""Folders of a study that each kind writes."""


def of_study(module: Any, whole: Study, folder: Path) -> Kind:
    shutil.copytree(whole.path, folder)
    for name in MADE[module]:
        shutil.rmtree(folder / name)
    study, said = Study.open(folder), list[str]()
    for trial in study.trials if module is task else ():
        task_file(study, trial).unlink()
    if module is curve:
        trials = [trial for trial in study.trials if trial.candidate.rank == 4]
        missing = partial(curve.missing, study, trials, [1, 4], 0, said.append, WORDS)
        return Kind(curve, folder, lambda: curve.jobs(study, missing(), 1), partial(curve.ended, study), said)
    if module is rows:
        make_stale(study)
    plan = partial(make_plan, study.spec, study_data(study.spec, study), HERE, make_fleet(None, None), study)
    run = Run(study, plan(), said.append, WORDS)
    return Kind(module, folder, lambda: module.jobs(run._replace(plan=plan())), partial(module.ended, run), said)


def make_stale(study: Study) -> None:
    """Have the trials evaluated on fewer rows than the study has, by their records."""
    for trial in study.trials:
        file = study.trial_folder(trial) / "trial.json"
        write_json(file, read_json(file) | {"tokens_sha256": "before"})
    study.log.append(LogEntry(when="", version="", tokens_sha256=["before", study.data_facts["tokens_sha256"]]))
    study.publish()


@pytest.fixture(scope="module")
def searched(whole: Study, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A search that lacks all but its job."""
    values = {"model": whole.spec.model.id, "dataset": whole.spec.data.id, "device": "cpu", "steps": 2}
    space = {"ranks": "2", "learning_rates": "1e-2", "alpha": "8", "trials": 1}
    spec = resolve_search({}, values | space, ("data.eval_rows=4", "training.batch_size=2"))
    folder = tmp_path_factory.mktemp("searched") / "search"
    with pytest.raises(KilledError):
        run_search(spec, folder, FakeLauncher(lambda *_: KilledError("killed")), lambda line: None)
    return folder


def of_search(folder: Path) -> Kind:
    found, said = search.Search.open(folder), list[str]()

    def missing() -> list[Job]:
        result = found.result()
        return [] if result is not None and result["finished"] else [search.job_of(found, 1)]

    return Kind(search, folder, missing, partial(search.ended, found, said.append, WORDS), said)


@pytest.fixture(params=[*MADE, search], ids=lambda module: module.__name__.removeprefix("rankscope."))
def kind(request: pytest.FixtureRequest, whole: Study, searched: Path, tmp_path: Path) -> Kind:
    if request.param is search:
        return of_search(shutil.copytree(searched, tmp_path / "search"))
    return of_study(request.param, whole, tmp_path / "study")


def run(kind: Kind, error: RankscopeError | None = None) -> list[Job]:
    """Run the missing jobs in this process, or have each end with an error without its work; return what ran."""

    def work(folder: Path, job: Job) -> RankscopeError | None:
        if error is None:
            importlib.import_module(job.module).work(folder, json.loads(json.dumps(dict(job.content))))
        return error

    launcher = FakeLauncher(work)
    run_jobs(launcher, kind.folder, kind.missing(), lambda: None, kind.ended)
    return launcher.started


def test_every_kind_is_under_test() -> None:
    assert set(KINDS) < {*MADE, search}
    files = {path.stem for path in Path(packs.__file__).parent.glob("*.py") if "\ndef work(" in path.read_text()}
    assert files == {module.__name__.rpartition(".")[2] for module in MADE}


def test_what_is_missing_is_done_and_then_nothing_is(kind: Kind) -> None:
    started = run(kind)
    assert started
    assert {job.module for job in started} == {kind.module.__name__}
    for job in started:
        assert not Path(job.folder).is_absolute()
        assert (kind.folder / job.folder).resolve().is_relative_to(kind.folder.resolve())
        for name in job.shared:
            assert (kind.folder / name).exists()
    assert kind.missing() == []


def test_a_job_that_is_killed_is_missing_again(kind: Kind) -> None:
    missing = kind.missing()
    try:
        run(kind, KilledError("killed"))
    except KilledError:  # a command of one kind alone ends with it
        assert kind.module in (curve, search)
    assert kind.missing() == missing


@pytest.mark.parametrize("error", [ModelError("another model"), StudyDirectoryError("the disk is full")])
def test_an_error_that_every_job_would_hit_ends_all_but_the_optional(kind: Kind, error: RankscopeError) -> None:
    if kind.module in (answers, task):
        run(kind, error)
        name = kind.module.__name__.rpartition(".")[2]
        assert Study.open(kind.folder).open_failures()[name].reason == error.what
    else:
        with pytest.raises(type(error), match=error.what):
            run(kind, error)


def test_what_is_said_of_a_failure_is_in_the_language_of_the_run(kind: Kind) -> None:
    with suppress(OutOfMemoryError):  # a command of one kind alone ends with it
        run(kind, OutOfMemoryError("no room"))
    assert kind.said or kind.module in (curve, search)
    assert [line for line in kind.said if not HANGUL.search(line)] == []
    assert any("no room" in line for line in kind.said) == bool(kind.said), "the error can be searched for"


def test_jobs_that_wait_are_kept_in_their_order(kind: Kind) -> None:
    others = [Job("other", {"profile": "other"}, f"other/{number}") for number in range(3)]
    job = kind.missing()[0]
    left = kind.ended(job, None, others)
    assert [other for other in left if other.module == "other"] == others
