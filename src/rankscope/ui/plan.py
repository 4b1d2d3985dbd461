"""`rankscope plan`: the packs that would run, their memory and time, and what fits. Trains and writes nothing."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import typer
from rich.table import Table

from rankscope.data.doubts import data_warnings
from rankscope.errors import StudyError
from rankscope.jobs import task
from rankscope.jobs.launchers import make_launcher
from rankscope.plan.checks import too_large
from rankscope.plan.memory import MAX_PACK_MEMORY_FRACTION
from rankscope.plan.plan import Plan, imagined_gpu, make_fleet, make_plan
from rankscope.plan.runtime import COUNTED, NOT_COUNTED, FleetEstimate, shorter
from rankscope.spec.models import StudySpec
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import is_finished, unevaluated
from rankscope.study.scores import unscored
from rankscope.text.catalogue import Catalogue, load
from rankscope.text.coverage import coverage_sentences
from rankscope.text.formats import about, duration, durations, parse_bytes, parse_flops, percent, size
from rankscope.train.prepare import describe_data, study_data
from rankscope.ui.console import error_console, has_room, make_table, out_console, print_json, show
from rankscope.ui.progress import Display
from rankscope.ui.rows import describe_rows, row_lines

TEXT = load("en")


def plan_study(
    spec: StudySpec,
    study: StudyFolder | None,
    launcher: str = "local",
    ray_address: str | None = None,
    gpu_memory: str | None = None,
    gpu_flops: str | None = None,
    devices: int | None = None,
    price: float | None = None,
    remeasure: bool | None = False,
) -> Plan:
    """The plan that a run would execute, or would on a GPU that need not exist. Raises StudyError, DataError,
    ModelError: as a run would; and where an option is no size, rate, number or price."""
    gpu = parse_gpu(gpu_memory, gpu_flops)
    task.check(spec.measure.task)
    if gpu is not None:
        site, slots, study = imagined_gpu(spec.model, gpu.memory_bytes), 1, None
    else:
        with make_launcher(launcher, spec.model, ray_address, error_console.print) as launching:
            site, slots = launching.site(), launching.slots()
    fleet, rate = make_fleet(devices, price, slots), gpu.flops_per_second if gpu else None
    data = study_data(spec, study)
    task.scorable(spec, data, study)
    return make_plan(spec, data, site, fleet, study, rate, bool(remeasure))


def show_plan(
    spec: StudySpec, study: StudyFolder | None, as_json: bool, show_rows: int | None = 0, **options: Any
) -> None:
    """Print the plan (`plan_study`) with the first rows to train on, and what a `study` that has begun has already."""
    plan = plan_study(spec, study, **options)
    rows = describe_rows(plan, show_rows) if show_rows else []
    if as_json:
        print_json(describe_plan(plan) | ({"rows": rows} if rows else {}))
    else:
        about_data = [describe_data(plan.data.facts), *coverage_of(plan), *row_lines(rows)]
        show(f"Model {plan.spec.model.id}: {plan.prediction.base_params:,} parameters", *about_data)
        show(*_candidates(plan), *_memory(plan), *_time(plan), *_work(plan))
        show(*(shorter_lines(plan) if study is None else ()))
    if study is not None:
        show(_begun(study, plan), console=error_console if as_json else out_console)


def _begun(study: StudyFolder, plan: Plan) -> str:
    done, stale = sum(is_finished(study, trial) for trial in study.trials), len(unevaluated(study))
    said = (
        f"{study.path} has {done} of the {len(study.trials)} trials; {len(plan.profiles)} repeats of profiles and "
        f"{len(plan.reference)} trials of full fine-tuning are missing too. A run would do what is missing."
    )
    added = f"{stale} trials would be evaluated on the rows that are added." if stale else None
    models = len(unscored(study))
    scored = f"{models} finished models, the untrained one counted, would be scored on the task." if models else None
    return " ".join(filter(None, [said, added, scored, plan.unmeasured]))


def shorter_lines(plan: Plan, text: Catalogue = TEXT) -> list[str]:
    """What makes the study shorter, with its time on one device by the same forecast."""
    times = shorter(plan.spec, plan.steps, plan.forecast.candidates, plan.data.facts)
    lines = [text("shorter.option", option=option, time=about(seconds, text)) for option, seconds in times.items()]
    return [text("shorter.title"), *lines, text("shorter.quick")] if lines else []


LONG_SECONDS = 2 * 3600  # a run of more says so first, and asks


def approve(progress: Display, plan: Plan, text: Catalogue = TEXT) -> None:
    """Say that a study takes hours, and what makes it shorter; in a terminal, ask. Raises typer.Exit: no."""
    fleet, alone = plan.fleet_estimate, plan.whole_seconds
    seconds = fleet.makespan_seconds if fleet else sum(alone or ())
    if seconds <= LONG_SECONDS:
        return
    takes = text("shorter.takes", time=about(seconds, text))
    for line in [takes, *shorter_lines(plan, text), text("shorter.hours")]:
        progress.say(line)
    if not progress.ask(text("shorter.start")):
        raise typer.Exit(130)


def coverage_of(plan: Plan) -> list[str]:
    """Sentences about what the adapters reach."""
    found = plan.prediction.coverage
    return coverage_sentences(found and found._asdict(), plan.spec.ranks, TEXT)


def describe_plan(plan: Plan) -> dict[str, Any]:
    """The plan as data, for `--json`: bytes, seconds, tokens."""
    seconds, fleet = plan.whole_seconds, plan.fleet_estimate
    return {
        "model": {"id": plan.spec.model.id, "parameters": plan.prediction.base_params},
        "data": plan.data.facts,
        "warnings": data_warnings(plan.data.facts, TEXT),
        "prediction": plan.forecast.describe(plan.prediction),
        "steps": plan.steps,
        "packs": {pack: [trial.name for trial in trials] for pack, trials in plan.packs.items()},
        "profiles": [job.profile for job in plan.profiles],
        "unmeasured": plan.unmeasured,
        "reference": [trial.name for trial in plan.reference],
        "free_bytes": plan.site.free_bytes,
        "largest_rank_that_fits": plan.largest_rank,
        "disk_bytes": plan.disk_bytes,
        "shorter": shorter(plan.spec, plan.steps, plan.forecast.candidates, plan.data.facts),
        "seconds": seconds._asdict() if seconds else None,
        "fleet": fleet.describe() if fleet else None,
    }


class Gpu(NamedTuple):
    memory_bytes: int
    flops_per_second: float | None  # rate of plain matrix products


def parse_gpu(memory: str | None, flops: str | None) -> Gpu | None:
    """The GPU of `--gpu-memory 24GB` and `--gpu-flops 400TFLOPS`; None where neither is given. Raises StudyError: one
    of the two is no size or no rate, or the memory is missing."""
    try:
        size_bytes = None if memory is None else parse_bytes(memory)
    except ValueError as error:
        raise StudyError(f"--gpu-memory {memory}: {error}", "For example --gpu-memory 24GB.") from None
    try:
        rate = None if flops is None else parse_flops(flops)
    except ValueError as error:
        raise StudyError(f"--gpu-flops {flops}: {error}", "For example --gpu-flops 400TFLOPS.") from None
    if rate and not size_bytes:
        raise StudyError("--gpu-flops without --gpu-memory", "Describe the GPU by both: --gpu-memory 80GB.")
    return Gpu(size_bytes, rate) if size_bytes else None


def _candidates(plan: Plan) -> Iterator[Table]:
    """Memory by part, and time, of each candidate alone: a table for each where the terminal is narrow."""
    names = ["candidate", "scaling", "trainable", "base", "adapter", "activations", "logits", "other", "total", "fits"]
    rows, room = [], plan.site.free_bytes * MAX_PACK_MEMORY_FRACTION
    time = durations((row.runtime_seconds for row in plan.forecast.candidates.values()), TEXT)
    for candidate in plan.spec.candidates():
        row = plan.forecast.candidates[candidate.name]
        memory, times = ["–"] * 7, ["–"] * 2
        if (parts := row.parts) and row.peak_bytes:
            adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
            other = parts["process"] + parts["retained"]
            columns = (parts["base"], adapter, parts["activations"], parts["logits"], other, row.peak_bytes)
            memory = [*map(size, columns), "yes" if row.peak_bytes <= room else "no"]
        if row.step_seconds is not None and row.runtime_seconds is not None:
            times = [f"{row.step_seconds:.2g}", time(row.runtime_seconds)]
        rows.append([candidate.name, f"{candidate.scaling:.3g}", f"{row.trainable_params:,}", *memory, *times])
    headers = [*names, "s/step", "runtime"]
    shown: list[Sequence[int]] = (
        [range(len(headers))] if has_room(headers, rows) else [(0, *range(3, 10)), (0, 1, 2, 10, 11)]
    )
    for part in shown:
        yield make_table([headers[column] for column in part], [[row[column] for column in part] for row in rows])


def _memory(plan: Plan) -> Iterator[str]:
    """The meaning of the table's columns, and the largest rank that fits."""
    prediction, found, free = plan.prediction, plan.forecast.candidates, plan.site.free_bytes
    where = f"a GPU with {size(free)}" if plan.hypothetical else f"the {size(free)} that are free here"
    tokens = max((row.forward_tokens or 0 for row in found.values()), default=0)
    forwards = f", forwards of up to {tokens:,} tokens" if tokens else ""
    kind = f"{prediction.device}, {str(prediction.dtype).removeprefix('torch.')}{forwards}"
    yield f"Memory: predicted peak of each candidate trained alone ({kind})."
    yield "  adapter: with gradients and optimizer. other: the process, and what the allocator keeps of freed tensors."
    yield f"  fits: within {percent(MAX_PACK_MEMORY_FRACTION)} of {where}."
    if prediction.engine_reason:
        yield f"  By PEFT's own forward, since this model cannot be packed: {prediction.engine_reason}."
    if plan.forecast.reason:
        yield f"  Not all of it can be predicted: {plan.forecast.reason}"
    if longest := {name: row.recomputed_tokens for name, row in found.items() if row.recomputed_tokens}:
        names = "all candidates" if len(longest) == len(found) else ", ".join(longest)
        yield (
            f"  Gradient checkpointing: {names}. Sequences that are longer than a forward may be here, the longest of "
            f"{max(longest.values()):,} tokens, keep their layers' inputs only, and run each layer again in the "
            "backward."
        )
    yield from too_large(plan.spec.model, prediction, free) or ()
    if (rank := plan.largest_rank) is not None:
        modules = plan.spec.adapter.target_modules
        on = f"on {modules if isinstance(modules, str) else ', '.join(modules)}"
        largest = f"{rank:,} {on} (as a power of two: {1 << (max(rank, 1).bit_length() - 1):,})"
        if rank == prediction.full_rank:
            largest = f"{rank:,} {on}, the full rank of its layers: more would add nothing"
        yield f"Largest rank that fits: {largest if rank else f'none, {on}'}."


