"""What a study holds that cannot be read, that a newer version wrote, that is whole and yet not as it is written, and
what kills leave behind: told apart, and only what can be made again is removed."""

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from launchers import FakeLauncher, do
from rankscope import cli, pipeline
from rankscope.errors import DamagedError, KilledError, OutOfMemoryError, StudyDirectoryError, StudyError
from rankscope.files import damaged_error, file_hashes, read_json, write_json
from rankscope.jobs import answers, profiles
from rankscope.jobs.job import Job, Settings
from rankscope.jobs.local import LocalLauncher
from rankscope.jobs.repair import remove_corrupt, remove_leftovers
from rankscope.report.write import build
from rankscope.search.folder import Search
from rankscope.search.space import resolve_search
from rankscope.study.folder import TRIAL_FILES
from rankscope.study.records import Failure
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui.watch import Watch
from recording import RecordingProgress

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"
TRIAL = "trials/r008-lr5e-3-s1"


@pytest.fixture
def study(tmp_path: Path) -> Study:
    shutil.copytree(FIXTURE, tmp_path / "study")
    return Study.open(tmp_path / "study")


def read_all(study: Study) -> None:
    for read in (study.evidence, lambda: study.verdict, lambda: study.pack_record("p000")):
        read()


@pytest.mark.parametrize("name", ["trial.json", "metrics.jsonl", "adapter/adapter_model.safetensors"])
def test_what_cannot_be_read_is_not_taken_for_damaged(study: Study, name: str) -> None:
    """A folder in the file's place gives an error of the system's own when it is read."""
    file = study.path / TRIAL / name
    file.rename(file.with_name("kept"))
    file.mkdir()
    with pytest.raises(StudyDirectoryError, match=f"{name}: cannot be read: Is a directory") as caught:
        remove_corrupt(study)
    assert not isinstance(caught.value, DamagedError)
    file.rmdir()
    file.with_name("kept").rename(file)
    assert remove_corrupt(study) == []


SCHEMAS = {
    f"{TRIAL}/trial.json": 1, f"{TRIAL}/eval.json": 1, "prediction.json": 1, "packs/division.json": 1,
    "profiles/r002.json": 2, "verdict.json": 3,
}  # fmt: skip
"""The newest that is known, by file."""


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_newer_version_wrote_is_refused_and_kept(study: Study, name: str) -> None:
    file = study.path / name
    record = read_json(file, schema=2)
    assert record["schema"] <= SCHEMAS[name]
    write_json(file, record | {"schema": SCHEMAS[name] + 1})
    if name == f"{TRIAL}/eval.json":
        trial = read_json(study.path / TRIAL / "trial.json")
        write_json(study.path / TRIAL / "trial.json", trial | {"files": file_hashes(study.path / TRIAL, TRIAL_FILES)})
    message = rf"{name}: made by a newer rankscope: its schema is {SCHEMAS[name] + 1}, and .* {SCHEMAS[name]} at most"
    with pytest.raises(StudyDirectoryError, match=message) as caught:
        remove_corrupt(study)
    assert not isinstance(caught.value, DamagedError)
    assert "Use that version" in caught.value.todo
    assert file.exists()
    with pytest.raises(StudyDirectoryError, match=message):
        read_all(study)


