"""A study with full fine-tuning as its reference, and with forgetting, from end to end on a tiny model."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel

import rankscope
from launchers import FakeLauncher
from rankscope import pipeline
from rankscope.data.tokens import load
from rankscope.errors import DataError, OutOfMemoryError, WorkerError
from rankscope.files import read_json
from rankscope.jobs.local import LocalLauncher
from rankscope.study.missing import unfinished
from rankscope.study.study import Study

OPTIONS: dict[str, Any] = {
    "ranks": [4, "full"], "seeds": [0, 1], "steps": 6, "batch_size": 4, "learning_rates": [3e-3]
}  # fmt: skip
FOLDERS = ["full-lr3e-4-s0", "full-lr3e-4-s1"]


def run(root: Path, out: Path) -> Study:
    sets = (
        "measure.profiles=false", "measure.answers=0", "data.eval_rows=12", "training.evals=2", "data.max_length=64",
        f"measure.forgetting={root / 'general.txt'}", "measure.forgetting_rows=5",
    )  # fmt: skip
    return rankscope.run(
        model=str(root / "model"), dataset=str(root / "data.json"), device="cpu", out=out, sets=sets, **OPTIONS
    )


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return run(root, tmp_path_factory.mktemp("reference") / "study")


def test_the_reference_is_trained_at_a_tenth_of_the_rate(study: Study) -> None:
    assert study.spec.ranks == (4,)
    reference = study.reference_results()
    assert list(reference["trial"]) == FOLDERS
    assert list(reference["status"]) == ["done", "done"]
    assert list(reference["learning_rate"]) == [3e-4, 3e-4]
    assert list(reference["rank"]) == [0, 0]
    assert (reference["eval_loss"] < 10).all()
    assert unfinished(study) == []
    for name in FOLDERS:
        files = {path.name for path in (study.path / "reference" / name).iterdir()}
        assert files == {"job.json", "log.txt", "trial.json", "metrics.jsonl", "untrained.json", "eval.json"}


def test_the_reference_sees_what_the_candidates_see(study: Study) -> None:
    examples, reference = study.examples(), study.reference_examples()
    assert list(examples.columns) == list(reference.columns)
    assert sorted(reference["seed"].unique()) == [0, 1]
    labels = [table[table["seed"] == 0]["label_tokens"].to_numpy() for table in (examples, reference)]
    np.testing.assert_array_equal(*labels)
    candidate, full = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (study.trial_folder(study.spec.trials()[0]), study.path / "reference" / FOLDERS[0])
    )
    assert candidate[0]["eval_loss"] == pytest.approx(full[0]["eval_loss"], rel=1e-6), "both start from the base model"
    assert [row.get("tokens") for row in candidate] == [row.get("tokens") for row in full]


def test_evidence_and_report_have_it(study: Study) -> None:
    evidence = study.evidence()
    assert len(evidence.reference) == 2 * len(load(study.path / "data").eval)
    for name in ("index.html", "report.md"):
        page = (study.path / "report" / name).read_text()
        assert "Other metrics" in page
        assert "full fine-tuning" in page
        assert "Forgetting (nats)" in page
    korean = pipeline.finish(study, "ko").study.report.read_text()
    assert "전체 파인튜닝" in korean
    assert "망각 (nat)" in korean
    pipeline.finish(study)


def test_forgetting_is_transformers_own_loss_before_and_after(study: Study, root: Path) -> None:
    general = load(study.path / "data").general
    assert general is not None
    assert len(general) == 5
    results = study.results().set_index("trial")
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32).eval()
    before = general_loss(base, list(general))
    everyone = [*results["general_loss_before"], *study.reference_results()["general_loss_before"]]
    assert everyone == pytest.approx([before] * 4, rel=1e-5)
    for trial in study.spec.trials():
        base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, str(study.trial_folder(trial) / "adapter")).eval()
        after = general_loss(model, list(general))
        assert results.loc[trial.name, "general_loss_after"] == pytest.approx(after, rel=1e-5)
        assert abs(after - before) > 1e-4, "training changed nothing: nothing is shown"


def general_loss(model: PreTrainedModel | PeftModel, sequences: list[Any]) -> float:
    """Mean loss by transformers; every token but the first of a sequence is a label."""
    ids = [torch.from_numpy(sequence.ids).long()[None] for sequence in sequences]
    with torch.no_grad():
        losses = [float(model(input_ids=one, labels=one).loss) for one in ids]
    return float(np.average(losses, weights=[one.shape[1] - 1 for one in ids]))


@pytest.mark.usefixtures("no_report")
def test_run_again_trains_only_what_is_missing(study: Study, root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    kept, lost = (copy / "reference" / name for name in FOLDERS)
    expected = read_json(lost / "eval.json")
    record = read_json(lost / "trial.json") | {"status": "failed"}
    (lost / "trial.json").write_text(json.dumps(record))
    before = (kept / "trial.json").stat().st_mtime_ns
    again = run(root, copy)
    assert (kept / "trial.json").stat().st_mtime_ns == before
    assert list(again.reference_results()["status"]) == ["done", "done"]
    np.testing.assert_allclose(
        read_json(lost / "eval.json")["examples"]["loss"], expected["examples"]["loss"], rtol=1e-6
    )
    assert len(list((copy / "packs").iterdir())) == len(list((study.path / "packs").iterdir()))


def test_trials_that_fail_are_recorded_and_end_no_study(
    study: Study, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    shutil.rmtree(copy / "reference")
    ends = iter([OutOfMemoryError("no more"), WorkerError("the child ended by signal 9")])
    ending = FakeLauncher(lambda *_: next(ends), LocalLauncher(study.spec.model).site())
    monkeypatch.setattr("rankscope.begin.make_launcher", lambda *_: ending)
    again = run(root, copy)
    assert list(again.reference_results()["status"]) == ["oom", "failed"]
    assert again.reference_results()["reason"][1] == "the child ended by signal 9"
    assert [trial.name for trial in unfinished(again)] == FOLDERS
    assert "the child ended by signal 9" in (copy / "report" / "report.md").read_text()


def test_a_general_text_that_is_missing_ends_the_run_before_it_begins(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"measure\.forgetting: nowhere\.txt: no such file"):
        rankscope.run(
            model=str(root / "model"), dataset=str(root / "data.json"), device="cpu", out=tmp_path / "none",
            sets=("measure.forgetting=nowhere.txt",), **OPTIONS,
        )  # fmt: skip
    assert not (tmp_path / "none").exists()


def test_a_study_without_either_has_empty_tables(study: Study, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    spec = study.spec.model_copy(update={"reference": type(study.spec.reference)()})
    other = Study(copy, spec)
    assert other.reference_results().empty
    assert other.reference_examples().empty
    assert list(other.reference_examples().columns) == list(study.examples().columns)
