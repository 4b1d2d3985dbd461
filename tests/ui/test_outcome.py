"""Results for the terminal and for scripts, from evidence that is read once."""

import io
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rankscope.cli import app
from rankscope.pipeline import Conclusion, finish
from rankscope.report import write
from rankscope.study.study import Study
from rankscope.text.verdict import verdict_sentence
from rankscope.ui.outcome import describe_outcome, show_curve, show_outcome

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"
TABLES = ("evidence", "results", "curves", "profiles", "samples", "examples", "reference_results")


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(write, "render_image", lambda figure: write.Image("", b""))  # the slow part of a report
    shutil.copytree(FIXTURE, tmp_path / "study")
    return Study.open(tmp_path / "study")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each table is read."""
    counts = Counter[str]()

    def counting(name: str, read: Callable[[Study], Any]) -> Callable[[Study], Any]:
        def counted(self: Study) -> Any:
            counts[name] += 1
            return read(self)

        return counted

    for name in TABLES:
        monkeypatch.setattr(Study, name, counting(name, getattr(Study, name)))
    return counts


SHOWN: list[Callable[[Conclusion], Any]] = [
    describe_outcome,
    lambda conclusion: show_outcome(conclusion, Console(), "en"),
    lambda conclusion: show_curve(conclusion, "en"),
]


@pytest.mark.parametrize("show", SHOWN)
def test_the_evidence_is_read_once(study: Study, reads: Counter[str], show: Callable[[Conclusion], Any]) -> None:
    show(finish(study))
    assert reads == dict.fromkeys(TABLES, 1)


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_report_reads_the_evidence_once(study: Study, reads: Counter[str], options: list[str]) -> None:
    result = CliRunner().invoke(app, ["report", str(study.path), *options])
    assert result.exit_code == 0, result.output
    assert reads == dict.fromkeys(TABLES, 1)


def test_trials_are_in_the_order_of_the_study(study: Study) -> None:
    described = describe_outcome(finish(study))
    assert [trial["trial"] for trial in described["trials"]] == study.results()["trial"].tolist()


@pytest.mark.parametrize(
    ("language", "warning"),
    [("en", "Warning: With only 8 rows held out,"), ("ko", "경고: 검증 데이터가 행 8개뿐이어서")],
)
def test_doubts_about_the_data_follow_the_verdict(study: Study, language: str, warning: str) -> None:
    shown, output = finish(study), io.StringIO()
    show_outcome(shown, Console(file=output, width=200), language)
    lines = output.getvalue().splitlines()
    at = lines.index(verdict_sentence(shown.verdict, language))
    assert lines[at + 1].startswith(warning)
    again = CliRunner().invoke(app, ["report", str(study.path), "--lang", language])
    assert again.output.splitlines()[1].startswith(warning)
