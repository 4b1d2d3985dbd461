"""Variants of LoRA compared with plain LoRA of the same rank, paired by seed and by held-out example."""

from typing import Any

import pandas as pd

from rankscope.analysis.comparison import estimate, judged_examples, label_tokens, losses_by_candidate, paired
from rankscope.analysis.costs import cpu_memory, noise_of
from rankscope.study.evidence import Evidence


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
    plain, of_variants = judged_examples(evidence.examples, evidence.results), evidence.variants
    pairs = []
    for variant in of_variants.spec.variants:
        examples = of_variants.examples[of_variants.examples["variant"] == variant]
        for rank, own in judged_examples(examples, of_variants.results).groupby("rank"):
            beside = plain[plain["rank"] == rank]
            pairs += [] if beside.empty else [(variant, int(str(rank)), own, beside)]
    confidence = 1 - (1 - evidence.spec.verdict.confidence) / max(1, len(pairs))
    return [
        {"variant": variant, "rank": rank} | _compared(evidence, own, beside, confidence)
        for variant, rank, own, beside in pairs
    ]


def _compared(evidence: Evidence, own: pd.DataFrame, plain: pd.DataFrame, confidence: float) -> dict[str, Any]:
    (name, losses), (plain_name, beside) = (next(iter(losses_by_candidate(part).items())) for part in (own, plain))
    shared = losses.columns.intersection(beside.columns)  # half of them, where one had several rates
    tokens = label_tokens(own)
    found = paired(losses, beside, tokens)
    row: dict[str, Any] = {
        "candidate": name,
        "plain": plain_name,
        "eval_loss": estimate(losses[shared].to_numpy(), tokens[shared].to_numpy()).mean,
        **dict.fromkeys(("difference", "low", "high", "outcome")),
        "memory": _cost(evidence, name, plain_name, "peak", "max"),
        "step_seconds": _cost(evidence, name, plain_name, "step_seconds_median", "median"),
    }
    if found:
        (low, high), row["difference"] = found.difference.ends(confidence), found.difference.mean
        if low is not None and high is not None:
            outcome = "better" if high < 0 else "worse" if low > 0 else "not_distinguishable"
            row |= {"low": low, "high": high, "outcome": outcome}
    return row


def _cost(evidence: Evidence, variant: str, plain: str, column: str, how: str) -> float | None:
    """Relative change of a cost, aggregated over repeats; None where one was not measured, or within noise."""
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
