"""How trials are divided into packs, what room they need, and in which order profiles are measured."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launchers import HERE
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.errors import StudyDirectoryError
from rankscope.files import write_json
from rankscope.plan import checks
from rankscope.plan.checks import disk_bytes
from rankscope.plan.costs import CostModel
from rankscope.plan.memory import MAX_PACK_MEMORY_FRACTION, StudyMemory
from rankscope.plan.packs import FULL_STEP_TOKENS, divide_into_packs
from rankscope.plan.plan import Plan, make_fleet, make_plan
from rankscope.spec.candidates import Trial
from rankscope.spec.models import DataSpec, ModelSpec, ReferenceSpec, StudySpec, TrainingSpec
from rankscope.study.missing import ProfileJob, missing_profiles
from rankscope.study.study import Study
from rankscope.text.formats import size
from rankscope.train.checkpoint import KEPT
from rows import rows_of

PLENTY = 10**12


@pytest.fixture(scope="module")
def spec() -> StudySpec:
    return StudySpec(
        model=ModelSpec(id="embedded", device="cpu", dtype="float32"),
        data=DataSpec(id="unused"),
        ranks=(8, 128, 256),
        seeds=(0, 1),
    )


@pytest.fixture(scope="module")
def prediction(spec: StudySpec, predicted_once: Callable[[StudySpec, torch.device], CostModel]) -> CostModel:
    return predicted_once(spec, torch.device("cpu"))


def room_for(spec: StudySpec, prediction: CostModel, trials: Sequence[Trial], tokens: Tokens) -> StudyMemory:
    """Memory of a device on which `trials` fit together, and hardly more."""
    memory = StudyMemory(spec, prediction, tokens, PLENTY)
    memory.free = int(memory.peak_bytes(trials) / MAX_PACK_MEMORY_FRACTION) + 1000
    return memory


def always(trials: Sequence[Trial]) -> bool:
    return True


def sizes(
    spec: StudySpec, prediction: CostModel, fits: Callable[[Sequence[Trial]], bool], tokens: Tokens, **training: object
) -> list[int]:
    packs = divide_into_packs(spec.trials(), prediction, fits, TrainingSpec(batch_size=8, **training), tokens)  # type: ignore[arg-type]
    assert [trial for pack in packs for trial in pack] == spec.trials()
    return [len(pack) for pack in packs]


def test_a_pack_takes_as_many_trials_as_fill_a_step(spec: StudySpec, prediction: CostModel) -> None:
    third = FULL_STEP_TOKENS["cpu"] // (3 * 8)
    assert sizes(spec, prediction, always, rows_of(third)) == [3, 3]
    assert sizes(spec, prediction, always, rows_of(10 * third)) == [1] * 6
    assert sizes(spec, prediction, always, rows_of(third), gradient_accumulation_steps=3) == [1] * 6


def test_the_user_may_say_how_many(spec: StudySpec, prediction: CostModel) -> None:
    assert sizes(spec, prediction, always, rows_of(500), trials_per_pack=4) == [4, 2]
    assert sizes(spec, prediction, always, rows_of(5), isolated=True) == [1] * 6
    assert sizes(spec, prediction, always, rows_of(5), base_dropout="keep") == [1] * 6


def test_a_pack_takes_no_more_than_fit(spec: StudySpec, prediction: CostModel) -> None:
    two = spec.trials()[:2]
    memory = room_for(spec, prediction, two, rows_of(5))
    packs = sizes(spec, prediction, memory.fits, rows_of(5), trials_per_pack=6)
    assert packs == [2, 1, 2, 1]  # 8 and 128, 256 alone
    whole = divide_into_packs(spec.trials(), prediction, memory.fits, TrainingSpec(trials_per_pack=6), rows_of(5))
    assert all(len(pack) == 1 or memory.peak_bytes(pack) <= 0.9 * memory.free for pack in whole), "what `plan` shows"


def test_a_trial_that_does_not_fit_is_tried_all_the_same(spec: StudySpec, prediction: CostModel) -> None:
    assert sizes(spec, prediction, lambda pack: False, rows_of(5)) == [1] * 6


def plan_of(spec: StudySpec, data: TokenizedData, study: Study) -> Plan:
    return make_plan(spec, data, HERE._replace(free_bytes=PLENTY), make_fleet(None, None), study)


def test_what_lies_there_is_not_asked_for_again(
    spec: StudySpec, prediction: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study that was stopped goes on where there is room for what is missing."""
    spec = spec.model_copy(update={"ranks": (256,), "seeds": (0,)})
    tokens = rows_of(20)
    study, data, trials = Study(tmp_path, spec), TokenizedData(tokens, tokens, {}), spec.trials()
    checkpoint = 12 * prediction.params[trials[0].candidate.name]
    whole = disk_bytes(spec, prediction, [trials], [], data)
    assert whole.checkpoints == (KEPT + 1) * checkpoint
    free = sum(whole)

    def check() -> None:
        usage = shutil.disk_usage(tmp_path)._replace(free=free)
        monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
        plan_of(spec, data, study).check(tmp_path)

    check()
    for step in (10, 20):
        file = tmp_path / "packs" / "p000" / "checkpoints" / f"step-{step:08d}" / "tensors.safetensors"
        file.parent.mkdir(parents=True)
        file.touch()
        os.truncate(file, checkpoint)
    free -= 2 * checkpoint
    check()
    free -= 1
    with pytest.raises(StudyDirectoryError, match="are needed on the disk"):
        check()
    free = checkpoint  # and what lies there of one thing is no room for another
    with pytest.raises(StudyDirectoryError, match="are needed on the disk"):
        check()


