"""The margin as a share of the gain: the contrast that is tested, what a rank keeps, and where there is no gain."""

import math
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from analysis.made_up import Losses, evidence_of, examples, untrained_examples, verdict_on
from rankscope.analysis.comparison import Judged, compare, judge
from rankscope.analysis.decision import GAIN_OVER_WIDTH, level_at
from rankscope.analysis.outcome import decide
from rankscope.analysis.verdict import conclude, least_kept
from rankscope.errors import StudyError
from rankscope.text.verdict import verdict_sentence


def by_hand(values: np.ndarray, tokens: np.ndarray, confidence: float) -> tuple[float, float]:
    """Mean of (S, E) weighted by tokens, and its half-width, sum by sum as docs/method.md defines them."""
    seeds, count = values.shape
    w = tokens / tokens.mean()
    mean = sum(w[e] * values[s, e] for s in range(seeds) for e in range(count)) / (seeds * count)
    part = [[w[e] * (values[s, e] - mean) for e in range(count)] for s in range(seeds)]
    of_seed = [sum(part[s]) / count for s in range(seeds)]
    of_example = [sum(part[s][e] for s in range(seeds)) / seeds for e in range(count)]
    rest = [[part[s][e] - of_seed[s] * w[e] - of_example[e] for e in range(count)] for s in range(seeds)]
    residual = sum(one**2 for row in rest for one in row) / ((seeds - 1) * (count - 1))
    mean_of_examples = sum(of_example) / count
    between_seeds = sum((one - sum(of_seed) / seeds) ** 2 for one in of_seed) / (seeds - 1)
    between_examples = sum((one - mean_of_examples) ** 2 for one in of_example) / (count - 1)
    v, u = between_seeds / seeds, max(0.0, between_examples / count - residual / (seeds * count))
    t = [stats.t.ppf((1 + confidence) / 2, degrees) for degrees in (seeds - 1, count - 1)]
    return mean, (t[0] * v + t[1] * u) / math.sqrt(v + u)


def random_study(seed: int, effects: Sequence[float], seeds: int = 4, count: int = 25, gain: float = 0.4) -> Judged:
    """Ranks 8, 16, ... with these mean losses above 2, and an untrained model's; all differ by example and seed."""
    rng = np.random.default_rng(seed)
    base, frames = 2 + rng.normal(0, 0.3, count), []
    tokens = rng.integers(5, 50, count)
    for rank, effect in enumerate(effects):
        for number in range(seeds):
            loss = base + effect + rng.normal(0, 0.01) + rng.normal(0, 0.02, count)
            identity = {"candidate": f"r{8 << rank:03d}", "rank": 8 << rank, "learning_rate": 1e-3, "seed": number}
            frames.append(pd.DataFrame({**identity, "example": range(count), "loss": loss, "label_tokens": tokens}))
    before = base + gain * rng.uniform(0.2, 1.8, count)
    return judge(pd.concat(frames, ignore_index=True), pd.DataFrame({"example": range(count), "loss": before}))


def losses_of(judged: Judged) -> dict[str, np.ndarray]:
    return {name: table.to_numpy() for name, table in judged.losses.items()}


@pytest.mark.parametrize("share", [0.02, 0.05, 0.3, 1.0])
def test_what_is_tested_is_the_contrast_with_its_own_noise(share: float) -> None:
    judged = random_study(0, (0.05, 0.01, 0.0))
    assert judged.untrained is not None
    losses, tokens = losses_of(judged), judged.label_tokens
    found = compare(judged, share)
    assert found.gain is not None
    for pair in permutations(range(3), 2):
        own, other = (losses[found.candidates[number]] for number in pair)
        contrast = own - (1 - share) * other - share * judged.untrained
        excess = found.excesses.mean[pair], found.excesses.half_width(0.95)[pair]
        assert excess == pytest.approx(by_hand(contrast, tokens, 0.95), rel=1e-9)
        gain = found.gain.mean[pair[0]], found.gain.half_width(0.9)[pair[0]]
        assert gain == pytest.approx(by_hand(judged.untrained - own, tokens, 0.9), rel=1e-9)


@pytest.mark.parametrize(("effects", "gain"), [((0.05, 0.01, 0.0), 0.4), ((0.3, 0.0), 0.4), ((0.0, 0.01), 0.02)])
def test_what_a_rank_keeps_is_one_minus_the_smallest_margin_at_which_it_is_good_enough(
    effects: Sequence[float], gain: float
) -> None:
    judged = random_study(0, effects, gain=gain)
    margins = np.linspace(0.0, 1.0, 51)
    states = [decide(compare(judged, share), 0.95, look_ahead=False)[1] for share in margins]
    for name in judged.losses:
        good = [state[name] is True for state in states]
        assert sorted(good) == good, "once good enough, always good enough"
        kept = least_kept(judged, 0.95, 0.05)[name]
        if not good[-1]:
            assert kept is None
        else:
            assert kept is not None
            assert 1 - margins[good.index(True)] - 1e-4 <= kept <= 1 - margins[good.index(True)] + 0.02
            assert decide(compare(judged, 1 - kept), 0.95)[1][name] is True, "what is stated is shown, not only nearly"


