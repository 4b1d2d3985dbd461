"""Memory of one candidate, measured alone, in a fresh process for each repeat."""

import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.measure.sampler import MemorySampler, Sample
from rankscope.measure.timing import first_examples
from rankscope.model.device import resolve_device, synchronize
from rankscope.model.load import load_model
from rankscope.spec.candidates import Candidate, Trial
from rankscope.spec.models import StudySpec
from rankscope.train.engine import EVAL_TOKENS
from rankscope.train.loop import choose_engine
from rankscope.train.step import evenly_spaced, make_train_state, save_trained_adapter, train_step


def profile_candidate(spec: StudySpec, candidate: Candidate, data: TokenizedData) -> dict[str, Any]:
    """Train `candidate` on batches of the real schedule and measure its memory; the trained adapter is discarded.

    The measured steps are spread evenly over the schedule, so that their batches are like the schedule's.
    Returns {"summary": {column: number}, "samples": {column: [...]}}. The summary has `trainable_params steps
    load_seconds`, the columns of `summarise_memory`, and:

    - `joules_per_token`: energy of the GPU over the measured steps; None where NVML does not count it
    - `rss_base_bytes private_base_bytes`: memory with the base model loaded, before adding the adapter
    - `gpu_context_bytes`: memory of the GPU that torch's allocator does not count, CUDA's context most of all; None
      where NVML is silent
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
        base = sampler.take()
        sampler.begin("warmup")
        steps = total_steps(training, len(data.train))
        member = make_train_state(model, trial, training, steps)
        engine = choose_engine(model, [member], training).engine
        tokens, energy_before = 0, None
        energy = sampler.nvml.energy_joules if sampler.nvml else lambda: None
        for number, step in enumerate(evenly_spaced(steps, measure.warmup_steps + measure.steps)):
            if number == measure.warmup_steps:
                sampler.begin("train")
                tokens, energy_before = 0, energy()
            sampler.step = number
            (metrics,) = train_step(engine, [member], data.train, training, step)
            synchronize(device)
            tokens += metrics.tokens
            sampler.take()
        joules, last = _less(energy(), energy_before), sampler.take()
        sampler.begin("eval")
        engine.evaluate(first_examples(data.eval, 2 * EVAL_TOKENS), [trial.name])
    with tempfile.TemporaryDirectory() as folder:
        adapter_bytes = save_trained_adapter(member, Path(folder))
    context = _less(last.gpu_nvml_bytes, last.gpu_reserved_bytes)
    summary = {
        "load_seconds": load_seconds,
        "steps": measure.steps,
        "joules_per_token": None if joules is None else joules / tokens,
        "rss_base_bytes": base.rss_bytes,
        "private_base_bytes": base.private_bytes,
        **summarise_memory(sampler.rows, sampler.peaks, base.private_bytes),
        "gpu_context_bytes": None if context is None else max(0, context),
        "trainable_params": sum(parameter.numel() for parameter in member.parameters),
        "adapter_bytes": adapter_bytes,
    }
    samples = dict(zip(Sample._fields, map(list, zip(*sampler.rows, strict=True)), strict=True))
    return {"summary": summary, "samples": samples}


MEMORY = ("private", "mapped", "rss", "gpu_allocated", "gpu_reserved", "gpu_nvml")  # kinds of memory in a `Sample`
PHASES = {"load": "load_", "train": "", "eval": "eval_"}  # phases with a summary, and the prefixes of their columns


def summarise_memory(
    samples: Sequence[Sample], peaks: Mapping[str, Mapping[str, int]], base_bytes: int | None
) -> dict[str, float | None]:
    """Memory of each phase in bytes, such as `private_mean_bytes` or `load_gpu_nvml_peak_bytes`; None if not sampled.

    For each phase and kind of memory: mean and 99th percentile of the samples, taken every 20 ms and at the end of each
    step, and the peak. The peak is as counted by the kernel or the allocator (`peaks`), which sampling could miss, or
    else the highest sample. `private_above_base_*` is training's private memory less `base_bytes`, that of the process
    with the base model loaded. What is resident is private or mapped from a file: see `Resident`.
    """
    columns: dict[str, float | None] = {}
    for (phase, prefix), kind in product(PHASES.items(), MEMORY):
        sampled = [getattr(sample, f"{kind}_bytes") for sample in samples if sample.phase == phase]
        values = [value for value in sampled if value is not None]
        counted = [peaks[phase][kind]] if kind in peaks[phase] else []
        columns[f"{prefix}{kind}_mean_bytes"] = statistics.fmean(values) if values else None
        columns[f"{prefix}{kind}_peak_bytes"] = max([*values, *counted]) if values else None
        columns[f"{prefix}{kind}_p99_bytes"] = float(np.percentile(values, 99)) if values else None
    for statistic in ("mean", "peak", "p99"):
        columns[f"private_above_base_{statistic}_bytes"] = _less(columns[f"private_{statistic}_bytes"], base_bytes)
    return columns


def _less(value: float | None, other: float | None) -> float | None:
    """Their difference; None where one is unknown."""
    return None if value is None or other is None else value - other
