"""A study that learned nothing recommends nothing."""

import shutil
from pathlib import Path

import pytest

from rankscope.analysis.verdict import conclude
from rankscope.study.study import Study
from study.planting import plant

LEARNED = {"r002-lr3e-2-s0": 9.0190, "r002-lr3e-2-s1": 9.0186, "r008-lr3e-2-s0": 9.0186, "r008-lr3e-2-s1": 9.0187}


@pytest.fixture
def study(trained: Study, tmp_path: Path) -> Study:
    """From 9.0240 to 9.0186."""
    shutil.copytree(trained.path, tmp_path / "study")
    study = Study.open(tmp_path / "study")
    plant(study, 9.0240, LEARNED)
    return study


def test_it_was_not_trained_enough(study: Study) -> None:
    verdict = conclude(study.evidence())
    assert (verdict["outcome"], verdict["rank"], verdict["candidate"]) == ("not_trained_enough", None, None)
    assert verdict["gain"] == pytest.approx(9.0240 - (9.0186 + 9.0187) / 2)
    assert all(row["within_margin"] is not True for row in verdict["comparison"])
    assert verdict["margins"] == []


def test_by_a_margin_of_the_loss_it_would_recommend(study: Study) -> None:
    """With 95% confidence, as it did."""
    evidence = study.evidence()
    of_loss = evidence.spec.verdict.model_copy(update={"margin_of": "loss", "margin": 0.01})
    verdict = conclude(evidence._replace(spec=evidence.spec.model_copy(update={"verdict": of_loss})))
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 2)
