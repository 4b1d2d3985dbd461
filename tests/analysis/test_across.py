"""Several studies together."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rankscope.analysis.across import Sufficient, _between, _interpolated, _with_error, common_rank, sufficient_rank
from rankscope.cli import app
from rankscope.study.study import Study
from rankscope.ui.console import out_console


def test_the_rank_that_keeps_enough_lies_where_the_line_between_two_crosses() -> None:
    # A gain of 1: rank 4 keeps 90%, rank 16 all, so that 95% lies half way in log2.
    assert _interpolated({4: 1.1, 16: 1.0}, 2.0) == (pytest.approx(3.0), pytest.approx(2.0))
    assert _interpolated({4: 1.01, 16: 1.0}, 2.0) == (2.0, 2.0)
    assert _interpolated({4: 2.1, 16: 2.0}, 2.0) is None


def test_the_error_is_the_jackknife_over_seeds_and_the_grid() -> None:
    losses = {4: np.array([1.10, 1.12, 1.08]), 16: np.array([1.0, 1.0, 1.0])}
    found = _with_error(losses, 2.0)
    assert found is not None
    left_out = []
    for pair in ([1.12, 1.08], [1.10, 1.08], [1.10, 1.12]):
        kept = 2.0 - sum(pair) / 2
        left_out.append(2 + 2 * (0.95 - kept) / (1 - kept))
    by_seed = 2 / 3 * sum((one - sum(left_out) / 3) ** 2 for one in left_out)
    assert found.error == pytest.approx(math.sqrt(by_seed + 4 / 12))
    assert found.at_lowest is False, "as JSON writes it"


def test_the_variance_between_studies_is_that_of_paule_and_mandel() -> None:
    values, variances = np.array([1.0, 2.0, 4.0, 7.0]), np.array([0.5, 0.2, 0.4, 0.3])
    between = _between(values, variances)
    weights = 1 / (variances + between)
    mean = (weights * values).sum() / weights.sum()
    assert (weights * (values - mean) ** 2).sum() == pytest.approx(3)
    assert _between(np.array([1.0, 1.1, 0.9]), np.array([1.0, 1.0, 1.0])) == 0.0


def test_the_common_interval_covers_and_estimates_are_drawn_towards_it() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        errors = random.uniform(0.3, 1.0, 12)
        values = random.normal(4.0, 0.7, 12) + random.normal(0.0, errors)
        found = common_rank([Sufficient(float(v), float(e), False) for v, e in zip(values, errors, strict=True)])
        assert found is not None
        covered += found.low <= 4.0 <= found.high
        nearer = np.abs(np.array(found.shrunken) - found.log2_rank) <= np.abs(values - found.log2_rank) + 1e-9
        assert nearer.all()
    assert 0.92 <= covered / 400 <= 0.98


def test_fewer_than_ten_studies_have_no_common_rank() -> None:
    assert common_rank([Sufficient(3.0, 0.5, False)] * 9) is None
    assert common_rank([Sufficient(3.0, 0.5, False)] * 10) is not None


def test_studies_with_the_same_tokens_are_paired_by_row_and_seed(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(out_console, "width", 1000)  # no header is divided
    other = tmp_path / "other"
    shutil.copytree(trained.path, other)
    done = CliRunner().invoke(app, ["compare", str(trained.path), str(other), "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [study["study"] for study in found["studies"]] == [str(trained.path), str(other)]
    assert [(pair["rank"], pair["difference"], pair["low"], pair["seeds"]) for pair in found["pairs"]] == [
        (2, 0.0, 0.0, 2),
        (8, 0.0, 0.0, 2),
    ]
    assert found["common"] is None
    shown = CliRunner().invoke(app, ["compare", str(trained.path), str(other)])
    assert "paired by held-out row and seed" in shown.stdout
    assert "from 10 studies on" in shown.stdout
    korean = CliRunner().invoke(app, ["compare", str(trained.path), str(other), "--lang", "ko"]).stdout
    assert "검증 행과 시드로 짝지은 비교" in korean
    assert "스터디가 10개 이상일 때" in korean
    words = set(re.findall("[a-z]{3,}", korean.replace(str(tmp_path), "").replace(str(trained.path), "")))
    assert not words & {"study", "seeds", "verdict", "difference", "interval", "rank", "none"}


def test_the_rank_of_a_study_is_that_of_its_own_losses(trained: Study) -> None:
    evidence = trained.evidence()
    found = sufficient_rank(evidence)
    assert evidence.untrained["loss"].mean() > 0
    assert found is None or 1.0 <= found.log2_rank <= 3.0


def test_one_study_cannot_be_compared(trained: Study) -> None:
    done = CliRunner().invoke(app, ["compare", str(trained.path), str(trained.path)])
    assert "at least two different studies" in done.output or "at least two" in str(done.exception)


def test_no_study_is_compared_twice(trained: Study, tmp_path: Path) -> None:
    other = shutil.copytree(trained.path, tmp_path / "other")
    done = CliRunner().invoke(app, ["compare", str(trained.path), str(trained.path), str(other)])
    assert done.exit_code != 0
    assert "at least two different studies" in str(done.exception)
