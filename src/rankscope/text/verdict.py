"""The verdict in sentences, for the report and the command line. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any

from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import percent, rate, signed_percent


def verdict_sentence(verdict: Mapping[str, Any] | None, language: str = "en") -> str:
    """Recommendation and its confidence; `verdict` is the content of verdict.json, or None without one."""
    text = load(language)
    if verdict is None:
        return text("sentence.none")
    outcome, more = verdict["outcome"], verdict.get("more_seeds")
    values = {"seeds": text.count("seeds", verdict["seeds"])}
    if more:
        values["more"] = text.count("more_seeds", more)
    if outcome == "not_enough_evidence":
        key = "one_seed" if verdict["seeds"] == 1 else "not_enough_evidence_more" if more else "not_enough_evidence"
        return text(f"sentence.{key}", **values)
    if outcome == "nothing_in_budget":
        return text("sentence.nothing_in_budget")
    rows = {row["candidate"]: row for row in verdict["comparison"]}
    chosen, best = rows[verdict["candidate"]], rows[verdict["best_candidate"]]
    values |= {
        "name": candidate_name(verdict, chosen["candidate"], text),
        "best": candidate_name(verdict, best["candidate"], text),
        "margin": percent(verdict["margin"]),
        "confidence": percent(verdict["confidence"]),
        "share": percent(chosen["regret_share"]),
        "most": percent((chosen["regret_high"] or 0.0) / best["eval_loss"]),
        "rate": rate(chosen["learning_rate"]),
        "scaling": scaling_name(verdict["scaling"], text),
    }
    sentences = [text(f"sentence.{_kind(verdict, chosen, best)}", **values)]
    lower = [row for row in verdict["comparison"] if row["rank"] < chosen["rank"]]
    if outcome == "not_distinguishable" and more:
        sentences.append(text("sentence.more_would_tell", **values))
    if outcome == "recommended" and verdict["undetermined"]:
        sentences.append(text("sentence.below_open_more" if more else "sentence.below_open", **values))
    elif outcome == "recommended" and lower and all(row["within_margin"] is False for row in lower):
        sentences.append(text("sentence.below_worse", **values))
    one_rate = "one_learning_rate" in verdict["caveats"]
    sentences.append(text("sentence.one_rate" if one_rate else "sentence.scaling", **values))
    return " ".join(sentences)


def scaling_name(scaling: Mapping[str, Any], text: Catalogue) -> str:
    """Name of verdict.json's `scaling`: `alpha 32 for every rank (scaling alpha/rank)`."""
    alpha = scaling["alpha"]
    kind = "multiple" if isinstance(alpha, str) else "fixed"
    shown = alpha.removesuffix("r") if isinstance(alpha, str) else f"{alpha:g}"
    return text(f"scaling.{kind}{'_rslora' * scaling['use_rslora']}", alpha=shown)


def _kind(verdict: Mapping[str, Any], chosen: Mapping[str, Any], best: Mapping[str, Any]) -> str:
    if verdict["outcome"] != "recommended":
        return str(verdict["outcome"])
    ranks = {row["rank"] for row in verdict["comparison"]}
    if len(ranks) == 1:
        return "recommended_only"
    if chosen["candidate"] != best["candidate"]:
        return "recommended"
    return "recommended_is_lowest" if chosen["rank"] == min(ranks) else "recommended_is_best"


def claim_sentences(verdict: Mapping[str, Any] | None, language: str = "en") -> list[str]:
    """Outcome of each of the original study's claims here, with effect and interval."""
    text, lines = load(language), []
    for claim in (verdict or {}).get("claims", []):
        outcome = text(f"claim.{claim['outcome']}")
        parts = [text("claim.sentence", claim=text(f"claim.{claim['claim']}"), outcome=outcome)]
        for found in (claim, claim.get("then")):
            if found and "effect" in found:
                parts.append(_effect(found, percent((verdict or {})["confidence"]), text))
        lines.append(" ".join(parts))
    return lines


def _effect(found: Mapping[str, Any], confidence: str, text: Catalogue) -> str:
    change = signed_percent(found["effect"])
    effect = text("claim.effect", low_rank=found["from_rank"], high_rank=found["to_rank"], change=change)
    if found["low"] is None:
        return f"{effect}."
    low, high = signed_percent(found["low"]), signed_percent(found["high"])
    return f"{effect} {text('claim.interval', confidence=confidence, low=low, high=high)}."


def candidate_name(verdict: Mapping[str, Any], candidate: str, text: Catalogue) -> str:
    """Name of a candidate of the comparison: `rank 8`, with its learning rate if the study tried several."""
    row = next(row for row in verdict["comparison"] if row["candidate"] == candidate)
    if "one_learning_rate" in verdict["caveats"]:
        return text("name.rank", rank=row["rank"])
    return text("name.rank_and_rate", rank=row["rank"], rate=rate(row["learning_rate"]))
