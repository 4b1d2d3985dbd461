"""Catalogues, sentences and number formats: what the command line shares with the report."""

import math
import string
import subprocess
import sys
from typing import Any

import pytest

from rankscope.analysis.next_step import next_step
from rankscope.errors import StudyError
from rankscope.text import formats
from rankscope.text.catalogue import LANGUAGES, load
from rankscope.text.verdict import (
    ALARMS,
    caveat_sentence,
    claim_sentences,
    gained,
    margin_table,
    outcome_label,
    verdict_sentence,
)
from report.report_evidence import make_evidence, make_spec, make_verdict, of_the_loss

ALIKE = "The ranks cannot be distinguished over 3 seeds at 95% confidence. Take the cheapest, rank 8: "
SCOPE = "Tested only at learning rate 2e-4, with alpha 32 at every rank (scaling alpha/rank)."
CLOSE = (
    "There is no verdict yet: a rank lies too close to the margin, or too few rows are held out; more seeds, up to 12, "
    "would not settle it."
)
GUESS = "Best guess: rank 8, which keeps 99.6% of what fine-tuning gains, on average."


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_catalogues_have_the_same_keys_and_placeholders() -> None:
    english, korean = (load(language)._texts for language in ("en", "ko"))
    assert english.keys() == korean.keys()
    assert [key for key in english if placeholders(english[key]) != placeholders(korean[key])] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_string_of_a_catalogue_is_text(language: str) -> None:
    assert [key for key, text in load(language)._texts.items() if not isinstance(text, str) or not text] == []


def test_korean_is_translated() -> None:
    english, korean = load("en")._texts, load("ko")._texts
    same = {key for key in english if english[key] == korean[key] and placeholders(english[key]) == set()}
    names = {f"variant.{name}" for name in ("lora", "rslora", "pissa", "olora", "loraplus", "dora")}
    assert same <= {"none", "machine.gpus"} | names


def test_an_unknown_language_is_refused_with_the_known_ones() -> None:
    with pytest.raises(StudyError, match="en, ko"):
        load("tlh")


@pytest.mark.parametrize(
    ("outcome", "chosen", "more", "expected"),
    [
        ("recommended", 0, None,
         "Use rank 8: the lowest rank shown to keep at least 95% of what fine-tuning gains (it keeps 99.6%, at least "
         f"99.3%, with 95% confidence over 3 seeds). {SCOPE}"),
        ("recommended", 1, None,
         "Use rank 128: it has the lowest held-out loss, and is shown to keep at least 95% of what fine-tuning gains, "
         f"whichever rank is truly the best (at least 99.8%, with 95% confidence over 3 seeds). {SCOPE}"),
        ("not_distinguishable", 0, None, f"{ALIKE}it keeps at least 99.3% of what fine-tuning gains. {SCOPE}"),
        ("not_distinguishable", 0, 4,
         f"{ALIKE}it keeps at least 99.3% of what fine-tuning gains. About 4 more seeds would show which keep at least "
         f"95%. {SCOPE}"),
        ("best_in_budget", 0, None,
         "Within the budget use rank 8: its held-out loss is the lowest there. It keeps 99.6% of what fine-tuning "
         "gains, and is shown to keep less than 95% (95% confidence, 3 seeds). The best, rank 128, exceeds the budget. "
         f"{SCOPE}"),
        ("nothing_in_budget", 0, None, "No rank is known to fit the budget."),
        ("not_enough_evidence", 0, None, f"{CLOSE} {GUESS}"),
        ("not_enough_evidence", 0, 1,
         f"There is no verdict yet: 3 seeds are too few; about 1 more seed would settle it. {GUESS}"),
        ("not_trained_enough", 0, None,
         "Not trained long enough to tell ranks apart: over 3 seeds, fine-tuning gains less than three times the "
         "uncertainty of a difference between ranks. Train longer."),
        ("not_trained_enough", 0, 2,
         "Ranks cannot be told apart yet: over 3 seeds, fine-tuning gains less than three times the uncertainty of a "
         "difference between ranks. About 2 more seeds would settle it; longer training may, too."),
    ],
)  # fmt: skip
def test_the_sentence_of_each_outcome(outcome: str, chosen: int, more: int | None, expected: str) -> None:
    verdict = make_verdict(make_evidence(), outcome, chosen, more_seeds=more)
    assert verdict_sentence(verdict) == expected


