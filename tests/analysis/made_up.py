"""Studies whose truth is known: evidence made of given losses."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from rankscope.analysis.verdict import conclude
from rankscope.spec.resolve import resolve_spec
from rankscope.study.evidence import Evidence

UNTRAINED = 2.4
"""Loss before training. Most losses below are near 2.0: 5% of the gain and 1% of the loss are then the same 0.02."""

Losses = Mapping[tuple[int, float], Sequence[float | None]]
"""Mean loss by rank and learning rate, one for each seed; None where that trial diverged."""


def examples(losses: Losses, count: int = 40, noise: float = 0.0) -> pd.DataFrame:
    """`Study.examples()` whose mean for each candidate and seed is as given."""
    rng = np.random.default_rng(0)
    frames = []
    for (rank, rate), by_seed in losses.items():
        for seed, loss in enumerate(by_seed):
            spread = rng.normal(0, noise, count) if noise else np.linspace(-0.5, 0.5, count)
            if loss is not None:
                own = {"loss": loss + spread - spread.mean(), "label_tokens": 10, "correct_tokens": 5}
                frames.append(pd.DataFrame(_identity(rank, rate, seed) | {"example": range(count)} | own))
    return pd.concat(frames, ignore_index=True)


def _identity(rank: int, rate: float, seed: int) -> dict[str, Any]:
    name = f"r{rank:03d}-lr{rate}"
    own = {"candidate": name, "variant": "lora", "rank": rank, "learning_rate": rate, "seed": seed}
    return {"trial": f"{name}-s{seed}"} | own


def results(losses: Losses) -> pd.DataFrame:
    """`Study.results()` of these trials."""
    rows = [
        _identity(rank, rate, seed)
        | {"lora_alpha": 16.0, "status": "diverged" if loss is None else "done", "train_loss": loss, "eval_loss": loss}
        for (rank, rate), by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
    ]
    return pd.DataFrame(rows)


def curves(losses: Losses, untrained: float = UNTRAINED) -> pd.DataFrame:
    """`Study.curves()`: an evaluation before training and at each of four steps, the last with the given losses."""
    rows = [
        _identity(rank, rate, seed) | {"step": step, "eval_loss": untrained if step == 0 else loss + (4 - step) / 100}
        for (rank, rate), by_seed in losses.items()
        for seed, loss in enumerate(by_seed)
        if loss is not None
        for step in range(5)
    ]
    return pd.DataFrame(rows)


def untrained_examples(count: int = 40, loss: float = UNTRAINED, spread: float = 0.8) -> pd.DataFrame:
    """`Study.untrained_examples()`, whose examples differ `spread` times as much as after training."""
    losses = loss + spread * np.linspace(-0.5, 0.5, count)
    return pd.DataFrame({"example": range(count), "loss": losses, "label_tokens": 10, "correct_tokens": 2})


def evidence_of(
    losses: Losses, profiles: pd.DataFrame | None = None, untrained: float = UNTRAINED, **verdict: float | str
) -> Evidence:
    """Evidence of a study with these losses; `verdict` are settings of the study's."""
    question = {
        "model": {"id": "m"}, "data": {"id": "d"}, "verdict": verdict,
        "ranks": sorted({rank for rank, _ in losses}), "learning_rates": sorted({rate for _, rate in losses}),
        "seeds": list(range(max(map(len, losses.values())))),
    }  # fmt: skip
    empty = pd.DataFrame()
    return Evidence(
        resolve_spec(question), results(losses), curves(losses, untrained), empty if profiles is None else profiles,
        empty, examples(losses), {}, {}, reference=empty, untrained=untrained_examples(loss=untrained),
        cuts=examples(losses)[:0].assign(cut_rank=0, recover_steps=0),
    )  # fmt: skip


def verdict_on(
    losses: Losses, profiles: pd.DataFrame | None = None, untrained: float = UNTRAINED, **verdict: float | str
) -> dict[str, Any]:
    return conclude(evidence_of(losses, profiles, untrained, **verdict))


RATE = 2e-4
Outcomes = Mapping[int, np.ndarray]  # by rank, seeds x items


def outcomes(shares: Mapping[int, float], seeds: int = 3, items: int = 400, before: float = 0.1) -> Outcomes:
    """Outcomes of each rank with these true scores; under rank 0 of the untrained model. Items differ
    in difficulty, and 5% of the outcomes of a seed are drawn anew."""
    rng = np.random.default_rng(1)
    easy = rng.random(items)

    def of(share: float, number: int) -> np.ndarray:
        drawn = np.where(rng.random((number, items)) < 0.05, rng.random((number, items)), easy)
        return (drawn < share).astype(float)

    return {0: of(before, 1)} | {rank: of(share, seeds) for rank, share in shares.items()}


def with_task(evidence: Evidence, found: Outcomes, task: str = "exact_match") -> Evidence:
    """The evidence with these scores."""
    items = range(found[0].shape[1])
    names = {(row["rank"], row["seed"]): row for row in evidence.results.to_dict("records")}
    scored, named = {"learning_rate": RATE, "example": items, "task": task}, ("trial", "candidate", "seed")
    frames = [
        pd.DataFrame({name: names[rank, seed][name] for name in named} | scored | {"rank": rank, "score": own})
        for rank, table in found.items()
        if rank
        for seed, own in enumerate(table)
    ]
    untrained = pd.DataFrame({"example": items, "score": found[0][0], "task": task})
    return evidence._replace(task_scores=pd.concat(frames, ignore_index=True), task_untrained=untrained)
