"""The verdict in one sentence, for the report and the command line. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

from rankscope.report.catalogue import Catalogue, load
from rankscope.report.formats import percent, rate


def verdict_sentence(verdict: Mapping[str, Any] | None, language: str = "en") -> str:
    """Says what to do, and how sure that is.

    `verdict` is the content of verdict.json, or None before there is one.
    """
    text = load(language)
    if verdict is None:
        return text("sentence.none")
    outcome, more = verdict["outcome"], verdict.get("more_seeds")
    values = {"seeds": text.count("seeds", verdict["seeds"])}
    if more:
        values["more"] = text.count("more_seeds", more)
    if outcome == "not_enough_evidence":
        return text("sentence.not_enough_evidence_more" if more else "sentence.not_enough_evidence", **values)
    values |= {
        "name": candidate_name(verdict, verdict["candidate"], text),
        "best": candidate_name(verdict, verdict["best_candidate"], text),
        "margin": percent(verdict["margin"]),
        "confidence": percent(verdict["confidence"]),
    }
    if outcome == "not_distinguishable":
        return text("sentence.not_distinguishable_more" if more else "sentence.not_distinguishable", **values)
    if verdict["candidate"] != verdict["best_candidate"]:
        return text("sentence.recommended", **values)
    ranks = {row["rank"] for row in verdict["comparison"]}
    if len(ranks) == 1:
        return text("sentence.recommended_only", **values)
    return text(f"sentence.recommended_is_{'lowest' if verdict['rank'] == min(ranks) else 'best'}", **values)


def candidate_name(verdict: Mapping[str, Any], candidate: str, text: Catalogue) -> str:
    """`rank 8`, with its learning rate if the study tried several. `candidate` is one of the comparison's."""
    row = next(row for row in verdict["comparison"] if row["candidate"] == candidate)
    if "one_learning_rate" in verdict["caveats"]:
        return text("name.rank", rank=row["rank"])
    return text("name.rank_and_rate", rank=row["rank"], rate=rate(row["learning_rate"]))
