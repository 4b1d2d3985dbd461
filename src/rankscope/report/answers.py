"""Answers of the model and of each candidate to the same held-out prompts, side by side."""

from typing import NamedTuple

from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import rate
from rankscope.text.verdict import Verdict

LONGEST = 4000  # characters of one text: rows of the data may be of any length, a page may not


class Answer(NamedTuple):
    name: str
    text: str
    chosen: bool = False  # by the verdict


class Answered(NamedTuple):
    """A held-out prompt with the data's answer, that of the model without an adapter, and each candidate's."""

    title: str
    prompt: str
    answers: list[Answer]


def answered(evidence: Evidence, verdict: Verdict, text: Catalogue) -> list[Answered]:
    """`Evidence.answers` by prompt: the data's own, the verdict's candidate, the model without an adapter, the others
    from the lowest rank to the highest; empty without answers. A rank with several learning rates shows the one that
    the verdict compares; all of them before there is a verdict."""
    if evidence.answers.empty:
        return []
    rates = {candidate.name: candidate.learning_rate for candidate in evidence.spec.candidates()}
    chosen = verdict.get("candidate")
    position = {name: number for number, name in enumerate(dict.fromkeys([chosen, "base", *rates]))}
    compared = {row["rank"]: row["candidate"] for row in verdict.get("comparison", [])}

    def name(rank: int, candidate: str) -> str:
        if rank == 0:
            return text("answer.base")
        if len(set(rates.values())) == 1 or candidate not in rates:
            return text("name.rank", rank=rank)
        return text("name.rank_and_rate", rank=rank, rate=rate(rates[candidate]))

    found = []
    for number, (_, rows) in enumerate(evidence.answers.groupby("example", sort=False), start=1):
        records = sorted(rows.to_dict("records"), key=lambda row: position.get(row["candidate"], len(position)))
        answers = [Answer(text("answer.reference"), _short(records[0]["reference"]))]
        for row in records:
            rank, candidate = row["rank"], row["candidate"]
            if compared.get(rank, candidate) == candidate:
                answers.append(Answer(name(rank, candidate), _short(row["answer"]), candidate == chosen))
        found.append(Answered(text("answer.prompt", number=number), _short(records[0]["prompt"]), answers))
    return found


def _short(value: object) -> str:
    found = str(value)
    return found if len(found) <= LONGEST else f"{found[:LONGEST]}…"
