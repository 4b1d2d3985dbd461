"""Fill the disk under runs at random moments, make room again, and compare the results with a run that had room.

    python benchmarks/disk_full.py --points 20 --seed 0

The disk is a real one, a tmpfs mounted in a namespace of its own (`unshare`, of util-linux; no root is needed), the
study that of benchmarks/crash.py. At a random moment a filler takes all that is left, or all but a few kilobytes.
Checked:

- the run ends with exit code 2 and an error of a few lines without a traceback, which says what cannot be written or
  how much room is needed
- without the filler the same command reaches its end, and every loss, held-out loss and adapter is bitwise that of
  the run that had room

A run that succeeds anyway, because it had nothing more to write, is not counted. The exit code is 1 if one of these
does not hold.
"""

import argparse
import errno
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import crash

SIZE = "150m"
INTERVAL = 2


def fill(disk: Path, left: int) -> Path:
    """Fill the disk up to about `left` bytes."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(1 << 16)):
                pass
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
        file.truncate(max(0, file.tell() - left))
    return filler


def one_point(
    disk: Path, number: int, rng: random.Random, seconds: float, expected: dict[str, str]
) -> list[str] | None:
    """Return the problems, or None if the run had nothing more to write."""
    study, moment, left = disk / f"study-{number}", rng.uniform(0.1, 1.0) * seconds, rng.choice([0, 4096, 100_000])
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(crash.command(study, INTERVAL), env=crash.environment(), **pipes) as process:  # type: ignore[call-overload]
        time.sleep(moment)
        filler = fill(disk, left)
        _, said = process.communicate()
    filler.unlink()
    if process.returncode == 0:
        return None
    problems = []
    if process.returncode != 2:
        problems.append(f"exit code {process.returncode}")
    if (
        "Traceback" in said
        or not 1 <= len(said.strip().splitlines()) <= 6
        or not re.search("cannot be written|needed on the disk", said)
    ):
        problems.append(f"it said: {said[-600:]}")
    print(
        f"  after {moment:.1f} s, {left} bytes left: {said.strip().splitlines()[0] if said.strip() else ''}", flush=True
    )
    again = subprocess.run(
        crash.command(study, INTERVAL), env=crash.environment(), capture_output=True, text=True, check=False
    )
    if again.returncode:
        return [*problems, f"with room it did not reach its end: {again.stderr[-300:]}"]
    found = crash.contents(study)
    return problems + [f"{part} differs" for part in expected if found.get(part) != expected[part]]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.disk is None:
        with tempfile.TemporaryDirectory(prefix="rankscope-disk-") as folder:
            inner = [sys.executable, __file__, *sys.argv[1:], "--disk", folder]
            mount = f'mount -t tmpfs -o size={SIZE} none "$0" && exec "$@"'
            unshare = shutil.which("unshare") or sys.exit("unshare is missing: it is part of util-linux")
            return subprocess.run([unshare, "-rm", "sh", "-c", mount, folder, *inner], check=False).returncode
    rng, problems, count, tried = random.Random(args.seed), list[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="rankscope-whole-") as name:
        start = time.perf_counter()
        subprocess.run(
            crash.command(Path(name) / "whole", INTERVAL),
            env=crash.environment(), check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        seconds, expected = time.perf_counter() - start, crash.contents(Path(name) / "whole")
    while count < args.points:
        found = one_point(args.disk, tried, rng, seconds, expected)
        shutil.rmtree(args.disk / f"study-{tried}", ignore_errors=True)
        tried += 1
        if found is not None:
            count += 1
            problems += [f"study {tried - 1}: {problem}" for problem in found]
            print(f"{count} of {tried} runs met a full disk, {len(problems)} problems", flush=True)
    print("\n".join(problems) or f"{count} full disks: exit code 2 each time, and everything bitwise with room again")
    return int(bool(problems))


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
