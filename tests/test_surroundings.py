"""What is around a run fails, or works beside it: disks that cannot be written, files that vanish, hubs that do not
answer, readers."""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import rankscope
from rankscope.errors import ModelError
from rankscope.report.finish import finish
from rankscope.study.missing import unfinished
from rankscope.study.study import Study

pytestmark = pytest.mark.slow

SETS = ("measure.profiles=false", "measure.answers=0", "training.evals=2", "data.eval_rows=12")


def run(root: Path, out: Path, steps: int) -> Study:
    return rankscope.run(
        model=str(root / "model"), dataset=str(root / "data.json"), ranks=[2, 4], seeds=[0], steps=steps, out=out,
        sets=SETS, device="cpu",
    )  # fmt: skip


def command(*arguments: str, inside: tuple[str, ...] = (), **environment: str) -> subprocess.CompletedProcess[str]:
    asked = [*inside, sys.executable, "-m", "rankscope.cli", *arguments]
    given = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200"} | environment
    return subprocess.run(asked, capture_output=True, text=True, timeout=240, check=False, env=given)


def test_reports_are_built_while_a_run_writes(root: Path, tmp_path: Path) -> None:
    """Every report is whole, of what there was; the run is not disturbed."""
    path = tmp_path / "study"
    writer = threading.Thread(target=run, args=(root, path, 400))
    writer.start()
    seen: set[int] = set()
    while writer.is_alive():
        if not (path / "trials").exists():
            time.sleep(0.05)
            continue
        study = Study.open(path)
        seen.add(len(study.curves()))
        page = finish(study).study.report
        assert page.read_text().rstrip().endswith("</html>")
    writer.join()
    assert len(seen) > 1, "no report fell into the training"
    assert unfinished(Study.open(path)) == []


def read_only(folder: Path) -> tuple[str, ...]:
    """Runs what follows with `folder` mounted read-only, which also binds root, in a namespace of its own."""
    script = f'mount --bind "{folder}" "{folder}" && mount -o remount,ro,bind "{folder}" && exec "$@"'
    wrapped = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script, "sh")
    if shutil.which("unshare") is None or subprocess.run([*wrapped, "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    return wrapped


def test_a_folder_that_cannot_be_written(root: Path, tmp_path: Path) -> None:
    """Said in a few lines, by a new study and by one that is there."""
    asked = ["run", "--model", str(root / "model"), "--dataset", str(root / "data.json"), "--ranks", "2"]
    asked += ["--seeds", "0", "--steps", "2"]
    for assignment in SETS:
        asked += ["--set", assignment]
    new = command(*asked, "--out", str(tmp_path / "study"), inside=read_only(tmp_path))
    assert new.returncode == 2, new.stderr
    assert "cannot be written: Read-only file system" in new.stderr
    assert len(new.stderr.splitlines()) <= 4
    assert list(tmp_path.iterdir()) == []
    assert command(*asked, "--out", str(tmp_path / "study")).returncode == 0
    for there in (["report", str(tmp_path / "study")], [*asked, "--out", str(tmp_path / "study")]):
        refused = command(*there, inside=read_only(tmp_path))
        assert refused.returncode == 2
        assert "cannot be written: Read-only file system" in refused.stderr
        assert "Traceback" not in refused.stderr


def test_data_and_model_that_vanish(root: Path, tmp_path: Path) -> None:
    """A study keeps its tokens, so it goes on without the data; without the model it says so, and keeps what it has."""
    own = tmp_path / "own"
    shutil.copytree(root, own)
    study = run(own, tmp_path / "study", 4)
    gone = study.spec.trials()[1]
    shutil.rmtree(study.trial_folder(gone))
    (own / "data.json").unlink()
    (own / "model").rename(own / "away")
    with pytest.raises(ModelError, match="no such folder"):
        run(own, tmp_path / "study", 4)
    kept = Study.open(tmp_path / "study")
    assert [kept.trial_record(trial).status for trial in kept.spec.trials()] == ["done", "pending"]
    (own / "away").rename(own / "model")
    assert unfinished(run(own, tmp_path / "study", 4)) == []
