"""Predicted and measured peak memory and step time of each rank.

    python benchmarks/predict_memory.py --model embedded --dataset embedded --ranks 8,128,256
    python benchmarks/predict_memory.py --model OPT350M --dataset code_alpaca_2k.json --ranks 8,128,256 --out FILE.json

- predicted: `rankscope.plan.runtime`, what `rankscope plan` shows, computed before anything is loaded
- measured: rankscope's own profile, the highest peak of the training phase over `--repeats` fresh processes a rank
  (on a CPU private memory, and the base's weights where they are pages of their own file; torch's allocator on a GPU);
  the steps' ratio to the lowest rank's, side by side
- difference: predicted over measured, minus one

`--before nothing,installed,cold` says what happens before each process: `installed` rewrites every shared library of
the environment in writes of 1 MB, as an installation does; `cold` drops them from the page cache. Resident memory moves
with both. Run it from an environment of its own: it must not rewrite what others run from.
"""

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rankscope.data.tokens import save
from rankscope.files import write_json
from rankscope.jobs import profiles
from rankscope.jobs.job import Job
from rankscope.jobs.process import JobProcess
from rankscope.measure.machine import hardware, versions
from rankscope.model.device import free_bytes, resolve_device
from rankscope.plan.costs import predict
from rankscope.plan.memory import StudyMemory
from rankscope.plan.runtime import forecast
from rankscope.spec.candidates import CONTROL, TIME
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.study import Study
from rankscope.train.prepare import prepare_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--dataset", default="embedded")
    parser.add_argument("--ranks", default="8,128,256")
    parser.add_argument("--max-length", type=int, default=None)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--warmup-steps", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--before", default="nothing", help="nothing, installed or cold, or several")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--engine", choices=("packed", "peft"), default="packed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    arguments = parser.parse_args()
    options: dict[str, Any] = {
        "ranks": [int(rank) for rank in arguments.ranks.split(",")],
        "seeds": [0],
        **{name: getattr(arguments, name) for name in ("model", "dataset", "max_length", "batch_size", "engine")},
        "device": arguments.device,
        "dtype": arguments.dtype,
    }
    sets = [f"measure.{name}={getattr(arguments, name)}" for name in ("repeats", "warmup_steps", "steps", "rounds")]
    spec = assemble({}, options, sets)
    rows = []
    for before in arguments.before.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"before": before} | row for row in compare(spec, Path(folder) / "study", BEFORE[before])]
        print(table(rows), flush=True)
    if arguments.out:
        command = f"python benchmarks/predict_memory.py {shlex.join(sys.argv[1:])}"
        write_json(arguments.out, {"command": command, "machine": hardware(), "versions": versions(), "rows": rows})


def rewrite_libraries() -> None:
    """Write each shared library of the environment anew, 1 MB at a time, as an installation does."""
    for file in shared_libraries():
        mode, copy = file.stat().st_mode, file.with_name(f"{file.name}.rewritten")
        with file.open("rb") as source, copy.open("wb", buffering=0) as target:
            while part := source.read(1 << 20):
                target.write(part)
            os.fsync(target.fileno())
        copy.chmod(mode)
        copy.replace(file)


def drop_libraries() -> None:
    """Drop the shared libraries from the page cache, as after a start of the machine."""
    for file in shared_libraries():
        with file.open("rb") as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def shared_libraries() -> list[Path]:
    return [file for file in Path(torch.__file__).parents[1].rglob("*.so*") if file.is_file() and not file.is_symlink()]


BEFORE: dict[str, Callable[[], None]] = {
    "nothing": lambda: None,
    "installed": rewrite_libraries,
    "cold": drop_libraries,
}


def run_job(folder: Path, content: dict[str, Any]) -> None:
    process = JobProcess(folder, Job(profiles.__name__, content, f"profiles/jobs/{content['profile']}"))
    while process.is_running(1.0):
        pass
    if (error := process.error()) is not None:
        raise error


def compare(spec: StudySpec, folder: Path, before: Callable[[], None] = lambda: None) -> list[dict[str, Any]]:
    """Return one row per rank."""
    data = prepare_data(spec)
    memory = StudyMemory(spec, predict(spec), data.train, free_bytes(resolve_device(spec.model.device)))
    found = forecast(spec, memory, data)
    if found.reason:
        print(f"not all can be predicted: {found.reason}", file=sys.stderr)
    study = Study.create(folder, spec)
    save(data, folder / "data")
    names = [name for name in study.spec.profiled() if name != CONTROL]
    for name in names * spec.measure.repeats:
        before()
        run_job(folder, {"profile": name, "members": [], "again": False})
    times: dict[str, Any] = {}
    if spec.measure.rounds > 1:
        run_job(folder, {"profile": TIME, "members": [CONTROL, *names], "again": False})
        times = study.profile_repeats(TIME)[0]["summaries"]
    lowest = found.candidates[spec.candidates()[0].name]
    rows = []
    for candidate in spec.candidates():
        summaries = [one["summary"] for one in study.profile_repeats(f"r{candidate.rank:03d}")]
        on_gpu = summaries[0]["gpu_allocated_peak_bytes"] is not None
        peaks = [one["gpu_allocated_peak_bytes" if on_gpu else "private_peak_bytes"] for one in summaries]
        base = memory.costs.base_bytes
        if not on_gpu and summaries[0]["private_base_bytes"] - memory.costs.process_bytes < base / 2:
            peaks = [peak + base for peak in peaks]  # the weights are pages of their file
        rows.append(
            {
                "rank": candidate.rank,
                **json.loads(json.dumps(found.candidates[candidate.name]._asdict())),
                "measured_peak_bytes": peaks,
                "measured_rss_bytes": [one["rss_peak_bytes"] for one in summaries],
                "measured_base_bytes": [one["private_base_bytes"] for one in summaries],
                "measured_ratio": times.get(f"r{candidate.rank:03d}", {}).get("step_ratio"),
                "predicted_ratio": ratio(found.candidates[candidate.name].step_seconds, lowest.step_seconds),
                "difference": found.candidates[candidate.name].peak_bytes / max(peaks) - 1,
            }
        )
    return rows


def ratio(seconds: float | None, of: float | None) -> float | None:
    return seconds / of if seconds and of else None


def table(rows: list[dict[str, Any]]) -> str:
    """Return a GitHub-flavoured Markdown table; sizes in MB (1e6 bytes)."""
    parts = ("process", "base", "adapter", "gradients", "optimizer", "activations", "logits", "retained")
    ends = [
        "predicted MB",
        "measured MB",
        "difference",
        "resident MB",
        "step over the lowest rank's: predicted",
        "measured",
    ]
    lines = [f"| before | rank | {' | '.join([*parts, *ends])} |", "|---|" + "---:|" * (len(parts) + len(ends) + 1)]
    for row in rows:
        cells = [f"{row['parts'][part] / 1e6:,.0f}" for part in parts]
        cells += [f"{row['peak_bytes'] / 1e6:,.0f}", f"{max(row['measured_peak_bytes']) / 1e6:,.0f}"]
        cells += [f"{row['difference']:+.1%}", f"{max(row['measured_rss_bytes']) / 1e6:,.0f}"]
        cells += [f"{value:.2f}" if value else "" for value in (row["predicted_ratio"], row["measured_ratio"])]
        lines.append(f"| {row['before']} | {row['rank']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
