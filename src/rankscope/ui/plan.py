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
from rankscope.plan.runtime import FleetEstimate, shorter
from rankscope.spec.models import StudySpec
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import START_SECONDS, is_finished, unevaluated
from rankscope.study.scores import unscored
from rankscope.text.catalogue import Catalogue
from rankscope.text.coverage import coverage_sentences
from rankscope.text.formats import about, duration, durations, parse_bytes, parse_flops, percent, size
from rankscope.train.prepare import describe_data, study_data
from rankscope.ui.console import error_console, make_table, out_console, print_json, show
from rankscope.ui.progress import Display
from rankscope.ui.rows import describe_rows, row_lines


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
    language: str = "en",
) -> Plan:
    """The plan that a run would execute, or would on a GPU that need not exist. Raises StudyError, DataError,
    ModelError: as a run would; and where an option is no size, rate, number or price."""
    gpu = parse_gpu(gpu_memory, gpu_flops)
    task.check(spec.measure.task)
    if gpu is not None:
        site, slots, study = imagined_gpu(spec.model, gpu.memory_bytes), 1, None
    else:
        with make_launcher(launcher, spec.model, ray_address, error_console.print, language) as launching:
            site, slots = launching.site(), launching.slots()
    fleet, rate = make_fleet(devices, price, slots), gpu.flops_per_second if gpu else None
    data = study_data(spec, study)
    task.scorable(spec, data, study)
    return make_plan(spec, data, site, fleet, study, rate, bool(remeasure))


def show_plan(
    spec: StudySpec,
    study: StudyFolder | None,
    as_json: bool,
    text: Catalogue,
    show_rows: int | None = 0,
    **options: Any,
) -> None:
    """Print the plan (`plan_study`) with the first rows to train on, and what a `study` that has begun has already."""
    plan = plan_study(spec, study, **options, language=text.language)
    rows = describe_rows(plan, show_rows) if show_rows else []
    if as_json:
        print_json(describe_plan(plan, text) | ({"rows": rows} if rows else {}))
    else:
        found = plan.prediction.coverage
        covered = coverage_sentences(found and found._asdict(), plan.spec.ranks, text)
        model = text("plan.model", id=plan.spec.model.id, parameters=f"{plan.prediction.base_params:,}")
        show(model, describe_data(plan.data.facts, text), *covered, *row_lines(rows, text))
        show(*_memory(plan, text), *_time(plan, text), *_work(plan, text))
        show(*(shorter_lines(plan, text) if study is None else ()))
    if study is not None:
        show(" ".join(_begun(study, plan, text)), console=error_console if as_json else out_console)


def _begun(study: StudyFolder, plan: Plan, text: Catalogue) -> Iterator[str]:
    yield text(
        "plan.begun",
        path=study.path,
        done=sum(is_finished(study, trial) for trial in study.trials),
        trials=text.count("trials", len(study.trials)),
        profiles=text.count("profiles", len(plan.profiles)),
        full=text.count("trials", len(plan.reference)),
    )
    if stale := unevaluated(study):
        yield text("plan.added", trials=text.count("trials", len(stale)))
    if models := unscored(study):
        yield text("plan.scored", models=text.count("models", len(models)))
    if plan.unmeasured:
        yield text("plan.unmeasured", **plan.unmeasured)


def shorter_lines(plan: Plan, text: Catalogue) -> list[str]:
    """What makes the study shorter, with its time on one device by the same forecast."""
    times = shorter(plan.spec, plan.steps, plan.forecast.candidates, plan.data.facts)
    lines = [text("shorter.option", option=option, time=about(seconds, text)) for option, seconds in times.items()]
    return [text("shorter.title"), *lines, text("shorter.quick")] if lines else []


LONG_SECONDS = 2 * 3600  # a run of more says so first, and asks


def approve(progress: Display, plan: Plan, text: Catalogue) -> None:
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


