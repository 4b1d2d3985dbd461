"""The figures' content: parts of memory, noise beside costs, the Pareto front, the map of rates; what stands in."""

import math
from itertools import pairwise
from typing import Any

import pandas as pd
import pytest

from rankscope.analysis.costs import noise_of, on_front
from rankscope.analysis.verdict import conclude
from rankscope.report.charts import spread
from rankscope.report.content import compose
from rankscope.report.figures import Figure
from rankscope.report.frames import by_candidate, heldout_by_seed
from rankscope.report.loss import loss_figures
from rankscope.report.memory import POINTS_IN_TIME, memory_by_time, predicted_parts
from rankscope.report.runtime import measurements
from rankscope.report.variants import variant_table
from rankscope.study.evidence import Evidence, without_variants
from rankscope.text.catalogue import load
from rankscope.text.formats import loss
from rankscope.text.verdict import caveat_sentence
from report.report_evidence import make_evidence, make_spec, make_verdict, of_the_loss, replace_trial

PARTS = {
    "process": 450_000_000, "base": 1_300_000_000, "adapter": 4_000_000, "gradients": 0, "optimizer": 8_000_000,
    "activations": 40_000_000, "logits": 30_000_000, "retained": 50_000_000,
}  # fmt: skip


def predict(evidence: Evidence, device: str = "cpu") -> Evidence:
    row = {"parts": PARTS, "peak_bytes": sum(PARTS.values()), "step_seconds": 0.5}
    candidates = {candidate.name: row for candidate in evidence.spec.candidates()}
    return evidence._replace(prediction={"device": device, "candidates": candidates})


def figures(evidence: Evidence, language: str = "en", **verdict: Any) -> dict[str, Figure]:
    content = compose(evidence, make_verdict(evidence, **verdict), load(language))
    return {figure.name: figure for figure in content.figures}


def drawn(figure: Figure) -> list[list[dict[str, Any]]]:
    """The tables of a figure's first chart."""
    return [rows for rows in figure.panels[0].chart.to_dict()["datasets"].values() if rows]


def numbers(figure: Figure, row: int = 0) -> dict[str, str]:
    assert figure.numbers is not None
    return dict(zip(figure.numbers.headers, figure.numbers.rows[row], strict=True))


def test_memory_is_stacked_by_part_beside_what_was_measured() -> None:
    figure = figures(predict(make_evidence()))["cpu-memory"]
    parts, measured = sorted(drawn(figure), key=len, reverse=True)
    assert len(parts) == 3 * 7, "no rank has gradients at its peak"
    assert [row["kind"] for row in measured] == ["measured"] * 3
    assert sum(row["value"] for row in parts if row["rank"] == 8) == pytest.approx(1.882)
    row = numbers(figure)
    assert row["Base weights"] == "1.30 GB"
    assert row["Predicted peak"] == "1.88 GB"
    assert (row["Average"], row["Peak"]) == ("1.92 GB", "2.35 GB")
    assert "predicted" in figure.note


def test_a_prediction_is_of_one_device() -> None:
    gpu = predict(make_evidence(gpu=True, steps=8), "cuda")
    assert predicted_parts(gpu, "cpu").empty
    assert predicted_parts(gpu, "gpu").shape == (3, 7)
    found = figures(gpu)
    assert "Base weights" in numbers(found["gpu-memory"])
    assert "Base weights" not in numbers(found["cpu-memory"])


def test_what_was_predicted_is_drawn_where_nothing_was_measured() -> None:
    figure = figures(predict(make_evidence(profiles=False, steps=8)))["cpu-memory"]
    assert figure.note.startswith("Nothing was profiled")
    assert numbers(figure).keys() >= {"Base weights", "Predicted peak"}
    assert "Peak" not in numbers(figure)
    assert "Rank 8: 1.88 GB" in figure.alternative


def test_noise_is_a_band_around_the_lowest_rank() -> None:
    evidence = make_evidence()
    found = figures(evidence)
    (band,) = [rows[0] for rows in drawn(found["runtime"]) if "from" in rows[0]]
    noise, mean = noise_of(evidence.profiles, "runtime_seconds"), 983.6 / 60  # rank 8: 977.6 and 989.6
    assert noise is not None
    assert band == pytest.approx({"from": mean / (1 + noise.floor), "to": mean * (1 + noise.floor)})
    assert numbers(found["runtime"])["Mean"] == "16 min 24 s"


