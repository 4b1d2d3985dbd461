"""The question of a search: how a space and a budget are written, and errors in them."""

import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rankscope import cli
from rankscope.errors import StudyError
from rankscope.search.space import Point, RateRange, SearchSpec, resolve_search
from rankscope.spec.options import read_study_file
from rankscope.spec.resolve import write_yaml
from rankscope.ui.options import EMBEDDED_STUDY

VALUES: dict[str, Any] = {"model": {"id": "m"}, "data": {"id": "d"}}


def asked(values: dict[str, Any] = VALUES, sets: tuple[str, ...] = (), **options: Any) -> SearchSpec:
    return resolve_search(values, options, sets)


def test_a_space_is_written_in_ends_or_lists() -> None:
    spec = asked(
        ranks="4..64", learning_rates="1e-5..1e-3", alpha="16,2r", target_modules="all-linear;q_proj, v_proj", trials=5
    )
    assert spec.space.ranks == (4, 8, 16, 32, 64)
    assert spec.space.learning_rates == RateRange(low=1e-5, high=1e-3)
    assert spec.space.alphas == (16.0, "2r")
    assert spec.space.target_modules == ("all-linear", ("q_proj", "v_proj"))
    assert spec.space.size == math.inf
    assert asked(ranks="6..50").space.ranks == (6, 12, 24, 48)
    listed = asked(ranks="32,8", learning_rates="1e-3,1e-4", alpha=8)
    assert listed.space.ranks == (8, 32)
    assert listed.space.learning_rates == (1e-4, 1e-3)
    assert listed.space.size == len(listed.space.points()) == 4


def test_defaults_and_what_a_study_says() -> None:
    spec = asked()
    assert spec.space.ranks == (4, 8, 16, 32, 64, 128, 256)
    assert spec.space.learning_rates == RateRange(low=3e-5, high=3e-3)
    assert spec.space.alphas == (32.0,)
    assert spec.space.target_modules == ("all-linear",)
    assert (spec.budget.trials, spec.budget.hours, spec.budget.tokens) == (32, None, None)
    assert asked(tokens=1000).budget.trials is None
    file = {**VALUES, "ranks": [3, 5], "learning_rates": 1e-4, "adapter": {"alpha": "2r", "target_modules": ["q_proj"]}}
    said = asked(file, sets=("training.steps=7",), seed=3)
    assert said.space.ranks == (3, 5)
    assert said.space.learning_rates == (1e-4,)
    assert said.space.alphas == ("2r",)
    assert said.space.target_modules == (("q_proj",),)
    assert said.study.training.steps == 7
    assert said.study.seeds == (3,)


def test_a_search_is_read_as_it_was_written() -> None:
    spec = asked(ranks="4..64", alpha="16,2r", target_modules="all-linear;q_proj,v_proj", hours=0.5, sampler="random")
    assert SearchSpec.model_validate(yaml.safe_load(write_yaml(spec))) == spec


def test_a_point_is_a_candidate_of_the_study() -> None:
    spec = asked({**VALUES, "adapter": {"lora_dropout": 0.1, "use_rslora": True}}, alpha="16,2r")
    candidate = spec.trial(Point(8, 2.5e-4, "2r", "q_proj"), 0).candidate
    assert (candidate.rank, candidate.learning_rate, candidate.lora_alpha) == (8, 2.5e-4, 16.0)
    assert (candidate.target_modules, candidate.lora_dropout, candidate.use_rslora) == (("q_proj",), 0.1, True)


@pytest.mark.parametrize(("steps", "rungs"), [(60, [6, 18]), (9, [1, 3]), (5, [1, 3]), (2, [1]), (1, [])])
def test_rungs_lie_within_the_schedule(steps: int, rungs: list[int]) -> None:
    assert asked().rung_steps(steps) == rungs
    assert asked(pruner="none").rung_steps(steps) == []


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"ranks": "8,eight"}, "ranks, 2nd value: .*eight"),
        ({"ranks": "64..8"}, "ranks: 64..8: no such range"),
        ({"ranks": "0"}, "ranks, 1st value: .*greater than 0"),
        ({"ranks": "8,8"}, "ranks: listed twice: 8"),
        ({"ranks": ","}, "ranks: expected at least one"),
        ({"ranks": "full"}, "give at least one number"),
        ({"learning_rates": "1e-3..1e-5"}, "--learning-rates 1e-3..1e-5: no such range"),
        ({"learning_rates": "1e-3.."}, "--learning-rates 1e-3..: no such range"),
        ({"learning_rates": "-1"}, "learning_rates, 1st value: .*greater than 0"),
        ({"learning_rates": "1e-4..fast"}, "learning_rates, 2nd value: .*fast"),
        ({"alpha": "0"}, "adapter.alpha: expected a number above 0"),
        ({"target_modules": "q_proj,;"}, "--target-modules .*: expected all-linear"),
        ({"target_modules": "all-linear;all-linear"}, "--target-modules .*: listed twice"),
        ({"trials": 0}, "--trials 0"),
        ({"hours": -1.0}, "--hours -1.0"),
        ({"sampler": "grid"}, "--sampler grid"),
        ({"pruner": "median"}, "--pruner median"),
        ({"stepz": 3}, "stepz: unknown option"),
    ],
)
def test_what_is_wrong_is_said(options: dict[str, Any], told: str) -> None:
    with pytest.raises(StudyError, match="(?s)" + told.replace("..", r"\.\.")) as error:
        asked(**options)
    assert error.value.exit_code == 2


def test_the_command_line_says_it_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, told in (
        (["--ranks", "64..8"], "no such range"),
        (["--model", "m"], "--dataset is missing"),
    ):
        monkeypatch.setattr(sys, "argv", ["rankscope", "search", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 2
        assert told in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_without_optuna_the_command_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rankscope.errors.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["rankscope", "search"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert re.search(r"pip install .*\[search\]'", capsys.readouterr().err)


def test_studies_of_other_kinds_are_refused() -> None:
    with pytest.raises(StudyError, match="among plain LoRA adapters"):
        asked({**VALUES, "variants": ["pissa"]})
    assert read_study_file(EMBEDDED_STUDY)["ranks"], "the command line leaves these out"
