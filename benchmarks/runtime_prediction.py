"""Runtime predicted by profiles, against that of the same trials trained alone and in full.

    python benchmarks/runtime_prediction.py [OPTIONS OF rankscope run]

Runs `rankscope run --isolated` with these options (without any: the embedded study) in a new folder, which `--out`
keeps, and compares for each trial:

- predicted: `runtime_seconds` of its candidate's profile (mean over repeats): steps and evaluations of the schedule
- isolated: the time of the trial's own steps and evaluations (`train_seconds` + `eval_seconds`), in a process of its
  own that trained nothing else

Neither includes loading the model and saving the adapter. The error is predicted / isolated - 1. Exit code 1 if its
median magnitude exceeds 5%.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import pandas as pd

from rankscope.analysis.costs import noise_of
from rankscope.study.study import Study

TARGET = 0.05


def run_isolated(options: list[str], folder: Path) -> Study:
    """Run the study from the command line and pass its output on."""
    command = [sys.executable, "-m", "rankscope.cli", "run", *options, "--isolated", "--out", str(folder)]
    subprocess.run(command, check=True)
    return Study.open(folder)


def compare(study: Study) -> pd.DataFrame:
    """Return one row per finished trial: `trial rank predicted isolated error` (seconds; relative)."""
    profiles, results = study.profiles(), study.results()
    predicted = profiles[~profiles["control"]].groupby("candidate")["runtime_seconds"].mean()
    done = results[results["status"] == "done"]
    table = done[["trial", "rank"]].assign(
        predicted=done["candidate"].map(predicted), isolated=done["train_seconds"] + done["eval_seconds"]
    )
    return table.assign(error=table["predicted"] / table["isolated"] - 1).sort_values("trial")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, help="the study's directory (default: a temporary one)")
    args, options = parser.parse_known_args()
    with tempfile.TemporaryDirectory(prefix="rankscope-runtime-") as temporary:
        study = run_isolated(options, args.out or Path(temporary) / "study")
        table, noise = compare(study), noise_of(study.profiles(), "runtime_seconds")
    print("\n| trial | predicted, s | isolated, s | error |\n|---|---:|---:|---:|")
    for row in table.itertuples():
        print(f"| {row.trial} | {row.predicted:.2f} | {row.isolated:.2f} | {row.error:+.1%} |")
    median = float(table["error"].abs().median())
    print(f"\nMedian error {median:.1%} (target {TARGET:.0%}).", end=" ")
    if noise is not None:
        print(f"Noise of a difference in runtime: {noise.floor:.1%}, in {noise.measurements} rounds.")
    sys.exit(0 if median <= TARGET else 1)


if __name__ == "__main__":
    main()