def test_noise_above_all_does_not_reach_below_zero() -> None:
    evidence = make_evidence()
    wild = evidence.profiles.copy()
    wild.loc[wild["control"], "runtime_seconds"] *= 9
    (band,) = [rows[0] for rows in drawn(figures(evidence._replace(profiles=wild))["runtime"]) if "from" in rows[0]]
    assert band["from"] > 0


def test_trials_in_packs_of_their_own_tell_their_runtime() -> None:
    shared = make_evidence()._replace(profiles=pd.DataFrame(), samples=pd.DataFrame())
    assert measurements(shared)[0].empty
    alone = shared._replace(results=shared.results.assign(pack=[f"p{i:03d}" for i in range(9)]))
    frame, profiled = measurements(alone)
    assert not profiled
    assert list(frame["runtime"]) == [312.0] * 9
    assert figures(alone)["runtime"].note == "Time of each trial, trained alone."


def test_without_a_second_measurement_there_is_no_band() -> None:
    evidence = make_evidence()
    profiles = evidence.profiles[~evidence.profiles["control"] & (evidence.profiles["repeat"] == 0)]
    figure = figures(evidence._replace(profiles=profiles))["runtime"]
    assert not any("from" in rows[0] for rows in drawn(figure))
    assert "noise" not in figure.note


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([(1, 3), (2, 2), (3, 1)], [True, True, True]),
        ([(1, 1), (2, 2), (1, 2)], [True, False, False]),
        ([(1, 2), (1, 2), (2, 1)], [True, True, True]),
        ([(1, 2), (math.nan, 1), (2, math.nan)], [True, False, False]),
        ([], []),
    ],
)
def test_the_front_has_those_that_none_beats(rows: list[tuple[float, float]], expected: list[bool]) -> None:
    table = pd.DataFrame(rows, columns=["loss", "cost"], index=range(5, 5 + len(rows)), dtype="float64")
    assert on_front(table, ["loss", "cost"]).tolist() == expected


def test_a_candidate_with_more_loss_for_more_cost_is_off_the_front() -> None:
    found = figures(make_evidence())
    for name in ("loss-memory", "loss-runtime"):  # rank 256 costs most, and its loss is above rank 128's
        assert [numbers(found[name], row)["On the Pareto front"] for row in range(3)] == ["yes", "yes", "no"]
        assert found[name].alternative.endswith("On the Pareto front: rank 8, rank 128.")
        points = max(drawn(found[name]), key=len)
        assert [row["chosen"] for row in points] == [True, False, False]
    assert "the ring marks" in found["loss-memory"].note


def test_costs_that_differ_by_noise_have_no_front() -> None:
    evidence = make_evidence(steps=8)
    alike = evidence.profiles["runtime_seconds"].where(evidence.profiles["repeat"] > 0, 900.0).clip(900.0, 990.0)
    found = figures(evidence._replace(profiles=evidence.profiles.assign(runtime_seconds=alike)))
    assert found["loss-runtime"].note.startswith("No measurable difference in cost (noise ±")
    assert "On the Pareto front" not in numbers(found["loss-runtime"])
    assert not any(row.get("front") for rows in drawn(found["loss-runtime"]) for row in rows)
    assert any(row.get("front") for rows in drawn(found["loss-memory"]) for row in rows)


def test_the_first_figure_is_the_evidence_of_the_verdict() -> None:
    """Loss above the best with the verdict's intervals, paired by seed, and the margin shaded."""
    evidence = make_evidence(steps=8)
    found = figures(evidence)
    assert next(iter(found)) == "loss-above-best"
    figure = found["loss-above-best"]
    means = next(rows for rows in drawn(figure) if "above_high" in rows[0])
    assert [(row["rank"], row["above"]) for row in means] == [
        (8, pytest.approx(0.007)), (128, pytest.approx(0.0, abs=1e-12)), (256, pytest.approx(0.005)),
    ]  # fmt: skip
    assert (means[0]["above_low"], means[0]["above_high"]) == pytest.approx((0.005, 0.010))
    seeds = next(rows for rows in drawn(figure) if "seed" in rows[0])
    assert [row["above"] for row in seeds if row["rank"] == 8] == pytest.approx([0.007] * 3), "seeds are paired"
    assert next(rows for rows in drawn(figure) if "from" in rows[0]) == [{"from": 0.0, "to": pytest.approx(0.08)}]
    assert "its bar ends in the shaded band, 5% of what fine-tuning gains" in figure.note


