"""`rankscope curve`, with real child processes: what it measures, adds, makes again and refuses."""

import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import forking
from rankscope.cli import app
from rankscope.errors import KilledError, StudyDirectoryError, StudyError
from rankscope.files import read_json, write_json
from rankscope.jobs.curve import lower_ranks
from rankscope.jobs.local import LocalLauncher
from rankscope.pipeline import measure_curve
from rankscope.study.study import Study
from recording import RecordingProgress
from small_study import run_small


@pytest.fixture(scope="module")
def whole(trained: Study, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """The trained study with its curve, and 12 steps of recovery."""
    study = Study.open(shutil.copytree(trained.path, tmp_path_factory.mktemp("curve") / "study"))
    measure(study, RecordingProgress(), recover=12)
    return study


@pytest.fixture
def copy(trained: Study, tmp_path: Path) -> Study:
    shutil.copytree(trained.path, tmp_path / "study")
    return Study.open(tmp_path / "study")


@pytest.fixture
def copy_of_whole(whole: Study, tmp_path: Path) -> Study:
    shutil.copytree(whole.path, tmp_path / "study")
    return Study.open(tmp_path / "study")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """`measure_curve` builds no report, which takes as long as the rest."""
    monkeypatch.setattr("rankscope.pipeline.finish", lambda *_: None)


def measure(study: Study, progress: RecordingProgress, **options: Any) -> None:
    measure_curve(study, LocalLauncher(study.spec.model), progress, **options)


def table(study: Study) -> dict[tuple[int, int, int], float]:
    rows = study.cuts().to_dict("records")
    return {(row["seed"], row["recover_steps"], row["cut_rank"]): row["eval_loss"] for row in rows}


def test_every_seed_and_rank_is_there_and_the_control_is_the_trial_s_own_loss(whole: Study) -> None:
    losses = table(whole)
    assert set(losses) == {(seed, steps, rank) for seed in (0, 1) for steps in (0, 12) for rank in (1, 2, 4, 8)}
    own = whole.results().set_index("trial")["eval_loss"]
    for seed in (0, 1):
        assert losses[seed, 0, 8] == pytest.approx(own[f"r008-lr3e-2-s{seed}"], rel=1e-5)
        assert losses[seed, 0, 1] != pytest.approx(own[f"r008-lr3e-2-s{seed}"], rel=1e-4)
    cuts = whole.cuts()
    assert set(cuts["candidate"]) == {"r008-lr3e-2"}
    energy = cuts[(cuts["recover_steps"] == 0) & (cuts["seed"] == 0)]["kept_energy"]
    assert energy.is_monotonic_increasing
    assert energy.iloc[-1] == 1
    examples = whole.cut_examples()
    assert len(examples) == 16 * 12
    part = examples[(examples["seed"] == 1) & (examples["cut_rank"] == 2) & (examples["recover_steps"] == 12)]
    mean = (part["loss"] * part["label_tokens"]).sum() / part["label_tokens"].sum()
    assert mean == pytest.approx(losses[1, 12, 2])


def test_recovery_lowers_the_loss_of_a_study_that_has_only_begun(whole: Study) -> None:
    """Five steps of training leave much to learn, so that twelve more must gain."""
    losses = table(whole)
    for seed, steps, rank in losses:
        assert steps == 0 or losses[seed, steps, rank] < losses[seed, 0, rank]


@pytest.mark.usefixtures("no_report")
def test_what_is_there_is_not_measured_again(copy: Study) -> None:
    measure(copy, RecordingProgress(), ranks=[2])
    first, job = table(copy), copy.path / "curve" / "job.json"
    assert set(first) == {(seed, 0, rank) for seed in (0, 1) for rank in (2, 8)}
    measure(copy, RecordingProgress(), ranks=[1, 2])
    assert read_json(job)["wanted"] == {f"r008-lr3e-2-s{seed}": [[1, 0]] for seed in (0, 1)}
    second = table(copy)
    assert first.items() < second.items()
    job.unlink()
    said = RecordingProgress()
    measure(copy, said, ranks=[1, 2])
    assert table(copy) == second
    assert not job.exists()
    assert said.lines == []
    measure(copy, RecordingProgress(), ranks=[2], recover=1)
    assert read_json(job)["wanted"]["r008-lr3e-2-s0"] == [[2, 1], [8, 1]]


@pytest.mark.usefixtures("no_report")
def test_a_curve_that_is_damaged_is_made_again(copy: Study) -> None:
    measure(copy, RecordingProgress(), ranks=[2])
    file, first, said = copy.path / "curve" / "curve.json", table(copy), RecordingProgress()
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.raises(StudyDirectoryError, match=r"curve\.json: damaged"):
        copy.evidence()
    measure(copy, said, ranks=[2])
    assert any("was damaged" in line for line in said.lines)
    assert table(copy) == pytest.approx(first, rel=1e-6)


def test_a_run_removes_a_damaged_curve_and_says_what_makes_it(root: Path, copy_of_whole: Study) -> None:
    file = copy_of_whole.path / "curve" / "curve.json"
    file.write_bytes(file.read_bytes()[:-9])
    said = RecordingProgress()
    study = run_small(root, copy_of_whole.path, progress=said)
    assert "curve/curve.json was damaged: it is removed; `rankscope curve` makes it again." in said.lines
    assert study.cuts().empty
    assert 'id="cuts"' not in study.report.read_text()


def test_cuts_of_an_adapter_that_was_trained_anew_count_no_more(copy_of_whole: Study) -> None:
    file = copy_of_whole.path / "trials" / "r008-lr3e-2-s1" / "trial.json"
    record = read_json(file)
    record["files"]["adapter/adapter_model.safetensors"] = "0" * 64
    write_json(file, record)
    assert set(copy_of_whole.cuts()["seed"]) == {0}


@pytest.mark.parametrize(("status", "seeds"), [("failed", (0, 1)), ("diverged", (0, 1)), ("diverged", (0,))])
def test_without_a_trial_of_the_largest_rank_there_is_nothing_to_cut(
    copy: Study, status: str, seeds: tuple[int, ...]
) -> None:
    """A seed that diverged counts against the whole candidate."""
    for seed in seeds:
        file = copy.path / "trials" / f"r008-lr3e-2-s{seed}" / "trial.json"
        write_json(file, read_json(file) | {"status": status, "results": None})
    with pytest.raises(StudyError, match="no trial of rank 8, the study's largest, is done") as caught:
        measure(copy, RecordingProgress())
    assert caught.value.exit_code == 2
    assert not (copy.path / "curve").exists()


@pytest.mark.usefixtures("no_report")
def test_seeds_that_are_not_done_are_left_out(copy: Study) -> None:
    file = copy.path / "trials" / "r008-lr3e-2-s0" / "trial.json"
    write_json(file, read_json(file) | {"status": "failed", "results": None})
    measure(copy, RecordingProgress(), ranks=[2])
    assert set(table(copy)) == {(1, 0, 2), (1, 0, 8)}


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_one_that_is_killed_keeps_what_it_has(copy: Study, whole: Study, tmp_path: Path, monkeypatch: Any) -> None:
    """The child is killed after its third piece, in the second seed's training."""
    hook = """
    import os, signal
    from rankscope.study.records import CurveRecord
    own, done = CurveRecord.write, []
    def write(*arguments):
        own(*arguments)
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGKILL)
    CurveRecord.write = write
    """
    (tmp_path / "hook.py").write_text(textwrap.dedent(hook))
    with monkeypatch.context() as patch:
        patch.setenv(forking.HOOK, str(tmp_path / "hook.py"))
        with pytest.raises(KilledError, match="curve was killed"):
            measure(copy, RecordingProgress(), recover=12)
    kept = table(copy)
    assert set(kept) == {(0, 0, 8), (0, 12, 8), *((0, 0, rank) for rank in (1, 2, 4))}
    measure(copy, RecordingProgress(), recover=12)
    assert kept.items() < table(copy).items()
    assert table(copy) == pytest.approx(table(whole), rel=1e-5)


def test_a_study_that_is_held_is_left_alone(copy: Study) -> None:
    with copy.lock(), pytest.raises(StudyDirectoryError, match="another run is writing"):
        measure(copy, RecordingProgress())


def test_the_report_has_the_figure_the_table_and_the_sentences(whole: Study) -> None:
    page, markdown = whole.report.read_text(), (whole.path / "report" / "report.md").read_text()
    for text in (page, markdown):
        assert "Held-out loss against rank, estimated from the largest" in text
        assert "Error of the estimate" in text
        assert "an upper estimate from rank 8 alone" in text
    assert 'id="cuts"' in page
    rows = [line for line in markdown.splitlines() if line.startswith(("| 2 | 0 |", "| 2 | 12 |"))]
    assert len(rows) == 2
    trained = whole.results().query("rank == 2")["eval_loss"].mean()
    cut = whole.cuts().query("cut_rank == 2 and recover_steps == 0")["eval_loss"].mean()
    assert f"| 2 | 0 | {trained:.4f} | {cut:.4f} |" in rows[0]


def test_the_command(copy: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    cli = CliRunner()
    with monkeypatch.context() as patch:
        patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())
        done = cli.invoke(app, ["curve", str(copy.path), "--ranks", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [(row["seed"], row["cut_rank"]) for row in found["cuts"]] == [(0, 2), (0, 8), (1, 2), (1, 8)]
    (error,) = found["errors"]
    assert error["error"] == pytest.approx(error["cut"] - error["trained"])
    assert {row["kind"] for row in found["curve"]} == {"trained", "cut"}
    shown = cli.invoke(app, ["curve", str(copy.path), "--ranks", "2", "--lang", "ko"])
    assert "추정 오차" in shown.stdout
    assert "report/index.html" in shown.stdout
    assert 'lang="ko"' in copy.report.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--ranks", "8"], "from 1 to 7"), (["--ranks", "0"], "from 1 to 7"), (["--ranks", "x"], "from 1 to 7"),
     (["--ranks", ","], "from 1 to 7"), (["--recover", "-1"], "expected 0 to")],
)  # fmt: skip
def test_wrong_options_are_refused(trained: Study, arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(app, ["curve", str(trained.path), *arguments])
    assert isinstance(done.exception, StudyError)
    assert said in str(done.exception)
    assert not (trained.path / "curve").exists()


def test_default_ranks() -> None:
    assert lower_ranks(16, [16, 6, 2]) == [1, 2, 4, 6, 8]
    assert lower_ranks(12, [12]) == [1, 2, 4, 8]
    with pytest.raises(StudyError, match="no lower rank"):
        lower_ranks(1, [1])
