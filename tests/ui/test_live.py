"""Following a file that another process writes, cuts back and begins anew."""

import json
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from rankscope.errors import StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.spec.candidates import CONTROL, AnyTrial
from rankscope.spec.resolve import write_yaml
from rankscope.spec.task import BASE
from rankscope.study.missing import (
    MAX_EXTRA_SECONDS,
    REPORT_SECONDS,
    START_SECONDS,
    ProfileJob,
    extra_seconds,
    missing_profiles,
    profile_seconds,
)
from rankscope.study.question import write_question
from rankscope.study.scores import SCORED, task_file
from rankscope.study.study import Study
from rankscope.ui.live import LiveStudy, MetricsTail

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"


def lines(first: int, last: int, width: int = 1) -> str:
    rows = ({"step": step, "train_loss": float(step), "step_seconds": 0.1} for step in range(first, last + 1))
    return "".join(json.dumps(row) + " " * width + "\n" for row in rows)


def test_only_whole_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = MetricsTail(file)
    tail.read()
    assert tail.step == 0
    text = lines(1, 3)
    file.write_text(text[:-5])
    tail.read()
    assert tail.step == 2
    file.write_text(text)
    tail.read()
    assert tail.step == 3


def test_a_file_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    """Also where it is longer by now than it was, and its lines end elsewhere."""
    file = tmp_path / "metrics.jsonl"
    for length in range(1, 12):
        tail = MetricsTail(file)
        file.write_text(lines(1, 4))
        tail.read()
        file.write_text(lines(1, length, width=3))
        tail.read()
        assert tail.step == length


@pytest.fixture
def study(tmp_path: Path) -> Study:
    shutil.copytree(FIXTURE, tmp_path / "study")
    return Study.open(tmp_path / "study")


def hold(study: Study, pid: int, host: str) -> None:
    (study.path / ".lock-holder").write_text(f"process {pid} on {host}\n")


def restart(study: Study, trial: AnyTrial, status: str = "running", **fields: str) -> Path:
    """Let the trial have no results and no metrics; returns the path of its record."""
    folder = study.trial_folder(trial)
    record = read_json(folder / "trial.json")
    write_json(folder / "trial.json", record | {"status": status, "results": None, "files": {}} | fields)
    (folder / "metrics.jsonl").write_text("")
    return folder / "trial.json"


def begin(study: Study, pack: str) -> None:
    file = study.file("packs", pack, "pack.json")
    write_json(file, read_json(file) | {"results": None})


def test_the_holder_is_a_process_that_lives(study: Study) -> None:
    assert study.holder() is None
    hold(study, os.getpid(), platform.node())
    assert study.holder() == (os.getpid(), platform.node())
    hold(study, 2**22 + 1, platform.node())  # above the kernel's highest
    assert study.holder() is None
    hold(study, os.getpid(), "elsewhere")
    assert study.holder() == (os.getpid(), "elsewhere")
    hold(study, os.getpid(), platform.node())
    os.utime(study.path / ".lock-holder", (1, 1))  # the number is another process's by now
    assert study.holder() is None
    with study.lock():
        assert study.holder() == (os.getpid(), platform.node())
    assert study.holder() is None


def test_a_study_that_is_done(study: Study) -> None:
    (study.path / "verdict.json").exists() or write_json(study.path / "verdict.json", {})
    state = LiveStudy(study.path).read()
    assert state.doing == "done"
    assert state.steps == read_json(next(study.path.glob("trials/*/trial.json")))["results"]["steps"]
    assert state.training == {}
    assert {trial.step for trial in state.trials} == {state.steps}
    assert state.profiles_done == state.profiles > 0
    assert state.seconds_left == 0
    assert state.rss_bytes is None


def test_a_study_that_grew_is_followed_once_its_data_can_be_read(study: Study) -> None:
    live, facts = LiveStudy(study.path), study.path / "data" / "facts.json"
    before = len(live.read().trials)
    seeds = (*study.spec.seeds, 7)
    write_question(study.path / "study.yaml", write_yaml(study.spec.model_copy(update={"seeds": seeds})))
    facts.rename(facts.with_name("away"))
    with pytest.raises(StudyDirectoryError):
        live.read()
    facts.with_name("away").rename(facts)
    assert len(live.read().trials) > before


