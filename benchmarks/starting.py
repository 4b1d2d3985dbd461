"""CPU and wall-clock seconds of commands that train nothing: help, refusals, and a finished study told again.

    python benchmarks/starting.py STUDY [--before OTHER/src] [--repeats 5]

STUDY is the directory of a finished study, of which a copy is taken. Each command runs in a process of its own, after
one that is not counted; with `--before` the same command of another checkout runs in turn with it. Medians are printed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

SRC = Path(__file__).parents[1] / "src"
MAIN = "from rankscope.cli import main; main()"


class Taken(NamedTuple):
    cpu: float  # seconds of the process and its children
    wall: float


def commands(study: str) -> dict[str, list[str]]:
    """Commands by what they show; `study` is the copy of the finished one."""
    model = str(SRC / "rankscope" / "demo" / "model")
    return {
        "`--help`": ["--help"],
        "`run --help`": ["run", "--help"],
        "no such model": ["run", "--model", "./nowhere", "--dataset", "rows.jsonl"],
        "no such data": ["run", "--model", model, "--dataset", "nowhere.jsonl"],
        "unknown `--lang`": ["run", "--lang", "xx"],
        "no such study": ["report", "nowhere"],
        "a finished study again": ["run", study],
        "`report`": ["report", study],
    }


def run(arguments: list[str], source: Path, folder: Path) -> Taken:
    environment = os.environ | {"PYTHONPATH": str(source), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, *arguments],
        cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    _, _, used = os.wait4(process.pid, 0)
    return Taken(used.ru_utime + used.ru_stime, time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--before", type=Path, help="src of another checkout")
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    sources = [*([given.before.resolve()] if given.before else []), SRC]
    found: dict[str, list[list[Taken]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        copies = [shutil.copytree(given.study, Path(scratch, f"study{number}")) for number in range(len(sources))]
        for name in commands(""):
            found[name] = [[] for _ in sources]
            for repeat in range(given.repeats + 1):
                for taken, source, copy in zip(found[name], sources, copies, strict=True):
                    one = run(commands(str(copy))[name], source, Path(scratch))
                    taken += [one] if repeat else []
    print(
        "| command | " + " | ".join(f"CPU s{when} | wall s{when}" for when in [" before", ""][-len(sources) :]) + " |"
    )
    print("|---" + "|--:" * 2 * len(sources) + "|")
    for name, columns in found.items():
        cells = [f"{median(side):.2f}" for taken in columns for side in zip(*taken, strict=True)]
        print(f"| {name} | {' | '.join(cells)} |")
    print(json.dumps({"python": sys.version.split()[0], "cores": os.cpu_count(), "repeats": given.repeats}))


if __name__ == "__main__":
    main()
