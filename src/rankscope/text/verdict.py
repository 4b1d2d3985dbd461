"""The verdict in words, for the report and the command line: sentence, gain, margins and caveats.

Verdicts of version 0.1 lack what is a share of the gain. Imports nothing heavy.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from rankscope.text.catalogue import Catalogue, load
from rankscope.text.formats import Columns, Table, at_least, known, loss, percent, rate, shown, signed_percent, tabulate

Verdict: TypeAlias = Mapping[str, Any]  # content of verdict.json; empty before there is one
Rows: TypeAlias = Sequence[Mapping[str, Any]]  # a verdict's, one a rank: of its comparison, or its scores on the task


class Gain(NamedTuple):
    """What fine-tuning gains, or a lower rank costs; empty where the verdict does not know it."""

    value: str
    notes: list[str]


def verdict_sentence(verdict: Verdict, language: str = "en") -> str:
    """Recommendation and its confidence, or a best guess and why there is no more."""
    text = load(language)
    if not verdict:
        return text("sentence.none")
    if verdict["outcome"] == "nothing_in_budget":
        sentences = [text("sentence.nothing_in_budget")]
    else:
        sentences = [*(_task_sentences if verdict.get("by") == "task" else _loss_sentences)(verdict, text)]
    sentences += [_agreement_sentence(verdict, text)] if "task" in verdict else []
    return " ".join(filter(None, sentences))


def _loss_sentences(verdict: Mapping[str, Any], text: Catalogue) -> Iterator[str]:
    """Sentences of a verdict by the loss, in order; an empty one is left out."""
    outcome, more, unit = verdict["outcome"], verdict.get("more_seeds"), margin_unit(verdict)
    of_unit = "" if unit == "loss" else f"_{unit}"  # end of keys whose sentence says what the margin is a share of
    values = {
        "seeds": _seeds(verdict["comparison"], verdict["seeds"], text),
        "margin": percent(verdict["margin"]),
        "least": percent(1 - verdict["margin"]),
        "confidence": percent(verdict["confidence"]),
        "more": text.count("more_seeds", more or 0),
    }
    if outcome == "not_trained_enough":
        yield text(f"sentence.{kind_of_gain(verdict)}", **values)
        return
    if outcome == "not_enough_evidence":
        yield text("sentence.open", cause=text(f"cause.{cause_of(verdict)}", **values))
        yield _guess(verdict, text)
        return
    rows = {row["candidate"]: row for row in verdict["comparison"]}
    chosen, best = rows[verdict["candidate"]], rows[verdict["best_candidate"]]
    values |= {
        "name": candidate_name(verdict, chosen["candidate"], text),
        "best": candidate_name(verdict, best["candidate"], text),
        "share": percent(chosen["regret_share"]),
        "most": percent((chosen["regret_high"] or 0.0) / best["eval_loss"]),
        "kept": percent(chosen.get("kept") or 0.0),
        "kept_low": at_least(chosen.get("kept_low") or 0.0),
        "rate": rate(chosen["learning_rate"]),
        "scaling": scaling_name(verdict["scaling"], text),
    }
    kind = _kind(verdict, chosen, best)
    nothing_kept = kind == "not_distinguishable" and not known(chosen.get("kept_low"))
    yield text(f"sentence.{kind}" + ("" if kind == "recommended_only" or nothing_kept else of_unit), **values)
    if outcome == "not_distinguishable":
        yield text(f"sentence.more_would_tell{of_unit}", **values) if more else ""
        yield _guess(verdict, text) if verdict.get("guess") != verdict["candidate"] else ""
    yield _below(verdict, verdict["comparison"], f"sentence.below_worse{of_unit}", values, text)
    yield text("sentence.one_rate" if "one_learning_rate" in verdict["caveats"] else "sentence.scaling", **values)


def _task_sentences(verdict: Mapping[str, Any], text: Catalogue) -> Iterator[str]:
    """Sentences of a verdict by the task, in order; an empty one is left out."""
    task, outcome, more = verdict["task"], verdict["outcome"], verdict["more_seeds"]
    values = {
        "seeds": _seeds(task["scores"], task["seeds"], text),
        "items": text.count("items", task["items"]),
        "least": percent(1 - task["margin"]),
        "confidence": percent(verdict["confidence"]),
        "more": text.count("more_seeds", more or 0),
        "base": shown(task["untrained"], percent, text),
    }
    named = verdict["candidate"] or verdict["guess"]
    row = next((row for row in task["scores"] if row["candidate"] == named), None)
    if row:
        scores = {end: shown(row[end], percent, text) for end in ("score", "score_low", "score_high")}
        values |= {"name": candidate_name(verdict, named, text), **scores}
    if outcome == "not_trained_enough":
        yield text(f"task.{kind_of_gain(verdict)}", **values)
    elif outcome == "not_enough_evidence":
        yield text("task.no_verdict", cause=text(f"cause.{cause_of(verdict)}", **values))
        yield text("task.guess", **values) if row else ""
    else:
        yield text(f"task.{outcome}", **values)
        yield _below(verdict, task["scores"], "sentence.below_worse_gain", values, text)


def _below(verdict: Mapping[str, Any], rows: Rows, worse_key: str, values: Mapping[str, Any], text: Catalogue) -> str:
    """What is known of the ranks below the recommended one: that some are undetermined, or that all are worse."""
    if verdict["outcome"] != "recommended":
        return ""
    if verdict["undetermined"]:
        return text("sentence.below_open_more" if verdict.get("more_seeds") else "sentence.below_open", **values)
    states = [row["within_margin"] for row in rows if row["rank"] < verdict["rank"]]
    return text(worse_key, **values) if states and all(state is False for state in states) else ""


def _agreement_sentence(verdict: Mapping[str, Any], text: Catalogue) -> str:
    """Whether loss and task agree, and what the one that the verdict does not follow says of the other's rank."""
    other = "loss" if verdict["by"] == "task" else "task"
    if verdict["agreement"] == "same":
        return text("task.same", by=text(f"task.by_{verdict['by']}"))
    says, rank = verdict[other]["rank"], verdict["rank"]
    sentence = text(f"task.{other}_open" if says is None else f"task.{other}_names", rank=says)
    rows = verdict["comparison"] if other == "loss" else verdict["task"]["scores"]
    states = [row["within_margin"] for row in rows if row["rank"] == rank != says]
    kinds = {True: "task.enough", False: "task.worse", None: "task.undecided"}
    beginning = [text("task.different")] if verdict["agreement"] == "different" else []
    more = [text(kinds[state], rank=rank, other=text(f"task.by_{other}")) for state in states]
    return " ".join([*beginning, sentence, *more])