def arrows(figure: Figure) -> list[dict[str, Any]]:
    """Rows that are arrows at the chart's upper edge."""
    chart = figure.panels[0].chart.to_dict()
    layer = next(layer for layer in chart["layer"] if layer["mark"].get("shape") == "triangle-up")
    assert layer["encoding"]["y"] == {"value": 5}
    return list(chart["datasets"][layer["data"]["name"]])


def test_candidates_beyond_the_verdict_s_are_arrows_with_their_value() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), steps=8)
    far = evidence.results.index[evidence.results["candidate"] == "r128-lr2e-4"]
    for row in far:
        evidence = replace_trial(evidence, int(row), eval_loss=7.0)
    lost = evidence.results.index[evidence.results["candidate"] == "r256-lr2e-4"][0]
    evidence = replace_trial(evidence, int(lost), status="diverged", eval_loss=math.nan)
    found = figures(evidence)
    for name, labels in (("loss-above-best", ["+5.7780", "diverged"]), ("loss-memory", ["7.0000"])):
        assert [row["label"] for row in arrows(found[name])] == labels
        layers = found[name].panels[0].chart.to_dict()["layer"]
        domains = {tuple(layer["encoding"].get("y", {}).get("scale", {}).get("domain", ())) for layer in layers} - {()}
        ((bottom, top),) = domains
        assert top < 1.4
        shown = ("above", "above_high", "eval_loss", "eval_loss_high")
        within = [row[at] for rows in drawn(found[name]) for row in rows for at in shown if row.get(at) is not None]
        assert max(value for value in within if value < top) < top - 0.08 * (top - bottom), "labels lie above the bars"


def test_rates_of_a_rank_beyond_the_axis_are_one_arrow_where_all_cost_the_same() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4, 3e-4]), steps=8)
    for candidate, far in (("r128-lr2e-4", 7.0), ("r128-lr3e-4", 9.0), ("r256-lr3e-4", 8.0)):
        for row in evidence.results.index[evidence.results["candidate"] == candidate]:
            evidence = replace_trial(evidence, int(row), eval_loss=far)
    found, heights = figures(evidence), []
    for layer in found["loss-above-best"].panels[0].chart.to_dict()["layer"]:
        heights += [layer["mark"].get("dy")] * (layer["encoding"]["y"] == {"value": 5})
    assert heights == [None, 14, 26], "labels of neighbours do not touch"
    weighed = arrows(found["loss-memory"])
    assert [(row["rank"], row["label"]) for row in weighed] == [(128, "from 7.0000"), (256, "8.0000")]


@pytest.mark.parametrize("values", [[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [5.0, 1.0, 1.2], []])
def test_labels_do_not_lie_on_each_other(values: list[float]) -> None:
    found = spread(values, 0.5)
    order = sorted(found)
    assert all(after - before >= 0.5 - 1e-9 for before, after in pairwise(order))
    assert sum(found) == pytest.approx(sum(values)), "as high as their lines, on average"
    assert sorted(range(len(found)), key=found.__getitem__) == sorted(range(len(values)), key=values.__getitem__)


def test_on_a_gpu_loss_is_weighed_against_its_memory() -> None:
    figure = figures(make_evidence(gpu=True, steps=8))["loss-memory"]
    assert numbers(figure)["Peak GPU memory (GB)"] == "4.81 GB"


def test_one_candidate_has_nothing_to_weigh() -> None:
    for evidence in (make_evidence(make_spec(ranks=[8]), steps=8), make_evidence(profiles=False, steps=8)):
        assert "loss-runtime" not in figures(evidence)
        content = compose(evidence, make_verdict(evidence), load("en"))
        (reason,) = content.section("trade_off").reasons
        assert reason.startswith("Fewer than two candidates")


def test_the_map_has_a_cell_a_candidate() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), steps=8)
    for seed in (0, 1, 2):
        row = evidence.results.index[(evidence.results["rank"] == 8) & (evidence.results["learning_rate"] == 2e-4)][
            seed
        ]
        evidence = replace_trial(evidence, int(row), status="diverged", eval_loss=math.nan)
    figure = figures(evidence)["learning-rate-map"]
    cells = {(row["rank"], row["rate"]): row for rows in drawn(figure) for row in rows}
    assert len(cells) == 6
    assert cells[8, "2e-4"]["label"] == "diverged"
    assert cells[128, "1e-4"]["label"] == "1.2220"
    assert {key for key, row in cells.items() if row["best"]} == {(8, "1e-4"), (128, "1e-4"), (256, "1e-4")}
    assert numbers(figure) == {"Learning rate": "1e-4", "rank 8": "1.2290", "rank 128": "1.2220", "rank 256": "1.2270"}
    assert "learning-rate-map" not in figures(make_evidence(steps=8)), "one rate is no map"