def by_hand_fast(values: np.ndarray, tokens: np.ndarray, confidence: float) -> tuple[float, float]:
    """`by_hand`, in numpy's words."""
    seeds, count = values.shape
    w = tokens / tokens.mean()
    mean = np.average(values.mean(axis=0), weights=tokens)
    part = w * (values - mean)
    rest = part - part.mean(axis=1, keepdims=True) * w - part.mean(axis=0)
    v = part.mean(axis=1).var(ddof=1) / seeds
    u = part.mean(axis=0).var(ddof=1) / count - (rest**2).sum() / ((seeds - 1) * (count - 1) * seeds * count)
    t = stats.t.ppf((1 + confidence) / 2, [seeds - 1, count - 1])
    return float(mean), float(t @ [v, max(0.0, u)] / math.sqrt(v + max(0.0, u)))


def test_both_ways_by_hand_agree() -> None:
    rng = np.random.default_rng(0)
    values, tokens = rng.normal(0, 1, (3, 8)), rng.integers(5, 50, 8)
    assert by_hand(values, tokens, 0.9) == pytest.approx(by_hand_fast(values, tokens, 0.9), rel=1e-12)


NOISE = np.array([0.001, -0.001, 0.0])
ALIKE: Losses = {(8, 1e-3): list(2 + NOISE), (256, 1e-3): [2.0, 2.0, 2.0]}
WIDTH = float(stats.t.ppf(0.975, 2) * NOISE.std(ddof=1) / math.sqrt(3))
"""Half-width of the only interval between candidates: 0.0025."""


def on_equal_examples(untrained: float) -> dict[str, Any]:
    """Verdict where every example gains the same, so that only seeds are uncertain."""
    before = untrained_examples(loss=untrained, spread=1.0)
    return conclude(evidence_of(ALIKE, untrained=untrained)._replace(untrained=before))


@pytest.mark.parametrize(
    ("untrained", "outcome"),
    [
        (2.0 - 0.01, "not_trained_enough"),
        (2.0, "not_trained_enough"),
        (2.0 + GAIN_OVER_WIDTH * WIDTH * 0.99, "not_trained_enough"),
        (2.0 + GAIN_OVER_WIDTH * WIDTH * 1.01, "not_enough_evidence"),
        (2.0 + 0.1, "recommended"),
    ],
)
def test_without_a_gain_there_is_nothing_to_recommend(untrained: float, outcome: str) -> None:
    verdict = on_equal_examples(untrained)
    assert (verdict["outcome"], verdict["rank"]) == (outcome, 8 if outcome == "recommended" else None)
    assert ("worse_than_untrained" in verdict["caveats"]) == (untrained < 2)
    if outcome == "not_trained_enough":
        assert {row["within_margin"] for row in verdict["comparison"]} == {None}, "of no gain all would be worse"
    assert verdict["gain"] == pytest.approx(untrained - 2)
    assert verdict_on(ALIKE, untrained=untrained, margin_of="loss")["rank"] == 8


def test_a_gain_that_seeds_do_not_agree_on_is_not_shown() -> None:
    """Ranks are alike by seed, but the seeds are not: no interval between ranks is wide, only the gain's own."""
    losses = {(8, 1e-3): [1.75, 2.3, 2.25], (256, 1e-3): [1.75, 2.3, 2.2501]}
    verdict = verdict_on(losses)
    assert verdict["gain"] > 100 * verdict["comparison"][0]["regret_high"]
    assert verdict["gain_low"] < 0 < verdict["gain"]
    assert verdict["outcome"] == "not_trained_enough"
    assert verdict["more_seeds"] is not None, "which would show it, if it is there"


def test_the_gate_never_stands_before_a_margin_below_a_third() -> None:
    """With a gain of three half-widths, a rank just like the best is shown to keep about two thirds of the gain."""
    verdict = on_equal_examples(2.0 + GAIN_OVER_WIDTH * WIDTH * 1.0001)
    width = float(stats.t.ppf(1 - level_at(3, 0.95), 2) * NOISE.std(ddof=1) / math.sqrt(3))
    assert verdict["comparison"][0]["kept_low"] == pytest.approx(1 - width / WIDTH / 3, abs=0.001)
    assert verdict["margins"] == [{"margin": m, "rank": None, "undetermined": []} for m in (0.01, 0.02, 0.05, 0.1)]


@pytest.mark.parametrize("losses", [{(8, 1e-3): [2.0]}, {(8, 1e-3): [2.0], (256, 1e-3): [1.9]}])
def test_one_seed_shows_no_gain(losses: Losses) -> None:
    verdict = verdict_on(losses)
    assert (verdict["outcome"], verdict["gain_low"]) == ("not_enough_evidence", None)
    assert "kept_low" not in verdict["comparison"][0] or verdict["comparison"][0]["kept_low"] is None


