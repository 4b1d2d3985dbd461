"""Scale of a study: the schedule of many trials on many devices, and reading a million rows of metrics.

    python benchmarks/scale.py schedule       10 to 10,000 trials on 1 to 1,000 devices, simulated
    python benchmarks/scale.py read           writes studies of 10, 100 and 1,000 trials of 1,000 rows, and reads them
    python benchmarks/scale.py read --trials 1000 --keep FOLDER

**schedule.** Trials have the ranks and step times measured in docs/results/scaling.md. rankscope's own code divides
them into packs (by counted FLOPs) and orders them (by these times, the only ones it knows). True times differ: each
trial's is off by one of the errors measured in docs/results/runtime-prediction.md, drawn at random. Every pack is a
process that takes time to start; on one device one process trains all.

The bound is a makespan that no division and no order can beat: the trials' true times over the devices, or the longest
trial, plus one start. The scheduler's time covers dividing, ordering and assigning.

**read.** A process of its own reads each study with `Study.open` and `Study.evidence`, the input of the verdict and the
report. Seconds are from the process's first line to its last, imports included; memory is the peak resident size. The
files have just been written, so they are read from memory, not from disk. Exit code 1 if a target is missed; that of
reading is 5 s of CPU time at 1,000 trials.
"""

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rankscope.data.tokens import Tokens
from rankscope.files import file_hashes, write_json
from rankscope.plan.costs import predict
from rankscope.plan.memory import StudyMemory
from rankscope.plan.packs import divide_into_packs, longest_first, lower_bound, simulate
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.folder import TRIAL_FILES, Division
from rankscope.study.missing import START_SECONDS
from rankscope.study.study import Study

RESULTS = Path(__file__).parents[1] / "docs" / "results"
TRIALS = (10, 100, 1000, 10000)
DEVICES = (1, 10, 100, 1000)
STEPS = 200
"""Steps of a trial whose schedule is simulated."""
ROW_TOKENS = 48
"""Tokens of each row of its data: four trials fill a step."""
FREE_BYTES = 24_000_000_000

CANDIDATES = 10
"""Candidates of a generated study: five ranks at two learning rates; the rest are seeds."""
EXAMPLES = 32
"""Held-out examples of a generated study: the fewest that rankscope holds out by default."""
EVALS = 4
TARGET_CPU_SECONDS = 5.0  # to read the evidence of 1,000 trials