def test_of_several_alphas_figures_of_loss_show_the_best_of_each_rank_and_rate() -> None:
    evidence = make_evidence(make_spec(adapter={"alpha": [16, "2r"]}, learning_rates=[1e-4, 2e-4]))
    results = evidence.results
    results.loc[results["candidate"] == "r128-lr1e-4-a256", "eval_loss"] -= 0.01
    results.loc[results["candidate"] == "r256-lr2e-4", "eval_loss"] -= 0.01
    results.loc[results["trial"] == "r256-lr2e-4-a512-s1", "status"] = "diverged"
    verdict = conclude(evidence)
    table, text = by_candidate(evidence, {}), load("en")
    figures = {figure.name: figure for figure in loss_figures(evidence, {}, table, text)}
    for name, rows in (("train-loss", 3), ("loss-above-best", 6), ("learning-rate-map", 2)):
        figure = figures[name]
        assert isinstance(figure, Figure)
        named = [tuple(row[:2]) for row in figure.numbers.rows]
        assert len(named) == len(set(named)) == rows
    chart = figures["learning-rate-map"].numbers.rows  # type: ignore[union-attr]
    best = table.set_index("candidate")["eval_loss"]
    assert chart[0][2] == loss(best["r128-lr1e-4-a256"])
    assert chart[1][3] == loss(best["r256-lr2e-4"])
    told = caveat_sentence(verdict, "diverged", text)
    assert "rank 256 at learning rate 2e-4 with alpha 512 (seed 1)" in told
    content = compose(evidence, verdict, text)
    assert any("Of several alphas" in line for line in content.how_to_read)
    limits = " ".join(content.section("limits").sentences)
    assert "Alpha is the same" not in limits
    assert "alpha of each rank were chosen" in limits


def test_one_rate_that_nearly_diverged_leaves_colours_to_the_others() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), steps=8)
    evidence = replace_trial(evidence, 3, eval_loss=90.0)
    layers = figures(evidence)["learning-rate-map"].panels[0].chart.to_dict()["layer"]
    low, high = layers[0]["encoding"]["opacity"]["scale"]["domain"]
    assert low == pytest.approx(1.222)
    assert high < 1.3


def on_two_halves(evidence: Evidence) -> Evidence:
    """Evidence whose candidates all have a loss of 2.5 on the odd rows, and of 9 on the even one."""
    keys = ["trial", "candidate", "rank", "learning_rate", "seed"]
    even = evidence.results[keys].assign(example=0, loss=9.0, label_tokens=10.0, correct_tokens=1.0)
    odd = even.assign(example=1, loss=2.0, label_tokens=30.0, correct_tokens=15.0)
    far = even.assign(example=3, loss=4.0, label_tokens=10.0, correct_tokens=9.0)
    return evidence._replace(examples=pd.concat([even, odd, far], ignore_index=True))


def test_with_several_rates_a_candidate_has_one_held_out_loss() -> None:
    """The verdict judges on the odd rows: losses over all rows would differ from its own, and from their intervals."""
    evidence = on_two_halves(make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), steps=8))
    assert set(heldout_by_seed(evidence)["eval_loss"]) == {2.5}
    assert by_candidate(evidence, {})["eval_loss"].tolist() == [2.5] * 6
    content = compose(evidence, make_verdict(evidence), load("en"))
    found = {figure.name: figure for figure in content.figures}
    for table, column in (
        (found["loss-memory"].numbers, "Held-out loss"),
        (found["loss-runtime"].numbers, "Held-out loss"),
        (found["learning-rate-map"].numbers, "rank 8"),
        (content.section("candidates").tables[0], "Held-out loss"),
        (content.section("also").tables[0], "Held-out loss"),
    ):
        assert table is not None
        at = table.headers.index(column)
        assert {row[at].split("\n")[0] for row in table.rows} == {"2.5000"}, table.caption
    table, trials = content.section("also").tables[0], content.section("trials").tables[0]
    also = dict(zip(table.headers, table.rows[0], strict=True))
    assert (also["Perplexity"], also["Token accuracy"]) == ("12.182", "60.0%")
    assert "half of the held-out rows" in content.how_to_read[-1]
    assert "over all held-out rows" in found["heldout-loss-steps"].note, "whose losses have no rows of their own"
    assert trials.headers[-1] == "Held-out loss (all rows)"
    assert {row[-1] for row in trials.rows} > {"1.2250", "1.2290"}


