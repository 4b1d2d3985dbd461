"""Catalogues, sentences and number formats: what the command line shares with the report."""

import string
import subprocess
import sys

import pytest

from rankscope.errors import StudyError
from rankscope.text import formats
from rankscope.text.catalogue import LANGUAGES, load
from rankscope.text.verdict import claim_sentences, verdict_sentence
from report.report_evidence import make_evidence, make_spec, make_verdict

ALIKE = (
    "The ranks cannot be distinguished over 3 seeds at 95% confidence. Take the cheapest, rank 8: its held-out loss is "
    "at most 0.817% above the best."
)
SCOPE = "Tested only at learning rate 2e-4, with alpha 32 at every rank (scaling alpha/rank)."
TOO_LITTLE = "There is not enough evidence for a conclusion"


def placeholders(text: str) -> set[str]:
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def test_catalogues_have_the_same_keys_and_placeholders() -> None:
    english, korean = (load(language).items() for language in ("en", "ko"))
    assert english.keys() == korean.keys()
    assert [key for key in english if placeholders(english[key]) != placeholders(korean[key])] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_string_of_a_catalogue_is_text(language: str) -> None:
    assert [key for key, text in load(language).items().items() if not isinstance(text, str) or not text] == []


def test_korean_is_translated() -> None:
    english, korean = load("en").items(), load("ko").items()
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
         "Use rank 8: the lowest rank whose held-out loss is shown to be within 1% of the best candidate's (rank 128), "
         f"with 95% confidence over 3 seeds. {SCOPE}"),
        ("recommended", 1, None,
         "Use rank 128: it has the lowest held-out loss, and no other rank is more than 1% better (95% confidence, 3 "
         f"seeds). {SCOPE}"),
        ("not_distinguishable", 0, None, f"{ALIKE} {SCOPE}"),
        ("not_distinguishable", 0, 4,
         f"{ALIKE} About 4 more seeds would show which are within 1% of the best. {SCOPE}"),
        ("best_in_budget", 0, None,
         "Within the budget use rank 8: its held-out loss is the lowest there, 0.572% above that of rank 128, which "
         "exceeds the budget. It is more than 1% worse than the best, with 95% confidence over 3 seeds. "
         f"{SCOPE}"),
        ("nothing_in_budget", 0, None, "No rank is known to fit the budget."),
        ("not_enough_evidence", 0, None, f"{TOO_LITTLE}."),
        ("not_enough_evidence", 0, 1, f"{TOO_LITTLE}; about 1 more seed would be needed."),
    ],
)  # fmt: skip
def test_the_sentence_of_each_outcome(outcome: str, chosen: int, more: int | None, expected: str) -> None:
    verdict = make_verdict(make_evidence(), outcome, chosen, more_seeds=more)
    assert verdict_sentence(verdict) == expected


def test_lower_ranks_that_are_open_are_told() -> None:
    evidence = make_evidence()
    told = verdict_sentence(make_verdict(evidence, "recommended", 1, undetermined=["r008-lr2e-4"], more_seeds=2))
    assert "Lower ranks are undecided; about 2 more seeds would settle it." in told
    told = verdict_sentence(make_verdict(evidence, "recommended", 1, undetermined=["r008-lr2e-4"]))
    assert "Lower ranks are undecided." in told


def test_one_seed_says_that_it_says_nothing_of_seeds() -> None:
    assert "Run at least two more" in verdict_sentence(make_verdict(make_evidence(), "not_enough_evidence", seeds=1))


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
        "Training loss falls with rank: holds. From rank 8 to rank 256: −2.1% (95% interval −3% to −1.2%).",
        "GPU memory rises with rank: not measured.",
        "Runtime rises with rank: undecided. From rank 8 to rank 256: +10%.",
    ]


def test_the_lowest_rank_that_is_also_the_best_says_so() -> None:
    evidence = make_evidence(make_spec(ranks=[128, 256]))
    assert verdict_sentence(make_verdict(evidence)).startswith("Use rank 128: the lowest rank tried also has")


def test_the_learning_rate_is_named_where_several_are_compared() -> None:
    evidence = make_evidence(make_spec(learning_rates=[1e-4, 2e-4]))
    assert "Use rank 8 at learning rate 1e-4:" in verdict_sentence(make_verdict(evidence))


def test_a_rank_without_another_says_so() -> None:
    evidence = make_evidence(make_spec(ranks=[8]))
    assert verdict_sentence(make_verdict(evidence)).startswith(
        "Use rank 8: it is the only rank with enough finished trials"
    )


def test_no_verdict_yet() -> None:
    assert verdict_sentence(None) == "There is no verdict yet."


@pytest.mark.parametrize("outcome", ["recommended", "not_distinguishable", "best_in_budget", "not_enough_evidence"])
def test_korean_sentences_are_whole(outcome: str) -> None:
    sentence = verdict_sentence(make_verdict(make_evidence(), outcome), "ko")
    assert sentence.endswith(".")
    assert "{" not in sentence
    assert ("랭크 8" in sentence) == (outcome != "not_enough_evidence")


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
    [(0.25, "0.25 s"), (119.0, "119 s"), (120.0, "2.00 min"), (7199.0, "120 min"), (9000.0, "2.50 h")],
)
def test_durations(seconds: float, expected: str) -> None:
    assert formats.duration(seconds, load("en")) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(2e-4, "2e-4"), (1.5e-4, "1.5e-4"), (0.01, "0.01"), (1e-5, "1e-5"), (1.0, "1")]
)
def test_learning_rates(value: float, expected: str) -> None:
    assert formats.rate(value) == expected


@pytest.mark.parametrize(
    ("new", "old", "expected"), [(62, 100, "\N{MINUS SIGN}38%"), (1003, 1000, "±0%"), (103, 100, "+3%")]
)
def test_changes_are_signed(new: float, old: float, expected: str) -> None:
    assert formats.change(new, old) == expected