def margin_unit(verdict: Mapping[str, Any]) -> str:
    """What the margin is a share of: `loss`, `gain`, or `full`, the gain of full fine-tuning."""
    return "full" if verdict.get("gain_of") == "full" else str(verdict.get("margin_of", "loss"))


def outcome_label(verdict: Verdict, text: Catalogue) -> str:
    outcome = verdict.get("outcome", "none")
    seeds_would_do = outcome == "not_trained_enough" and kind_of_gain(verdict) == "little_gain_more"
    return text("outcome.not_enough_evidence" if seeds_would_do else f"outcome.{outcome}")


def kind_of_gain(verdict: Mapping[str, Any]) -> str:
    """Why ranks cannot be told apart by a share of the gain: a key of the catalogue's `sentence`."""
    low = (verdict["task"] if verdict.get("by") == "task" else verdict)["gain_low"]
    if low is not None and low <= 0:  # None of full fine-tuning's gain
        return "no_gain"
    return "little_gain_more" if verdict["more_seeds"] else "little_gain"


def cause_of(verdict: Mapping[str, Any]) -> str:
    """Why there is not enough evidence: a key of the catalogue's `cause`."""
    if not verdict["comparison"]:
        unfinished = "some_trials_unfinished" in verdict["caveats"] or not verdict.get("diverged")
        return "unfinished" if unfinished else "diverged"
    if len(verdict["comparison"]) == 1 and "ranks_left_out" in verdict.get("caveats", ()):
        return "alone"
    by_task = verdict.get("by") == "task"
    if by_task and not verdict["task"]["scores"]:
        return "unscored"
    if verdict["seeds"] == 1:
        return "one_seed"
    return "few_seeds" if verdict.get("more_seeds") else "few_items" if by_task else "close"


