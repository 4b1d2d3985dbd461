"""Kill runs at named and at random points, resume them, and compare the results with an uninterrupted run.

    python benchmarks/crash.py --kills 200 --seed 0

One small study (embedded model, four trials in a pack, LoRA dropout, gradient accumulation, nine epochs)
is run once to its end. Then it is started again and again in new directories, and each run is killed until one reaches
its end. Half of the kills are at named points (SIGKILL), half at a random moment (SIGKILL, SIGTERM or SIGINT):

- flush: before a file's bytes are flushed to disk, of the nth file
- rename: before a finished file takes its name; renamed: right after
- append: in the middle of a line that is appended to metrics.jsonl
- random: at a moment in the duration of a whole run, or after a random number of steps (half each); the supervisor and
  all its children, or (one in three) only the child that trains

A `sitecustomize` module on the processes' path reaches the named points; rankscope itself has no hooks. A kill counts
if a process ended by its signal or reported that it was interrupted. Checked after each kill and at the end:

- no finished trial was lost or trained again: its trial.json is byte for byte what it was
- no step is in metrics.jsonl twice or missing
- every loss, held-out loss and adapter is bitwise that of the uninterrupted run
- a pack resumed from a checkpoint began at most `--interval` steps before the last step that had been recorded

SIGTERM and SIGINT take effect between two steps: the process writes a checkpoint and ends.

The exit code is 1 if one of these does not hold, if a study never resumed from a checkpoint, or if the kills did not
happen.
"""

import argparse
import hashlib
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import psutil

POINTS = ("flush", "rename", "renamed", "append")
MOST_PER_STUDY = 30
STEPS, TRIALS = 60, 4

HOOK = """
import io, os, signal
point, _, nth = os.environ.get("CRASH_AT", "").partition(":")
child = "rankscope.jobs.worker" in open("/proc/self/cmdline").read()
if point and child == (os.environ["CRASH_IN"] == "child"):
    left = int(nth)
    def passing(here):
        global left
        if here == point:
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    fsync, replace, open_ = os.fsync, os.replace, io.open
    def fsync_(descriptor):
        passing("flush")
        fsync(descriptor)
    def replace_(source, target, **kwargs):
        passing("rename")
        replace(source, target, **kwargs)
        passing("renamed")
    os.fsync, os.replace = fsync_, replace_
    def opening(file, mode="r", *args, **kwargs):
        opened = open_(file, mode, *args, **kwargs)
        if "a" in mode and str(file).endswith("metrics.jsonl"):
            write = opened.write
            class Appending:
                def write(self, text):
                    if point == "append" and left == 1:
                        write(text[: len(text) // 2])
                        opened.flush()
                    passing("append")
                    return write(text)
                def __getattr__(self, name):
                    return getattr(opened, name)
            return Appending()
        return opened
    io.open = opening
"""


class Outcome(NamedTuple):
    """Outcome of one study."""

    kills: Counter[str]
    resumed: int
    """Number of packs that resumed from a checkpoint."""
    problems: list[str]


def environment(**values: str) -> dict[str, str]:
    """Return an environment with one thread per process, so that concurrent studies do not slow each other down."""
    return {**os.environ, "OMP_NUM_THREADS": "1", **values}


def command(study: Path, interval: int) -> list[str]:
    options = ["--ranks", "4,16", "--seeds", "0,1", "--steps", str(STEPS), "--batch-size", "1", "--out", str(study)]
    sets = ["measure.profiles=false", "measure.answers=0", f"training.checkpoint_steps={interval}"]
    sets += ["training.evals=3", "data.eval_rows=4", "data.max_length=64", f"training.trials_per_pack={TRIALS}"]
    sets += ["training.gradient_accumulation_steps=2", "adapter.lora_dropout=0.1", "data.max_rows=20"]
    run = [sys.executable, "-m", "rankscope.cli", "run", "--model", "embedded", "--dataset", "embedded", *options]
    return run + [part for assignment in sets for part in ("--set", assignment)]


