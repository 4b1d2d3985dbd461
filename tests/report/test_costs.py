"""Costs in a report: noise beside every difference, and the details."""

import math

import pandas as pd
import pytest

from rankscope.report.content import Content, compose
from rankscope.report.costs import noise_sentence
from rankscope.report.frames import by_candidate
from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import load
from report.report_evidence import make_evidence, make_spec, make_verdict


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return make_evidence()


def content_of(evidence: Evidence, language: str = "en") -> Content:
    return compose(evidence, make_verdict(evidence), load(language))


def notes(content: Content) -> str:
    return " ".join(content.section("candidates").sentences)


def test_noise_stands_beside_every_measured_difference(evidence: Evidence) -> None:
    peak, runtime, adapter = content_of(evidence).savings.rows
    # runtimes of each rank differ by 12 s in 1,000, of rank 8 and the control by 6 s more; peaks by 1 and 2 MB in 2,350
    assert runtime.noise == "measurement noise: ±1.9%"
    assert runtime.less
    assert peak.noise == "measurement noise: ±0.12%"
    assert adapter.noise == "", "a file's size is counted, not measured"
    assert runtime.difference == f"{runtime.change}; {runtime.noise}"


def test_a_difference_within_the_noise_is_marked(evidence: Evidence) -> None:
    profiles = evidence.profiles.copy()
    profiles.loc[profiles["rank"] == 256, "runtime_seconds"] = 990.0
    peak, runtime, _ = content_of(evidence._replace(profiles=profiles)).savings.rows
    assert runtime.difference == runtime.noise == "no measurable difference (noise ±1.8%)", "and no percentage"
    assert not runtime.less
    assert peak.less


def test_the_noise_is_said_in_a_sentence(evidence: Evidence) -> None:
    assert noise_sentence(evidence.profiles, load("en")) == (
        "Measurement noise (95%): 0.10% in average CPU memory, 0.12% in peak CPU memory, 3.5% in seconds per step, "
        "1.9% in runtime. Smaller differences between ranks are not measurable."
    )
    assert notes(content_of(evidence)).startswith("Measurement noise (95%)")
    assert notes(content_of(evidence, "ko")).startswith("측정 오차(95%)")


def test_a_busy_machine_is_said_with_what_to_do(evidence: Evidence) -> None:
    for language, what in (("en", "(for 40% of it"), ("ko", "40%")):
        busy, idle = (evidence._replace(profiles=evidence.profiles.assign(cpu_pressure=x)) for x in (0.4, 0.05))
        assert what in notes(content_of(busy, language))
        assert "--remeasure" in notes(content_of(busy, language))
        assert "--remeasure" not in notes(content_of(idle, language))


def test_without_a_second_measurement_nothing_is_said_of_noise(evidence: Evidence) -> None:
    profiles = evidence.profiles[~evidence.profiles["control"] & (evidence.profiles["repeat"] == 0)]
    content = content_of(evidence._replace(profiles=profiles))
    assert "noise" not in notes(content)
    assert {saving.noise for saving in content.savings.rows} == {""}
    assert all(saving.less for saving in content.savings.rows)
    bare = content_of(evidence._replace(profiles=pd.DataFrame(), samples=pd.DataFrame()))
    assert "noise" not in notes(bare)
    assert len(bare.section("candidates").tables) == 1


def test_costs_in_detail_have_a_row_a_rank_and_their_noise(evidence: Evidence) -> None:
    _, memory, time = content_of(evidence).section("candidates").tables
    assert [row[:2] for row in memory.rows] == [
        ["8", "CPU, resident"], ["128", "CPU, resident"], ["256", "CPU, resident"], ["Noise", "CPU, resident"],
    ]  # fmt: skip
    first = dict(zip(memory.headers, memory.rows[0], strict=True))
    assert first["99th percentile"] == "2.31 GB"
    assert first["Above the base, average"] == "1.51 GB"
    assert first["Loading, peak"] == "488 MB"
    assert dict(zip(memory.headers, memory.rows[-1], strict=True))["Peak"] == "0.12%"
    of_time = dict(zip(time.headers, time.rows[0], strict=True))
    assert of_time["Seconds per step, 10th percentile"] == "0.358"
    assert of_time["Seconds per step, median"] == "0.413"
    assert of_time["Tokens per second"] == "2,100"
    assert of_time["GPU energy (J per token)"] == load("en")("none")


def test_with_a_gpu_each_kind_of_memory_has_its_rows() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), gpu=True, steps=8)
    _, memory, time = content_of(evidence).section("candidates").tables
    assert len(memory.rows) == (3 + 1) * 4, "ranks and their noise, once for all learning rates"
    rows = {(row[0], row[1]): row for row in memory.rows}
    assert rows["8", "GPU, by the driver"][3] == "5.58 GB"
    assert time.rows[0][-1] == "0.0120"


def test_a_control_does_not_move_its_candidate_s_costs(evidence: Evidence) -> None:
    shifted = evidence.profiles.copy()
    shifted.loc[shifted["control"], ["runtime_seconds", "rss_peak_bytes"]] *= 3
    verdict = make_verdict(evidence)
    pd.testing.assert_frame_equal(
        by_candidate(evidence._replace(profiles=shifted), verdict), by_candidate(evidence, verdict)
    )


def test_every_learning_rate_of_a_rank_has_its_cost() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), steps=8)
    table = by_candidate(evidence, {})
    assert len(table) == 6
    assert table.groupby("rank")["runtime_seconds"].nunique().eq(1).all()
    assert table["runtime_seconds"].notna().all()
    assert math.isnan(table["gpu_allocated_peak_bytes"].iloc[0])
