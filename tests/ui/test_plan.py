"""What is printed before training, in the language that was asked for: a plan, a run's first lines."""

import io
import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.cells import cell_len
from typer.testing import CliRunner

from rankscope import cli
from rankscope.study.study import Study
from rankscope.ui import console
from rankscope.ui.console import PlainConsole

NAMES = {"cpu", "cuda", "kB", "MB", "GB", "GPU", "GFLOP", "lr", "in"}
FLEET = ["--gpu-memory", "24GB", "--gpu-flops", "0.1GFLOPS", "--devices", "2", "--price", "2.5"]


def in_korean(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [*map(str, arguments), "--lang", "ko"])
    assert result.exit_code == 0, result.output
    return result.output


def english_in(output: str) -> set[str]:
    """Words between spaces and brackets that are no names; JSON strings, which are of the data, and commands aside."""
    told = re.sub(r'".*"|^  rankscope .*', "", output, flags=re.MULTILINE)
    return set(re.findall(r"(?<![\w./-])[A-Za-z]{2,}(?![\w./-])", told)) - NAMES


@pytest.fixture
def question(root: Path) -> list[str]:
    return ["--model", str(root / "model"), "--dataset", str(root / "data.json"), "--ranks", "2,4", "--steps", "5"]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--ranks", "2,4,full", "--show-rows", "1"], "1번째 행"),
        (FLEET, "비용: "),
        (["--gpu-memory", "100kB"], "그래디언트 체크포인팅: 모든 후보"),
        (["--gpu-memory", "10kB"], "베이스 모델만 해도"),
    ],
    ids=["here", "fleet", "rows too long", "base too large"],
)
def test_a_plan_in_korean_has_no_english(question: list[str], more: list[str], told: str) -> None:
    shown = in_korean("plan", *question, *more)
    assert told in shown
    assert english_in(shown) == set()


def test_the_plan_of_a_study_that_has_begun_is_in_korean(trained: Study) -> None:
    """The warnings of its data are the second line."""
    for command in (
        ["run", trained.path, "--dry-run", "--seeds", "0..4"],
        ["plan", trained.path, "--task", "exact_match"],
    ):
        shown = in_korean(*command)
        assert re.search(rf"{re.escape(str(trained.path))}: 시행 \d+개 중 4개 완료", shown.replace("\n", ""))
        assert english_in(shown) == set()
    assert "완료된 모델 5개를 태스크로 채점" in shown


@pytest.mark.usefixtures("no_report")
def test_a_run_in_korean_begins_in_korean(question: list[str], tmp_path: Path) -> None:
    only = ["--seeds", "0", "--steps", "2", "--set", "measure.profiles=false", "--set", "measure.answers=0"]
    first, begun, _ = in_korean("run", *question, *only, "--out", tmp_path / "study").partition("팩(묶음) p000")
    assert begun
    assert "행당 평균 73토큰" in first
    assert english_in(first) == set()


@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_plan_fits_80_columns_whole(question: list[str], language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr("rankscope.ui.plan.show", lambda *parts: show_in(output, parts))
    monkeypatch.setattr(console.out_console, "width", 80)
    result = CliRunner().invoke(cli.app, ["plan", *question, "--lang", language])
    assert result.exit_code == 0, result.output
    lines = output.getvalue().splitlines()
    assert max(map(cell_len, lines)) <= 80
    rows = [line for line in lines if re.match(r"r00\d-lr2e-4 ", line)]
    assert [len(re.findall(r"\d [kM]B", row)) for row in rows] == [6, 6, 0, 0], "every size, with its unit"
    tables = [lines[number - 1 : number + 2] for number in (lines.index(rows[0]), lines.index(rows[2]))]
    assert [len({*map(cell_len, table)}) for table in tables] == [1, 1], "columns end where their headers do"


def show_in(output: io.StringIO, parts: Sequence[object]) -> None:
    for part in parts:
        PlainConsole(file=output, width=80, force_terminal=True, color_system=None).print(part)


def test_json_is_data_in_either_language(question: list[str]) -> None:
    korean, english = (
        json.loads(CliRunner().invoke(cli.app, ["plan", *question, *FLEET, "--json", "--lang", language]).stdout)
        for language in ("ko", "en")
    )
    assert english["fleet"].pop("counted").startswith("steps and evaluations of all trials, 11 s for each process")
    assert re.search("[가-힣]", korean["fleet"].pop("counted"))
    assert english["fleet"].pop("not_counted") != korean["fleet"].pop("not_counted")
    assert english.pop("warnings") != korean.pop("warnings")
    assert english == korean
