"""The section on the task, the table of trials, and what the terminal says of both."""

from io import StringIO
from pathlib import Path

import pandas as pd
import pytest
from rich.console import Console

from analysis.made_up import RATE, examples, outcomes, untrained_examples, with_task
from rankscope.analysis.verdict import conclude
from rankscope.report.content import compose
from rankscope.report.finish import Conclusion
from rankscope.report.frames import scored_results
from rankscope.report.markdown import render
from rankscope.report.task import task_table
from rankscope.report.write import draw_charts
from rankscope.study.evidence import Evidence
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.ui.outcome import show_verdict
from report.report_evidence import make_evidence

SHARES = {8: 0.5, 128: 0.8, 256: 0.8}


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    made = make_evidence()
    names = dict(zip(made.results["rank"], made.results["candidate"], strict=True))
    losses = examples({(rank, RATE): [2.0, 2.001, 2.002] for rank in SHARES})
    losses = losses.assign(candidate=losses["rank"].map(names))
    return with_task(made._replace(examples=losses, untrained=untrained_examples()), outcomes(SHARES, items=1000))


def test_the_report_has_each_rank_beside_the_untrained_model(evidence: Evidence) -> None:
    verdict = conclude(evidence)
    for language in ("en", "ko"):
        content = compose(evidence, verdict, load(language))
        section = content.section("task")
        assert [figure.name for figure in section.figures] == ["task-scores"]
        (table,) = section.tables
        assert [row[0] for row in table.rows[1:]] == ["8", "128", "256"]
        assert table.chosen == 2, "below the untrained model's row"
        assert verdict["rank"] == 128
        assert "task-scores" in render(content, load(language))
    assert table.rows[2][1].startswith(f"{verdict['task']['scores'][1]['score']:.1%}")


def test_the_figure_is_drawn(evidence: Evidence) -> None:
    content = compose(evidence, conclude(evidence), load("en"))
    section = content.section("task")
    drawn = draw_charts(content._replace(sections=[section], details=[]))
    assert all("untrained model" in image for image in drawn.values())
    assert len(drawn) == 1


def test_a_study_without_a_task_has_no_section() -> None:
    evidence = make_evidence()
    verdict = conclude(evidence)
    assert "task" not in {section.name for section in compose(evidence, verdict, load("en")).sections}
    assert task_table(verdict, load("en")) is None
    assert scored_results(evidence) is evidence.results


def test_missing_scores_are_said(evidence: Evidence) -> None:
    part = evidence._replace(task_scores=evidence.task_scores.query("rank < 100"))
    section = compose(part, conclude(part), load("en")).section("task")
    assert section.reasons == ["a compared rank has no scores on the task"]


def test_the_table_of_trials_has_their_mean_scores(evidence: Evidence) -> None:
    table = scored_results(evidence)
    first = table.iloc[0]
    own = evidence.task_scores.query(f"candidate == '{first['candidate']}' and seed == {first['seed']}")
    assert first["task_score"] == pytest.approx(own["score"].mean())
    assert table["task_score"].notna().all()
    pd.testing.assert_frame_equal(table.drop(columns="task_score"), evidence.results)


def test_the_terminal_ends_with_scores_and_the_verdict(evidence: Evidence, tmp_path: Path) -> None:
    study = Study.create(tmp_path / "study", evidence.spec)
    console = Console(width=150, record=True, file=StringIO())
    show_verdict(Conclusion(study, evidence, conclude(evidence)), console, load("en"))
    said = console.export_text()
    assert "Points behind the best" in said
    assert "By the task, use rank 128" in said
    assert "rankscope report" not in said, "another margin of the loss would change nothing"
    assert said.splitlines()[-1] == f"  rankscope export {study.path}"
