"""The main path from end to end, in real child processes, on a tiny model and real files."""

import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

import rankscope
from drawing import images
from rankscope import cli
from rankscope.analysis.costs import noise_of
from rankscope.data.tokens import load
from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import read_json
from rankscope.report.finish import Conclusion
from rankscope.study.missing import unfinished
from rankscope.study.study import Study
from rankscope.text import catalogue
from rankscope.ui.outcome import show_outcome

OPTIONS = {"ranks": [2, 16], "seeds": [0, 1], "steps": 6, "batch_size": 4, "learning_rates": [5e-3]}
SETS = (
    "measure.repeats=2",
    "measure.steps=2",
    "measure.rounds=3",
    "measure.warmup_steps=1",
    "data.eval_rows=12",
    "training.evals=2",
)


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    files, out = {"model": str(root / "model"), "dataset": str(root / "data.json")}, tmp_path_factory.mktemp("run")
    with images():
        return rankscope.run(out=out / "study", sets=SETS, **files, **OPTIONS)


def test_every_trial_is_done(study: Study) -> None:
    results = study.results()
    assert list(results["status"]) == ["done"] * 4
    assert list(results["engine"]) == ["packed"] * 4
    assert unfinished(study) == []
    assert results["eval_loss"].between(1, math.log(300) + 1).all()
    assert set(results["steps"]) == {6}


def test_curves_have_every_step(study: Study) -> None:
    curves = study.curves()
    for _, trial in curves.groupby("trial"):
        assert list(trial["step"]) == [0, 1, 2, 3, 4, 5, 6]
        assert trial["train_loss"].notna().sum() == 6
        assert list(trial.loc[trial["eval_loss"].notna(), "step"]) == [0, 3, 6]
        assert (trial["grad_norm"].dropna() > 0).all()
    at_start = curves.loc[curves["step"] == 0, "eval_loss"]
    assert at_start.nunique() == 1, "before training every trial is the base model"


def test_trials_with_one_seed_see_the_same_tokens(study: Study) -> None:
    curves = study.curves()
    tokens = curves[curves["step"] > 0].pivot(index="step", columns="trial", values="tokens")
    assert (tokens["r002-lr5e-3-s0"] == tokens["r016-lr5e-3-s0"]).all()
    assert (tokens["r002-lr5e-3-s0"] != tokens["r002-lr5e-3-s1"]).any()


def test_held_out_loss_can_be_recomputed_from_the_saved_adapter(study: Study, root: Path) -> None:
    """PEFT and transformers alone compute the loss of results.csv from the adapter on disk."""
    data = load(study.path / "data")
    trial = study.spec.trials()[1]
    base = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(study.trial_folder(trial) / "adapter")).eval()
    total = labels = 0.0
    for ids, is_label in data.eval:
        batch = torch.from_numpy(ids).long()[None]
        with torch.no_grad():
            logits = model(input_ids=batch).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, batch[0, 1:], reduction="none").numpy()
        total += losses[is_label[1:]].sum()
        labels += is_label[1:].sum()
    results = study.results().set_index("trial")
    assert results.loc[trial.name, "eval_loss"] == pytest.approx(total / labels, rel=1e-5)
    examples = study.examples()
    mine = examples[examples["trial"] == trial.name]
    assert np.average(mine["loss"], weights=mine["label_tokens"]) == pytest.approx(total / labels, rel=1e-5)


def test_profiles_measure_each_candidate(study: Study) -> None:
    everything = study.profiles()
    assert list(everything.groupby(["control", "candidate"]).size()) == [2, 2, 2], "each twice, the first twice over"
    assert sorted(path.stem for path in (study.path / "profiles").glob("*.json")) == ["control", "r002", "r016", "time"]
    profiles = everything[~everything["control"]]
    for kind in ("rss", "private"):
        assert (profiles[f"{kind}_peak_bytes"] >= profiles[f"{kind}_mean_bytes"]).all()
        assert (profiles[f"{kind}_peak_bytes"] >= profiles[f"eval_{kind}_peak_bytes"]).all()
    assert (profiles["rss_base_bytes"] > profiles["private_base_bytes"]).all()
    assert (profiles["private_base_bytes"] > 100e6).all()
    assert (profiles["step_seconds_median"] > 0).all()
    assert (profiles["steps"] == 2).all()
    assert list(profiles["trainable_params"].unique()) == list(study.results()["trainable_params"].unique())
    assert set(profiles["adapter_bytes"]) == set(study.results()["adapter_bytes"])
    for column, measurements in (("private_mean_bytes", 2), ("runtime_seconds", 3)):
        noise = noise_of(everything, column)
        assert noise is not None
        assert noise.measurements == measurements
        assert noise.floor > 0
    (session,) = study.profile_repeats("time")
    assert set(session["summaries"]) == {"control", "r002", "r016"}
    samples = study.samples()
    assert set(samples["phase"]) == {"load", "warmup", "train", "eval"}