def describe_plan(plan: Plan, text: Catalogue) -> dict[str, Any]:
    """The plan as data, for `--json`: bytes, seconds, tokens."""
    seconds, fleet = plan.whole_seconds, plan.fleet_estimate
    return {
        "model": {"id": plan.spec.model.id, "parameters": plan.prediction.base_params},
        "data": plan.data.facts,
        "warnings": data_warnings(plan.data.facts, text),
        "prediction": plan.forecast.describe(plan.prediction),
        "steps": plan.steps,
        "packs": {pack: [trial.name for trial in trials] for pack, trials in plan.packs.items()},
        "profiles": [job.profile for job in plan.profiles],
        "unmeasured": text("plan.unmeasured", **plan.unmeasured) if plan.unmeasured else None,
        "reference": [trial.name for trial in plan.reference],
        "free_bytes": plan.site.free_bytes,
        "largest_rank_that_fits": plan.largest_rank,
        "disk_bytes": plan.disk_bytes,
        "shorter": shorter(plan.spec, plan.steps, plan.forecast.candidates, plan.data.facts),
        "seconds": seconds._asdict() if seconds else None,
        "fleet": fleet.describe() | _counts(text) if fleet else None,
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


def _memory(plan: Plan, text: Catalogue) -> Iterator[str | Table]:
    """Predicted peak of each candidate by part, what its columns mean, and the largest rank that fits."""
    prediction, found, free = plan.prediction, plan.forecast.candidates, plan.site.free_bytes
    rows, unknown = [], ["–"] * 7
    for name, row in found.items():
        rows.append([name, *unknown])
        if (parts := row.parts) and row.peak_bytes:
            adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
            other = parts["process"] + parts["retained"]
            columns = (parts["base"], adapter, parts["activations"], parts["logits"], other, row.peak_bytes)
            fits = "yes" if row.peak_bytes <= free * MAX_PACK_MEMORY_FRACTION else "no"
            rows[-1] = [name, *map(size, columns), text(f"table.{fits}")]
    yield _table(["candidate", "base", "adapter", "activations", "logits", "other", "total", "fits"], rows, text)
    kind = f"{prediction.device}, {str(prediction.dtype).removeprefix('torch.')}"
    if tokens := max((row.forward_tokens or 0 for row in found.values()), default=0):
        kind = text("plan.forwards", kind=kind, tokens=f"{tokens:,}")
    yield text("plan.memory", kind=kind)
    yield text("plan.parts")
    where = "plan.fits_gpu" if plan.hypothetical else "plan.fits"
    yield text(where, share=percent(MAX_PACK_MEMORY_FRACTION), free=size(free))
    if prediction.engine_reason:
        yield text("plan.not_packed", reason=prediction.engine_reason)
    if plan.forecast.reason:
        yield text("plan.not_predicted", reason=plan.forecast.reason)
    if longest := {name: row.recomputed_tokens for name, row in found.items() if row.recomputed_tokens}:
        names = text("plan.all") if len(longest) == len(found) else ", ".join(longest)
        yield text("plan.recomputed", names=names, tokens=f"{max(longest.values()):,}")
    yield from too_large(plan.spec.model, prediction, free, text) or ()
    if (rank := plan.largest_rank) is not None:
        modules = plan.spec.adapter.target_modules
        values = {"rank": f"{rank:,}", "modules": modules if isinstance(modules, str) else ", ".join(modules)}
        key = "largest_none" if not rank else "largest_full" if rank == prediction.full_rank else "largest"
        yield text(f"plan.{key}", **values, power=f"{1 << (max(rank, 1).bit_length() - 1):,}")


def _time(plan: Plan, text: Catalogue) -> Iterator[str | Table]:
    """Time of each candidate alone, and of the study, on one device and on a fleet."""
    found = plan.forecast
    seconds, rate = plan.whole_seconds, found.product_flops_per_second
    runtime = durations((row.runtime_seconds for row in found.candidates.values()), text)
    rows = []
    for candidate in plan.spec.candidates():
        row = found.candidates[candidate.name]
        rows.append([candidate.name, f"{candidate.scaling:.3g}", f"{row.trainable_params:,}", "–", "–"])
        if row.step_seconds is not None and row.runtime_seconds is not None:
            rows[-1][3:] = [f"{row.step_seconds:.2g}", runtime(row.runtime_seconds)]
    yield _table(["candidate", "scaling", "trainable", "step", "runtime"], rows, text)
    if seconds is None:
        yield text("plan.no_time_gpu" if plan.hypothetical else "plan.no_time")
        return
    if rate is None:
        yield text("plan.time")
    else:
        yield text("plan.time_given", share=f"{found.product_share:.0%}", rate=f"{rate / 1e9:,.0f}")
    parts = {name: duration(part, text) for name, part in seconds._asdict().items()}
    yield text("plan.whole", whole=duration(sum(seconds), text), **parts)
    if fleet := plan.fleet_estimate:
        yield from _fleet(plan, fleet, text)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], text: Catalogue) -> Table:
    return make_table([text(f"plan.column.{column}") for column in columns], rows)


def _fleet(plan: Plan, found: FleetEstimate, text: Catalogue) -> Iterator[str]:
    count, price = found.fleet
    kind, key = ("gpus", "plan.fleet_gpu") if plan.hypothetical else ("devices", "plan.fleet_here")
    yield text(
        "plan.fleet",
        devices=text(key, devices=text.count(kind, count), size=size(plan.site.free_bytes)),
        whole=duration(found.makespan_seconds, text),
        trials=duration(found.trials_seconds, text),
        least=duration(found.least_trials_seconds, text),
        profiles=duration(found.profiles_seconds, text),
    )
    hours = {"hours": f"{found.device_hours:,.3g}", "busy": f"{found.busy_seconds / 3600:,.3g}"}
    if found.cost is None:
        yield text("plan.hours", **hours)
    else:
        yield text("plan.hours_cost", **hours, cost=f"{found.cost:,.2f}", price=f"{price:,.2f}")
    yield text("plan.counts", **_counts(text))


def _counts(text: Catalogue) -> dict[str, str]:
    """What the estimate of a fleet counts, and what it does not."""
    counted = text("plan.counted", seconds=f"{START_SECONDS:.0f}")
    return {"counted": counted, "not_counted": text("plan.not_counted")}


def _work(plan: Plan, text: Catalogue) -> Iterator[str]:
    """Packs with their memory, full fine-tuning, and room on the disk."""
    trials, free = sum(map(len, plan.packs.values())), plan.site.free_bytes
    numbers = {"trials": trials, "training_steps": plan.steps, "packs": len(plan.packs)}
    words = {name.removeprefix("training_"): text.count(name, number) for name, number in numbers.items()}
    yield text("plan.packs", **words) if trials else text("plan.no_packs")
    for pack, members in plan.packs.items():
        total, names = plan.memory.peak_bytes(members), ", ".join(trial.name for trial in members)
        key = "plan.pack" if total <= free else "plan.pack_too_large"
        yield text(key, pack=pack, trials=names, size=size(total), free=size(free))
    if full := len(plan.reference):
        yield text("plan.full", trials=text.count("trials", full))
    yield text("plan.disk", size=size(plan.disk_bytes))
