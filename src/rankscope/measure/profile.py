"""Cost of one candidate, measured alone, in a fresh process for each repeat."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.measure.sampler import MemorySampler, Sample
from rankscope.model.device import resolve_device, synchronize
from rankscope.model.load import load_model
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import EVAL_TOKENS
from rankscope.train.loop import choose_engine
from rankscope.train.step import (
    batch_at,
    eval_steps,
    evenly_spaced,
    make_train_state,
    save_trained_adapter,
    train_step,
)


def profile_candidate(spec: StudySpec, candidate: Candidate, data: TokenizedData) -> dict[str, Any]:
    """Train `candidate` on batches of the real schedule and measure its cost; the trained adapter is discarded.

    The measured steps are spread evenly over the schedule, so that their batches are like the schedule's.
    Returns {"summary": {column: number}, "step_seconds": [...], "step_tokens": [...], "samples": {column: [...]}}.

    The summary has `trainable_params`, and:

    - `load_seconds`, of loading the base model
    - `steps step_seconds_median step_seconds_mean step_seconds_p10 step_seconds_p90 tokens_per_second`, of the steps
      measured after warm-up
    - `warmup_seconds`, of the steps before those
    - `eval_seconds_per_token`; `runtime_seconds` of the whole schedule: its first steps as the warm-up took, the others
      by the time per token of the measured steps, and its evaluations
    - `joules_per_token`: energy of the GPU over the measured steps; None where NVML does not count it
    - `rss_base_bytes`: resident memory after loading the base model, before adding the adapter
    - `rss_mean_bytes rss_peak_bytes rss_p99_bytes` of training (after warm-up, without loading or evaluation); the same
      of `gpu_allocated`, `gpu_reserved` and `gpu_nvml`; of loading and evaluation with prefixes `load_` and `eval_`;
      and `rss_above_base_mean_bytes` and so on: see `summarise_memory`
    - `adapter_bytes`: size of the saved weights
    """
    trial = Trial(candidate=candidate, seed=spec.seeds[0])
    training, measure = spec.training, spec.measure
    device = resolve_device(spec.model.device)
    with MemorySampler(device) as sampler:
        start = time.perf_counter()
        model = load_model(spec.model)
        load_seconds = time.perf_counter() - start
        for weight in model.parameters():
            weight.sum()  # weights of a mapped file enter memory when they are read
        base = sampler.take().rss_bytes
        sampler.begin("warmup")
        steps = total_steps(training, len(data.train))
        member = make_train_state(model, trial, training, steps, spec.model.id)
        engine = choose_engine(model, [member], training).engine
        seconds: list[float] = []
        tokens: list[int] = []
        energy_before = None
        for number, step in enumerate(evenly_spaced(steps, measure.warmup_steps + measure.steps)):
            if number == measure.warmup_steps:
                sampler.begin("train")
                energy_before = _energy(sampler)
            sampler.step = number
            start = time.perf_counter()
            (metrics,) = train_step(engine, [member], data.train, training, step)
            synchronize(device)
            seconds.append(time.perf_counter() - start)
            tokens.append(metrics.tokens)
            sampler.take()
        energy_after = _energy(sampler)
        sampler.begin("eval")
        start = time.perf_counter()
        held_out = _first(data.eval, 2 * EVAL_TOKENS)
        engine.evaluate(held_out, [trial.name])
        eval_seconds_per_token = (time.perf_counter() - start) / int(held_out.offsets[-1])
    warmup_seconds, warmup_tokens = sum(seconds[: measure.warmup_steps]), sum(tokens[: measure.warmup_steps])
    seconds, tokens = seconds[measure.warmup_steps :], tokens[measure.warmup_steps :]
    schedule_tokens = sum(int(data.train.lengths[batch_at(trial, data.train, training, s)].sum()) for s in range(steps))
    eval_tokens = int(data.eval.offsets[-1]) * (1 + len(eval_steps(training, steps)))
    joules = None if energy_before is None or energy_after is None else energy_after - energy_before
    with tempfile.TemporaryDirectory() as folder:
        adapter_bytes = save_trained_adapter(member, Path(folder))
    summary = {
        "load_seconds": load_seconds,
        **summarise_steps(seconds, tokens),
        "warmup_seconds": warmup_seconds,
        "eval_seconds_per_token": eval_seconds_per_token,
        "runtime_seconds": warmup_seconds
        + sum(seconds) / sum(tokens) * max(0, schedule_tokens - warmup_tokens)
        + eval_seconds_per_token * eval_tokens,
        "joules_per_token": None if joules is None else joules / sum(tokens),
        "rss_base_bytes": base,
        **summarise_memory(sampler.rows, sampler.peaks, base),
        "trainable_params": sum(parameter.numel() for parameter in member.parameters),
        "adapter_bytes": adapter_bytes,
    }
    samples = dict(zip(Sample._fields, map(list, zip(*sampler.rows, strict=True)), strict=True))
    return {"summary": summary, "step_seconds": seconds, "step_tokens": tokens, "samples": samples}


def _first(tokens: Tokens, count: int) -> Tokens:
    """First examples with at most `count` tokens together, at least one."""
    examples = max(1, int((tokens.offsets[1:] <= count).sum()))
    return Tokens.from_examples([tokens[number] for number in range(examples)])


def _energy(sampler: MemorySampler) -> float | None:
    return sampler.nvml.energy_joules() if sampler.nvml else None


MEMORY = ("rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")  # kinds of memory in a `Sample`
PHASES = {"load": "load_", "train": "", "eval": "eval_"}  # phases with a summary, and the prefixes of their columns


def summarise_memory(
    samples: Sequence[Sample], peaks: Mapping[str, Mapping[str, int]], base_bytes: int
) -> dict[str, float | None]:
    """Memory of each phase in bytes, such as `rss_mean_bytes` or `load_gpu_nvml_peak_bytes`; None if not sampled.

    For each phase and kind of memory: mean and 99th percentile of the samples, taken every 20 ms and at the end of each
    step, and the peak. The peak is as counted by the kernel or the allocator (`peaks`), which sampling could miss, or
    else the highest sample. `rss_above_base_*` is training's resident memory less `base_bytes`, that of the process
    with the base model loaded.
    """
    columns: dict[str, float | None] = {}
    for phase, prefix in PHASES.items():
        during = [sample for sample in samples if sample.phase == phase]
        for kind in MEMORY:
            sampled = [getattr(sample, f"{kind}_bytes") for sample in during]
            values = [value for value in sampled if value is not None]
            counted = [peaks[phase][kind]] if kind in peaks[phase] else []
            columns[f"{prefix}{kind}_mean_bytes"] = statistics.fmean(values) if values else None
            columns[f"{prefix}{kind}_peak_bytes"] = max([*values, *counted]) if values else None
            columns[f"{prefix}{kind}_p99_bytes"] = float(np.percentile(values, 99)) if values else None
    for statistic in ("mean", "peak", "p99"):
        value = columns[f"rss_{statistic}_bytes"]
        columns[f"rss_above_base_{statistic}_bytes"] = None if value is None else value - base_bytes
    return columns


def summarise_steps(seconds: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Summary of the measured steps: `steps`, seconds per step (median, mean, 10th and 90th percentile), tokens/s."""
    low, median, high = np.percentile(seconds, (10, 50, 90))
    return {
        "steps": len(seconds),
        "step_seconds_median": float(median),
        "step_seconds_mean": statistics.fmean(seconds),
        "step_seconds_p10": float(low),
        "step_seconds_p90": float(high),
        "tokens_per_second": sum(tokens) / sum(seconds),
    }
