"""The curve from one training in the report: figure, table and sentences, and none of them without a curve."""

from pathlib import Path

import altair as alt
import pytest

from analysis.test_curve import with_cuts
from rankscope.report.curve import rank_curve_sections
from rankscope.report.write import build
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from report.report_evidence import make_evidence, make_verdict
from report.test_report import read_page

CUTS = {(0, 2): 2.6, (0, 4): 2.1, (0, 8): 1.905, (0, 16): 1.8, (8, 4): 2.015, (8, 8): 1.9, (8, 16): 1.79}


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return with_cuts({4: 2.0, 8: 1.9, 16: 1.8}, CUTS)


def test_the_sentences_say_where_it_holds_and_where_not(evidence: Evidence) -> None:
    (section,) = rank_curve_sections(evidence, load("en"))
    assert section.sentences == [
        "The truncated curve is an upper estimate from rank 16 alone: a rank that is trained directly usually reaches "
        "a lower loss than the adapter truncated to it.",
        "Truncated, compared with the same rank trained: within 1% at rank 8; off by more than 1% at rank 4.",
        "Truncated, then trained 8 steps, compared with the same rank trained: within 1% at rank 4, 8.",
        "Truncated: the lowest rank whose loss is at most 1% above that of rank 16 is 16; of the trained ranks it is "
        "16.",
        "Truncated, then trained 8 steps: the lowest rank whose loss is at most 1% above that of rank 16 is 16; of the "
        "trained ranks it is 16.",
        "Recovered adapters have had 8 steps more than the trained ranks, at a tenth of the learning rate. The same "
        "steps changed the loss of rank 16, not truncated, by −0.0100 nats.",
    ]


def test_without_a_trained_lower_rank_the_error_is_not_known() -> None:
    (found,) = rank_curve_sections(with_cuts({16: 1.8}, {(0, 4): 2.1, (0, 16): 1.8}), load("en"))
    assert found.tables == []
    assert found.sentences[1:] == [
        "No lower rank was trained here, so the error of the estimate is unknown.",
    ]


def test_the_table_has_the_error_with_its_interval_share_and_spread(evidence: Evidence) -> None:
    (table,) = rank_curve_sections(evidence, load("en"))[0].tables
    assert [row[:5] for row in table.rows[:2]] == [
        ["4", "0", "2.0100", "2.1110", "+0.1010\n[+0.0985, +0.1035]"],
        ["8", "0", "1.9100", "1.9160", "+0.0060\n[+0.0035, +0.0085]"],
    ]
    assert [row[5:] for row in table.rows] == [
        ["+5.0%", "0.0010", "no"], ["+0.31%", "0.0010", "yes"],
        ["+0.80%", "0.0010", "yes"], ["+0.052%", "0.0010", "yes"],
    ]  # fmt: skip
    (single,) = rank_curve_sections(with_cuts({4: 2.0, 16: 1.8}, {(0, 4): 2.1}, seeds=[0]), load("en"))[0].tables
    assert single.rows[0][4:7] == ["+0.1000", "+5.0%", "–"]


def test_the_figure_is_on_the_page_with_all_its_numbers(evidence: Evidence, tmp_path: Path) -> None:
    build(evidence, make_verdict(evidence), tmp_path)
    page = read_page(tmp_path)
    chart = page.charts["chart-cut-loss-rank-0"]
    assert "Truncated. Rank 2: 2.6110; Rank 4: 2.1110" in chart["description"]
    points = next(rows for rows in chart["datasets"].values() if rows)
    names = {row["name"] for row in points}
    assert names == {"Trained", "Truncated", "Truncated, then trained 8 steps"}
    assert len(points) == 3 + 4 + 3
    assert {layer["encoding"]["x"]["scale"]["base"] for layer in chart["layer"]} == {2}
    alt.Chart.from_dict(chart | {"$schema": alt.SCHEMA_URL}, validate=True).to_dict(validate=True)
    for text in ("Error of the estimate", "+0.1010\n[+0.0985, +0.1035]", "is an upper estimate from rank 16 alone"):
        assert text in page.text
    markdown = (tmp_path / "report.md").read_text()
    assert "| 4 | 0 | 2.0100 | 2.1110 | +0.1010 \\[+0.0985, +0.1035\\] | +5.0% | 0.0010 | no |" in markdown


def test_in_korean(evidence: Evidence, tmp_path: Path) -> None:
    build(evidence, make_verdict(evidence), tmp_path, "ko")
    text = read_page(tmp_path).text
    for expected in (
        "한 번의 학습으로 추정한 모든 랭크",
        "그 랭크를 직접 학습하면 대개",
        "랭크 4에서는 1% 초과",
        "추정 오차",
    ):
        assert expected in text


def test_without_a_curve_there_is_no_section(tmp_path: Path) -> None:
    evidence = make_evidence(steps=8)
    assert rank_curve_sections(evidence, load("en")) == []
    build(evidence, {}, tmp_path)
    assert "cut-loss-rank" not in (tmp_path / "index.html").read_text()
