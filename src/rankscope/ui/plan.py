"""`rankscope plan`: the packs that would run, their memory and time, and what fits. Trains and writes nothing."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import typer
from rich.table import Table

from rankscope.data.doubts import data_warnings
from rankscope.errors import StudyError
from rankscope.jobs.launchers import make_launcher
from rankscope.plan.checks import too_large
from rankscope.plan.costs import CostModel
from rankscope.plan.memory import MAX_PACK_MEMORY_FRACTION
from rankscope.plan.plan import Plan, imagined_gpu, make_fleet, make_plan
from rankscope.plan.runtime import COUNTED, NOT_COUNTED, StudyForecast, shorter, study_seconds
from rankscope.spec.models import StudySpec
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import is_finished, unevaluated
from rankscope.study.study import Study
from rankscope.text.catalogue import load
from rankscope.text.coverage import coverage_sentences
from rankscope.text.formats import about, duration, parse_bytes, parse_flops, percent, size
from rankscope.train.prepare import describe_data, study_data
from rankscope.ui.console import error_console, make_table, out_console, print_json
from rankscope.ui.progress import Display
from rankscope.ui.rows import describe_rows, show_rows

Number = TypeVar("Number", int, float)


def plan_study(
    spec: StudySpec,
    study: Study | None,
    launcher: str = "local",
    ray_address: str | None = None,
    gpu_memory: str | None = None,
    gpu_flops: str | None = None,
    devices: int | None = None,
    price: float | None = None,
    remeasure: bool = False,
) -> Plan:
    """Return the plan that a run would execute, or would on a GPU that need not exist. Raises StudyError, DataError,
    ModelError: as a run would; and where an option is no size, rate, number or price."""
    gpu = parse_gpu(gpu_memory, gpu_flops)
    if gpu is not None:
        site, slots, study = imagined_gpu(spec.model, gpu.memory_bytes), 1, None
    else:
        with make_launcher(launcher, spec.model, ray_address, error_console.print) as launching:
            site, slots = launching.site(), launching.slots()
    fleet = make_fleet(devices, price, slots)
    rate = gpu.flops_per_second if gpu else None
    return make_plan(spec, study_data(spec, study), site, fleet, study, rate, remeasure)


def show_plan(plan: Plan, study: StudyFolder | None, as_json: bool, rows: int = 0) -> None:
    """Print the plan with the first `rows` to train on, and what a `study` that has begun has already."""
    if as_json:
        print_json(describe_plan(plan) | ({"rows": describe_rows(plan, rows)} if rows else {}))
    else:
        _print_plan(plan, rows, study is not None)
    if study is not None:
        done, stale = sum(is_finished(study, trial) for trial in study.trials), len(unevaluated(study))
        (error_console if as_json else out_console).print(
            f"{study.path} has {done} of the {len(study.trials)} trials; {len(plan.profiles)} repeats of profiles and "
            f"{len(plan.reference)} trials of full fine-tuning are missing too. A run would do what is missing."
            + (f" {stale} trials would be evaluated on the rows that are added." if stale else "")
            + (f" {plan.unmeasured}" if plan.unmeasured else ""),
            soft_wrap=True,
        )


def _print_plan(plan: Plan, rows: int, begun: bool) -> None:
    out_console.print(f"Model {plan.spec.model.id}: {plan.prediction.base_params:,} parameters")
    out_console.print(describe_data(plan.data.facts), soft_wrap=True)
    for sentence in coverage_of(plan):
        out_console.print(sentence, soft_wrap=True)
    if rows:
        show_rows(plan, rows)
    out_console.print(_candidates(plan))
    trials, full = sum(map(len, plan.packs.values())), len(plan.reference)
    packs = f"{trials} trials of {plan.steps:,} steps in {len(plan.packs)} packs:" if trials else "No trial is missing."
    lines = [*_notes(plan), packs, *_packs(plan)]
    if full:
        lines.append(f"{full} trials of full fine-tuning, each alone: their memory and time are not predicted.")
    lines.append(f"On the disk: at most about {size(plan.disk_bytes)}.")
    for line in [*lines, *([] if begun else shorter_lines(plan))]:
        out_console.print(line, soft_wrap=True)


def shorter_lines(plan: Plan) -> list[str]:
    """What makes the study shorter, with its time on one device by the same forecast."""
    times = shorter(plan.spec, plan.steps, plan.forecast.candidates)
    lines = [f"  {option}: about {about(seconds, load('en'))}" for option, seconds in times.items()]
    quick = "  --quick: a first look, at most 3 ranks, 2 seeds, 200 steps and 2,000 rows"
    return ["Shorter, on one device by the same forecast:", *lines, quick] if lines else []


LONG_SECONDS = 2 * 3600  # a run of more says so first, and asks


def approve(progress: Display, plan: Plan) -> None:
    """Say that a study takes hours, and what makes it shorter; in a terminal, ask. Raises typer.Exit: no."""
    fleet, alone = plan.fleet_estimate, study_seconds(plan.spec, plan.forecast.candidates)
    seconds = fleet.makespan_seconds if fleet else sum(alone or ())
    if seconds <= LONG_SECONDS:
        return
    hours = "  --hours 2: starts nothing that would end later, and concludes from what it has"
    for line in [f"This will take about {about(seconds, load('en'))}.", *shorter_lines(plan), hours]:
        progress.say(line)
    if not progress.ask("Start?"):
        raise typer.Exit(130)


def coverage_of(plan: Plan) -> list[str]:
    """Sentences about what the adapters reach."""
    found = plan.prediction.coverage
    return coverage_sentences(found and found._asdict(), plan.spec.ranks, load("en"))


def describe_plan(plan: Plan) -> dict[str, Any]:
    """Return the plan as data, for `--json`: bytes, seconds, tokens."""
    seconds = study_seconds(plan.spec, plan.forecast.candidates)
    return {
        "model": {"id": plan.spec.model.id, "parameters": plan.prediction.base_params},
        "data": plan.data.facts,
        "warnings": data_warnings(plan.data.facts, load("en")),
        "prediction": plan.forecast.describe(plan.prediction),
        "steps": plan.steps,
        "packs": {pack: [trial.name for trial in trials] for pack, trials in plan.packs.items()},
        "profiles": [job.profile for job in plan.profiles],
        "unmeasured": plan.unmeasured,
        "reference": [trial.name for trial in plan.reference],
        "free_bytes": plan.site.free_bytes,
        "largest_rank_that_fits": plan.largest_rank,
        "disk_bytes": plan.disk_bytes,
        "shorter": shorter(plan.spec, plan.steps, plan.forecast.candidates),
        "seconds": seconds._asdict() if seconds else None,
        "fleet": found.describe() if (found := plan.fleet_estimate) else None,
    }


class Gpu(NamedTuple):
    memory_bytes: int
    flops_per_second: float | None  # rate of plain matrix products


def parse_gpu(memory: str | None, flops: str | None) -> Gpu | None:
    """Return the GPU of `--gpu-memory 24GB` and `--gpu-flops 400TFLOPS`; None where neither is given. Raises
    StudyError: one of the two is no size or no rate, or the memory is missing."""
    size_bytes = _parsed("--gpu-memory", memory, parse_bytes, "24GB")
    rate = _parsed("--gpu-flops", flops, parse_flops, "400TFLOPS")
    if rate and not size_bytes:
        raise StudyError("--gpu-flops without --gpu-memory", "Describe the GPU by both: --gpu-memory 80GB.")
    return Gpu(size_bytes, rate) if size_bytes else None


def _parsed(option: str, text: str | None, parse: Callable[[str], Number], example: str) -> Number | None:
    try:
        return None if text is None else parse(text)
    except ValueError as error:
        raise StudyError(f"{option} {text}: {error}", f"For example {option} {example}.") from None


def _candidates(plan: Plan) -> Table:
    names = ["candidate", "scaling", "trainable", "base", "adapter", "activations", "logits", "other", "total", "fits"]
    rows, room = [], plan.site.free_bytes * MAX_PACK_MEMORY_FRACTION
    for candidate in plan.spec.candidates():
        row = plan.forecast.candidates[candidate.name]
        memory, times = ["–"] * 7, ["–"] * 2
        if row.parts and row.peak_bytes:
            parts = row.parts
            adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
            other = parts["process"] + parts["retained"]
            columns = (parts["base"], adapter, parts["activations"], parts["logits"], other, row.peak_bytes)
            memory = [*map(size, columns), "yes" if row.peak_bytes <= room else "no"]
        if row.step_seconds is not None and row.runtime_seconds is not None:
            times = [f"{row.step_seconds:.2g}", duration(row.runtime_seconds, load("en"))]
        rows.append([candidate.name, f"{candidate.scaling:.3g}", f"{row.trainable_params:,}", *memory, *times])
    return make_table([*names, "s/step", "runtime"], rows, no_wrap=True)


def _notes(plan: Plan) -> list[str]:
    """Lines below the table: the meaning of its columns, the largest rank that fits, and the time of the study."""
    spec, prediction, found, free = plan.spec, plan.prediction, plan.forecast, plan.site.free_bytes
    hypothetical = plan.hypothetical
    kind = str(prediction.dtype).removeprefix("torch.")
    where = f"a GPU with {size(free)}" if hypothetical else f"the {size(free)} that are free here"
    tokens = max((row.forward_tokens or 0 for row in found.candidates.values()), default=0)
    forwards = f"{prediction.device}, {kind}" + (f", forwards of up to {tokens:,} tokens" if tokens else "")
    notes = [
        f"Memory: predicted peak of each candidate trained alone ({forwards}).",
        "  adapter: with gradients and optimizer. other: the process, and what the allocator keeps of freed tensors.",
        f"  fits: within {percent(MAX_PACK_MEMORY_FRACTION)} of {where}.",
    ]
    if prediction.engine_reason:
        notes.append(f"  By PEFT's own forward, since this model cannot be packed: {prediction.engine_reason}.")
    if found.reason:
        notes.append(f"  Not all of it can be predicted: {found.reason}")
    notes += [*_checkpointing(found), *(too_large(spec.model, prediction, free) or ())]
    if plan.largest_rank is not None:
        notes.append(_largest(spec, prediction, plan.largest_rank))
    seconds = study_seconds(spec, found.candidates)
    if seconds is None:
        known = " --gpu-flops says what it reaches." if hypothetical else ""
        return [*notes, f"Time: not predicted, since this device's speed is not known here.{known}"]
    trials, profiles, others = (duration(part, load("en")) for part in seconds)
    timed, rate = "Time: about; a few layers with random weights are timed here.", found.product_flops_per_second
    if rate is not None:
        timed = (
            f"Time: about; FLOPs at {found.product_share:.0%} of plain matrix products ({rate / 1e9:,.0f} GFLOP/s as "
            "given), a share that was measured on a CPU and never on a GPU: this can be far off."
        )
    return [
        *notes,
        timed,
        f"The whole study: about {duration(sum(seconds), load('en'))} on one device: trials {trials}, profiles "
        f"{profiles}, the rest {others}.",
        *_fleet(plan),
    ]


def _checkpointing(found: StudyForecast) -> list[str]:
    """Which candidates have sequences that are longer than a forward may be."""
    longest = {name: row.recomputed_tokens for name, row in found.candidates.items() if row.recomputed_tokens}
    if not longest:
        return []
    names = "all candidates" if len(longest) == len(found.candidates) else ", ".join(longest)
    return [
        f"  Gradient checkpointing: {names}. Sequences that are longer than a forward may be here, the longest of "
        f"{max(longest.values()):,} tokens, keep their layers' inputs only, and run each layer again in the backward."
    ]


def _fleet(plan: Plan) -> list[str]:
    found, text = plan.fleet_estimate, load("en")
    if found is None:
        return []
    devices, price = found.fleet
    several = "s" * (devices > 1)
    kind = f"GPU{several} of {size(plan.site.free_bytes)}" if plan.hypothetical else f"device{several} like this one"
    trials, least = duration(found.trials_seconds, text), duration(found.least_trials_seconds, text)
    cost = "" if found.cost is None else f" Cost: {found.cost:,.2f}, at {price:,.2f} a device hour."
    return [
        f"On {devices:,} {kind}: about {duration(found.makespan_seconds, text)}: trials {trials} (no order of these "
        f"packs is shorter than {least}), then profiles {duration(found.profiles_seconds, text)}.",
        f"  {found.device_hours:,.3g} device hours from beginning to end, {found.busy_seconds / 3600:,.3g} of them "
        f"busy.{cost}",
        f"  Counted: {COUNTED}.",
        f"  Not counted: {NOT_COUNTED}.",
    ]


def _largest(spec: StudySpec, prediction: CostModel, rank: int) -> str:
    modules = spec.adapter.target_modules
    on = modules if isinstance(modules, str) else ", ".join(modules)
    if rank == 0:
        return f"Largest rank that fits: none, on {on}."
    if rank == prediction.full_rank:
        return f"Largest rank that fits: {rank:,} on {on}, the full rank of its layers: more would add nothing."
    return f"Largest rank that fits: {rank:,} on {on} (as a power of two: {1 << (rank.bit_length() - 1):,})."


def _packs(plan: Plan) -> list[str]:
    free, lines = plan.site.free_bytes, []
    for pack, trials in plan.packs.items():
        total = plan.memory.peak_bytes(trials)
        fits = "" if total <= free else f", more than the {size(free)} there are"
        lines.append(f"  {pack}  {', '.join(trial.name for trial in trials)}: about {size(total)}{fits}")
    return lines