def _seeds(rows: Rows, seeds: int, text: Catalogue) -> str:
    """Number of seeds, or its range where ranks have different ones."""
    counts = {row.get("seeds", seeds) for row in rows} or {seeds}
    if len(counts) == 1:
        return text.count("seeds", *counts)
    return text("count.seeds_range", low=min(counts), high=max(counts))


def _guess(verdict: Mapping[str, Any], text: Catalogue) -> str:
    """The best guess as a sentence; empty without one."""
    row = next((row for row in verdict["comparison"] if row["candidate"] == verdict.get("guess")), None)
    if row is None:
        return ""
    name = candidate_name(verdict, row["candidate"], text)
    if row["candidate"] == verdict["best_candidate"]:
        return text("sentence.guess_best", name=name)
    if known(row.get("kept")):
        return text(f"sentence.guess_{margin_unit(verdict)}", name=name, kept=percent(row["kept"]))
    return text("sentence.guess_loss", name=name, share=percent(row["regret_share"]))


def gained(verdict: Verdict, text: Catalogue) -> Gain:
    """Gain in nats, the losses it is the difference of, and its interval."""
    gain = verdict.get("gain")
    if gain is None:
        return Gain("", [])
    best = next(row for row in verdict["comparison"] if row["candidate"] == verdict["best_candidate"])
    before = best["eval_loss"] + best["gain"]
    name = text("gain.full") if margin_unit(verdict) == "full" else candidate_name(verdict, best["candidate"], text)
    notes = [text("gain.from_to", before=loss(before), after=loss(before - gain), name=name)]
    if known(verdict["gain_low"]) and known(verdict["gain_high"]):
        ends = {"low": loss(verdict["gain_low"]), "high": loss(verdict["gain_high"])}
        notes.append(text("cost.interval", confidence=percent(verdict["confidence"]), **ends))
    return Gain(text("gain.nats", value=loss(gain)), notes)


def margin_table(verdict: Verdict, text: Catalogue) -> Table | None:
    """The smallest rank that is good enough, by margin; None where the margin is no share of the gain."""
    margins = verdict.get("margins")
    if not margins:
        return None

    def smallest(row: Mapping[str, Any]) -> str:
        if row["rank"] is None:
            return text("gain.open")
        return text("gain.lower_open", rank=row["rank"]) if row["undetermined"] else str(row["rank"])

    of_full = margin_unit(verdict) == "full"
    share = text("gain.lost" if of_full else "gain.kept")
    columns: Columns = {
        share: lambda row: percent(row["margin"] if of_full else 1 - row["margin"]),
        text("gain.smallest"): smallest,
    }
    caption = text("gain.margins_full" if of_full else "gain.margins", confidence=percent(verdict["confidence"]))
    own = next((number for number, row in enumerate(margins) if row["margin"] == verdict["margin"]), None)
    return tabulate(caption, columns, margins, words=columns, chosen=own)


def rate_sentences(verdict: Verdict, text: Catalogue) -> list[str]:
    """How the best learning rate moves with rank: each rank's optimum, and what the trend is; none without rates."""
    rates = verdict.get("rates")
    if rates is None:
        return []
    if not rates["curved"]:
        return [text("rates.flat")]
    optima = []
    for row in rates["ranks"]:
        ends = {name: rate(float(f"{row[name]:.2g}")) for name in ("optimum", "low", "high") if row[name] is not None}
        kind = "edge" if row["edge"] else "optimum" if {"low", "high"} <= ends.keys() else "one_seed"
        edge = text(f"rates.{row['edge']}") if row["edge"] else ""
        optima.append(text(f"rates.{kind}", rank=row["rank"], edge=edge, tried=rate(row["tried"]), **ends))
    key = "rates.optima" if rates["seeds"] > 1 else "rates.optima_alone"
    sentences = [text(key, confidence=percent(verdict["confidence"]), ranks="; ".join(optima))]
    if rates["exponent_low"] is not None:
        ends = {name: f"{rates[name]:+.2f}" for name in ("exponent", "exponent_low", "exponent_high")}
        kind = {(True, True): "both", (True, False): "same", (False, True): "inverse"}.get(
            (rates["same"], rates["inverse"]), "neither"
        )
        sentences.append(text(f"rates.{kind}", **ends))
    elif rates["exponent"] is not None:
        sentences.append(text("rates.no_interval", exponent=f"{rates['exponent']:+.2f}"))
    return sentences


