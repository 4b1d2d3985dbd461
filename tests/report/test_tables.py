"""Other metrics in the report: perplexity, accuracy, forgetting, divergence, full fine-tuning."""

import math
from pathlib import Path
from typing import Any

import pytest

from rankscope.report.content import Content, compose
from rankscope.report.tables import full_fine_tuning, metrics_by_candidate
from rankscope.report.write import build
from rankscope.text.catalogue import load
from report.report_evidence import HOSTILE, make_evidence, make_spec, make_verdict, replace_trial


def content(language: str = "en", **values: Any) -> Content:
    evidence = make_evidence(make_spec(**values), steps=8)
    return compose(evidence, make_verdict(evidence), load(language))


def rows(found: Content) -> dict[str, dict[str, str]]:
    table = found.section("also").tables[0]
    return {row[0]: dict(zip(table.headers, row, strict=True)) for row in table.rows}


def test_every_candidate_has_its_perplexity_and_accuracy() -> None:
    found = content()
    assert found.section("also").tables[0].headers == [
        "Rank", "Learning rate", "Held-out loss", "Perplexity", "Token accuracy", "Diverged",
    ]  # fmt: skip
    assert rows(found).keys() == {"8", "128", "256"}
    assert rows(found)["8"]["Perplexity"] == f"{sum(math.exp(1.231 + d) for d in (-0.004, 0, 0.004)) / 3:.3f}"
    assert rows(found)["8"]["Token accuracy"] == "70.0%"
    assert rows(found)["8"]["Diverged"] == "0 / 3"
    assert found.section("also").sentences == []


def test_forgetting_is_the_mean_change_over_seeds() -> None:
    found = content(measure={"forgetting": "general.txt"})
    assert rows(found)["8"]["Forgetting (nats)"] == "+0.0180"  # 0.008, and 0, 0.01 and 0.02 of the seeds
    assert rows(found)["256"]["Forgetting (nats)"] == "+0.2660"
    (note,) = found.section("also").sentences
    assert "(general.txt)" in note
    assert "before training it was 3.1000" in note


def test_full_fine_tuning_is_a_row_at_its_best_rate() -> None:
    found = content(ranks=[8, "full"], reference={"learning_rates": [1e-5, 2e-5, 4e-5]})
    full = rows(found)["full fine-tuning"]
    assert (full["Learning rate"], full["Held-out loss"]) == ("1e-5", "1.2000")
    assert full["Diverged"] == "0 / 3"
    (note,) = found.section("also").sentences
    assert "1e-5, 2e-5, 4e-5" in note
    assert "not profiled" in note
    trials = [row for row in found.section("trials").tables[0].rows if row[1] == "full fine-tuning"]
    assert len(trials) == 9
    assert sum(row[5] == "loss not finite at step 7" for row in trials) == 3
    assert len(found.section("candidates").tables[0].rows) == 1, "the reference is no candidate"
    assert rows(found)["8"]["Over full fine-tuning (nats)"] == "+0.0310\n[+0.0210, +0.0410]"
    assert full["Over full fine-tuning (nats)"] == "–"
    one = rows(content(ranks=[8, "full"], seeds=[0]))["8"]["Over full fine-tuning (nats)"]
    assert one == "+0.0270", "no interval with one seed"


def test_full_fine_tuning_that_never_finished_says_so() -> None:
    evidence = make_evidence(make_spec(ranks=[8, "full"]), steps=8)
    none = evidence.reference_results.assign(status="oom", eval_loss=math.nan)
    row = full_fine_tuning(evidence._replace(reference_results=none), {}).iloc[0]
    assert (row["finished"], row["diverged"]) == (0, 0)
    assert math.isnan(row["eval_loss"])
    assert full_fine_tuning(evidence._replace(reference_results=none.iloc[:0]), {}).empty


def test_diverged_trials_are_counted_and_left_out_of_the_means() -> None:
    evidence = replace_trial(make_evidence(steps=8), 0, status="diverged", eval_loss=math.nan, eval_perplexity=math.nan)
    row = metrics_by_candidate(evidence.results).iloc[0]
    assert (row["trials"], row["finished"], row["diverged"]) == (3, 2, 1)
    assert row["eval_loss"] == pytest.approx(1.233)


def test_korean_and_hostile_text(tmp_path: Path) -> None:
    spec = make_spec(ranks=[8, "full"], measure={"forgetting": HOSTILE})
    evidence = make_evidence(spec, steps=8)
    build(evidence, make_verdict(evidence), tmp_path, "ko")
    page, markdown = ((tmp_path / name).read_text(encoding="utf-8") for name in ("index.html", "report.md"))
    for expected in ("그 밖의 지표", "망각 (nat)", "전체 파인튜닝", "토큰 정확도"):
        assert expected in page
        assert expected in markdown
    assert f"({HOSTILE})" not in page
    assert "(\\<script\\>" in markdown