def lines(file: Path) -> list[dict[str, object]]:
    """Return the complete lines of a metrics.jsonl, without an incomplete last one."""
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def contents(study: Path) -> dict[str, str]:
    """Return what must be equal: losses of every step, held-out losses of every example, adapters."""
    found = {}
    for folder in sorted((study / "trials").iterdir()):
        rows = [row | {"step_seconds": None} for row in lines(folder / "metrics.jsonl")]
        found[f"{folder.name}/metrics"] = json.dumps(rows)
        found[f"{folder.name}/eval"] = (folder / "eval.json").read_text()
        adapter = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
        found[f"{folder.name}/adapter"] = hashlib.sha256(adapter).hexdigest()
    return found


def trained(study: Path) -> Counter[tuple[str, int]]:
    """Count how often each training step of each trial stands in its metrics.jsonl."""
    files = list((study / "trials").glob("*/metrics.jsonl"))
    return Counter((file.parent.name, row["step"]) for file in files for row in lines(file) if "train_loss" in row)  # type: ignore[misc]


def finished(study: Path) -> dict[str, str]:
    """Return trial.json of every finished trial."""
    texts = {file.parent.name: file.read_text() for file in (study / "trials").glob("*/trial.json")}
    return {trial: text for trial, text in texts.items() if json.loads(text)["status"] == "done"}


def reached(study: Path) -> dict[str, int]:
    """Return the last recorded step of each pack, by its trials' metrics.jsonl."""
    division = study / "packs" / "division.json"
    packs = json.loads(division.read_text())["packs"] if division.exists() else {}
    steps = trained(study)
    return {pack: max((step for trial, step in steps if trial in names), default=0) for pack, names in packs.items()}


def begins(study: Path) -> dict[str, list[int]]:
    """Return the steps at which each process began to train, by the log of the first pack of each job."""
    logs = (study / "packs").glob("*/log.txt")
    return {log.parent.name: list(map(int, re.findall(r"from step (\d+) of", log.read_text()))) for log in logs}


def kill(study: Path, hook: Path, interval: int, rng: random.Random, seconds: float, named: bool) -> str | None:
    """Run once and kill it; return the kind of kill, or None if the run ended first."""
    kind = rng.choice(POINTS) if named else "random"
    values = {"PYTHONPATH": os.pathsep.join([str(hook), os.environ.get("PYTHONPATH", "")])}
    if named:
        where = "child" if kind == "append" or rng.random() < 0.8 else "parent"
        most = 16 if where == "child" else 6
        values |= {"CRASH_AT": f"{kind}:{rng.randint(1, most)}", "CRASH_IN": where}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    with subprocess.Popen(command(study, interval), env=environment(**values), **quiet) as process:  # type: ignore[call-overload]
        if named:
            return kind if process.wait() == -signal.SIGKILL or child_was_killed(study) else None
        wait_for_a_moment(process, study, rng, seconds)
        if process.poll() is not None:
            return None
        children = psutil.Process(process.pid).children()
        sent = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        if rng.random() < 1 / 3 and children:
            children[0].send_signal(sent)
            process.wait()
            return f"{sent.name} to the child" if child_was_killed(study) else None
        os.killpg(process.pid, sent)
        return sent.name if process.wait() in (-sent, 130) else None


def wait_for_a_moment(process: "subprocess.Popen[bytes]", study: Path, rng: random.Random, seconds: float) -> None:
    """Return at a random time of a whole run, or during or after a random one of the remaining steps."""
    if rng.random() < 0.5:
        time.sleep(rng.uniform(0.0, seconds))
        return
    done = trained(study).total()
    wanted = rng.randint(done, max(done, STEPS * TRIALS - 1))
    while process.poll() is None and trained(study).total() < wanted:
        time.sleep(0.05)
    time.sleep(rng.uniform(0.0, 0.5))


def child_was_killed(study: Path) -> bool:
    texts = [file.read_text() for file in (study / "trials").glob("*/trial.json")]
    reasons = [str(json.loads(text)["reason"]) for text in texts]
    return any("was killed (signal" in reason or "stopped as asked" in reason for reason in reasons)


