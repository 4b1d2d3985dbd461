"""What `rankscope run` shows in the terminal, all of it read from the study's files."""

import io
import os
import platform
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from rankscope.errors import StudyDirectoryError
from rankscope.files import write_json
from rankscope.spec.candidates import CONTROL
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui import progress as shown_by
from rankscope.ui.live import MetricsTail
from rankscope.ui.progress import TerminalProgress
from ui.test_live import FIXTURE, begin, hold, lines, restart


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    """The fixture while its second pack trains."""
    monkeypatch.setattr(shown_by, "LINE_EVERY_SECONDS", 0.0)
    monkeypatch.setattr(shown_by, "MOST_LINES", float("inf"))
    monkeypatch.setattr(shown_by, "MAX_CPU_SHARE", float("inf"))
    shutil.copytree(FIXTURE, tmp_path / "study")
    found = Study.open(tmp_path / "study")
    restart(found, found.trials[-1])
    begin(found, "p001")
    hold(found, os.getpid(), platform.node())
    return found


@pytest.fixture
def output() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def progress(study: Study, output: io.StringIO) -> TerminalProgress:
    return TerminalProgress(Console(file=output, width=200), study.path, load("en"))


def advance(study: Study, step: int) -> None:
    (study.trial_folder(study.trials[-1]) / "metrics.jsonl").write_text(lines(1, step))


def finish(study: Study) -> None:
    shutil.rmtree(study.path / "packs")
    shutil.copytree(FIXTURE / "packs", study.path / "packs")
    name = study.trials[-1].name
    shutil.rmtree(study.path / "trials" / name)
    shutil.copytree(FIXTURE / "trials" / name, study.path / "trials" / name)


def test_before_the_study_exists_nothing_is_shown(tmp_path: Path, output: io.StringIO) -> None:
    with TerminalProgress(Console(file=output), tmp_path / "none", load("en")) as progress:
        progress.poll()
        (tmp_path / "none").mkdir()
        progress.poll()
        progress.say("kept")
    assert output.getvalue() == "kept\n"


def test_lines_where_output_is_no_terminal(study: Study, progress: TerminalProgress, output: io.StringIO) -> None:
    progress.poll()
    progress.poll()
    advance(study, 2)
    progress.poll()
    follow, command, first, *more = output.getvalue().splitlines()
    assert (follow, command) == ("To follow it on a live page, in another terminal:", f"  rankscope watch {study.path}")
    assert first == "Pack p001 (2 of 2): 3 trials, 4 steps"
    assert [line.split(" · ")[2] for line in more] == ["p001 0 / 4  about 5 s left", "p001 2 / 4  about 5 s left"]
    assert f"{study.trials[-1].name} –" in more[0]
    assert output.getvalue().count("Pack p001") == 1
    finish(study)
    progress.poll()
    begin(study, "p001")
    restart(study, study.trials[-1])
    progress.poll()
    assert output.getvalue().count("Pack p001") == 1, "said once, also where it is trained again"


def test_time_left_and_losses(study: Study, progress: TerminalProgress, output: io.StringIO) -> None:
    progress.poll()
    advance(study, 2)
    diverged = study.trials[-2]
    restart(study, diverged, status="diverged")
    progress.poll()
    share, now, pack, losses, *_ = output.getvalue().splitlines()[-1].split(" · ")
    assert re.fullmatch(r"  \d+%  about .* left", share)
    assert now == "Evaluating p001 on the held-out rows"
    assert re.fullmatch(r"p001 2 / 4  about .* left", pack)
    assert losses.endswith(f"{diverged.name} diverged, {study.trials[-1].name} 1.2000")


def test_nothing_new_is_no_line(study: Study, progress: TerminalProgress, output: io.StringIO) -> None:
    progress.poll()
    before = output.getvalue()
    progress.poll()
    progress.poll()
    assert output.getvalue() == before
    advance(study, 1)
    progress.poll()
    assert len(output.getvalue().splitlines()) == len(before.splitlines()) + 1