def test_with_one_rate_no_half_is_spoken_of() -> None:
    evidence = on_two_halves(make_evidence(steps=8))
    content = compose(evidence, make_verdict(evidence), load("en"))
    assert "half" not in str([content.how_to_read, [figure.note for figure in content.figures]])
    candidates = content.section("candidates").tables[0]
    assert candidates.rows[0][candidates.headers.index("Held-out loss")].startswith("1.2310")


@pytest.mark.parametrize(("rates", "expected"), [([2e-4], 1.231), ([1e-4, 2e-4], 2.5)])
def test_losses_of_variants_are_on_the_rows_of_plain_lora(rates: list[float], expected: float) -> None:
    """Several variants of a rank are not several rates: they leave no half of the rows out."""
    spec = make_spec(learning_rates=rates, variants=["pissa", "dora"])
    evidence = without_variants(on_two_halves(make_evidence(spec, steps=8, profiles=False)))
    assert evidence.variants is not None
    table = variant_table(evidence, {}, load("en"))
    assert table is not None
    first = dict(zip(table.headers, table.rows[0], strict=True))
    assert (first["Variant"], first["Rank"], first["Held-out loss"]) == ("PiSSA", "8", f"{expected:.4f}")


def test_the_band_holds_losses_that_keep_enough_of_the_gain() -> None:
    evidence = make_evidence(steps=8)

    def band(verdict: dict[str, Any]) -> list[dict[str, Any]]:
        content = compose(evidence, verdict, load("en"))
        figure = next(figure for figure in content.figures if figure.name == "loss-above-best")
        assert ("of what fine-tuning gains" in figure.note) == (verdict.get("margin_of") == "gain")
        return [rows[0] for rows in drawn(figure) if "from" in rows[0]]

    verdict = make_verdict(evidence)
    assert band(verdict) == [{"from": 0.0, "to": pytest.approx(0.05 * 1.6)}]
    assert band(of_the_loss(verdict)) == [{"from": 0.0, "to": pytest.approx(0.01224)}]


def test_a_candidate_with_a_diverged_seed_has_no_mean() -> None:
    evidence = replace_trial(make_evidence(steps=8), 0, status="diverged", eval_loss=math.nan)
    found = figures(evidence, chosen=1)
    for name in ("train-loss", "loss-above-best", "heldout-loss-steps", "loss-memory"):
        table = found[name].numbers
        assert table is not None
        assert [row[0] for row in table.rows] == ["128", "256"]


def test_memory_against_time_keeps_its_peak_and_starts_with_loading() -> None:
    evidence = make_evidence()
    samples = evidence.samples.copy()
    samples.loc[5, "rss_bytes"] = 9e9
    frame = memory_by_time(evidence._replace(samples=samples), "rss_bytes")
    assert frame["mean"].max() == 9e9
    assert frame.loc[frame["seconds"].idxmin(), "phase"] == "load"
    assert len(frame) <= POINTS_IN_TIME + 3
    assert memory_by_time(evidence, "gpu_allocated_bytes").empty


@pytest.mark.parametrize("language", ["en", "ko"])
def test_every_drawn_figure_has_its_numbers(language: str) -> None:
    evidence = predict(make_evidence(make_spec(learning_rates=[1e-4, 2e-4]), gpu=True, steps=40), "cuda")
    for figure in figures(evidence, language).values():
        assert figure.panels
        assert figure.numbers is not None
        assert figure.numbers.rows
        assert all(len(row) == len(figure.numbers.headers) for row in figure.numbers.rows)
        assert "nan" not in str(figure.numbers.rows)


def test_masked_tokens_are_told() -> None:
    evidence = make_evidence(steps=8)
    facts = evidence.data_facts | {"train_label_tokens": 1_000_000, "eval_label_tokens": 5}
    content = compose(evidence._replace(data_facts=facts), {}, load("en"))
    named = dict(content.section("data").tables[0].rows)
    assert named["Training tokens masked (context only)"] == "1,310,552 (56.7%)"
    assert "Held-out tokens masked" not in named, "how many there are in all is not known"