@pytest.mark.parametrize(
    ("outcome", "chosen", "more", "expected"),
    [
        ("recommended", 0, None,
         "Use rank 8: the lowest rank whose held-out loss is shown to be within 1% of the best candidate's (rank 128), "
         f"with 95% confidence over 3 seeds. {SCOPE}"),
        ("recommended", 1, None,
         "Use rank 128: it has the lowest held-out loss, and no other rank is more than 1% better (95% confidence, 3 "
         f"seeds). {SCOPE}"),
        ("not_distinguishable", 0, 4,
         f"{ALIKE}its held-out loss is at most 0.817% above the best. About 4 more seeds would show which are within "
         f"1% of the best. {SCOPE}"),
        ("best_in_budget", 0, None,
         "Within the budget use rank 8: its held-out loss is the lowest there, 0.572% above that of rank 128, which "
         "exceeds the budget. It is more than 1% worse than the best, with 95% confidence over 3 seeds. "
         f"{SCOPE}"),
        ("nothing_in_budget", 0, None, "No rank is known to fit the budget."),
        ("not_enough_evidence", 0, None, CLOSE),
    ],
)  # fmt: skip
def test_the_sentence_of_a_verdict_of_version_0_1(outcome: str, chosen: int, more: int | None, expected: str) -> None:
    """Its margin is a share of the loss, and it has no guess and no gain."""
    verdict = of_the_loss(make_verdict(make_evidence(), outcome, chosen, more_seeds=more))
    assert verdict_sentence(verdict) == expected
    assert gained(verdict, load("en")) == ("", [])
    assert margin_table(verdict, load("en")) is None


def test_no_gain_at_all_is_said() -> None:
    verdict = make_verdict(make_evidence(), "not_trained_enough", gain_low=-0.01, more_seeds=2)
    assert verdict_sentence(verdict).endswith("is not shown to lower the held-out loss at all. Train longer.")
    assert outcome_label(verdict, load("en")) == "Not trained long enough"
    for low in (0.01, None):  # full fine-tuning's gain has no interval
        assert outcome_label(verdict | {"gain_low": low}, load("en")) == "No verdict yet", "as more seeds would do"


def test_a_guess_says_why_it_is_one() -> None:
    evidence = make_evidence()
    best = make_verdict(evidence, "not_enough_evidence", guess="r128-lr2e-4")
    assert verdict_sentence(best).endswith("Best guess: rank 128, whose mean loss is the lowest.")
    unknown = [{key: row[key] for key in row if key != "kept"} for row in best["comparison"]]
    of_loss = best | {"comparison": unknown, "guess": "r008-lr2e-4", "margin_of": "loss"}
    assert verdict_sentence(of_loss).endswith("Best guess: rank 8, whose mean loss is 0.572% above the best.")
    alike = make_verdict(evidence, "not_distinguishable", guess="r256-lr2e-4")
    assert "Best guess: rank 256" in verdict_sentence(alike), "not the one that is taken"