def test_the_noise_is_told_below_the_table(study: Study, capsys: pytest.CaptureFixture[str]) -> None:
    show_outcome(Conclusion(study, study.evidence(), study.verdict), cli.out_console, catalogue.load("en"))
    assert "Measurement noise (95%): " in capsys.readouterr().out


def test_verdict_and_report(study: Study) -> None:
    verdict = study.verdict
    assert verdict["outcome"] in ("recommended", "not_distinguishable", "not_enough_evidence", "not_trained_enough")
    assert verdict["seeds"] == 2
    assert [row["rank"] for row in verdict["comparison"]] == [2, 16]
    page = (study.path / "report" / "index.html").read_text()
    assert "r016-lr5e-3" in page
    assert (study.path / "report" / "figures" / "train-loss.png").exists()
    frame = pd.read_csv(study.path / "report" / "results.csv")
    assert len(frame) == 4


def test_machine_json_says_what_it_ran_on(study: Study) -> None:
    machine = study.machine
    assert machine["model"]["parameters"] == sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(study.spec.model.id).parameters()
    )
    assert machine["versions"]["torch"] == torch.__version__
    assert machine["hardware"]["memory_bytes"] > 1e9


def test_run_again_does_only_what_is_missing(study: Study, root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(study.path, copy)
    kept, lost = copy / "trials" / "r002-lr5e-3-s0", copy / "trials" / "r016-lr5e-3-s1"
    before = (kept / "trial.json").stat().st_mtime_ns
    expected = read_json(lost / "eval.json")
    shutil.rmtree(lost)
    again = rankscope.run(model=str(root / "model"), dataset=str(root / "data.json"), out=copy, sets=SETS, **OPTIONS)
    assert unfinished(again) == []
    assert (kept / "trial.json").stat().st_mtime_ns == before
    assert sorted(path.name for path in (copy / "packs").iterdir()) == ["division.json", "p000"]
    assert "from step 0 of 6, with 1 trials" in (copy / "packs" / "p000" / "log.txt").read_text()
    np.testing.assert_allclose(
        read_json(lost / "eval.json")["examples"]["loss"], expected["examples"]["loss"], rtol=1e-4
    )  # alone, where it was packed before


@pytest.mark.slow
def test_isolated_trials_have_a_process_each(root: Path, tmp_path: Path) -> None:
    options = OPTIONS | {"ranks": [2], "seeds": [0], "learning_rates": [1e-3, 5e-3], "steps": 2}
    study = rankscope.run(
        model=str(root / "model"), dataset=str(root / "data.json"), out=tmp_path / "study", isolated=True,
        sets=(*SETS, "measure.repeats=1", "measure.answers=0"), **options,
    )  # fmt: skip
    assert unfinished(study) == []
    jobs = [read_json(file)["packs"] for file in sorted((study.path / "packs").glob("*/job.json"))]
    assert jobs == [{f"p{number:03d}": [trial.name]} for number, trial in enumerate(study.spec.trials())]
    results = study.results()
    assert (results["eval_seconds"] > 0).all()
    profiles = study.profiles()
    assert list(profiles["candidate"]) == ["r002-lr1e-3", "r002-lr5e-3", "r002-lr1e-3"]
    assert list(profiles["control"]) == [False, False, True]
    first, other, _ = profiles["runtime_seconds"]
    assert first == other, "a rank is profiled once for all its learning rates"


def test_two_runs_at_once_are_refused(study: Study) -> None:
    other = Study.open(study.path)
    with (
        study.lock(),
        pytest.raises(StudyDirectoryError, match=r"another run is writing to it \(process \d+ on"),
        other.lock(),
    ):
        pass
    with other.lock():
        pass  # free again


def test_another_study_in_the_same_place_is_refused(study: Study, root: Path) -> None:
    with pytest.raises(StudyError, match=r"training.steps: 6 there, 7 asked for"):
        rankscope.run(
            model=str(root / "model"),
            dataset=str(root / "data.json"),
            out=study.path,
            sets=(*SETS, "training.steps=7"),
            **OPTIONS,
        )