def made_spec(trials: int, rows: int) -> StudySpec:
    """Return the question of a generated study with that many trials and rows of metrics in all."""
    values = {
        "ranks": [8, 16, 32, 64, 128],
        "learning_rates": [1e-4, 1e-3],
        "seeds": list(range(trials // CANDIDATES)),
        "measure": {"profiles": False, "answers": 0},
    }
    options = {"model": "embedded", "dataset": "embedded", "steps": rows // trials - 1 - EVALS, "name": "made"}
    return assemble(values, options)


def write_trial(study: Study, trial: Trial, steps: int, pack: str) -> None:
    """Write the files of a finished trial with made-up losses, as `rankscope.train.loop` writes them."""
    folder, draw = study.trial_folder(trial), random.Random(trial.name).random
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}\n")
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(trial.name.encode())
    rate, evaluated = trial.candidate.learning_rate, {round((n + 1) * steps / EVALS) for n in range(EVALS)}
    lines = ['{"step": 0, "epoch": 0.0, "eval_loss": 5.703777727167657}\n']
    for step in range(1, steps + 1):
        lines.append(
            f'{{"step": {step}, "epoch": {step / 107}, "train_loss": {3 + draw()}, "grad_norm": {draw()}, '
            f'"step_learning_rate": {rate * step / steps}, "tokens": {300 + int(99 * draw())}, '
            f'"label_tokens": {100 + int(99 * draw())}, "step_seconds": {0.2 + 0.01 * draw()}}}\n'
        )
        if step in evaluated:
            lines.append(f'{{"step": {step}, "eval_loss": {3 + draw()}}}\n')
    (folder / "metrics.jsonl").write_text("".join(lines))
    examples = {
        "example": list(range(EXAMPLES)),
        "loss": [3 + draw() for _ in range(EXAMPLES)],
        "label_tokens": [117] * EXAMPLES,
        "correct_tokens": [50] * EXAMPLES,
    }
    write_json(folder / "eval.json", {"schema": 1, "trial": trial.name, "examples": examples})
    results = {
        "steps": steps,
        "tokens": 350 * steps,
        "trainable_params": 19200 * trial.candidate.rank,
        "adapter_bytes": 76800 * trial.candidate.rank,
        "train_loss": 3 + draw(),
        "eval_loss": 3 + draw(),
        "eval_perplexity": 30.0,
        "eval_accuracy": 0.4,
        "general_loss_before": None,
        "general_loss_after": None,
        "train_seconds": 0.2 * steps,
        "eval_seconds": 1.0,
        "tokens_per_second": 1750.0,
    }
    record = {
        "schema": 1,
        "trial": trial.name,
        "status": "done",
        "reason": None,
        "pack": pack,
        "engine": "packed",
        "engine_reason": None,
        "model_sha256": "0" * 64,
        "tokens_sha256": "0" * 64,
        **trial.model_dump(mode="json"),
        "results": results,
        "files": file_hashes(folder, TRIAL_FILES),
    }
    write_json(folder / "trial.json", record)


def _write_trials(path: Path, spec: StudySpec, names: Sequence[str]) -> None:
    os.fsync = lambda _: None  # what is made up need not outlive a power cut
    study, trials = Study(path, spec), {trial.name: trial for trial in spec.trials()}
    for name in names:
        write_trial(study, trials[name], spec.training.steps or 0, f"p{int(name.split('-s')[1]):03d}")


def make_study(path: Path, trials: int, rows: int) -> Study:
    """Write a study of finished trials: real formats and hashes, made-up numbers."""
    spec = made_spec(trials, rows)
    study, all_trials = Study.create(path, spec), spec.trials()
    names = [trial.name for trial in all_trials]
    with ProcessPoolExecutor(2) as pool:
        parts = [names[first : first + 250] for first in range(0, len(names), 250)]
        list(pool.map(_write_trials, [path] * len(parts), [spec] * len(parts), parts))
    packs: dict[str, list[Trial]] = {}
    for trial in all_trials:
        packs.setdefault(f"p{trial.seed:03d}", []).append(trial)
    study.write_division(Division(packs, {}))
    facts = dict.fromkeys(("truncated", "duplicates_dropped", "rows_without_label_dropped"), 0)
    facts |= {"rows_train": 759, "rows_eval": EXAMPLES, "max_length": 128}
    write_json(study.file("data", "facts.json"), facts | {"id": "embedded", "mean_length": 81.0})
    model = {"id": "embedded", "parameters": 4404736}
    write_json(study.file("machine.json"), {"hardware": {}, "versions": {}, "model": model})
    return study


class Measured(NamedTuple):
    """Measurements that the simulation starts from."""

    step_seconds: dict[int, float]
    """Seconds per step, by rank."""
    errors: list[float]
    """Errors of predicted runtime: predicted over true, minus 1."""


def measured() -> Measured:
    """Read the measurements from the tables in docs/results."""
    ranks = (RESULTS / "scaling.md").read_text(encoding="utf-8").partition("## Rank")[2].partition("##")[0]
    steps = {int(rank): float(s) for rank, s in re.findall(r"^\| (\d+) \| [\d,]+ \| ([\d.]+) \(", ranks, re.MULTILINE)}
    rows = (RESULTS / "runtime-prediction.md").read_text(encoding="utf-8").splitlines()
    errors = [row.split()[-2].rstrip("%") for row in rows if row.startswith("| r")]
    assert len(steps) > 1
    assert len(errors) > 1
    return Measured(steps, [float(error) / 100 for error in errors])


class Simulated(NamedTuple):
    """Outcome of a simulated study. Times are in seconds."""

    packs: int
    makespan: float
    bound: float
    scheduler_seconds: float


def simulate_study(known: Measured, trials: int, devices: int, seed: int = 0) -> Simulated:
    """Divide, order and simulate that many trials on that many devices."""
    ranks = sorted(known.step_seconds)
    options = {"model": "embedded", "dataset": "embedded", "device": "cpu", "steps": STEPS, "ranks": ranks}
    spec = assemble({"seeds": list(range(-(-trials // len(ranks))))}, options)
    prediction, draw = predict(spec), random.Random(seed)
    offsets = np.arange(0, 65 * ROW_TOKENS, ROW_TOKENS, dtype=np.int64)
    rows = Tokens(np.zeros(64 * ROW_TOKENS, np.int32), np.ones(64 * ROW_TOKENS, np.bool_), offsets)
    members = spec.trials()[:trials]
    predicted = {trial.name: STEPS * known.step_seconds[trial.candidate.rank] for trial in members}
    true = {name: seconds / (1 + draw.choice(known.errors)) for name, seconds in predicted.items()}

    start = time.perf_counter()
    fits = StudyMemory(spec, prediction, rows, FREE_BYTES).fits
    packs = divide_into_packs(members, prediction, fits, spec.training, rows, devices)
    named = Division({}, {}).named(packs)
    expected = {pack: sum(predicted[trial.name] for trial in trials) for pack, trials in named.items()}
    order = longest_first(expected)
    simulate(order, expected, devices)
    scheduler_seconds = time.perf_counter() - start

    starts = START_SECONDS if devices > 1 else 0.0
    takes = {pack: starts + sum(true[trial.name] for trial in trials) for pack, trials in named.items()}
    makespan = simulate(order, takes, devices).makespan + (START_SECONDS if devices == 1 else 0.0)
    return Simulated(len(packs), makespan, START_SECONDS + lower_bound(true, devices), scheduler_seconds)


def show_schedules() -> Iterator[str]:
    """Yield the table's lines, and the missed targets."""
    known, worst, slowest = measured(), 0.0, 0.0
    yield "| trials | devices | packs | makespan, h | bound, h | makespan / bound | scheduler, s |"
    yield "|---:|---:|---:|---:|---:|---:|---:|"
    for trials in TRIALS:
        for devices in DEVICES:
            found = simulate_study(known, trials, devices)
            worst, slowest = max(worst, found.makespan / found.bound), max(slowest, found.scheduler_seconds)
            yield (
                f"| {trials:,} | {devices:,} | {found.packs:,} | {found.makespan / 3600:.3g} | "
                f"{found.bound / 3600:.3g} | {found.makespan / found.bound:.3f} | {found.scheduler_seconds:.2f} |"
            )
    yield f"\nWorst {worst:.3f} (target 1.15); scheduler at most {slowest:.2f} s (target 1 s)."
    if worst > 1.15 or slowest > 1:
        yield "MISSED"


READ = """
import json, resource, sys, time
start = time.perf_counter()
from rankscope.study.study import Study
rows = len(Study.open(sys.argv[1]).evidence().curves)
seconds, usage = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
cpu_seconds, peak_bytes = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024
print(json.dumps({"rows": rows, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peak_bytes}))
"""


def read_apart(path: Path) -> dict[str, Any]:
    """Read a study in a process of its own; return its cost."""
    command = [sys.executable, "-c", READ, str(path)]
    found: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def show_reading(trials: Sequence[int], keep: Path | None) -> Iterator[str]:
    """Yield one row per number of trials, and the missed targets."""
    yield "| trials | rows | metrics.jsonl | s | CPU s | peak |"
    yield "|---:|---:|---:|---:|---:|---:|"
    for count in trials:
        with tempfile.TemporaryDirectory(prefix="rankscope-scale-") as temporary:
            path = keep or Path(temporary) / "study"
            if not Study.is_at(path):
                make_study(path, count, 1000 * count)
            size = sum(file.stat().st_size for file in path.glob("trials/*/metrics.jsonl"))
            found = read_apart(path)
            yield (
                f"| {count:,} | {found['rows']:,} | {size / 1e6:,.3g} MB | {found['seconds']:.1f} | "
                f"{found['cpu_seconds']:.1f} | {found['peak_bytes'] / 1e9:.2f} GB |"
            )
            if found["cpu_seconds"] > TARGET_CPU_SECONDS:
                yield "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["schedule", "read"])
    parser.add_argument("--trials", type=int, nargs="+", default=TRIALS[:3])
    parser.add_argument("--keep", type=Path, help="where a study of one size is made, kept, and read again")
    arguments = parser.parse_args()
    missed = False
    for line in show_schedules() if arguments.what == "schedule" else show_reading(arguments.trials, arguments.keep):
        print(line, flush=True)
        missed |= line == "MISSED"
    sys.exit(missed)


if __name__ == "__main__":
    main()
