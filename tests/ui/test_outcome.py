"""Results for the terminal and for scripts, from evidence that is read once."""

import io
import math
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from rich.console import Console
from typer.testing import CliRunner

from rankscope.cli import app
from rankscope.report.finish import Conclusion, finish
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.text.verdict import verdict_sentence
from rankscope.ui.outcome import curve_parts, describe_outcome, show_outcome
from report.report_evidence import make_evidence, make_verdict, replace_trial
from ui.test_console import accepts

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"
TABLES = ("evidence", "results", "curves", "profiles", "samples", "examples", "reference_results")


@pytest.fixture
def study(tmp_path: Path, no_report: None) -> Study:
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
    lambda conclusion: show_outcome(conclusion, Console(), load("en")),
    lambda conclusion: list(curve_parts(conclusion, load("en"))),
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
    concluded, output = finish(study), io.StringIO()
    show_outcome(concluded, Console(file=output, width=200), load(language))
    again = CliRunner().invoke(app, ["report", str(study.path), "--lang", language])
    for shown in (output.getvalue(), again.output):
        lines = shown.splitlines()
        at = lines.index(verdict_sentence(concluded.verdict, language))
        assert lines[at + 1].startswith(warning)


def made_up(**values: Any) -> Conclusion:
    evidence = make_evidence(steps=8)
    where = SimpleNamespace(path="my study", report="report")
    return Conclusion(cast(Study, where), evidence, make_verdict(evidence, **values))


def shown(conclusion: Conclusion) -> list[str]:
    output = io.StringIO()
    show_outcome(conclusion, Console(file=output, width=200), load("en"))
    return output.getvalue().splitlines()


def test_the_end_is_the_gain_the_margins_the_verdict_and_what_would_settle_it() -> None:
    lines = shown(made_up(outcome="not_enough_evidence", more_seeds=2))
    at = next(number for number, line in enumerate(lines) if line.startswith("What fine-tuning gains"))
    assert lines[at + 6].startswith("There is no verdict yet: 3 seeds")
    assert [" ".join(line.split()) for line in lines[at : at + 6] + lines[at + 7 :]] == [
        "What fine-tuning gains: 1.6000 nats; held-out loss 2.8240 before training, 1.2240 with rank 128; 95% "
        "interval: 1.5800 to 1.6200 nats.",
        "Smallest rank by the share of the gain it must keep (95% confidence):",
        "Keeps at least Smallest rank",
        "98% 8",
        "95% 8",
        "",
        "Report: report",
        "To settle it:",
        "rankscope run 'my study' --until-settled",
    ]


@pytest.mark.parametrize(
    ("chosen", "title", "command"),
    [
        (0, "To try lower ranks as well:", "rankscope run 'my study' --ranks 2,4"),
        (1, "To conclude at another margin:", "rankscope report 'my study' --margin 2.5%"),
    ],
)
def test_a_settled_study_ends_with_its_adapter_and_what_to_try_next(chosen: int, title: str, command: str) -> None:
    lines = shown(made_up(chosen=chosen))
    adapter, *rest = lines[-4:]
    assert re.fullmatch(rf"Adapter: my study/trials/r{(8, 128)[chosen]:03d}-.*-s\d/adapter", adapter)
    assert rest == ["Report: report", title, f"  {command}"]
    assert accepts(command)


def test_ranks_to_doubt_are_named_on_the_terminal() -> None:
    diverged = [{"candidate": "r064-lr2e-3", "rank": 64, "learning_rate": 2e-3, "seeds": [0]}]
    lines = shown(made_up(diverged=diverged, caveats=["one_learning_rate", "diverged"]))
    assert [line.split(".")[0] for line in lines if line.startswith("Warning")] == [
        "Warning: Diverged: rank 64 at learning rate 2e-3 (seed 0)"
    ]


def test_a_diverged_candidate_has_no_mean_and_one_worse_than_no_training_says_so() -> None:
    study, evidence, verdict = made_up()
    evidence = replace_trial(evidence, 0, status="diverged", eval_loss=math.nan)
    evidence = evidence._replace(untrained=evidence.untrained.assign(loss=1.226))
    lines = shown(Conclusion(study, evidence, verdict))
    header, *rows = "\n".join(lines[: lines.index("")]).split("\nr")
    cells = {row.split()[0]: " ".join(row.split()) for row in rows}
    assert "diverged" in cells["008-lr2e-4"]
    assert "1.233" not in cells["008-lr2e-4"], "the mean of the other two"
    assert "worse" not in cells["128-lr2e-4"]
    assert "1.2290" in cells["256-lr2e-4"]
    assert "worse than" in cells["256-lr2e-4"]
    assert "Loss above" in header