ALARMS = ("diverged", "worse_than_untrained", "overfits")  # caveats that name ranks: the terminal shows them too


def caveat_sentence(verdict: Mapping[str, Any], code: str, text: Catalogue) -> str:
    """A caveat of verdict.json in words, with its numbers."""
    if code == "diverged":
        found = []
        for row in verdict["diverged"]:
            of_seeds = "caveat.of_seeds" if len(row["seeds"]) > 1 else "caveat.of_seed"
            seeds = text(of_seeds, seeds=", ".join(map(str, row["seeds"])))
            found.append(text("caveat.diverged_seeds", name=_name(row, text), seeds=seeds))
        return text("caveat.diverged", candidates="; ".join(found))
    if code == "worse_than_untrained":
        worse = [row["candidate"] for row in verdict["comparison"] if known(row["gain"]) and row["gain"] < 0]
        return text(f"caveat.{code}", ranks=", ".join(candidate_name(verdict, name, text) for name in worse))
    if code == "overfits":
        found = [
            text("caveat.overfit", rank=row["rank"], step=f"{row['step']:,}", rise=loss(row["rise"]))
            for row in verdict["overfits"]
        ]
        return text("caveat.overfits", ranks="; ".join(found))
    return text.get(f"caveat.{code}", code)


def scaling_name(scaling: Mapping[str, Any], text: Catalogue) -> str:
    """Name of verdict.json's `scaling`: `alpha 32 for every rank (scaling alpha/rank)`."""
    alpha = scaling["alpha"]
    alphas = alpha if isinstance(alpha, list | tuple) else [alpha]
    multiple = all(isinstance(one, str) for one in alphas)
    shown = ", ".join(one.removesuffix("r" * multiple) if isinstance(one, str) else f"{one:g}" for one in alphas)
    kind = "multiple" if multiple else "fixed"
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


MARKS = {"held": "✓", "not_held": "✗", "not_distinguishable": "?", "not_measured": "–"}


def claim_sentences(verdict: Verdict, language: str = "en") -> list[str]:
    """Outcome of each rule of thumb here, with effect and interval."""
    text, lines = load(language), []
    for claim in verdict.get("claims", []):
        parts = {"claim": text(f"claim.{claim['claim']}"), "outcome": text(f"claim.{claim['outcome']}")}
        line = text("claim.sentence", mark=MARKS[claim["outcome"]], **parts)
        for found in (claim, claim.get("then") or {}):
            if "effect" in found:
                ranks = {"low_rank": found["from_rank"], "high_rank": found["to_rank"]}
                line += f" {text('claim.effect', change=signed_percent(found['effect']), **ranks)}"
                if found["low"] is not None:
                    ends = {end: signed_percent(found[end]) for end in ("low", "high")}
                    line += f" {text('claim.interval', confidence=percent(verdict['confidence']), **ends)}"
                line += "."
        lines.append(line)
    return lines


def candidate_name(verdict: Mapping[str, Any], candidate: str, text: Catalogue) -> str:
    """Name of a candidate of the comparison: `rank 8`, with its learning rate and alpha if the study tried several."""
    row = next(row for row in verdict["comparison"] if row["candidate"] == candidate)
    return _name(row, text, one_rate="one_learning_rate" in verdict["caveats"])


def _name(row: Mapping[str, Any], text: Catalogue, one_rate: bool = False) -> str:
    name = text("name.rank" if one_rate else "name.rank_and_rate", rank=row["rank"], rate=rate(row["learning_rate"]))
    return text("name.with_alpha", name=name, alpha=f"{row['alpha']:g}") if "alpha" in row else name
