"""A made-up study: three ranks, three seeds, whose every number is known to the tests."""

import math
from typing import Any

import numpy as np
import pandas as pd

from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import resolve_spec
from rankscope.study.evidence import Evidence

FINAL_LOSS = {8: 1.231, 128: 1.224, 256: 1.229}
UNTRAINED_LOSS = 2.824  # 1.6 above the lowest
HOSTILE = "<script>alert(1)</script>"
DOUBTFUL = {
    "rows_train": 3_400, "rows_eval": 180, "truncated": 480, "answers_cut_off": 23, "max_length": 512,
    "notes": ["columns not read: id, source", "read as prompt and answer"], "warnings": ["One prompt for all rows."],
}  # fmt: skip
"""Facts of data with every doubt, with notes and with a warning of its own."""


def make_spec(**values: Any) -> StudySpec:
    defaults = {
        "name": "opt350m-codealpaca",
        "model": {"id": "facebook/opt-350m"},
        "data": {"id": "lucasmccabe-lmi/CodeAlpaca-20k"},
        "ranks": [8, 128, 256],
        "seeds": [0, 1, 2],
    }
    return resolve_spec(defaults | values)


def make_evidence(
    spec: StudySpec | None = None, *, steps: int = 120, gpu: bool = False, profiles: bool = True
) -> Evidence:
    """Complete evidence: all trials done. Losses fall with steps, memory and time rise with rank."""
    spec = spec or make_spec()
    noise = np.random.default_rng(7)
    results, curves, forgetting = [], [], spec.measure.forgetting is not None
    for trial in spec.trials():
        candidate = trial.candidate
        identity = {"trial": trial.name, "candidate": candidate.name, "rank": candidate.rank,
                    "learning_rate": candidate.learning_rate, "seed": trial.seed}  # fmt: skip
        final = FINAL_LOSS.get(candidate.rank, 1.25) + 0.004 * (trial.seed - 1) + 20 * (candidate.learning_rate - 2e-4)
        results.append(
            identity
            | {
                "lora_alpha": candidate.lora_alpha,
                "scaling": candidate.scaling,
                "use_rslora": False,
                "target_modules": "all-linear",
                "status": "done",
                "reason": None,
                "engine": "packed",
                "pack": "p000",
                "steps": float(steps),
                "tokens": steps * 900.0,
                "trainable_params": 110_592.0 * candidate.rank,
                "adapter_bytes": 442_368.0 * candidate.rank,
                "train_loss": final - 0.1,
                "eval_loss": final,
                "eval_perplexity": math.exp(final),
                "eval_accuracy": 0.7,
                "general_loss_before": 3.1 if forgetting else math.nan,
                "general_loss_after": 3.1 + candidate.rank / 1000 + trial.seed / 100 if forgetting else math.nan,
                "train_seconds": 300.0,
                "eval_seconds": 12.0,
                "tokens_per_second": steps * 3.0,
            }
        )
        for step in range(steps + 1):
            evaluated = step % max(1, steps // 4) == 0
            level = final + 1.6 * (math.exp(-6 * step / steps) - math.exp(-6))
            curves.append(
                identity
                | {
                    "step": step,
                    "epoch": step / steps,
                    "train_loss": math.nan if step == 0 else level - 0.1 + noise.normal(0, 0.06),
                    "eval_loss": level if evaluated else math.nan,
                    "grad_norm": 0.5,
                    "step_learning_rate": 2e-4,
                    "tokens": 900.0,
                    "label_tokens": 400.0,
                    "step_seconds": 0.4,
                }
            )
    profile_rows, samples = _costs(spec, noise, gpu) if profiles else ([], [])
    return Evidence(
        spec=spec,
        results=pd.DataFrame(results),
        curves=pd.DataFrame(curves),
        profiles=pd.DataFrame(profile_rows),
        samples=pd.DataFrame(samples),
        examples=pd.DataFrame(),
        machine={
            "date": "2026-11-29",
            "hardware": {
                "cpu": "AMD EPYC 7763", "cores": 16, "memory_bytes": 128_000_000_000,
                "gpus": [{"name": "NVIDIA H100", "memory_bytes": 80_000_000_000}] if gpu else [],
            },
            "versions": {"rankscope": "0.1.0", "python": "3.11.2", "torch": "2.11.0", "peft": "0.19.0"},
            "model": {"id": spec.model.id, "revision": "08ab08cc", "parameters": 331_196_416,
                      "dtype": "float32", "fingerprint": "sha256:3f9a"},
            "device": "cuda" if gpu else "cpu",
        },
        data_facts={
            "id": spec.data.id, "fingerprint": "sha256:77b1", "format": "alpaca", "rows_read": 20_022,
            "rows_train": 18_980, "rows_eval": 1_000, "duplicates_dropped": 42, "truncated": 3,
            "train_tokens": 2_310_552, "max_length": 1024, "a_new_fact": 5,
        },
        reference=pd.DataFrame(),
        untrained=pd.DataFrame({"example": range(4), "loss": UNTRAINED_LOSS, "label_tokens": 10}),
        reference_results=_reference(spec),
    )  # fmt: skip


def _reference(spec: StudySpec) -> pd.DataFrame:
    """Full fine-tuning, better than every rank at the lowest of its rates; the highest diverged with every seed."""
    trials = spec.reference_trials()
    rates = sorted({trial.learning_rate for trial in trials})
    rows = []
    for trial in trials:
        final = 1.2 + 0.004 * (trial.seed - 1) + 0.1 * rates.index(trial.learning_rate)
        diverged = len(rates) > 1 and trial.learning_rate == rates[-1]
        rows.append(
            {
                "trial": trial.name,
                "candidate": trial.candidate_name,
                "rank": 0,
                "learning_rate": trial.learning_rate,
                "seed": trial.seed,
                "status": "diverged" if diverged else "done",
                "reason": "loss not finite at step 7" if diverged else None,
                "steps": math.nan if diverged else 120.0,
                "train_loss": math.nan if diverged else final - 0.1,
                "eval_loss": math.nan if diverged else final,
                "eval_perplexity": math.nan if diverged else math.exp(final),
                "eval_accuracy": math.nan if diverged else 0.72,
                "general_loss_before": math.nan if diverged else 3.1,
                "general_loss_after": math.nan if diverged else 3.6,
            }
        )
    return pd.DataFrame(rows)


def _costs(spec: StudySpec, noise: np.random.Generator, gpu: bool) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows for every candidate, samples of each rank once; then the control's rows."""
    profiles: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    first = spec.candidates()[0]
    for candidate, control in [*((candidate, False) for candidate in spec.candidates()), (first, True)]:
        identity = {
            "candidate": candidate.name,
            "rank": candidate.rank,
            "learning_rate": candidate.learning_rate,
        }
        base = 1.9e9 + 3.1e6 * candidate.rank
        for repeat in range(spec.measure.repeats):
            profiles.append(
                identity
                | {
                    "repeat": repeat,
                    "control": control,
                    "load_seconds": 3.2,
                    "steps": 8,
                    "step_seconds_median": 0.4 + candidate.rank / 1000 + 0.01 * repeat,
                    "step_seconds_mean": 0.41 + candidate.rank / 1000,
                    "step_seconds_p10": 0.35 + candidate.rank / 1000,
                    "step_seconds_p90": 0.5 + candidate.rank / 1000,
                    "tokens_per_second": 2100.0,
                    "runtime_seconds": 960 + candidate.rank * 2.2 + 12 * repeat + 6 * control,
                    "joules_per_token": 0.012 if gpu else math.nan,
                    "rss_base_bytes": 4.1e8,
                    **_memory("", base, gpu),
                    **_memory("load_", 4e8, gpu),
                    **_memory("eval_", base * 0.9, gpu),
                    "rss_peak_bytes": base * 1.22 + 1e6 * repeat + 2e6 * control,
                    "rss_above_base_mean_bytes": base - 4.1e8,
                    "rss_above_base_peak_bytes": base * 1.22 - 4.1e8,
                    "rss_above_base_p99_bytes": base * 1.2 - 4.1e8,
                    "trainable_params": 110_592 * candidate.rank,
                    "adapter_bytes": 442_368.0 * candidate.rank,
                }
            )
            if control or candidate.learning_rate != first.learning_rate:
                continue
            for step in range(0, 9):
                for part in range(4):
                    samples.append(
                        identity
                        | {
                            "repeat": repeat,
                            "phase": "load" if step == 0 else "train",
                            "step": math.nan if step == 0 else step,
                            "seconds": step + part / 4,
                            "rss_bytes": base + noise.normal(0, 2e7) + 3e7 * (part == 2),
                            "gpu_allocated_bytes": base * 1.5 + 1e8 * part if gpu else None,
                            "gpu_reserved_bytes": base * 1.7 if gpu else None,
                            "gpu_nvml_bytes": base * 1.9 if gpu else None,
                        }
                    )
    return profiles, samples


def _memory(phase: str, rss: float, gpu: bool) -> dict[str, float]:
    shares = {"rss": (1.0, 1.22, 1.2), "gpu_allocated": (1.5, 2.5, 2.4), "gpu_reserved": (1.7, 2.7, 2.6)}
    shares["gpu_nvml"] = (1.9, 2.9, 2.8)
    return {
        f"{phase}{kind}_{statistic}_bytes": rss * share if kind == "rss" or gpu else math.nan
        for kind, of_kind in shares.items()
        for statistic, share in zip(("mean", "peak", "p99"), of_kind, strict=True)
    }


def make_verdict(evidence: Evidence, outcome: str = "recommended", chosen: int = 0, **values: Any) -> dict[str, Any]:
    """A verdict with a row for each rank at its best learning rate, as `rankscope.analysis` writes it.

    `chosen` is an index of the compared ranks, lowest first. Its margin is a share of the gain: see `of_the_loss`.
    """
    results, one_seed = evidence.results, len(evidence.spec.seeds) == 1
    done = results[results["status"] == "done"].groupby(["rank", "candidate", "learning_rate"])
    means = done["eval_loss"].mean().reset_index()
    rows = means.loc[means.groupby("rank")["eval_loss"].idxmin()].to_dict("records")
    best = min(rows, key=lambda row: row["eval_loss"])
    comparison: list[dict[str, Any]] = []
    for row in rows:
        regret = row["eval_loss"] - best["eval_loss"]
        intervals = {
            "eval_loss_low": row["eval_loss"] - 0.006,
            "eval_loss_high": row["eval_loss"] + 0.006,
            "regret_low": regret - 0.002,
            "regret_high": regret + 0.003,
        }
        share, gain = regret / best["eval_loss"], UNTRAINED_LOSS - best["eval_loss"]
        of_the_gain = {"kept": 1 - regret / gain, "kept_low": None if one_seed else 1 - (regret + 0.003) / gain}
        comparison.append(
            row
            | (dict.fromkeys(intervals) if one_seed else intervals)
            | _over_full(evidence, row["eval_loss"], one_seed)
            | {"regret": regret, "regret_share": share, "within_margin": None if one_seed else share < 0.01}
            | {"gain": UNTRAINED_LOSS - row["eval_loss"]}
            | of_the_gain
        )
    decided = outcome not in ("not_enough_evidence", "not_trained_enough", "nothing_in_budget")
    gain = UNTRAINED_LOSS - best["eval_loss"]
    return {
        "schema": 3,
        "outcome": outcome,
        "rank": comparison[chosen]["rank"] if decided else None,
        "candidate": comparison[chosen]["candidate"] if decided else None,
        "best_candidate": best["candidate"],
        "margin": 0.05,
        "margin_of": "gain",
        "gain": gain,
        "gain_low": None if one_seed else gain - 0.02,
        "gain_high": None if one_seed else gain + 0.02,
        "gain_of": best["candidate"],
        "margins": [{"margin": share, "rank": comparison[0]["rank"], "undetermined": []} for share in (0.02, 0.05)],
        "guess": comparison[0]["candidate"],
        "diverged": [],
        "overfits": [],
        "confidence": 0.95,
        "seeds": len(evidence.spec.seeds),
        "examples": 100,
        "scaling": {"alpha": evidence.spec.adapter.alpha, "use_rslora": evidence.spec.adapter.use_rslora},
        "more_seeds": None,
        "undetermined": [],
        "left_out": [],
        "reference_candidate": evidence.spec.reference_trials()[0].candidate_name if _has_reference(evidence) else None,
        "claims": [],
        "caveats": ["one_learning_rate"] if len(evidence.spec.learning_rates) == 1 else [],
        "comparison": comparison,
    } | values


def of_the_loss(verdict: dict[str, Any]) -> dict[str, Any]:
    """The verdict as version 0.1 wrote it, with a margin of 1% of the loss."""
    late = ("margin_of", "gain", "gain_low", "gain_high", "gain_of", "margins", "guess", "diverged", "overfits")
    of_row = ("gain", "kept", "kept_low")
    comparison = [{key: row[key] for key in row if key not in of_row} for row in verdict["comparison"]]
    old = {key: value for key, value in verdict.items() if key not in late}
    return old | {"schema": 2, "margin": 0.01, "comparison": comparison}


def _has_reference(evidence: Evidence) -> bool:
    return bool(evidence.spec.reference_trials())


def _over_full(evidence: Evidence, eval_loss: float, one_seed: bool) -> dict[str, float | None]:
    """Beside the loss of `_reference` at its lowest rate."""
    if not _has_reference(evidence):
        return {}
    over = eval_loss - 1.2
    ends = {"over_full_low": None, "over_full_high": None}
    return {"over_full": over} | (ends if one_seed else {"over_full_low": over - 0.01, "over_full_high": over + 0.01})


def replace_trial(evidence: Evidence, index: int, **values: Any) -> Evidence:
    """Return the evidence with one trial's row changed."""
    results = evidence.results.copy()
    for column, value in values.items():
        results[column] = results[column].astype("object" if isinstance(value, str) else results[column].dtype)
        results.loc[index, column] = value
    return evidence._replace(results=results)
