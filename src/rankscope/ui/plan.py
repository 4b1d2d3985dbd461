"""What `rankscope plan` shows: what would run, what it would take, and what fits. Nothing is trained or written."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from rankscope.data.tokens import TokenizedData
from rankscope.plan.checks import too_large
from rankscope.plan.memory import CostModel, PeakMemory, predict_peak
from rankscope.plan.packs import MAX_PACK_MEMORY_FRACTION
from rankscope.plan.plan import Plan
from rankscope.plan.runtime import COUNTED, NOT_COUNTED, Forecast, StudyForecast, study_seconds
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.study.folder import FINISHED, StudyFolder
from rankscope.study.missing import missing_profiles, missing_reference
from rankscope.text.catalogue import load
from rankscope.text.formats import duration, percent, size
from rankscope.train.prepare import describe_data
from rankscope.ui.console import make_table

if TYPE_CHECKING:
    from rankscope.spec.models import StudySpec


def show_plan(plan: Plan, console: Console) -> None:
    """Prints the plan."""
    spec, prediction, data, found, packs, steps, free, _, _ = plan
    console.print(f"Model {spec.model.id}: {prediction.base_params:,} parameters", markup=False)
    console.print(describe_data(data.facts), markup=False, soft_wrap=True)
    console.print(_candidates(spec, found, free))
    for line in _notes(plan):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"{len(spec.trials())} trials of {steps:,} steps in {len(packs)} packs:")
    for line in _packs(spec, prediction, found.candidates, packs, data, free):
        console.print(line, markup=False, soft_wrap=True)
    if reference := spec.reference_trials():
        console.print(
            f"{len(reference)} trials of full fine-tuning, each alone: their memory and time are not predicted."
        )
    console.print(f"On the disk: at most about {size(plan.disk_bytes)}.")


def show_progress_so_far(study: StudyFolder, console: Console) -> None:
    """Says what a study that has begun has already: a run does only the rest."""
    trials = study.spec.trials()
    done = sum(study.trial_record(trial).status in FINISHED for trial in trials)
    console.print(
        f"{study.path} has {done} of the {len(trials)} trials; {len(missing_profiles(study))} repeats of profiles and "
        f"{len(missing_reference(study))} trials of full fine-tuning are missing too. A run would do what is missing.",
        markup=False,
        soft_wrap=True,
    )


def _candidates(spec: StudySpec, found: StudyForecast, free: int) -> Table:
    names = ["candidate", "scaling", "trainable", "base", "adapter", "activations", "logits", "other", "total", "fits"]
    rows = []
    for candidate in spec.candidates():
        row = found.candidates[candidate.name]
        memory = ["–"] * 7
        if row.parts and row.peak_bytes:
            parts = row.parts
            adapter = parts["adapter"] + parts["gradients"] + parts["optimizer"]
            other = parts["process"] + parts["retained"]
            columns = (parts["base"], adapter, parts["activations"], parts["logits"], other, row.peak_bytes)
            memory = [*map(size, columns), "yes" if row.peak_bytes <= free * MAX_PACK_MEMORY_FRACTION else "no"]
        times = ["–"] * 2
        if row.step_seconds is not None and row.runtime_seconds is not None:
            times = [f"{row.step_seconds:.2g}", duration(row.runtime_seconds, load("en"))]
        rows.append([candidate.name, f"{candidate.scaling:.3g}", f"{row.trainable_params:,}", *memory, *times])
    return make_table([*names, "s/step", "runtime"], rows, no_wrap=True)


def _notes(plan: Plan) -> list[str]:
    """What the table's columns mean, the largest rank that fits, and the time of the whole study."""
    spec, prediction, _, found, _, _, free, hypothetical, _ = plan
    kind = str(prediction.dtype).removeprefix("torch.")
    where = f"a GPU with {size(free)}" if hypothetical else f"the {size(free)} that are free here"
    tokens = max((row.forward_tokens or 0 for row in found.candidates.values()), default=0)
    notes = [
        f"Memory: predicted peak of each candidate trained alone ({prediction.device}, {kind}, forwards of up to "
        f"{tokens:,} tokens).",
        "  adapter: with gradients and optimizer. other: the process, and what the allocator keeps of freed tensors.",
        f"  fits: within {percent(MAX_PACK_MEMORY_FRACTION)} of {where}.",
    ]
    if found.reason:
        notes.append(f"  Not all of it can be predicted: {found.reason}")
    notes += [*_checkpointing(found), *(too_large(spec.model, prediction, free) or ())]
    largest = plan.largest_rank
    if largest is not None:
        notes.append(_largest(spec, prediction, largest))
    seconds = study_seconds(spec, found.candidates)
    if seconds is None or found.product_flops_per_second is None:
        known = " --gpu-flops says what it reaches." if hypothetical else ""
        return [*notes, f"Time: not predicted, since this device's speed is not known here.{known}"]
    trials, profiles = (duration(part, load("en")) for part in seconds)
    measured = (
        "where packs reached 45% to 75% on one CPU: a rough guide, within about a third"
        if prediction.device == "cpu"
        else "a share that was measured on a CPU and never on a GPU: this can be far off"
    )
    return [
        *notes,
        f"Time: about; FLOPs at {found.product_share:.0%} of plain matrix products "
        f"({found.product_flops_per_second / 1e9:,.0f} GFLOP/s {'as given' if hypothetical else 'here'}), {measured}.",
        f"The whole study: about {duration(sum(seconds), load('en'))} on one device: trials {trials}, profiles "
        f"{profiles}.",
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
    """Time, device hours and cost, where several devices or a price were asked for."""
    found, text = plan.takes, load("en")
    if found is None:
        return []
    devices, price = found.fleet
    several = "s" * (devices > 1)
    kind = f"GPU{several} of {size(plan.free_bytes)}" if plan.hypothetical else f"device{several} like this one"
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


def _packs(
    spec: StudySpec,
    prediction: CostModel,
    forecasts: Mapping[str, Forecast],
    packs: Mapping[str, Sequence[Trial]],
    data: TokenizedData,
    free: int,
) -> list[str]:
    """One line a pack. Packs of the same candidates need the same memory."""
    known: dict[tuple[str, ...], int | None] = {(name,): row.peak_bytes for name, row in forecasts.items()}
    step_tokens = float(data.train.lengths.mean()) * spec.training.effective_batch_size
    lines = []
    for pack, trials in packs.items():
        names = tuple(trial.candidate.name for trial in trials)
        if names not in known:
            peak = predict_peak(spec, prediction, trials, data.train, free)
            known[names] = peak.parts.total if isinstance(peak, PeakMemory) else None
        total = known[names] or prediction.peak_bytes(trials, free, len(trials) * step_tokens)
        fits = "" if total <= free else f", more than the {size(free)} there are"
        lines.append(f"  {pack}  {', '.join(trial.name for trial in trials)}: about {size(total)}{fits}")
    return lines