@pytest.mark.parametrize(
    ("changes", "seeds", "title", "command"),
    [
        ({"seeds": 1}, [0], "To settle it", "--until-settled"),
        ({"more_seeds": 2}, [0, 1, 2], "To settle it", "--until-settled"),
        ({"seeds": 1, "caveats": ["some_trials_unfinished"]}, [0, 1, 2], "To train what is missing", ""),
        ({"comparison": [], "seeds": 0}, [0, 1, 2], "To train what is missing", ""),
        ({"outcome": "recommended", "undetermined": ["r008-lr2e-4"], "more_seeds": 1}, [0, 1, 2], "To settle it",
         "--until-settled"),
        ({"outcome": "not_trained_enough"}, [0, 1, 2], "To train longer, as another study",
         "--steps 800 --out 'my study-800-steps'"),
        ({"outcome": "not_trained_enough", "more_seeds": 1}, [0, 1, 2], "To settle it", "--until-settled"),
        ({"outcome": "not_trained_enough", "more_seeds": 1, "gain_low": -1.0}, [0, 1, 2],
         "To train longer, as another study", "--steps 800 --out 'my study-800-steps'"),
        ({"comparison": [], "diverged": [{"rank": 8}]}, [0, 1, 2], "To try a lower learning rate",
         "--learning-rates 5e-5,2e-4"),
        ({"margins": []}, [0, 1, 2], "To evaluate on more rows",
         "--set data.eval_rows=2000 --out 'my study-2000-rows'"),
    ],
)  # fmt: skip
def test_the_command_that_would_settle_it(changes: dict[str, Any], seeds: list[int], title: str, command: str) -> None:
    evidence = make_evidence(make_spec(seeds=seeds, training={"steps": 400}), steps=8)
    verdict = make_verdict(evidence, "not_enough_evidence") | changes
    step = next_step(verdict, evidence, "my study", load("en"))
    assert step is not None
    assert step.title == title
    assert step.command == f"rankscope run 'my study' {command}".rstrip()


def test_rows_of_an_evaluation_set_are_added_while_it_has_more() -> None:
    evidence = make_evidence(steps=8)
    verdict = make_verdict(evidence, "not_enough_evidence") | {"margins": []}

    def command(**facts: Any) -> str | None:
        own = evidence._replace(data_facts=evidence.data_facts | facts)
        step = next_step(verdict, own, "x", load("en"))
        return step and step.command

    assert command(eval_id="e", eval_rows_unused=5) == "rankscope run x --set data.eval_rows=2000"
    assert command(eval_id="e", eval_rows_unused=0) is None
    assert command(rows_eval=9_600) is None, "more than half of the rows would be held out"


def test_a_wider_margin_that_would_do_is_proposed() -> None:
    evidence = make_evidence(steps=8)
    margins = [
        {"margin": share, "rank": rank, "undetermined": []} for share, rank in ((0.02, 8), (0.05, None), (0.1, 8))
    ]
    verdict = make_verdict(evidence, "not_enough_evidence", margins=margins)
    assert next_step(verdict, evidence, "x", load("en")) == (
        "To conclude at another margin", "rankscope report x --margin 10%",
    )  # fmt: skip


def test_epochs_are_doubled_where_steps_are_not_given() -> None:
    evidence = make_evidence(make_spec(training={"epochs": 1.5}), steps=8)
    step = next_step(make_verdict(evidence, "not_trained_enough"), evidence, "x", load("en"))
    assert step is not None
    assert step.command == "rankscope run x --epochs 3 --out x-3-epochs"


@pytest.mark.parametrize("outcome", ["recommended", "best_in_budget", "nothing_in_budget", None])
def test_what_is_settled_needs_no_command(outcome: str | None) -> None:
    evidence = make_evidence(steps=8)
    verdict = make_verdict(evidence, outcome) if outcome else None
    assert next_step(verdict, evidence, "x", load("en")) is None


def test_the_gain_is_that_of_the_best_or_of_full_fine_tuning() -> None:
    evidence, text = make_evidence(), load("en")
    value, notes = gained(make_verdict(evidence), text)
    assert value == "1.6000 nats"
    assert notes == [
        "held-out loss 2.8240 before training, 1.2240 with rank 128",
        "95% interval: 1.5800 to 1.6200 nats",
    ]
    of_full = make_verdict(evidence, gain=1.62, gain_of="full", gain_low=None, gain_high=None)
    assert gained(of_full, text).notes == ["held-out loss 2.8240 before training, 1.2040 with full fine-tuning"]


def test_the_usual_margins_are_a_table() -> None:
    found = [(0.01, None, []), (0.02, 128, ["r008-lr2e-4"]), (0.05, 8, [])]
    margins = [dict(zip(("margin", "rank", "undetermined"), row, strict=True)) for row in found]
    table = margin_table(make_verdict(make_evidence(), margins=margins), load("en"))
    assert table is not None
    assert table.rows == [["99%", "undecided"], ["98%", "128 (lower undecided)"], ["95%", "8"]]
    assert table.chosen == 2, "the verdict's own margin"