def test_packs_on_several_devices(study: Study, progress: TerminalProgress, output: io.StringIO) -> None:
    restart(study, study.trials[0])
    begin(study, "p000")
    progress.poll()
    said = output.getvalue().splitlines()
    assert said[2:4] == ["Pack p000 (1 of 2): 5 trials, 4 steps", "Pack p001 (2 of 2): 3 trials, 4 steps"]
    (line,) = said[4:]
    assert line.index(" · p000 0 / 4") < line.index(" · p001 0 / 4")


def test_full_fine_tuning_and_profiles(study: Study, progress: TerminalProgress, output: io.StringIO) -> None:
    finish(study)
    (reference, *_) = study.reference_trials
    restart(study, reference)
    progress.poll()
    assert output.getvalue().splitlines()[2] == f"Full fine-tuning, {reference.name}: 4 steps"
    shutil.rmtree(study.path / "reference")
    shutil.copytree(FIXTURE / "reference", study.path / "reference")
    name = CONTROL
    study.profile_file(name).unlink()
    write_json(study.path / "profiles" / "jobs" / name / "job.json", {"kind": "profile"})
    progress.poll()
    progress.poll()
    total = len(study.spec.profiled()) * study.spec.measure.repeats
    done = total - study.spec.measure.repeats
    assert f" · Measuring memory of {name}, {done + 1} of {total}" in output.getvalue().splitlines()[-1]
    assert output.getvalue().count("Measuring") == 1


def test_a_table_in_a_terminal(study: Study, output: io.StringIO) -> None:
    advance(study, 2)
    with TerminalProgress(Console(file=output, width=200, force_terminal=True), study.path, load("en")) as progress:
        progress.poll()
        assert progress._live is not None
        progress._live.refresh()
        shown = output.getvalue()
        for part in (
            "Trial",
            "Training loss",
            "2 / 4",
            "1.2000",
            "━",
            "Pack p001 (2 of 2)",
            "11 of 12 trials",
        ):
            assert part in shown
        finish(study)
        restart(study, study.trials[0])
        progress.poll()
        progress._live.refresh()
        assert "Loading the model" in output.getvalue()


def test_memory_of_the_working_process(
    study: Study, progress: TerminalProgress, output: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankscope.ui.live._rss", lambda holder: 635_000_000)
    progress.poll()
    assert output.getvalue().endswith(" · 635 MB in use\n")


def test_the_whole_study_is_read_less_often_the_longer_that_takes(
    study: Study, progress: TerminalProgress, output: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shown_by, "MAX_CPU_SHARE", 1e-9)
    progress.poll()
    finish(study)
    advance(study, 3)
    progress.poll()  # as it was when the whole study was read
    assert "p001 3 / 4" in output.getvalue(), "metrics of the trials in training are always read"
    monkeypatch.setattr(progress, "_read_again", 0.0)
    progress.poll()
    assert " · Answering held-out prompts" in output.getvalue().splitlines()[-1], "the pack has ended"


@pytest.mark.parametrize("line", ["z", "3", '{"stdp": 5}', '{"step": 2, "train_loss": "x", "step_seconds": 1}'])
def test_a_damaged_line_ends_no_run_that_shows_it(
    line: str, study: Study, progress: TerminalProgress, output: io.StringIO
) -> None:
    file = study.trial_folder(study.trials[-1]) / "metrics.jsonl"
    advance(study, 1)
    progress.poll()
    with file.open("a") as metrics:
        metrics.write(f"{line}\n")
    with pytest.raises(StudyDirectoryError, match=r"metrics\.jsonl: damaged"):
        MetricsTail(file).read()
    progress.poll()
    with file.open("a") as metrics:
        metrics.write(lines(3, 3))
    progress.poll()
    assert "p001 3 / 4" in output.getvalue()