def test_the_reference_alone_needs_room_too(
    spec: StudySpec, prediction: CostModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec.model_copy(update={"reference": ReferenceSpec(full=True), "seeds": (0,)})
    (trial,), tokens = spec.reference_trials(), rows_of(20)
    data = TokenizedData(tokens, tokens, {})
    needed = disk_bytes(spec, prediction, [], [trial], data)
    assert needed.checkpoints == 12 * (KEPT + 1) * prediction.base_params
    usage = shutil.disk_usage(tmp_path)._replace(free=1)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda _: usage)
    study, done = Study(tmp_path, spec), {"schema": 1, "status": "diverged", "results": None, "files": {}}
    for one in spec.trials():
        write_json(study.trial_folder(one) / "trial.json", done)
    with pytest.raises(StudyDirectoryError, match=f"about {size(sum(needed))} are needed on the disk"):
        plan_of(spec, data, study).check(tmp_path)
    write_json(study.trial_folder(trial) / "trial.json", done)
    plan_of(spec, data, study).check(tmp_path)  # nothing is missing


def test_profiles_are_interleaved_and_each_rank_is_measured_once_the_first_twice_over(
    spec: StudySpec, tmp_path: Path
) -> None:
    study = Study(tmp_path, spec.model_copy(update={"learning_rates": (1e-4, 2e-4)}))
    names = {"r008", "r128", "r256", "control"}
    jobs = missing_profiles(study.spec, study)
    assert jobs.pop() == ProfileJob("time", ("control", "r008", "r128", "r256")), "and timed side by side"
    assert len(jobs) == 8
    assert {job.profile for job in jobs[:4]} == {job.profile for job in jobs[4:]} == names
    assert [job.profile for job in jobs[:4]] != [job.profile for job in jobs[4:]], "a new order in each repeat"
    assert jobs == missing_profiles(study.spec, study)[:-1], "the same each time"
    assert study.spec.profiled()["control"] == study.spec.profiled()["r008"] == study.spec.candidates()[0]
    write_json(study.profile_file("r128"), {"repeats": [{}]})
    write_json(study.profile_file("control"), {"repeats": [{}]})
    write_json(study.profile_file("time"), {"repeats": [{"summaries": {"r008": {}, "r256": {}}}]})
    *left, timed = missing_profiles(study.spec, study)
    assert timed.members == ("control", "r128")
    assert {job.profile for job in left[:2]} == {"r008", "r256"}
    assert {job.profile for job in left[2:]} == names
    assert len(left) == 6


def test_candidates_that_do_not_fit_together_are_timed_in_parts_with_the_control(
    spec: StudySpec, prediction: CostModel, tmp_path: Path
) -> None:
    tokens = rows_of(5)
    trials = {name: Trial(candidate=one, seed=0) for name, one in spec.profiled().items()}
    names = ("control", "r008", "r128", "r256")

    plan = plan_of(spec, TokenizedData(tokens, tokens, {}), Study(tmp_path, spec))
    assert plan.fitting(trials, names) == [list(names)]
    tight = room_for(spec, prediction, [trials["control"], trials["r256"]], tokens)
    assert replace(plan, memory=tight).fitting(trials, names) == [["control", "r008", "r128"], ["control", "r256"]]
    tight.free = 1
    apart = [["control", "r008"], ["control", "r128"], ["control", "r256"]]
    assert replace(plan, memory=tight).fitting(trials, names) == apart, "two are tried all the same"