def _time(plan: Plan) -> Iterator[str]:
    """Time of the study, on one device and on a fleet."""
    found = plan.forecast
    seconds, rate = plan.whole_seconds, found.product_flops_per_second
    if seconds is None:
        known = " --gpu-flops says what it reaches." if plan.hypothetical else ""
        yield f"Time: not predicted, since this device's speed is not known here.{known}"
        return
    if rate is None:
        yield "Time: about; a few layers with random weights are timed here."
    else:
        yield (
            f"Time: about; FLOPs at {found.product_share:.0%} of plain matrix products ({rate / 1e9:,.0f} GFLOP/s as "
            "given), a share that was measured on a CPU and never on a GPU: this can be far off."
        )
    trials, profiles, others = (duration(part, TEXT) for part in seconds)
    yield (
        f"The whole study: about {duration(sum(seconds), TEXT)} on one device: trials {trials}, profiles "
        f"{profiles}, the rest {others}."
    )
    if fleet := plan.fleet_estimate:
        yield from _fleet(plan, fleet)


def _fleet(plan: Plan, found: FleetEstimate) -> Iterator[str]:
    devices, price = found.fleet
    several = "s" * (devices > 1)
    kind = f"GPU{several} of {size(plan.site.free_bytes)}" if plan.hypothetical else f"device{several} like this one"
    whole, trials, least, profiles = (
        duration(part, TEXT)
        for part in (found.makespan_seconds, found.trials_seconds, found.least_trials_seconds, found.profiles_seconds)
    )
    cost = "" if found.cost is None else f" Cost: {found.cost:,.2f}, at {price:,.2f} a device hour."
    yield (
        f"On {devices:,} {kind}: about {whole}: trials {trials} (no order of these packs is shorter than {least}), "
        f"then profiles {profiles}."
    )
    yield (
        f"  {found.device_hours:,.3g} device hours from beginning to end, {found.busy_seconds / 3600:,.3g} of them "
        f"busy.{cost}"
    )
    yield f"  Counted: {COUNTED}."
    yield f"  Not counted: {NOT_COUNTED}."


def _work(plan: Plan) -> Iterator[str]:
    """Packs with their memory, full fine-tuning, and room on the disk."""
    trials, free = sum(map(len, plan.packs.values())), plan.site.free_bytes
    yield f"{trials} trials of {plan.steps:,} steps in {len(plan.packs)} packs:" if trials else "No trial is missing."
    for pack, members in plan.packs.items():
        total = plan.memory.peak_bytes(members)
        fits = "" if total <= free else f", more than the {size(free)} there are"
        yield f"  {pack}  {', '.join(trial.name for trial in members)}: about {size(total)}{fits}"
    if full := len(plan.reference):
        yield f"{full} trials of full fine-tuning, each alone: their memory and time are not predicted."
    yield f"On the disk: at most about {size(plan.disk_bytes)}."