def test_caveats_name_what_they_are_about() -> None:
    evidence, text = make_evidence(), load("en")
    diverged = [{"candidate": "r064-lr2e-3", "rank": 64, "learning_rate": 2e-3, "seeds": [0, 2]}]
    overfits = [{"candidate": "r256-lr2e-4", "rank": 256, "step": 1200, "rise": 0.0312}]
    verdict = make_verdict(evidence, diverged=diverged, overfits=overfits)
    verdict["comparison"][0]["gain"] = -0.1
    said = {code: caveat_sentence(verdict, code, text) for code in ALARMS}
    assert said["diverged"].startswith("Diverged: rank 64 at learning rate 2e-3 (seeds 0, 2).")
    assert said["worse_than_untrained"].startswith("Worse than no training: rank 8. ")
    assert said["overfits"].startswith("Overfitting: rank 256 was best at step 1,200, 0.0312 nats below its end.")
    assert caveat_sentence(verdict, "one_seed", text).startswith("Between ranks that share only one seed")
    assert caveat_sentence(verdict, "of another version", text) == "of another version"


def test_lower_ranks_that_are_open_are_told() -> None:
    evidence = make_evidence()
    told = verdict_sentence(make_verdict(evidence, "recommended", 1, undetermined=["r008-lr2e-4"], more_seeds=2))
    assert "Lower ranks are undecided; about 2 more seeds would settle it." in told
    told = verdict_sentence(make_verdict(evidence, "recommended", 1, undetermined=["r008-lr2e-4"]))
    assert "Lower ranks are undecided." in told


def test_one_seed_says_that_it_says_nothing_of_seeds() -> None:
    assert "run at least two more" in verdict_sentence(make_verdict(make_evidence(), "not_enough_evidence", seeds=1))


@pytest.mark.parametrize(
    ("alpha", "rslora", "expected"),
    [(32.0, True, "alpha 32 at every rank (scaling alpha/√rank)"), ("2r", False, "alpha 2 times the rank")],
)
def test_the_scaling_is_named(alpha: float | str, rslora: bool, expected: str) -> None:
    verdict = make_verdict(make_evidence(), scaling={"alpha": alpha, "use_rslora": rslora})
    assert expected in verdict_sentence(verdict)


def test_claims_are_told_with_effect_and_interval() -> None:
    claims = [
        {"claim": "loss_falls", "outcome": "held", "effect": -0.021, "low": -0.03, "high": -0.012, "from_rank": 8,
         "to_rank": 256},
        {"claim": "gpu_memory_rises", "outcome": "not_measured"},
        {"claim": "runtime_rises", "outcome": "not_distinguishable", "effect": 0.1, "low": None, "high": None,
         "from_rank": 8, "to_rank": 256},
    ]  # fmt: skip
    assert claim_sentences(make_verdict(make_evidence(), claims=claims)) == [
        "✓ Training loss falls with rank: holds. From rank 8 to rank 256: −2.1% (95% interval −3.0% to −1.2%).",
        "– GPU memory rises with rank: not measured.",
        "? Runtime rises with rank: undecided. From rank 8 to rank 256: +10%.",
    ]


def test_the_lowest_rank_that_is_also_the_best_says_so() -> None:
    evidence = make_evidence(make_spec(ranks=[128, 256]))
    assert verdict_sentence(make_verdict(evidence)).startswith("Use rank 128: the lowest rank compared also has")


def test_the_learning_rate_is_named_where_several_are_compared() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]))
    assert "Use rank 8 at learning rate 1e-4:" in verdict_sentence(make_verdict(evidence))


def test_a_rank_without_another_says_so() -> None:
    evidence = make_evidence(make_spec(ranks=[8]))
    assert verdict_sentence(make_verdict(evidence)).startswith(
        "Use rank 8: it is the only rank with enough finished trials"
    )


def test_no_verdict_yet() -> None:
    assert verdict_sentence({}) == "There is no verdict yet."