def one_study(folder: Path, number: int, seed: int, interval: int, seconds: float, expected: dict[str, str]) -> Outcome:
    """Kill the run of one study until it reaches its end, and compare."""
    rng, study = random.Random(seed * 1_000_003 + number), folder / f"study-{number}"
    kills, problems, resumed = Counter[str](), list[str](), 0
    done: dict[str, str] = {}
    for attempt in range(MOST_PER_STUDY):
        before, begun = reached(study), begins(study)
        kind = kill(study, folder / "hook", interval, rng, seconds, named=(number + attempt) % 2 == 0)
        after = finished(study)
        problems += [f"{study.name}: {t} was done and is not what it was" for t in done if after.get(t) != done[t]]
        done |= after
        problems += [f"{study.name}: {t} step {s} stands {n} times" for (t, s), n in trained(study).items() if n > 1]
        for pack, starts in begins(study).items():
            for start in starts[len(begun.get(pack, [])) :][:1]:
                resumed += start > 0
                if before.get(pack, 0) - start > interval:
                    problems.append(f"{study.name}: {pack} had reached step {before[pack]} and went on from {start}")
        kills += Counter([kind] if kind else [])
        if len(done) == len(list((folder / "whole" / "trials").iterdir())):
            break
    last = subprocess.run(command(study, interval), capture_output=True, text=True, check=False, env=environment())
    if last.returncode:
        return Outcome(kills, resumed, [*problems, f"{study.name} did not reach its end: {last.stderr[-300:]}"])
    found = contents(study)
    problems += [f"{study.name}: {part} differs" for part in expected if found.get(part) != expected[part]]
    return Outcome(kills, resumed, problems)


def studies(folder: Path, args: argparse.Namespace, seconds: float, expected: dict[str, str]) -> Iterator[Outcome]:
    """Yield the outcomes of studies, `--jobs` at a time, until enough kills happened; begun studies finish."""
    numbers, kills = itertools.count(), 0
    with ThreadPoolExecutor(args.jobs) as pool:

        def begin() -> Future[Outcome]:
            return pool.submit(one_study, folder, next(numbers), args.seed, args.interval, seconds, expected)

        running = {begin() for _ in range(args.jobs)}
        while running:
            ended, running = wait(running, return_when=FIRST_COMPLETED)
            for future in ended:
                kills += future.result().kills.total()
                yield future.result()
                if kills < args.kills:
                    running.add(begin())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--interval", type=int, default=2, help="steps between checkpoints")
    parser.add_argument("--jobs", type=int, default=2, help="studies at a time")
    args = parser.parse_args()
    kills, problems, resumed, count = Counter[str](), list[str](), 0, 0
    with tempfile.TemporaryDirectory(prefix="rankscope-crash-") as name:
        folder = Path(name)
        (folder / "hook").mkdir()
        (folder / "hook" / "sitecustomize.py").write_text(HOOK)
        start = time.perf_counter()
        subprocess.run(
            command(folder / "whole", args.interval), check=True, stdout=subprocess.DEVNULL, env=environment()
        )
        seconds, expected = time.perf_counter() - start, contents(folder / "whole")
        print(f"a run that nobody kills: {seconds:.0f} s", flush=True)
        for outcome in studies(folder, args, seconds, expected):
            kills, problems = kills + outcome.kills, problems + outcome.problems
            resumed, count = resumed + outcome.resumed, count + 1
            print("".join(f"{problem}\n" for problem in outcome.problems), end="")
            print(
                f"{count} studies, {kills.total()} kills, {resumed} packs resumed, {len(problems)} problems", flush=True
            )
    print(f"{kills.total()} kills in {count} studies: {dict(kills)}; {resumed} packs went on from a checkpoint")
    print("\n".join(problems) or "no finished trial lost, no step twice, everything bitwise as without a kill")
    return int(bool(problems) or kills.total() < args.kills or not resumed)


if __name__ == "__main__":
    sys.exit(main())
