"""Study directories of each released format still open, and mean what they meant.

One was made by each version whose format a later one changes: a tiny model, two ranks, two learning rates, two seeds, a
general text, full fine-tuning; without logs and report.
"""

import shutil
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

import rankscope
from rankscope.analysis.verdict import conclude
from rankscope.errors import StudyError
from rankscope.jobs.repair import remove_corrupt
from rankscope.report.write import build

_NEW = ("caveats", "more_seeds", "outcome", "schema")
STUDIES = sorted((Path(__file__).parents[1] / "fixtures").glob("study-*"))


def test_there_are_some() -> None:
    assert [study.name for study in STUDIES] == ["study-0.1"]


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_an_old_study_opens_and_concludes_as_it_did(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "study"
    shutil.copytree(path, copy)
    study = rankscope.open(copy)
    assert remove_corrupt(study) == []
    evidence = study.evidence()
    assert list(evidence.results["status"]) == ["done"] * 8
    assert len(evidence.profiles) == 5  # each rank's for both of its rates, and the control's for one
    found = conclude(evidence)
    assert found["caveats"] == [*study.verdict["caveats"], "few_held_out_rows"], "which version 0.1 did not say"
    assert (found["outcome"], found["more_seeds"]) == ("not_distinguishable", 1), "two seeds are no longer a claim"
    assert [row.pop("within_margin") for row in found["comparison"]] == [None, None]
    expected = deepcopy({key: study.verdict[key] for key in study.verdict if key not in _NEW})
    for row in expected["comparison"]:
        del row["within_margin"]
    for row in expected["claims"]:
        assert [row.pop(end) for end in ("low", "high") if row.get(end, 0) is None] in ([], [None] * 2), (
            "of costs, then"
        )
    assert_same(found, expected)
    assert (found["margin_of"], found["margin"], found["gain"]) == ("loss", 0.01, None)
    build(evidence, study.verdict, copy / "report")
    assert "full fine-tuning" in (copy / "report" / "index.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_an_old_study_is_not_judged_by_a_gain_that_it_does_not_know(path: Path) -> None:
    evidence = rankscope.open(path).evidence()
    verdict = evidence.spec.verdict.model_copy(update={"margin_of": "gain", "margin": 0.05})
    with pytest.raises(StudyError, match=r"margin_of: gain needs the untrained model's loss") as caught:
        conclude(evidence._replace(spec=evidence.spec.model_copy(update={"verdict": verdict})))
    assert "--margin-of loss" in caught.value.todo


def assert_same(found: Any, expected: Any) -> None:
    """Assert that every value of an old file is found; a newer version may add some."""
    if isinstance(expected, dict):
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)
    else:
        assert found == expected
