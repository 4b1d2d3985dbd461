"""How right the remaining time of a run is, as its lines show it: docs/results/runtime-prediction.md.

    python benchmarks/remaining.py              # the embedded study, as `rankscope run` runs it
    python benchmarks/remaining.py --steps 20   # any options of `rankscope run`

Runs a study by the command line, and prints each time left that it showed, beside the time that was.
"""

import re
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

UNITS = {"h": 3600.0, "min": 60.0, "s": 1.0}
SHOWN = re.compile(r"^ +\d+%  about (.*?) left · ([^·]*)")  # of a line: the whole study's time left, and what is done


class Line(NamedTuple):
    seconds: float  # since the command began
    left: float  # as shown
    doing: str


def parse(duration: str) -> float:
    """Seconds of `2 min 30 s`, or of `2.50 min`."""
    return sum(
        float(value.replace(",", "")) * UNITS[unit] for value, unit in re.findall(r"([\d.,]+) (h|min|s)", duration)
    )


def watch(options: list[str]) -> tuple[list[Line], float]:
    """Lines of a run with these options, and the seconds that all of it took."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "rankscope.cli", "run", *options, "--out", f"{folder}/study"]
        began, lines = time.monotonic(), []
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if found := SHOWN.match(line):
                    lines.append(Line(time.monotonic() - began, parse(found[1]), found[2].strip()))
        return lines, time.monotonic() - began


if __name__ == "__main__":
    lines, whole = watch(sys.argv[1:])
    print("| elapsed, s | done | shown left, s | truly left, s | error |\n|---:|---|---:|---:|---:|")
    for line in lines:
        truth = whole - line.seconds
        print(f"| {line.seconds:.0f} | {line.doing} | {line.left:.0f} | {truth:.0f} | {line.left / truth - 1:+.0%} |")
    half = max((line for line in lines if line.seconds <= whole / 2), key=lambda line: line.seconds)
    shown = half.left - (whole / 2 - half.seconds)
    print(f"\nHalf-way, after {whole / 2:.0f} s: {shown:.0f} s shown, {shown / (whole / 2) - 1:+.0%}.")
