"""The table of predicted and measured memory, in the report's content."""

from rankscope.report.content import compose
from rankscope.report.costs import prediction_tables
from rankscope.report.frames import by_candidate
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from rankscope.text.formats import Table
from report.report_evidence import make_evidence

PARTS = {
    "process": 450_000_000, "base": 1_300_000_000, "adapter": 1, "gradients": 2, "optimizer": 9_999_997,
    "activations": 40_000_000, "logits": 30_000_000, "retained": 50_000_000,
}  # fmt: skip


def predicted(total: int = 2_000_000_000) -> dict[str, object]:
    row = {"parts": PARTS, "peak_bytes": total, "step_seconds": 0.5, "runtime_seconds": 60.0, "forward_tokens": 512}
    return {"candidates": dict.fromkeys(("r008-lr2e-4", "r128-lr2e-4"), row)}


def tables(evidence: Evidence) -> list[Table]:
    return prediction_tables(evidence, by_candidate(evidence, {}), load("en"))


def test_predicted_and_measured_stand_side_by_side() -> None:
    evidence = make_evidence()._replace(prediction=predicted())
    (table,) = tables(evidence)
    assert len(table.rows) == 2, "one candidate was not predicted"
    measured = evidence.profiles.loc[evidence.profiles["candidate"] == "r008-lr2e-4", "rss_peak_bytes"].max()
    row = dict(zip(table.headers, table.rows[0], strict=True))
    assert row["Rank"] == "8"
    assert row["Adapter"] == "10.0 MB"
    assert row["Other"] == "500 MB"
    assert row["Predicted peak"] == "2.00 GB"
    assert row["Measured peak"] == f"{measured / 1e9:.2f} GB"
    assert row["Predicted relative to measured"] == f"{2e9 / measured - 1:+.0%}".replace("-", "−")
    assert row["Seconds per step, predicted"] == "0.500", "with as many decimals as what was measured"


def test_on_a_gpu_its_own_peak_is_compared() -> None:
    evidence = make_evidence(gpu=True)._replace(prediction=predicted())
    (table,) = tables(evidence)
    measured = evidence.profiles.loc[evidence.profiles["candidate"] == "r008-lr2e-4", "gpu_allocated_peak_bytes"].max()
    assert dict(zip(table.headers, table.rows[0], strict=True))["Measured peak"] == f"{measured / 1e9:.2f} GB"


def test_nothing_measured_and_nothing_predicted() -> None:
    unmeasured = make_evidence(profiles=False)._replace(prediction=predicted())
    (table,) = tables(unmeasured)
    assert dict(zip(table.headers, table.rows[0], strict=True))["Measured peak"] == "–"
    assert tables(make_evidence()) == []


def test_the_report_holds_it_in_both_languages() -> None:
    evidence = make_evidence()._replace(prediction=predicted())
    for language in ("en", "ko"):
        text = load(language)
        content = compose(evidence, {}, text)
        assert content.section("candidates").tables[-1].caption == text("prediction.title")
