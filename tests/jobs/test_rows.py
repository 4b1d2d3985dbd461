"""Evaluation of finished trials on added rows: the numbers are those that training itself gives for these rows."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers import FakeLauncher
from rankscope.errors import KilledError, RankscopeError
from rankscope.files import file_sha256, read_json, write_json
from rankscope.jobs import rows
from rankscope.jobs.job import Job, Run
from rankscope.jobs.queue import run_jobs
from rankscope.study.folder import OF_HELD_OUT
from rankscope.study.missing import unevaluated
from rankscope.study.records import LogEntry
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from small_study import run_small

VARIANTS = ["rslora", "pissa", "olora", "loraplus", "dora"]


@pytest.fixture(scope="module")
def stale(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """A study of each variant whose trials are taken to be of other evaluation rows, though they are of these."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())
        options = {"ranks": [2], "seeds": [0], "variants": VARIANTS}
        study = run_small(root, tmp_path_factory.mktemp("rows") / "study", **options)
    return make_stale(study)


def make_stale(study: Study) -> Study:
    for trial in study.trials:
        file = study.trial_folder(trial) / "trial.json"
        write_json(file, read_json(file) | {"tokens_sha256": "before"})
    now = study.data_facts["tokens_sha256"]
    study.log.append(LogEntry(when="", version="", tokens_sha256=["before", now]))
    study.publish()
    return study


def run(study: Study, does: Any = rows.work, devices: int = 1) -> tuple[list[Job], list[str]]:
    said: list[str] = []
    plan: Any = SimpleNamespace(fleet=SimpleNamespace(devices=devices), host_bytes=lambda trials: 1)
    launcher = FakeLauncher(lambda path, job: does(path, job.content))
    run = Run(study, plan, said.append, load("en"))
    run_jobs(launcher, study.path, rows.jobs(run), lambda: None, partial(rows.ended, run))
    return launcher.started, said


@pytest.mark.slow
def test_every_variant_has_the_losses_that_its_training_ended_with(stale: Study) -> None:
    before = {trial.name: stale.saved_record(trial) for trial in stale.trials}
    examples = {trial.name: stale.held_out(trial) for trial in stale.trials}
    assert unevaluated(stale) == stale.trials
    assert set(stale.results()["status"]) == {"interrupted"}
    assert stale.results()["eval_loss"].isna().all()
    assert stale.examples().empty, "losses on other rows are not compared"
    assert stale.untrained_examples().empty
    failed, said = run(stale, lambda path, content: KilledError("killed"))
    assert said[-1] == "The evaluation on the rows that were added did not finish: killed"
    assert unevaluated(stale) == stale.trials
    started, _ = run(stale, devices=4)
    assert [len(job.content["trials"]) for job in (*failed, *started)] == [6, 2, 2, 1, 1]
    assert unevaluated(stale) == []
    assert run(stale) == ([], [])
    assert {trial.candidate.variant for trial in stale.trials} == {"lora", *VARIANTS}
    for trial in stale.trials:
        now, earlier = stale.trial_record(trial), before[trial.name]
        assert now.status == "done"
        assert now.results is not None
        for field, value in earlier.results or ():
            assert getattr(now.results, field) == (value if value is None else pytest.approx(value, rel=1e-6)), field
        assert stale.held_out(trial).loss == pytest.approx(examples[trial.name].loss, rel=1e-5)
        assert now.tokens_sha256 == stale.data_facts["tokens_sha256"]
        folder, files = stale.trial_folder(trial), now.files or {}
        assert {name: file_sha256(folder / name) for name in files} == files
        assert files | {name: (earlier.files or {})[name] for name in files if name not in OF_HELD_OUT} == files
    examples_of_lora = stale.examples().query("variant == 'lora'")
    assert stale.untrained_examples()["loss"].mean() > examples_of_lora["loss"].mean(), "before training"


def test_an_error_that_every_job_would_hit_ends_the_run(trained: Study, tmp_path: Path) -> None:
    study = make_stale(Study.open(shutil.copytree(trained.path, tmp_path / "study")))
    adapter = study.trial_folder(study.trials[0]) / "adapter" / "adapter_model.safetensors"
    adapter.write_bytes(adapter.read_bytes()[:-1])
    with pytest.raises(RankscopeError, match="damaged"):
        run(study)