def without(*names: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: {name: value for name, value in record.items() if name not in names}


def other(**values: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: record | values


def repeat(change: Callable[[dict[str, Any]], dict[str, Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda record: record | {"repeats": [change(repeat) for repeat in record["repeats"]]}


ODD: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "trial without status": (f"{TRIAL}/trial.json", lambda record: {}, "status: Field required"),
    "unknown status": (f"{TRIAL}/trial.json", other(status="wonder"), "status: Input should be"),
    "results are text": (f"{TRIAL}/trial.json", other(results="x"), "results: Input should be"),
    "a result is text": (f"{TRIAL}/trial.json", other(results={"eval_loss": "x"}), "results.eval_loss"),
    "done without results": (f"{TRIAL}/trial.json", other(results=None), "it is done, and has no results"),
    "files are a list": (f"{TRIAL}/trial.json", other(files=["x"]), "files: Input should be"),
    "profile without repeats": ("profiles/r002.json", without("repeats"), "repeats: Field required"),
    "repeat without summary": ("profiles/r002.json", repeat(without("summary")), "summary: Field required"),
    "empty summary": ("profiles/r002.json", repeat(other(summary={})), "summary.steps: Field required"),
    "empty samples": ("profiles/r002.json", repeat(other(samples={})), "samples.phase: Field required"),
    "empty machine": ("machine.json", lambda record: {}, "hardware: Field required"),
    "empty facts": ("data/facts.json", lambda record: {}, "id: Field required"),
    "rows are text": ("data/facts.json", other(rows_train="many"), "rows_train: Input should be"),
    "unknown trial in a pack": ("packs/division.json", other(packs={"p000": ["nobody"]}), "KeyError: 'nobody'"),
    "prediction is a number": ("prediction.json", other(candidates=3), "candidates: Input should be"),
    "pack of a number": ("packs/p000/pack.json", other(trials=3), "trials: Input should be"),
    "empty verdict": ("verdict.json", lambda record: {}, "outcome: Field required"),
    "failures are text": ("failures.json", lambda record: {"failures": "x"}, "failures: Input should be"),
    "fewer answers than questions": (
        "answers/answers.json", lambda record: {"questions": [{}], "answers": {"base": []}}, "ValueError: zip"
    ),
    "cut without losses": ("curve/curve.json", lambda record: {"cuts": [{"rank": 1}]}, "cuts.0.trial: Field required"),
}  # fmt: skip


@pytest.mark.parametrize("case", ODD)
def test_what_is_whole_but_odd_is_named_and_made_again(study: Study, case: str) -> None:
    """Its hash is right: somebody changed both."""
    name, change, message = ODD[case]
    file = study.path / name
    write_json(file, change(read_json(file, schema=2) if file.exists() else {}))
    with pytest.raises(DamagedError, match=rf"{name}: damaged: not as it is written: .*{message}"):
        read_all(study)
    assert remove_corrupt(study) == [TRIAL if name.startswith(TRIAL) else "data" if "facts" in name else name]
    assert remove_corrupt(study) == []


ROWS = {
    "no step": '{"stdp": 1}\n',
    "a number": "3\n",
    "no JSON": "z\n",
    "text for a loss": '{"step": 1, "train_loss": "x", "step_seconds": 1}\n',
}


@pytest.mark.parametrize("case", ROWS)
def test_odd_lines_of_a_trial_that_runs_are_named_and_removed(study: Study, case: str) -> None:
    trial, metrics = study.path / TRIAL / "trial.json", study.path / TRIAL / "metrics.jsonl"
    write_json(trial, read_json(trial) | {"status": "running", "results": None, "files": {}})
    metrics.write_text(ROWS[case] + metrics.read_text())
    for read in (study.evidence, Watch(study.path, load("en")).live.read):
        with pytest.raises(DamagedError, match=r"metrics.jsonl: damaged"):
            read()
    assert remove_corrupt(study) == [f"{TRIAL}/metrics.jsonl"]
    assert study.trial_record(study.spec.trials()[-1]).status == "running"


MINIMAL = {"model": {"id": "m"}, "data": {"id": "d"}}


def test_a_start_that_was_killed_leaves_the_folder_free(tmp_path: Path, study: Study) -> None:
    for folder, name, create in (
        ("new", "study.yaml", lambda path: Study.create(path, study.spec)),
        ("search", "search.yaml", lambda path: Search.create(path, resolve_search(MINIMAL, {}, (), None))),
    ):
        path = tmp_path / folder
        path.mkdir()
        (path / f".{name}.5_b7ml7c.tmp").touch()
        create(path)
        assert (path / name).exists()
        (tmp_path / f"{folder}-taken").mkdir()
        (tmp_path / f"{folder}-taken" / ".git").touch()
        with pytest.raises(StudyError, match="exists and is not a"):
            create(tmp_path / f"{folder}-taken")


def test_temporary_files_of_kills_are_removed_and_never_hashed(study: Study) -> None:
    left = [
        study.path / ".study.yaml.5_b7ml7c.tmp",
        study.path / TRIAL / "adapter" / ".adapter_config.json.abcdefgh.tmp",
    ]
    of_report = [study.path / ".verdict.json.abcdefgh.tmp", study.path / TRIAL / "adapter" / ".README.md.abcdefgh.tmp"]
    old = study.path / "report" / ".index.html.abcdefgh.tmp"
    old.parent.mkdir()
    for file in (*left, *of_report, old):
        file.touch()
    os.utime(old, (time.time() - 4000,) * 2)
    assert sorted(file_hashes(study.path / TRIAL, TRIAL_FILES)) == [
        "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "eval.json", "metrics.jsonl"
    ]  # fmt: skip
    remove_leftovers(study)
    assert not any(file.exists() for file in (*left, old))
    assert all(file.exists() for file in of_report), "a report may be writing them"
    assert remove_corrupt(study) == []


@pytest.fixture
def handlers() -> Iterator[None]:
    """The command line sets handlers of signals."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def interrupt(*_: Any, **__: Any) -> Any:
    raise KeyboardInterrupt


def running(study: Study) -> Path:
    """Makes one of its trials a running one, and returns its trial.json."""
    file = study.path / TRIAL / "trial.json"
    write_json(file, read_json(file) | {"status": "running", "results": None, "files": {}})
    return file


@pytest.mark.usefixtures("handlers")
def test_a_second_run_that_is_stopped_marks_nothing_of_the_first(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first holds the lock; the second is stopped before it has asked for it."""
    record = running(study)
    before = record.read_bytes()
    monkeypatch.setattr(pipeline, "load_catalogue", interrupt)
    with study.lock():
        result = CliRunner().invoke(cli.app, ["run", str(study.path / "study.yaml"), "--out", str(study.path)])
    assert result.exit_code == 130, result.output
    assert record.read_bytes() == before


def test_the_run_that_holds_the_study_marks_what_it_was_doing(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    record = running(study)
    monkeypatch.setattr(pipeline, "study_data", interrupt)
    launcher = LocalLauncher(study.spec.model.model_copy(update={"dtype": "float32"}))  # there is no model
    with pytest.raises(KeyboardInterrupt):
        pipeline.run_study(study.spec, study.path, launcher, RecordingProgress(), Settings())
    assert read_json(record)["status"] == "interrupted"
    assert read_json(record)["reason"] == "interrupted by the user, after step 4"


def test_an_unknown_language_is_refused_before_anything_is_done(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "study_data", interrupt)
    launcher = LocalLauncher(study.spec.model)
    with pytest.raises(StudyError, match="no report language 'xx'"):
        pipeline.run_study(study.spec, study.path, launcher, RecordingProgress(), Settings(language="xx"))
    (study.path / "verdict.json").unlink()
    with pytest.raises(StudyError, match="no report language 'xx'"):
        pipeline.finish(study, "xx")
    assert not (study.path / "verdict.json").exists()


KILLED = KilledError("profile r002 was killed (signal 9)")
NO_MEMORY = OutOfMemoryError("MemoryError: no more")


@pytest.mark.slow
def test_a_profile_that_fails_is_recorded_told_and_measured_again(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (study.path / "profiles" / "r002.json").read_bytes()
    for name in ("r002", "r008"):
        (study.path / "profiles" / f"{name}.json").unlink()
    ends = {"r002": KILLED, "r008": NO_MEMORY}
    said = RecordingProgress()
    do(profiles, study, FakeLauncher(lambda path, job: ends.get(job.content["profile"])), said)
    assert study.open_failures() == {
        "r002": Failure(status="interrupted", reason=KILLED.what),
        "r008": Failure(status="oom", reason=NO_MEMORY.what),
    }
    assert any("profile of r002 did not finish" in line for line in said.lines)
    for language, what in (("en", "The profile r008 did not finish"), ("ko", "끝나지 않은 작업: r008")):
        build(study.evidence(), study.verdict, study.path / "report", language)
        report = (study.path / "report" / "report.md").read_text(encoding="utf-8")
        assert what in report
        assert NO_MEMORY.what in report

    def measured(path: Path, job: Job) -> None:
        (path / "profiles" / f"{job.content['profile']}.json").write_bytes(kept)

    do(profiles, study, FakeLauncher(measured), RecordingProgress())
    assert study.open_failures() == {}
    assert study.failures() == {}


@pytest.mark.usefixtures("handlers")
def test_what_was_not_measured_gives_exit_code_4(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    (study.path / "profiles" / "r002.json").unlink()
    study.write_failure("r002", Failure(status="interrupted", reason="was killed"))
    monkeypatch.setattr(pipeline, "run_study", lambda *_: pipeline.Conclusion(study, study.evidence(), study.verdict))
    result = CliRunner().invoke(cli.app, ["run", str(study.path / "study.yaml"), "--out", str(study.path)])
    assert result.exit_code == 4, result.output
    assert "profile of r002: interrupted: was killed" in result.output


def test_a_disk_or_a_model_that_fails_ends_profiles_too(study: Study) -> None:
    (study.path / "profiles" / "r002.json").unlink()
    error = StudyDirectoryError("profiles/r002.json: cannot be written: No space left on device")
    with pytest.raises(StudyDirectoryError, match="No space left"):
        do(profiles, study, FakeLauncher(lambda *_: error), RecordingProgress())
    assert study.failures() == {}


def test_answers_that_fail_are_recorded(study: Study) -> None:
    asked = Study(
        study.path, study.spec.model_copy(update={"measure": study.spec.measure.model_copy(update={"answers": 1})})
    )
    do(answers, asked, FakeLauncher(lambda *_: NO_MEMORY), RecordingProgress())
    assert asked.open_failures() == {"answers": Failure(status="oom", reason=NO_MEMORY.what)}


def test_trials_beside_one_that_diverged_are_named(study: Study) -> None:
    division = study.division()
    assert study.evidence().survivors == []
    pack, beside = next((pack, trials) for pack, trials in division.packs.items() if len(trials) > 1)
    record = study.trial_folder(beside[0]) / "trial.json"
    write_json(record, read_json(record) | {"status": "diverged", "results": None})
    names = [trial.name for trial in beside[1:]]
    assert study.evidence().survivors == names, pack
    build(study.evidence(), study.verdict, study.path / "report")
    report = (study.path / "report" / "report.md").read_text(encoding="utf-8")
    assert f"after another one had diverged and left it: {', '.join(names)}." in report


def test_damage_is_a_kind_of_its_own() -> None:
    assert isinstance(damaged_error(Path("x"), "y"), DamagedError)
    assert DamagedError.exit_code == 2
