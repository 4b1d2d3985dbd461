"""Variants of LoRA compared with plain LoRA of the same rank, paired by seed and by held-out example."""

from typing import Any

import pandas as pd

from rankscope.analysis.comparison import estimate, judged_examples, label_tokens, losses_by_candidate, without_diverged
from rankscope.analysis.costs import cpu_memory, noise_of
from rankscope.study.evidence import Evidence

COSTS = {"memory": ("peak", "max"), "step_seconds": ("step_seconds_median", "median")}
"""Compared costs: a column of `Study.profiles`, and its aggregation over repeats."""


def judge_variants(evidence: Evidence) -> list[dict[str, Any]]:
    """One row per variant and rank, each at its best learning rate: `variant rank candidate plain eval_loss
    difference low high outcome memory step_seconds`.

    `difference` is the variant's held-out loss minus that of `plain`, in nats per label token, with an interval whose
    confidence holds for all rows together (Bonferroni). `outcome` is `better`, `worse` or `not_distinguishable`: by the
    interval alone, however small the difference; None and no interval with fewer than two seeds that both finished.
    `memory` (peak) and `step_seconds` are relative changes, None where they are unknown or below noise. A
    rank without finished plain trials has no row, nor has a candidate with a seed that diverged.
    """
    if evidence.variants is None:
        return []
    plain = without_diverged(evidence.examples, evidence.results)
    found = without_diverged(evidence.variants.examples, evidence.variants.results)
    if plain.empty or found.empty:
        return []
    plain, names = judged_examples(plain), evidence.variants.spec.variants
    pairs = [
        (variant, rank, own[own["rank"] == rank], plain[plain["rank"] == rank])
        for variant, own in ((name, judged_examples(found[found["variant"] == name])) for name in names)
        for rank in sorted(set(own["rank"]) & set(plain["rank"]))
    ]
    confidence = 1 - (1 - evidence.spec.verdict.confidence) / max(1, len(pairs))
    return [
        {"variant": variant, "rank": int(rank)} | _compared(evidence, own, beside, confidence)
        for variant, rank, own, beside in pairs
    ]


def _compared(evidence: Evidence, own: pd.DataFrame, plain: pd.DataFrame, confidence: float) -> dict[str, Any]:
    shared = sorted(set(own["example"]) & set(plain["example"]))  # half of them, where one had several rates
    own, plain = own[own["example"].isin(shared)], plain[plain["example"].isin(shared)]
    tokens = label_tokens(own)
    (name, losses), (plain_name, plain_losses) = (next(iter(losses_by_candidate(t).items())) for t in (own, plain))
    seeds = losses.index.intersection(plain_losses.index)
    row: dict[str, Any] = {
        "candidate": name,
        "plain": plain_name,
        "eval_loss": estimate(losses.to_numpy(), tokens).mean,
        **dict.fromkeys(("difference", "low", "high", "outcome")),
        **{cost: _cost(evidence, name, plain_name, *how) for cost, how in COSTS.items()},
    }
    if len(seeds):
        found = estimate((losses.loc[seeds] - plain_losses.loc[seeds]).to_numpy(), tokens)
        row["difference"] = found.mean
        if len(seeds) > 1:
            low, high = found.interval(confidence)
            outcome = "better" if high < 0 else "worse" if low > 0 else "not_distinguishable"
            row |= {"low": low, "high": high, "outcome": outcome}
    return row


def _cost(evidence: Evidence, variant: str, plain: str, column: str, how: str) -> float | None:
    """Relative change of a cost; None where one was not measured, or within noise."""
    assert evidence.variants is not None
    tables = [table for table in (evidence.variants.profiles, evidence.profiles) if not table.empty]
    if len(tables) < 2:
        return None
    if column == "peak":
        gpu = evidence.profiles["gpu_allocated_peak_bytes"].notna().any()
        column = "gpu_allocated_peak_bytes" if gpu else f"{cpu_memory(pd.concat(tables))}_peak_bytes"
    values = [
        table.loc[(table["candidate"] == name) & ~table["control"], column].astype("float64").agg(how)
        for table, name in zip(tables, (variant, plain), strict=True)
    ]
    noise = noise_of(evidence.profiles, column)
    change = float(values[0] / values[1] - 1)
    return change if noise is not None and abs(change) > noise.floor else None
