"""Ranks compared by their scores on a task, as they are by loss.

A score is between 0 and 1, and mostly one of the two. Its complement, the error, takes the place of the loss, and every
item weighs the same; seeds and items are crossed as in `rankscope.analysis.comparison`. The margin is a share of what
fine-tuning gains on the task.

Outcomes need one thing more. Where two ranks agree on nearly all items, the variance of their difference is estimated
as nearly zero, however few the items. So items are added on which only the one rank is right, and as many on which only
the other is: z^2 / 2 of each, about two, with z the normal quantile of the plain interval. Agresti and Coull (1998, The
American Statistician 52) do so for one proportion; to paired ones Bonett and Price (2012, Journal of Educational and
Behavioral Statistics 37) add one of each, too few for the small levels at which claims are made. Where no pair
disagrees, the interval's end is that of Tango's score interval (1998, Statistics in Medicine 17), z^2 / (n + z^2). All
seeds agree on the added items, which so count as items alone. docs/results/task-simulation.md has the error rates.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import special

from rankscope.analysis import comparison
from rankscope.analysis.comparison import Comparison, Estimate, Numbers, estimate, finite, with_ends
from rankscope.analysis.outcome import best_guess, decide
from rankscope.spec.models import VerdictSpec
from rankscope.study.evidence import Evidence

CONCLUSION = ("outcome", "rank", "candidate", "undetermined", "guess", "more_seeds", "next_look")
"""Fields of verdict.json that are of the loss or of the task, as `verdict.by` says."""


def judge_task(
    scores: pd.DataFrame,
    untrained: pd.DataFrame | None,
    compared: Sequence[str],
    spec: VerdictSpec,
    over: Mapping[str, list[str]],
) -> dict[str, Any]:
    """Field `task` of verdict.json: those of `CONCLUSION`, `best_candidate`, `margin`, `seeds`, `items`, the untrained
    model's score `untrained` and the best candidate's `gain` over it, both with `_low` and `_high`, and `scores`, a row
    for each rank. Scores are shares of 1.

    `scores` is `Study.task_scores()`, `untrained` `Study.untrained_scores()`. `compared` are the candidates that are
    compared by loss, so that both verdicts are on the same adapters; where one of them has no scores, nothing is
    concluded. `over` names the limits of cost that each exceeds.
    """
    empty: dict[str, Any] = {
        **dict.fromkeys(CONCLUSION),
        "outcome": "not_enough_evidence",
        "undetermined": [],
        "best_candidate": None,
        "margin": spec.task_margin,
        "seeds": 0,
        "items": 0,
        **{f"{name}{end}": None for name in ("untrained", "gain") for end in ("", "_low", "_high")},
        "scores": [],
    }
    own = scores[scores["candidate"].isin(compared)]
    if untrained is None or untrained.empty or own.empty:
        return empty
    judged = comparison.judge(_errors(own), _errors(untrained))
    if set(judged.losses) != set(compared):  # one of them has no scores, or shares no seed with another
        return empty
    plain, confidence = comparison.compare(judged, spec.task_margin), spec.confidence
    added: dict[str, Any] = {
        name: add_items(getattr(plain, name), confidence) for name in ("differences", "excesses", "gain")
    }
    found = plain._replace(**added)
    fields, states = decide(found, confidence, over)
    assert plain.gain is not None
    assert found.gain is not None
    assert judged.untrained is not None
    best, before = found.best, estimate(np.stack([judged.untrained] * 2), judged.label_tokens)  # alike at any seed
    gain_ends = finite(*(end[best] for end in found.gain.interval(confidence)))
    rows = [row | {"within_margin": states[row["candidate"]]} for row in _rows(plain, found, confidence)]
    return empty | fields | {
        "guess": best_guess(plain, over),
        "seeds": int(plain.differences.seeds.min()),
        "items": plain.eval_loss.examples,
        **with_ends("untrained", 1.0 - before.mean, finite(*_ends(before, confidence))),
        **with_ends("gain", plain.gain.mean[best], gain_ends),
        "scores": rows,
    }  # fmt: skip


def loss_and_task(
    evidence: Evidence, verdict: Mapping[str, Any], compared: Sequence[str], over: Mapping[str, list[str]]
) -> dict[str, Any]:
    """Fields that a task adds to a verdict on the loss, none in a study without one: `by`, what the verdict follows,
    and by the task the fields of `CONCLUSION`; `loss`, these fields by the loss; `task` (`judge_task`); `agreement`:
    both name the `same` rank, `different` ones, or one of them none (`open`)."""
    scores, spec = evidence.task_scores, evidence.spec.verdict
    if scores is None:
        return {}
    task = judge_task(scores, evidence.task_untrained, compared, spec, over)
    loss, by = {name: verdict[name] for name in CONCLUSION}, spec.by or "task"
    ranks = {loss["rank"], task["rank"]}
    agreement = "open" if None in ranks else "same" if len(ranks) == 1 else "different"
    followed = {name: task[name] for name in CONCLUSION} if by == "task" else {}
    return {"by": by, "agreement": agreement, "loss": loss, "task": task} | followed


def add_items(found: Estimate, confidence: float, size: float = 1.0) -> Estimate:
    """Estimate with z^2 / 2 more items of the value `size`, and as many of minus that."""
    items, added = found.examples, special.ndtri((1 + confidence) / 2) ** 2
    total = items + added
    squares = np.square(found.example_error) * items * (items - 1)
    squares = squares + added * (size**2 + items * np.square(found.mean) / total)
    share = items / total
    return found._replace(
        mean=share * found.mean,
        seed_error=share * found.seed_error,
        example_error=np.sqrt(squares / (total * (total - 1))),
        third=share**3 * found.third,
    )


def _errors(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores in the form of held-out losses; of several tasks an item is a task and a number."""
    item = scores["task"].astype(str) + " " + scores["example"].astype(str)
    return scores.assign(example=item, loss=1.0 - scores["score"], label_tokens=1.0)


def _rows(plain: Comparison, added: Comparison, confidence: float) -> list[dict[str, Any]]:
    """A row for each candidate: its score, and how far it is behind the best, with intervals of the items `added`."""
    behind, (lows, highs) = comparison.bounds(added, confidence), _ends(plain.eval_loss, confidence)
    assert plain.gain is not None
    return [
        {
            "candidate": name,
            "rank": plain.ranks[number],
            "learning_rate": plain.learning_rates[number],
            "seeds": int(plain.eval_loss.seeds[number]),
            **with_ends("score", 1.0 - plain.eval_loss.mean[number], finite(lows[number], highs[number])),
            **with_ends("behind", max(0.0, plain.regrets[number]), behind[number]),
            "gain": float(plain.gain.mean[number]),
        }
        for number, name in enumerate(plain.candidates)
    ]


def _ends(errors: Estimate, confidence: float) -> tuple[Numbers, Numbers]:
    """Interval of a score over seeds and items, between 0 and 1; infinite with one seed."""
    centred = errors._replace(mean=0.5 - errors.mean)
    ends = add_items(centred, confidence, 0.5).interval(confidence)
    low, high = (np.where(np.isinf(end), end, np.clip(0.5 + end, 0.0, 1.0)) for end in ends)
    return low, high