@pytest.mark.parametrize("outcome", ["recommended", "not_distinguishable", "best_in_budget", "not_enough_evidence"])
def test_korean_sentences_are_whole(outcome: str) -> None:
    verdict = make_verdict(make_evidence(), outcome)
    for sentence in (verdict_sentence(verdict, "ko"), verdict_sentence(of_the_loss(verdict), "ko")):
        assert sentence.endswith(".")
        assert "{" not in sentence
    assert "랭크 8" in verdict_sentence(verdict, "ko")


def test_sentences_import_nothing_heavy() -> None:
    heavy = ["altair", "numpy", "pandas", "torch", "jinja2", "vl_convert"]
    code = f"import sys, rankscope.text.verdict; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(1_000_000, "1.00 MB"), (999_999, "1,000 kB"), (38_420_000, "38.4 MB"), (113_250_000, "113 MB"),
     (2_350_000_000, "2.35 GB"), (512, "0.51 kB"), (0, "0.00 kB")],
)  # fmt: skip
def test_sizes_are_decimal(value: float, expected: str) -> None:
    assert formats.size(value) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0.25, "0.25 s"), (42.13, "42.1 s"), (59.97, "1 min"), (119.0, "1 min 59 s"), (140.2, "2 min 20 s"),
     (3599.6, "1 h"), (7199.0, "2 h"), (9000.0, "2 h 30 min"), (180_000.0, "50 h")],
)  # fmt: skip
def test_durations(seconds: float, expected: str) -> None:
    assert formats.duration(seconds, load("en")) == expected
    assert formats.duration(140.2, load("ko")) == "2분 20초"


@pytest.mark.parametrize(
    ("values", "expected"),
    [([9.983, math.nan, 11.52], ["10.0 s", "nan s", "11.5 s"]), ([42.13, 140.2], ["42.1 s", "2 min 20 s"])],
)
def test_a_column_of_seconds_has_as_many_decimals(values: list[float], expected: list[str]) -> None:
    assert list(map(formats.durations(values, load("en")), values)) == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [([3.54e6, 113.2e6], ["3.5 MB", "113.2 MB"]), ([1.9e9, math.nan, 2.35e9], ["1.90 GB", "nan GB", "2.35 GB"]),
     ([4.0e5, 1.3e10], ["0.0004 GB", "13.0000 GB"]), ([], []), ([0.0], ["0 kB"])],
)  # fmt: skip
def test_a_column_of_sizes_has_one_unit_and_as_many_decimals(values: list[float], expected: list[str]) -> None:
    assert list(map(formats.sizes(values), values)) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(137.7, "140"), (3.0, "3.0"), (9.96, "10"), (0.418, "0.42"), (-29.2, "−29"), (0.0, "0.0")]
)
def test_noise_and_changes_have_two_significant_digits(value: float, expected: str) -> None:
    assert formats.two_digits(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.01, "1%"), (0.0025, "0.25%"), (-0.5, "−50%"), (0.12345, "12.3%"), (12.34, "1,230%")]
)
def test_shares_have_three_significant_digits_and_no_exponent(value: float, expected: str) -> None:
    assert formats.percent(value) == expected


@pytest.mark.parametrize(("seconds", "expected"), [(0.0, "5 s"), (8.0, "10 s"), (44.4, "45 s")])
def test_a_time_left_is_rough_and_never_nothing(seconds: float, expected: str) -> None:
    assert formats.about(seconds, load("en")) == expected
    assert formats.about(9876, load("en")) == formats.duration(9600, load("en"))


@pytest.mark.parametrize(
    ("value", "expected"), [(2e-4, "2e-4"), (1.5e-4, "1.5e-4"), (0.01, "0.01"), (1e-5, "1e-5"), (1.0, "1")]
)
def test_learning_rates(value: float, expected: str) -> None:
    assert formats.rate(value) == expected


@pytest.mark.parametrize(
    ("new", "old", "expected"),
    [(62, 100, "\N{MINUS SIGN}38%"), (10003, 10000, "±0%"), (1003, 1000, "+0.30%"), (238, 100, "+140%")],
)
def test_changes_are_signed(new: float, old: float, expected: str) -> None:
    assert formats.change(new, old) == expected
