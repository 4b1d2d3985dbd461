"""What the model and each candidate answer on the same held-out prompts, side by side."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rankscope.study.evidence import Evidence
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import rate

LONGEST = 4000
"""Characters of one text: a row of the data may be as long as it likes, a page may not."""


class Answer(NamedTuple):
    """Whose, and what."""

    name: str
    text: str
    chosen: bool = False
    """By the verdict."""


class Answered(NamedTuple):
    """A held-out prompt, and its answers: the data's own, the model's without an adapter, each candidate's."""

    title: str
    prompt: str
    answers: list[Answer]


def answered(evidence: Evidence, verdict: Mapping[str, Any] | None, text: Catalogue) -> list[Answered]:
    """`Evidence.answers` by prompt, candidates from the lowest rank to the highest; empty where there are none.

    Of a rank with several learning rates, the one that the verdict compares; all of them before there is a verdict.
    """
    if evidence.answers is None or evidence.answers.empty:
        return []
    order = ["base", *(candidate.name for candidate in evidence.spec.candidates())]
    place = {name: number for number, name in enumerate(order)}
    chosen, compared = (verdict or {}).get("candidate"), _compared(verdict)
    found = []
    for number, (_, rows) in enumerate(evidence.answers.groupby("example", sort=False), start=1):
        records = sorted(rows.to_dict("records"), key=lambda row: place.get(row["candidate"], len(place)))
        answers = [Answer(text("answer.reference"), _short(records[0]["reference"]))]
        for row in records:
            if row["candidate"] not in compared.get(row["rank"], [row["candidate"]]):
                continue
            name = _name(evidence, row["candidate"], int(row["rank"]), text)
            answers.append(Answer(name, _short(row["answer"]), row["candidate"] == chosen))
        found.append(Answered(text("answer.prompt", number=number), _short(records[0]["prompt"]), answers))
    return found


def _compared(verdict: Mapping[str, Any] | None) -> dict[int, list[str]]:
    """By rank; a rank that is left out of the comparison has none, and keeps all its answers."""
    return {row["rank"]: [row["candidate"]] for row in (verdict or {}).get("comparison", [])}


def _name(evidence: Evidence, candidate: str, rank: int, text: Catalogue) -> str:
    if rank == 0:
        return text("answer.base")
    rates = {found.name: found.learning_rate for found in evidence.spec.candidates()}
    if len(evidence.spec.learning_rates) == 1 or candidate not in rates:
        return text("name.rank", rank=rank)
    return text("name.rank_and_rate", rank=rank, rate=rate(rates[candidate]))


def _short(value: object) -> str:
    found = str(value)
    return found if len(found) <= LONGEST else f"{found[:LONGEST]}…"