def test_one_rank_is_recommended_where_it_gains() -> None:
    one = {(8, 1e-3): [2.0, 2.01, 2.0]}
    assert verdict_on(one)["rank"] == 8
    assert verdict_on(one)["comparison"][0]["kept_low"] == 1.0
    assert verdict_on(one, untrained=2.0)["outcome"] == "not_trained_enough"


THREE: Losses = {(8, 1e-3): [2.1, 2.11, 2.105], (64, 1e-3): [2.01, 2.012, 2.011], (256, 1e-3): [2.0, 2.001, 2.0]}


def test_the_usual_margins_are_the_verdicts_at_these_margins() -> None:
    found = verdict_on(THREE)["margins"]
    assert [row["margin"] for row in found] == [0.01, 0.02, 0.05, 0.1]
    for row in found:
        alone = verdict_on(THREE, margin=row["margin"])
        assert (row["rank"], row["undetermined"]) == (alone["rank"], alone["undetermined"])
    assert [row["rank"] for row in found] == [256, 256, 64, 64]


def test_what_is_kept_agrees_with_the_verdict() -> None:
    """A rank is good enough at just those margins that leave it at least what it is shown to keep."""
    kept = {row["rank"]: row["kept_low"] for row in verdict_on(THREE)["comparison"]}
    for rank, low in kept.items():
        for nearby, state in ((low - 1e-4, True), (low + 1e-4, None)):
            if 0 < 1 - nearby < 1:
                rows = {row["rank"]: row for row in verdict_on(THREE, margin=1 - nearby)["comparison"]}
                assert (rows[rank]["within_margin"] is True) == (state is True)


def test_a_recommended_rank_is_shown_to_keep_what_it_is_recommended_for() -> None:
    """Of a gain that rows hardly agree on. At a margin of all of it only the gain would count, which is shown by the
    plain interval and not by the bound of a claim."""
    losses: Losses = {(8, 1e-3): [2.0, 2.001] * 4, (256, 1e-3): [2.02] * 8}
    evidence = evidence_of(losses)._replace(
        examples=examples(losses, count=5), untrained=untrained_examples(5, spread=1.646)
    )
    verdict = conclude(evidence)
    assert (verdict["outcome"], verdict["rank"]) == ("recommended", 8)
    assert verdict["comparison"][0]["kept_low"] >= 0.95


def test_on_a_good_base_one_percent_of_the_loss_is_a_fifth_of_the_gain() -> None:
    """From 2.1 to 2.0: rank 8 ends 0.018 above the best, less than 1% of the loss and 18% of what was gained."""
    losses = {(8, 1e-3): [2.018, 2.0185, 2.0175], (256, 1e-3): [2.0, 2.0, 2.0]}
    assert verdict_on(losses, untrained=2.1, margin_of="loss")["rank"] == 8
    of_gain = verdict_on(losses, untrained=2.1)
    assert (of_gain["rank"], of_gain["comparison"][0]["within_margin"]) == (256, False)
    assert of_gain["comparison"][0]["kept"] == pytest.approx(0.82)


def test_a_study_that_does_not_know_the_untrained_loss_is_told_so() -> None:
    evidence = evidence_of(THREE)
    with pytest.raises(StudyError, match="earlier version") as caught:
        conclude(evidence._replace(untrained=untrained_examples(0)))
    assert "margin_of" in str(caught.value)
    assert "loss" in caught.value.todo


def test_full_fine_tuning_that_gains_more_is_what_the_margin_is_a_share_of() -> None:
    """Rank 64 is 0.026 from rank 256. Of the gain of 0.4 that is 6.5%, of full fine-tuning's 0.8 it is 3.25%."""
    losses = {(64, 1e-3): [2.026, 2.0265, 2.0255], (256, 1e-3): [2.0, 2.0, 2.0]}
    evidence = evidence_of(losses)
    assert conclude(evidence)["rank"] == 256
    better = conclude(evidence._replace(reference=examples({(0, 1e-4): [1.6, 1.6, 1.6]})))
    assert (better["rank"], better["gain_of"]) == (64, "full")
    assert better["gain"] == pytest.approx(0.8)
    assert [row["kept"] for row in better["comparison"]] == pytest.approx([0.374 / 0.8, 0.4 / 0.8])
    for row in better["comparison"]:
        assert 0.45 < row["kept_low"] < row["kept"]
    assert "at most 5% of what full fine-tuning gains beside the best rank (it keeps 46.7%" in verdict_sentence(better)
    assert "46.7%" in verdict_sentence(better, "ko")
    worse = conclude(evidence._replace(reference=examples({(0, 1e-4): [2.2, 2.2, 2.2]})))
    assert (worse["rank"], worse["gain_of"]) == (256, "r256-lr0.001")