def test_a_study_that_trains(study: Study) -> None:
    steps = read_json(next(study.path.glob("trials/*/trial.json")))["results"]["steps"]
    trial = study.spec.trials()[-1]
    folder = study.trial_folder(trial)
    record = read_json(folder / "trial.json")
    write_json(folder / "trial.json", record | {"status": "running", "results": None, "files": {}})
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] <= steps // 2]
    (folder / "metrics.jsonl").write_text("".join(kept))
    hold(study, os.getpid(), platform.node())
    assert LiveStudy(study.path).read().training == {}, "its pack has ended"
    begin(study, "p001")
    state = LiveStudy(study.path).read()
    assert state.doing == "train"
    assert list(state.training) == ["p001"]
    assert [one.step for one in state.training["p001"]] == [steps, steps, steps // 2]
    (now,) = [found for found in state.trials if found.name == trial.name]
    assert (now.status, now.step) == ("running", steps // 2)


EVENTS = Iterator[tuple[float, Callable[[], object]]]  # forecast seconds of some work, and the files that it leaves


def restore(study: Study, *parts: str) -> None:
    """Let a folder of the study have the fixture's files again."""
    shutil.copytree(FIXTURE.joinpath(*parts), study.file(*parts), dirs_exist_ok=True)


def work(study: Study, runtime: float) -> EVENTS:
    """All work of a run, where each candidate is forecast to take so long. Full fine-tuning is said to take as long."""
    packs, spec = study.division().packs, study.spec
    steps = read_json(next(FIXTURE.glob("trials/*/trial.json")))["results"]["steps"]
    for pack, trials in packs.items():
        yield (START_SECONDS if pack == next(iter(packs)) else 0.0), partial(start_pack, study, pack)
        for step in range(1, steps + 1):
            yield len(trials) * runtime / steps, partial(advance, study, pack, step)
        yield 0.0, partial(end_pack, study, pack)
    measured = dict.fromkeys(spec.profiled(), runtime / 5)
    for job in missing_profiles(spec, None):
        yield profile_seconds(spec.measure, job, measured), partial(leave_profile, study, job)
    for trial in study.reference_trials:
        yield START_SECONDS + runtime, partial(restore, study, "reference", trial.name)
    models, measure = 1 + len(spec.candidates()), spec.measure
    token = runtime / 5 / 8 / spec.training.effective_batch_size
    yield START_SECONDS + models * measure.answers * measure.answer_tokens * token, partial(leave_answers, study)
    yield REPORT_SECONDS, lambda: None


def start_pack(study: Study, pack: str) -> None:
    begin(study, pack)
    for trial in study.division().packs[pack]:
        restart(study, trial)


def end_pack(study: Study, pack: str) -> None:
    for trial in study.division().packs[pack]:
        restore(study, "trials", trial.name)
    restore(study, "packs", pack)


def advance(study: Study, pack: str, step: int) -> None:
    for trial in study.division().packs[pack]:
        (study.trial_folder(trial) / "metrics.jsonl").write_text(lines(1, step))


def leave_profile(study: Study, job: ProfileJob) -> None:
    repeat = {"summaries": dict.fromkeys(job.members, 0)} if job.members else {"summary": {}}
    write_json(study.profile_file(job.profile), {"schema": 2, "repeats": [repeat]})


def leave_answers(study: Study) -> None:
    measure, answers = study.spec.measure, {trial.name: ["yes"] for trial in study.answered()}
    record = {"schema": 1, "questions": [], "answers": answers, "asked": [measure.answers, measure.answer_tokens]}
    write_json(study.path / "answers" / "answers.json", record)


@pytest.mark.parametrize("slower", [0.5, 1.0, 3.0])
def test_half_way_the_time_left_is_near_the_truth(slower: float, study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a run does takes `slower` times as long as forecast: nothing is forgotten, and that is found out."""
    clock, runtime = [0.0], 20.0
    monkeypatch.setattr("rankscope.ui.live.monotonic", lambda: clock[0])
    monkeypatch.setattr("rankscope.ui.live.cpu_pressure", lambda *_: 0.0)
    prediction = read_json(study.path / "prediction.json")
    for found in prediction["candidates"].values():
        found |= {"step_seconds": runtime / 5, "runtime_seconds": runtime}
    write_json(study.path / "prediction.json", prediction)
    for trial in study.all_trials():
        restart(study, trial, status="pending")
    shutil.rmtree(study.path / "profiles")
    hold(study, os.getpid(), platform.node())
    events, live, shares = list(work(study, runtime)), LiveStudy(study.path), list[float]()
    whole, half = slower * sum(seconds for seconds, _ in events), None
    for seconds, leave in events:
        state = live.read()
        shares.append(state.share)
        assert state.seconds_left is not None
        assert max(state.pack_seconds.values(), default=0.0) <= state.seconds_left
        if half is None and clock[0] + slower * seconds >= whole / 2:
            before, clock[0] = clock[0], whole / 2
            half, clock[0] = live.read().seconds_left, before
        clock[0] += slower * seconds
        leave()
    assert half == pytest.approx(whole / 2, rel=0.25)
    assert shares == sorted(shares)
    assert shares[0] == 0.0
    assert shares[-1] > 0.9


def test_a_busy_machine_takes_more_rounds_of_time(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(study.path / "profiles")
    hold(study, os.getpid(), platform.node())
    seconds = []
    for pressure in (0.0, 0.5):
        monkeypatch.setattr("rankscope.ui.live.cpu_pressure", lambda *_, pressure=pressure: pressure)
        seconds.append(LiveStudy(study.path).read().seconds_left)
    idle, busy = seconds
    assert idle is not None
    assert busy is not None
    found = read_json(study.file("prediction.json"))["candidates"]
    steps = {name: forecast["step_seconds"] for name, forecast in found.items()}
    extra = extra_seconds(study.spec, steps, missing_profiles(study.spec, None))
    assert 0 < extra < busy - idle <= MAX_EXTRA_SECONDS, "steps took longer than forecast"


def test_a_trial_that_diverges_does_not_make_the_others_faster(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("rankscope.ui.live.monotonic", lambda: clock[0])
    for trial in study.division().packs["p001"]:
        restart(study, trial)
    begin(study, "p001")
    hold(study, os.getpid(), platform.node())
    live = LiveStudy(study.path)
    live.read()
    clock[0] = 100.0
    advance(study, "p001", 1)
    live.read()
    scale = live._pace.scale
    assert scale is not None
    assert scale > 2, "a step of milliseconds took 100 s"
    restart(study, study.division().packs["p001"][0], status="diverged")
    assert live.read().training["p001"][0].status == "diverged"
    assert live._pace.scale == pytest.approx(scale)


UNTRAINED = '{"step": 0, "eval_loss": 5.0}\n'


@pytest.mark.parametrize(
    ("rows", "activity"),
    [("", "evaluate"), (UNTRAINED, "train"), (UNTRAINED + lines(1, 1), "train"), (UNTRAINED + lines(1, 2), "evaluate")],
)
def test_loading_and_evaluating_are_named(rows: str, activity: str, study: Study) -> None:
    trial = study.trials[-1]
    restart(study, trial)
    hold(study, os.getpid(), platform.node())
    assert LiveStudy(study.path).read().activity == "load"
    begin(study, "p001")
    (study.trial_folder(trial) / "metrics.jsonl").write_text(rows)
    assert LiveStudy(study.path).read().activity == activity


def test_metrics_are_followed_without_reading_anything_else(study: Study) -> None:
    trial = study.spec.trials()[-1]
    restart(study, trial)
    begin(study, "p001")
    live = LiveStudy(study.path)
    before = live.read()
    assert before.training["p001"][-1].step == 0
    (study.trial_folder(trial) / "metrics.jsonl").write_text(lines(1, 3))
    shutil.rmtree(study.path / "profiles")
    after = live.refresh(before)
    assert after.training["p001"][-1].step == 3
    assert after.profiles_done == before.profiles_done > 0
    assert live.read().profiles_done == 0


def test_a_trial_that_failed_in_an_earlier_run_is_due_again(study: Study) -> None:
    trial = study.spec.trials()[-1]
    record = restart(study, trial, status="failed", reason="no memory")
    hold(study, os.getpid(), platform.node())
    assert LiveStudy(study.path).read().doing == "train", "it failed before this run began"
    os.utime(study.path / ".lock-holder", (os.path.getmtime(record) - 10,) * 2)
    assert LiveStudy(study.path).read().doing == "answer", "this run has tried it"


def test_the_profile_that_is_measured(study: Study) -> None:
    name = CONTROL
    file = study.profile_file(name)
    os.utime(file, (1, 1))
    repeats = read_json(file, schema=2)
    write_json(file, repeats | {"repeats": repeats["repeats"][:-1]})
    os.utime(file, (1, 1))
    hold(study, os.getpid(), platform.node())
    state = LiveStudy(study.path).read()
    assert (state.doing, state.profile, state.profiles_done) == ("profile", None, state.profiles - 1)
    write_json(study.path / "profiles" / "jobs" / name / "job.json", {"kind": "profile"})
    assert LiveStudy(study.path).read().profile == name
    later = os.path.getmtime(study.path / "profiles" / "jobs" / name / "job.json") + 1
    os.utime(file, (later, later))
    assert LiveStudy(study.path).read().profile is None, "it is recorded"
    os.utime(file, (1, 1))
    os.utime(study.path / "profiles" / "jobs" / name / "job.json", (2, 2))
    assert LiveStudy(study.path).read().profile is None, "an earlier run's job"


def test_full_fine_tuning_in_training(study: Study) -> None:
    first, second = study.reference_trials[:2]
    for trial in (first, second):
        restart(study, trial)
    os.utime(study.trial_folder(second) / "trial.json", (1, 1))  # a killed run left it
    hold(study, os.getpid(), platform.node())
    os.utime(study.path / ".lock-holder", (os.path.getmtime(study.trial_folder(first) / "trial.json"),) * 2)
    state = LiveStudy(study.path).read()
    assert state.doing == "reference"
    assert list(state.training) == [first.name]


def test_what_is_done_when_all_is_trained(study: Study) -> None:
    hold(study, os.getpid(), platform.node())
    live = LiveStudy(study.path)
    assert live.read().doing == "answer"
    write_json(study.path / "answers" / "answers.json", {"schema": 1, "questions": [], "answers": {}})
    assert live.read().doing == "conclude"
    write_json(study.path / "curve" / "job.json", {})
    assert live.read().doing == "curve"
    shutil.rmtree(study.path / "profiles")
    assert live.read().doing == "curve", "it measures no profiles"
    os.utime(study.path / "curve" / "job.json", (1, 1))
    assert live.read().doing == "profile", "an earlier curve"
    write_json(study.path / "curve" / "jobs" / study.trials[0].name / "job.json", {})
    assert live.read().doing == "curve", "on several devices each trial has a job"
    shutil.rmtree(study.path / "curve" / "jobs")
    write_json(study.path / "answers" / "job.json", {})
    os.utime(study.path / "answers" / "answers.json", (1, 1))
    assert live.read().doing == "answer", "of what was added to the study"
    (study.path / "answers" / "answers.json").touch()
    assert live.read().doing == "conclude", "profiles come before the answers: they did not finish"


def test_scores_on_a_task_are_forecast_and_followed(study: Study) -> None:
    hold(study, os.getpid(), platform.node())
    values = study.spec.model_dump(mode="json")
    values["measure"] |= {"task": "exact_match"}
    seconds, names = [LiveStudy(study.path).read().seconds_left], [trial.name for trial in study.trials]
    write_question(study.path / "study.yaml", write_yaml(type(study.spec).model_validate(values)))
    seconds.append(LiveStudy(study.path).read().seconds_left)
    write_json(job := study.file("task", "p000", "job.json"), {"parts": [[BASE], names]})
    state = LiveStudy(study.path).read()
    assert (state.doing, state.seconds_left) == ("task", pytest.approx(seconds[1], abs=1))
    write_json(job.parent / SCORED, {"models": (1 + len(names)) / 2})
    seconds.append(LiveStudy(study.path).read().seconds_left)
    for trial in (None, *study.trials):
        write_json(task_file(study, trial), {})
    assert LiveStudy(study.path).read().doing == "task", "the job has not ended"
    (job.parent / SCORED).unlink()
    assert LiveStudy(study.path).read().doing == "answer"
    seconds.append(LiveStudy(study.path).read().seconds_left)
    without, whole, half, done = (one for one in seconds if one is not None)
    assert done == pytest.approx(without, abs=1)
    assert (whole + without) / 2 < half, "half of the scores, and what starting takes"
    assert half - without < 0.8 * (whole - without)
