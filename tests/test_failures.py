"""Failures of child processes: one bad trial leaves the others as they were, and stopped packs resume."""

import io
import shutil
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import forking
import rankscope
from rankscope.errors import ModelError, StudyDirectoryError
from rankscope.files import read_json
from rankscope.study.metrics import read_rows
from rankscope.study.missing import unfinished
from rankscope.study.records import Failure
from rankscope.study.study import Study
from rankscope.ui.console import PlainConsole
from recording import RecordingProgress

pytestmark = pytest.mark.slow  # whole studies

OPTIONS: dict[str, Any] = {
    "ranks": [2, 4, 8],
    "seeds": [0],
    "steps": 6,
    "batch_size": 4,
    "learning_rates": [5e-3],
    "device": "cpu",
}
SETS = (
    "measure.profiles=false",
    "measure.answers=0",
    "data.eval_rows=12",
    "training.evals=2",
    "training.checkpoint_steps=2",
)
NAMES = ["r002-lr5e-3-s0", "r004-lr5e-3-s0", "r008-lr5e-3-s0"]


def run(root: Path, out: Path, said: RecordingProgress | None = None, **options: Any) -> Study:
    return rankscope.run(
        model=str(root / "model"), dataset=str(root / "data.json"), out=out, sets=SETS, progress=said,
        **(OPTIONS | options),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run(root, tmp_path_factory.mktemp("whole") / "study")


@pytest.fixture
def harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run code before each training step of the child processes; it sees `members`, `names` and `step`."""

    def put(code: str, more: str = "pass") -> None:
        folder = tmp_path / "hook"
        folder.mkdir(exist_ok=True)
        hook = f"""
        import os, signal
        import rankscope.train.loop as loop
        own = loop.train_step
        def harmed(engine, members, tokens, training, step):
            names = [member.trial.name for member in members]
            {code}
            return own(engine, members, tokens, training, step)
        loop.train_step = harmed
        {more}
        """
        (folder / "hook.py").write_text(textwrap.dedent(hook))
        monkeypatch.setenv(forking.HOOK, str(folder / "hook.py"))

    return put


def losses(study: Study, trial: str) -> Any:
    return read_json(study.path / "trials" / trial / "eval.json")["examples"]["loss"]


def rows(study: Study, trial: str) -> list[dict[str, Any]]:
    return [row | {"step_seconds": 0} for row in read_rows(study.path / "trials" / trial / "metrics.jsonl")]


def test_a_pack_without_enough_memory_is_divided(root: Path, whole: Study, tmp_path: Path, harm: Any) -> None:
    harm("if len(members) > 1 and step == 3: raise MemoryError('no more')")
    said = RecordingProgress()
    study = run(root, tmp_path / "study", said)
    assert unfinished(study) == []
    division = read_json(study.path / "packs" / "division.json")
    assert division["divided"] == {"p000": ["p001", "p002"], "p001": ["p003", "p004"]}
    assert division["packs"] == {"p003": NAMES[:1], "p004": NAMES[1:2], "p002": NAMES[2:]}
    assert any("Pack p000 is divided into p001 and p002" in message for message in said.lines)
    for name in NAMES:
        np.testing.assert_allclose(losses(study, name), losses(whole, name), rtol=1e-4)
    assert "smaller packs" in (study.path / "report" / "report.md").read_text()
    assert "smaller packs" not in (whole.path / "report" / "report.md").read_text()
    assert not list(study.path.glob("packs/*/checkpoints"))


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("error", "status"), [("MemoryError('no more')", "oom"), ("RuntimeError('odd shape')", "failed")]
)
def test_a_trial_that_cannot_be_trained_keeps_no_other_from_it(
    root: Path, whole: Study, tmp_path: Path, harm: Any, error: str, status: str
) -> None:
    harm(f"if '{NAMES[1]}' in names and step == 3: raise {error}")
    study = run(root, tmp_path / "study")
    results = study.results().set_index("trial")
    assert list(results["status"]) == ["done", status, "done"]
    assert error.split("'")[1] in results.loc[NAMES[1], "reason"]
    assert results.loc[NAMES[1], "reason"].endswith(", after step 3")
    for name in (NAMES[0], NAMES[2]):
        np.testing.assert_allclose(losses(study, name), losses(whole, name), rtol=1e-4)


@pytest.mark.usefixtures("no_report")
def test_what_was_killed_goes_on_where_it_was(root: Path, whole: Study, tmp_path: Path, harm: Any) -> None:
    harm("if step == 3: os.kill(os.getpid(), signal.SIGKILL)")
    said = RecordingProgress()
    study = run(root, tmp_path / "study", said)
    assert list(study.results()["status"]) == ["interrupted"] * 3
    assert set(study.results()["reason"]) == {"packs/p000 was killed (signal 9), after step 3"}
    assert any("did not finish" in message for message in said.lines)
    harm("assert step >= 2, 'it began anew'")
    study = run(root, tmp_path / "study")
    assert list(study.results()["status"]) == ["done"] * 3
    for name in NAMES:
        assert losses(study, name) == losses(whole, name)
        assert rows(study, name) == rows(whole, name)


@pytest.mark.usefixtures("no_report")
def test_one_that_is_killed_as_it_goes_on_loses_nothing(root: Path, whole: Study, tmp_path: Path, harm: Any) -> None:
    """The second kill comes after metrics are cut back to the checkpoint, when their recorded hash is stale."""
    harm("if step == 3: os.kill(os.getpid(), signal.SIGKILL)")
    run(root, tmp_path / "study")
    harm("pass", "loop.TrialFiles.history = lambda files: os.kill(os.getpid(), signal.SIGKILL)")
    run(root, tmp_path / "study")
    harm("assert step >= 2, 'it began anew'")
    said = RecordingProgress()
    study = run(root, tmp_path / "study", said)
    assert not [message for message in said.lines if "damaged" in message]
    assert [rows(study, name) for name in NAMES] == [rows(whole, name) for name in NAMES]


@pytest.mark.usefixtures("no_report")
def test_a_diverged_trial_leaves_the_others_as_they_were(root: Path, whole: Study, tmp_path: Path) -> None:
    both = run(root, tmp_path / "study", learning_rates=[5e-3, 1e30], ranks=[4])
    results = both.results().set_index("status")
    assert sorted(results.index) == ["diverged", "done"]
    assert "not finite at step" in results.loc["diverged", "reason"]
    np.testing.assert_allclose(losses(both, NAMES[1]), losses(whole, NAMES[1]), rtol=1e-4)


@pytest.mark.usefixtures("no_report")
def test_a_full_disk_ends_the_run_and_loses_nothing(root: Path, whole: Study, tmp_path: Path, harm: Any) -> None:
    """No file of the child, its log and error.json included, takes one more byte, as the system has it; `test_files.py`
    and benchmarks/disk_full.py fill real disks."""
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))"
    harm(f"if step == 3: import resource; {limit}")
    with pytest.raises(StudyDirectoryError, match=r"packs/p000: cannot be written"):
        run(root, tmp_path / "study")
    harm("assert step >= 2, 'it began anew'")
    study = run(root, tmp_path / "study")
    assert [rows(study, name) for name in NAMES] == [rows(whole, name) for name in NAMES]


@pytest.mark.slow
def test_a_profile_that_is_killed_is_told_and_measured_again(
    root: Path, tmp_path: Path, harm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profiled = (
        *SETS,
        "measure.profiles=true",
        "measure.repeats=1",
        "measure.steps=2",
        "measure.rounds=2",
        "measure.warmup_steps=1",
    )
    monkeypatch.setitem(globals(), "SETS", profiled)
    harm("pass", "import sys; 'profiles' in sys.argv[1] and os.kill(os.getpid(), signal.SIGKILL)")
    study = run(root, tmp_path / "study", ranks=[2], steps=2)
    assert unfinished(study) == []
    reason = "profiles/jobs/r002 was killed (signal 9)"
    assert study.open_failures()["r002"] == Failure(status="interrupted", reason=reason)
    assert reason in (study.path / "report" / "report.md").read_text()
    assert study.profiles().empty
    harm("pass")
    again = run(root, tmp_path / "study", ranks=[2], steps=2)
    assert again.open_failures() == {}
    assert len(again.profile_repeats("r002")) == 1
    assert "was killed" not in (study.path / "report" / "report.md").read_text()


def test_another_model_under_the_same_name_is_refused(root: Path, whole: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(whole.path, copy)
    shutil.rmtree(copy / "trials" / NAMES[2])
    file = root / "model" / "model.safetensors"
    own = file.read_bytes()
    try:
        file.write_bytes(own[:-1] + bytes([own[-1] ^ 1]))
        with pytest.raises(ModelError, match=f"not the weights that {NAMES[0]} was trained on"):
            run(root, copy)
    finally:
        file.write_bytes(own)


def test_what_a_terminal_would_obey_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    PlainConsole().print("a\x1b]0;title\x07b", markup=False)
    assert capsys.readouterr().out == "a\ufffd]0;title\ufffdb\n"


def test_warnings_are_yellow_in_a_terminal_and_the_same_text_elsewhere() -> None:
    said = "Data: 3 rows\nWarning: few rows\nno Warning: here"
    terminal, file = io.StringIO(), io.StringIO()
    PlainConsole(file=terminal, force_terminal=True, color_system="standard").print(said, highlight=False)
    PlainConsole(file=file).print(said, highlight=False)
    assert terminal.getvalue() == "Data: 3 rows\n\x1b[33mWarning: few rows\x1b[0m\nno Warning: here\n"
    assert file.getvalue() == f"{said}\n"


def test_too_little_space_is_said_before_the_start(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1_000_000))
    with pytest.raises(StudyDirectoryError, match=r"about .* are needed on the disk, and 1.00 MB are free"):
        run(root, tmp_path / "study")
    assert not (tmp_path / "study").exists()
