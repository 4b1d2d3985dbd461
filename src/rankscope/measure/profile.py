"""The cost of one candidate, measured alone: to be called in a fresh process for each repeat."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.lora.base import load_model, resolve_device
from rankscope.measure.sampler import MemorySampler, peak_rss, reset_peak_rss
from rankscope.spec import Candidate, StudySpec, Trial
from rankscope.train.engine import EVAL_TOKENS
from rankscope.train.loop import choose_engine
from rankscope.train.pack import batch_at, eval_steps, make_member, total_steps, train_step


@dataclass(frozen=True)
class ProfileSummary:
    """One repeat. Memory is that of the training phase (after warm-up, without loading or evaluation).

    `rss_mean_bytes` is the mean of samples each 20 ms and at each step's end; `rss_peak_bytes` is the kernel's own
    high-water mark of that phase on Linux, the highest sample elsewhere.
    """

    load_seconds: float
    steps: int
    step_seconds_median: float
    step_seconds_mean: float
    tokens_per_second: float
    """Tokens trained over the time of the measured steps."""
    eval_seconds_per_token: float
    runtime_seconds: float
    """Of the whole schedule: time a token of the measured steps, times the schedule's tokens, and its evaluations."""
    rss_base_bytes: int
    """After loading the base model, before the adapter is added."""
    rss_mean_bytes: float
    rss_peak_bytes: int
    gpu_allocated_mean_bytes: float | None
    gpu_allocated_peak_bytes: int | None
    gpu_reserved_mean_bytes: float | None
    gpu_reserved_peak_bytes: int | None
    trainable_params: int


def profile_candidate(spec: StudySpec, candidate: Candidate, data: TokenizedData) -> dict[str, Any]:
    """Trains `candidate` on batches of the real schedule and measures; nothing of the training is kept.

    The measured steps are spread evenly over the schedule, so that their batches are like the schedule's.
    Returns {"summary": ProfileSummary, "step_seconds": [...], "step_tokens": [...], "samples": {column: [...]}}.
    """
    trial = Trial(candidate=candidate, seed=spec.seeds[0])
    training, measure = spec.training, spec.measure
    device = resolve_device(spec.model.device)
    with MemorySampler(device) as sampler:
        start = time.perf_counter()
        model = load_model(spec.model)
        load_seconds = time.perf_counter() - start
        sampler.take()
        base = sampler.rows[-1][3]
        steps = total_steps(training, len(data.train))
        member = make_member(model, trial, training, steps, spec.model.id)
        engine = choose_engine(model, [member], training).engine
        where = spread(steps, measure.warmup_steps + measure.steps)
        seconds, tokens, kernel_peak = [], [], False
        for number, step in enumerate(where):
            measured = number >= measure.warmup_steps
            if number == measure.warmup_steps:
                kernel_peak = reset_peak_rss()
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats(device)
            sampler.step, sampler.phase = number, "train" if measured else "warmup"
            start = time.perf_counter()
            (metrics,) = train_step(engine, [member], data.train, training, step)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if measured:
                seconds.append(time.perf_counter() - start)
                tokens.append(metrics.tokens)
            sampler.take()
        gpu_peaks, rss_peak = _gpu_peaks(device), peak_rss() if kernel_peak else 0
        sampler.phase = "eval"
        start = time.perf_counter()
        held_out = _first(data.eval, 2 * EVAL_TOKENS)
        engine.evaluate(held_out, [trial.name])
        eval_seconds_per_token = (time.perf_counter() - start) / int(held_out.offsets[-1])
    schedule_tokens = sum(int(data.train.lengths[batch_at(trial, data.train, training, s)].sum()) for s in range(steps))
    eval_tokens = int(data.eval.offsets[-1]) * (1 + len(eval_steps(training, steps)))
    columns = ("phase", "step", "seconds", "rss_bytes", "gpu_allocated_bytes", "gpu_reserved_bytes")
    samples = dict(zip(columns, map(list, zip(*sampler.rows, strict=True)), strict=True))
    during = [row for row in sampler.rows if row[0] == "train"]
    summary = ProfileSummary(
        load_seconds=load_seconds,
        steps=len(seconds),
        step_seconds_median=statistics.median(seconds),
        step_seconds_mean=statistics.fmean(seconds),
        tokens_per_second=sum(tokens) / sum(seconds),
        eval_seconds_per_token=eval_seconds_per_token,
        runtime_seconds=sum(seconds) / sum(tokens) * schedule_tokens + eval_seconds_per_token * eval_tokens,
        rss_base_bytes=base,
        rss_mean_bytes=statistics.fmean(row[3] for row in during),
        rss_peak_bytes=max(rss_peak, *(row[3] for row in during)),
        gpu_allocated_mean_bytes=_mean([row[4] for row in during]),
        gpu_allocated_peak_bytes=gpu_peaks[0],
        gpu_reserved_mean_bytes=_mean([row[5] for row in during]),
        gpu_reserved_peak_bytes=gpu_peaks[1],
        trainable_params=sum(parameter.numel() for parameter in member.parameters),
    )
    return {"summary": asdict(summary), "step_seconds": seconds, "step_tokens": tokens, "samples": samples}


def spread(steps: int, count: int) -> list[int]:
    """`count` steps spread evenly over a schedule of `steps`, repeating some where it is shorter."""
    return [i * steps // count for i in range(count)]


def _first(tokens: Tokens, count: int) -> Tokens:
    """The first examples, of about `count` tokens; at least one."""
    examples = max(1, int((tokens.offsets[1:] <= count).sum()))
    return Tokens.from_examples([tokens[number] for number in range(examples)])


def _gpu_peaks(device: torch.device) -> tuple[int | None, int | None]:
    if device.type != "cuda":
        return None, None
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


def _mean(values: Sequence[int | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present else None
