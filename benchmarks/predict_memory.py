"""Predicted and measured peak memory and step time of each rank.

    python benchmarks/predict_memory.py --model embedded --dataset embedded --ranks 8,128,256
    python benchmarks/predict_memory.py --model OPT350M --dataset code_alpaca_2k.json --ranks 8,128,256 --out FILE.json

- predicted: `rankscope.plan.runtime`, what `rankscope plan` shows, computed before anything is loaded
- measured: rankscope's own profile, the highest peak of the training phase over `--repeats` fresh processes a rank
  (the kernel's high-water mark of resident memory on a CPU, torch's allocator on a GPU), and its median step
- difference: predicted over measured, minus one
"""

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from rankscope.data.tokens import save
from rankscope.files import write_json
from rankscope.jobs import profiles
from rankscope.jobs.job import Job
from rankscope.jobs.process import JobProcess
from rankscope.measure.machine import hardware, versions
from rankscope.model.device import free_bytes, resolve_device
from rankscope.plan.memory import predict
from rankscope.plan.runtime import forecast
from rankscope.spec.candidates import CONTROL
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
    parser.add_argument("--engine", choices=("packed", "peft"), default="packed")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="where to write the figures, as JSON")
    arguments = parser.parse_args()
    options: dict[str, Any] = {
        "ranks": [int(rank) for rank in arguments.ranks.split(",")],
        "seeds": [0],
        **{name: getattr(arguments, name) for name in ("model", "dataset", "max_length", "batch_size", "engine")},
        "device": arguments.device,
    }
    sets = [f"measure.{name}={getattr(arguments, name)}" for name in ("repeats", "warmup_steps", "steps")]
    spec = assemble({}, options, sets)
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(spec, Path(folder) / "study")
    print(table(rows))
    if arguments.out:
        command = f"python benchmarks/predict_memory.py {shlex.join(sys.argv[1:])}"
        write_json(arguments.out, {"command": command, "machine": hardware(), "versions": versions(), "rows": rows})


def compare(spec: StudySpec, folder: Path) -> list[dict[str, Any]]:
    """Return one row per rank."""
    prediction, data = predict(spec), prepare_data(spec)
    found = forecast(spec, prediction, data, free_bytes(resolve_device(spec.model.device)))
    if found.reason:
        print(f"not all can be predicted: {found.reason}", file=sys.stderr)
    study = Study.create(folder, spec)
    save(data, folder / "data")
    for repeat in range(spec.measure.repeats):
        for name in study.spec.profiled():
            if name != CONTROL:
                print(f"profile {repeat + 1} of {name}", file=sys.stderr)
                job = Job(profiles.__name__, {"profile": name, "repeat": repeat}, f"profiles/jobs/{name}")
                process = JobProcess(folder, job)
                while process.is_running(1.0):
                    pass
                if (error := process.error()) is not None:
                    raise error
    rows = []
    for candidate in spec.candidates():
        summaries = [one["summary"] for one in study.profile_repeats(f"r{candidate.rank:03d}")]
        on_gpu = summaries[0]["gpu_allocated_peak_bytes"] is not None
        peaks = [one["gpu_allocated_peak_bytes" if on_gpu else "rss_peak_bytes"] for one in summaries]
        rows.append(
            {
                "rank": candidate.rank,
                **json.loads(json.dumps(found.candidates[candidate.name].__dict__)),
                "measured_peak_bytes": peaks,
                "measured_base_bytes": [one["rss_base_bytes"] for one in summaries],
                "measured_step_seconds": [one["step_seconds_mean"] for one in summaries],
                "measured_runtime_seconds": [one["runtime_seconds"] for one in summaries],
                "difference": found.candidates[candidate.name].peak_bytes / max(peaks) - 1,
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return a GitHub-flavoured Markdown table; sizes in MB (1e6 bytes)."""
    parts = ("process", "base", "adapter", "gradients", "optimizer", "activations", "logits", "retained")
    lines = [
        f"| rank | {' | '.join(parts)} | predicted MB | measured MB | difference | s a step: predicted | measured |",
        "|" + "---:|" * (len(parts) + 6),
    ]
    for row in rows:
        cells = [f"{row['parts'][part] / 1e6:,.0f}" for part in parts]
        cells += [f"{row['peak_bytes'] / 1e6:,.0f}", f"{max(row['measured_peak_bytes']) / 1e6:,.0f}"]
        cells += [f"{row['difference']:+.1%}", f"{row['step_seconds']:.3g}", f"{row['measured_step_seconds'][0]:.3g}"]
        lines.append(f"| {row['rank']} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
