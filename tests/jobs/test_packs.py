"""Jobs that a launcher receives, their order, and the effect of how each ends; memory after a pack."""

import gc
import shutil
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from launchers import HERE, FakeLauncher
from rankscope.data.tokens import TokenizedData
from rankscope.errors import KilledError, ModelError, OutOfMemoryError, RankscopeError
from rankscope.files import write_json
from rankscope.jobs import packs as kind
from rankscope.jobs.job import Run
from rankscope.jobs.queue import run_jobs
from rankscope.plan.plan import make_fleet, make_plan
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.train.prepare import prepare_data
from recording import RecordingProgress


@pytest.fixture(scope="module")
def question(root: Path) -> tuple[StudySpec, TokenizedData]:
    asked = {"model": str(root / "model"), "dataset": str(root / "data.json")}
    spec = assemble({}, {**asked, "ranks": [2, 4, 16], "seeds": [0, 1], "steps": 3, "device": "cpu"})
    return spec, prepare_data(spec)


class PackLauncher(FakeLauncher):
    """A fake launcher with some slots. Jobs end with the errors of `ends`, later ones as after training."""

    def __init__(self, slots: int, study: Study, ends: Iterable[RankscopeError | None] = ()) -> None:
        left = iter(ends)
        super().__init__(lambda path, job: self._end(job.content, next(left, None)))
        self._slots, self._study = slots, study

    def slots(self) -> int:
        return self._slots

    def _end(self, job: Mapping[str, Any], error: RankscopeError | None) -> RankscopeError | None:
        for pack, trials in job["packs"].items():
            record = {"schema": 1, "pack": pack, "trials": trials, "results": None}
            if error is None:
                record["results"] = {
                    "steps": 3, "step_seconds": 1.0, "useful_flops_per_second": 1e9,
                    "rss_peak_bytes": 1, "gpu_allocated_peak_bytes": None,
                }  # fmt: skip
            write_json(self._study.file("packs", pack, "pack.json"), record)
            if error is not None:
                break  # the packs after it have not begun
        return error


def train(
    question: tuple[StudySpec, TokenizedData],
    path: Path,
    slots: int,
    ends: Iterable[RankscopeError | None] = (),
    **training: Any,
) -> tuple[Study, PackLauncher, RecordingProgress]:
    spec, data = question
    spec = spec.model_copy(update={"training": spec.training.model_copy(update=training)})
    study = Study.create(path / "study", spec)
    launcher, progress = PackLauncher(slots, study, ends), RecordingProgress()
    plan = make_plan(spec, data, HERE, make_fleet(None, None, slots), study)
    run = Run(study, plan, progress.say, load("en"))
    run_jobs(launcher, study.path, kind.jobs(run), progress.poll, partial(kind.ended, run))
    return study, launcher, progress


def packs(launcher: FakeLauncher) -> list[dict[str, list[str]]]:
    return [dict(job.content["packs"]) for job in launcher.started]


def test_on_one_device_all_packs_are_one_job(question: Any, tmp_path: Path) -> None:
    study, launcher, _ = train(question, tmp_path, 1, trials_per_pack=2)
    assert packs(launcher) == [{p: [t.name for t in trials] for p, trials in study.division().packs.items()}]
    assert launcher.started[0].folder == "packs/p000"


def test_isolated_trials_are_a_job_each(question: Any, tmp_path: Path) -> None:
    _, launcher, _ = train(question, tmp_path, 1, isolated=True)
    assert [len(job) for job in packs(launcher)] == [1] * 6


def test_over_several_devices_every_pack_is_a_job_and_the_longest_comes_first(question: Any, tmp_path: Path) -> None:
    study, _, _ = train(question, tmp_path, 1, trials_per_pack=1)
    assert [trials[0].candidate.rank for trials in study.division().packs.values()] == [2, 4, 16, 2, 4, 16]
    _, launcher, _ = train(question, tmp_path, 2, trials_per_pack=1)  # it began on one
    ranks = [int(trials[0][1:4]) for job in packs(launcher) for trials in job.values()]
    assert ranks == [16, 16, 4, 4, 2, 2]


def test_a_job_says_what_it_reads_and_what_memory_it_takes(question: Any, tmp_path: Path) -> None:
    spec, _ = question
    first = spec.trials()[0].name
    study = Study.create(tmp_path / "study", spec)
    known = {"schema": 1, "trial": first, "status": "interrupted", "model_sha256": "abc", "results": None, "files": {}}
    write_json(study.file("trials", first, "trial.json"), known)
    _, launcher, _ = train(question, tmp_path, 2)
    assert len(launcher.started) >= 2
    for job in launcher.started:
        (names,) = job.content["packs"].values()
        assert job.reads == [*(f"trials/{name}" for name in names), f"trials/{first}/trial.json"]
        assert 3.3e8 < job.memory_bytes < 2e9, "a process and more"


@pytest.mark.parametrize("slots", [1, 2])
def test_a_pack_without_room_is_divided_and_its_parts_come_next(question: Any, tmp_path: Path, slots: int) -> None:
    study, launcher, progress = train(question, tmp_path, slots, [OutOfMemoryError("no more")], trials_per_pack=3)
    begun = [pack for job in packs(launcher) for pack in job]
    if slots == 1:
        assert begun == ["p000", "p001", "p002", "p003", "p001"]
        assert [list(job) for job in packs(launcher)] == [["p000", "p001"], ["p002", "p003", "p001"]]
    else:
        (divided,) = study.division().divided
        assert begun[0] == divided
        assert sorted(begun[2:]) == ["p002", "p003"]
    assert any("is divided into p002 and p003" in line for line in progress.lines)


def test_a_pack_that_was_killed_keeps_no_other_from_training(question: Any, tmp_path: Path) -> None:
    study, launcher, _ = train(question, tmp_path, 2, [KilledError("killed")], trials_per_pack=3)
    first, second = (names for job in packs(launcher) for names in job.values())
    statuses = {trial.name: study.trial_record(trial).status for trial in study.spec.trials()}
    assert {statuses[name] for name in first} == {"interrupted"}
    assert {statuses[name] for name in second} == {"pending"}  # this launcher trains nothing
    assert len(launcher.started) == 2


def test_a_wrong_model_ends_the_run(question: Any, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="another"):
        train(question, tmp_path, 2, [ModelError("another model")])


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) in (torch.Tensor, torch.nn.Parameter)]  # no fake ones
    storages = {one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}
    return sum(storages.values())


def test_memory_after_a_pack_is_that_before_it(trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shutil.copytree(trained.path, tmp_path / "study")
    shutil.rmtree(path / "trials")
    names, found = [trial.name for trial in trained.trials], []
    measure, remove = kind.measure_pack, kind.remove_adapters

    def measured(*arguments: Any) -> Any:
        found.append(live_bytes())
        return measure(*arguments)

    def removed(model: Any) -> None:
        trained_bytes = live_bytes()
        remove(model)
        found.append(live_bytes())
        assert found[-1] < trained_bytes, "adapters take memory"

    monkeypatch.setattr(kind, "measure_pack", measured)
    monkeypatch.setattr(kind, "remove_adapters", removed)
    kind.work(path, {"packs": {"p000": names[:3], "p001": names[3:]}})
    assert len(found) == 4
    assert len(set(found)) == 1
