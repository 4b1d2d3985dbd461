"""rankscope and TRL's SFTTrainer with PEFT on one rank study: gain, time of a step, and memory, in one table.

    python benchmarks/compare_trl.py --out FILE.jsonl --model DIR --dataset ROWS --lengths 128,1024 --gain-steps 16
    python benchmarks/compare_trl.py --out FILE.jsonl                  # prints the tables of what was measured

Each measurement is a line of FILE as soon as it is there; a second call does only what is missing. Settings:

- rankscope: `rankscope run` in a child process, all ranks in one study, in float32 and in bfloat16
- TRL float32; TRL autocast (float32 weights, `bf16=True`); TRL bfloat16 (bfloat16 weights, `bf16=True`, adapters in
  float32 by PEFT's default): one rank after the other, the largest first, in one child process
- each of TRL's also grouped by length, at its best: in place of the rows of a batch those whose lengths are nearest to
  the batch's mean. So a step has as many real tokens as rankscope's, and next to no padding

TRL trains on rankscope's tokens in rankscope's order. Adapters start from the same values; optimizer, schedule and
clipping are the study's; the base's own dropout is off. So the losses of rankscope and TRL in float32 must agree: the
last table has their largest relative difference. Grouped batches are others, so their losses are not compared.

TRL's settings: no gradient checkpointing (TRL's default computes each forward twice), fused AdamW, no saving, no
trackers, and huge pages for torch's CPU allocator, as rankscope's own children have them. Everything else is TRL's
default, including entropy and token accuracy. On a CPU its loss scores every position, padding and prompt too, and no
setting changes that.

- s a step: all ranks together, the mean over all steps but the first, which only warms up. TRL's clock goes
  from on_step_begin to on_step_end, which excludes forming the batch and logging; rankscope's excludes logging only
- peak: ru_maxrss of wait4 (Linux), the high-water mark of resident memory of the setting's largest process
- private: the highest sum of anonymous memory over the setting's processes, sampled ten times a second: without the
  files that are mapped, such as libraries and weights
- padded: tokens that TRL computes for each real one in the steps that are timed
- gain: loss on held-out rows before training, less after `--gain-steps` steps, in nats a label token: from runs of
  their own that are not timed, of `--gain-ranks`, at the first length. All adapters are evaluated alike: by PEFT, over
  the base in float32, one row at a time. A grouped setting counts with the gain of its precision, because its batches
  differ; a model without gains of its own with those of the others
- limit: FLOPs of a step's products, LoRA's included and padding left out, at the rate of plain products of the model's
  shapes, in float32 and bfloat16, timed in each repeat in a process of its own

Repeats are interleaved: each runs all settings, one after the other. Tables show medians over repeats, and a ratio is
taken within each repeat first. The reference of the bars is the fastest TRL setting whose gain, averaged over ranks,
is at least 99% of TRL's in float32.
"""

import argparse
import json
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from rankscope.files import read_json, write_json
from rankscope.measure.cores import ENVIRONMENT
from rankscope.measure.machine import versions
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.study.metrics import read_rows
from rankscope.study.study import Study

OURS = ("rankscope float32", "rankscope bfloat16")
PRECISIONS = ("TRL float32", "TRL autocast", "TRL bfloat16")
GROUPED = ", grouped"
ARMS = (*OURS, *(f"{arm}{order}" for arm in PRECISIONS for order in ("", GROUPED)))
SEED = 0
LEAST_GAIN = 0.99
"""Share of TRL's gain in float32 that another setting must reach to have done the same work."""


class Process(NamedTuple):
    """Memory of a finished child process and its descendants."""

    peak_bytes: int
    private_bytes: int


def run_child(command: Sequence[str], folder: Path) -> Process:
    """Run a command to its end; `folder` takes its output and its cache of tokens."""
    environment = ENVIRONMENT | os.environ | {"RANKSCOPE_CACHE": str(folder / "cache")}
    log, ended, sampled = folder / "log.txt", threading.Event(), [0]

    def sample(identity: int) -> None:
        process = psutil.Process(identity)
        while not ended.wait(0.1):
            try:
                together = [process, *process.children(recursive=True)]
                kept = [one.memory_info() for one in together]
                sampled.append(sum(memory.rss - memory.shared for memory in kept))
            except psutil.Error:  # a process ended meanwhile
                continue

    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True) as process,
    ):
        sampler = threading.Thread(target=sample, args=(process.pid,), daemon=True)
        sampler.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            os.killpg(process.pid, signal.SIGTERM)  # with what it has started: an orphan would slow what runs next
            raise
        finally:
            ended.set()
        sampler.join()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
    return Process(usage.ru_maxrss * 1024, max(sampled))


class Case(NamedTuple):
    """One study, to be trained by every setting."""

    model: str
    dataset: str
    max_length: int
    ranks: list[int]
    steps: int
    batch_size: int
    learning_rate: float
    eval_rows: int

    def options(self) -> dict[str, Any]:
        names = ("model", "dataset", "max_length", "ranks", "steps", "batch_size")
        own = {"learning_rates": [self.learning_rate], "target_modules": "all-linear", "seeds": [SEED]}
        return {name: getattr(self, name) for name in names} | own

    def assignments(self) -> list[str]:
        return ["measure.profiles=false", "measure.answers=0", "training.evals=1", f"data.eval_rows={self.eval_rows}"]

    def spec(self) -> StudySpec:
        return assemble({}, self.options(), self.assignments())


def run_rankscope(case: Case, arm: str, folder: Path) -> tuple[dict[str, Any], Process]:
    """Run the study from the command line, in `folder`/study."""
    path, dtype = folder / "study", arm.rpartition(" ")[2]
    command = [sys.executable, "-m", "rankscope.cli", "run", "--out", str(path)]
    for name, value in case.options().items():
        command += [f"--{name.replace('_', '-')}", ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    for assignment in (*case.assignments(), f"model.dtype={dtype}"):
        command += ["--set", assignment]
    process = run_child(command, folder)
    study = Study.open(path)
    losses, packs, adapters, tokens = {}, {}, {}, [0] * case.steps
    for trial in study.spec.trials():
        rows = [row for row in read_rows(study.trial_folder(trial) / "metrics.jsonl") if "train_loss" in row]
        losses[trial.candidate.rank] = [row["train_loss"] for row in rows]
        packs[study.trial_record(trial).pack] = [row["step_seconds"] for row in rows]  # one time for a pack's trials
        adapters[trial.candidate.rank] = str(study.trial_folder(trial) / "adapter")
        tokens = [row["tokens"] for row in rows]
    flops = sum(read_json(path / "packs" / pack / "pack.json")["results"]["useful_flops"] for pack in packs)
    found = {
        "step_seconds": [sum(each) for each in zip(*packs.values(), strict=True)],
        "losses": losses,
        "flops": flops * statistics.fmean(tokens[1:]) / sum(tokens),  # of a step that is timed
        "adapters": adapters,
    }
    return found, process


def run_in_child(case: Case, python: str, job: str, folder: Path, **more: Any) -> tuple[dict[str, Any], Process]:
    """What a function of trl_jobs.py returns, run by `python` in a process of its own."""
    file = folder / "job.json"
    write_json(file, {"job": job, "case": case._asdict()} | more)
    process = run_child([python, str(Path(__file__).with_name("trl_jobs.py")), str(file)], folder)
    return read_json(folder / "result.json"), process


def train(case: Case, arm: str, python: str, folder: Path) -> tuple[dict[str, Any], Process]:
    if arm in OURS:
        return run_rankscope(case, arm, folder)
    return run_in_child(case, python, "train_with_trl", folder, arm=arm)


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(line.get(name) for name in ("kind", "model", "length", "arm", "repeat"))


class Log:
    """The measurements of one file, of which each is made once."""

    def __init__(self, file: Path, minutes: float) -> None:
        self.file, self.end = file, time.monotonic() + 60 * minutes
        self.lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def add(self, case: Case, work: Callable[[Path], dict[str, Any]], **values: Any) -> None:
        """Append what `work` returns of a temporary folder, unless the file has it, or the time is over."""
        line = {"model": Path(case.model).name, "length": case.max_length} | values
        line["case"] = case._asdict() | {"model": line["model"], "dataset": Path(case.dataset).name}
        for known in self.lines:
            if key(known) == key(line):
                if known["case"] != line["case"]:
                    raise SystemExit(f"{self.file} has {key(line)} of {known['case']}: use another --out")
                return
        if time.monotonic() > self.end:
            return
        with tempfile.TemporaryDirectory(prefix="rankscope-trl-") as folder:
            line |= work(Path(folder)) | {"versions": versions(), "date": f"{datetime.now(UTC):%Y-%m-%d}"}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self.lines.append(json.loads(json.dumps(line)))
        print(*(value for value in key(line) if value is not None), flush=True)


def measure(args: argparse.Namespace, log: Log) -> None:
    """Measure what the file does not have yet."""

    def rates(case: Case, folder: Path) -> dict[str, Any]:
        return run_in_child(case, sys.executable, "product_rates", folder)[0]

    def times(case: Case, arm: str, folder: Path) -> dict[str, Any]:
        found, process = train(case, arm, args.trl_python, folder)
        del found["adapters"]
        return found | process._asdict()

    def gains(case: Case, arm: str, folder: Path) -> dict[str, Any]:
        adapters = train(case, arm, args.trl_python, folder)[0]["adapters"]
        return run_in_child(case, sys.executable, "held_out_losses", folder, adapters=adapters)[0]

    def case_of(length: int, ranks: list[int], steps: int, eval_rows: int) -> Case:
        return Case(args.model, args.dataset, length, ranks, steps, args.batch_size, args.learning_rate, eval_rows)

    for arm in (arm for arm in args.arms if args.gain_steps and not arm.endswith(GROUPED)):
        case = case_of(args.lengths[0], args.gain_ranks, args.gain_steps, args.gain_rows)
        log.add(case, partial(gains, case, arm), kind="gain", arm=arm)
    for repeat in range(args.repeats):
        for case in (case_of(length, args.ranks, args.steps, 8) for length in args.lengths):
            log.add(case, partial(rates, case), kind="rate", repeat=repeat)
            for arm in args.arms:
                log.add(case, partial(times, case, arm), kind="time", arm=arm, repeat=repeat)


def seconds(line: dict[str, Any]) -> float:
    """Seconds of a step after the first, all ranks together."""
    return statistics.fmean(line["step_seconds"][1:])


Times = dict[str, dict[int, dict[str, Any]]]
"""Measurements of one model and length: by setting, by repeat."""


def median(times: Times, arm: str, value: Callable[[dict[str, Any]], float]) -> float:
    return statistics.median(map(value, times[arm].values()))


def ratio(times: Times, arm: str, ours: str, value: Callable[[dict[str, Any]], float]) -> float | None:
    """Median over the repeats that have both of `arm` over `ours`."""
    both = times.get(arm, {}).keys() & times.get(ours, {}).keys()
    return statistics.median(value(times[arm][r]) / value(times[ours][r]) for r in both) if both else None


def mean_gains(lines: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Gain of each setting, averaged over ranks."""
    gains = (line for line in lines if line["kind"] == "gain")
    return {line["arm"]: line["before"] - statistics.fmean(line["after"].values()) for line in gains}


def as_good(gains: dict[str, float]) -> set[str]:
    """Settings that reach 99% of TRL's gain in float32, grouped ones with their precision; float32 always does."""
    target = gains.get(PRECISIONS[0], math.inf)
    good = {arm for arm, gain in gains.items() if gain >= LEAST_GAIN * target} | {OURS[0], PRECISIONS[0]}
    return {arm for arm in ARMS if arm.removesuffix(GROUPED) in good}


def setting_rows(model: str, length: int, times: Times, gains: dict[str, float], best: str) -> Iterator[str]:
    """One line a setting; the reference of the bars is in bold."""
    for arm in (arm for arm in ARMS if arm in times):
        peak, private, padded = (
            median(times, arm, value)
            for value in (
                lambda line: line["peak_bytes"] / 1e9,
                lambda line: line["private_bytes"] / 1e9,
                lambda line: line.get("padded", 1.0),
            )
        )
        gain = gains.get(arm.removesuffix(GROUPED))
        cells = [model, str(length), f"**{arm}**" if arm == best else arm, "–" if gain is None else f"{gain:.4f}"]
        cells += [f"{value:.2f}" for value in (median(times, arm, seconds), peak, private, padded)]
        yield f"| {' | '.join(cells)} |"


def bar_rows(model: str, length: int, times: Times, best: str, rates: Sequence[dict[str, Any]]) -> Iterator[str]:
    """One line for each of rankscope's dtypes: ratios to the reference and to TRL in float32, and the limit."""
    for ours in (ours for ours in OURS if ours in times):
        rate = statistics.median(line["rates"][ours.rpartition(" ")[2]] for line in rates)
        limit = median(times, ours, lambda line: line["flops"]) / rate
        quantities = (
            ratio(times, best, ours, seconds),
            ratio(times, best, ours, lambda line: line["peak_bytes"]),
            ratio(times, best, ours, lambda line: line["private_bytes"]),
            ratio(times, PRECISIONS[0], ours, seconds),
        )
        cells = [model, str(length), ours, best, *("–" if value is None else f"{value:.2f}" for value in quantities)]
        cells += [f"{rate / 1e9:,.0f}", f"{limit:.2f}", f"{limit / median(times, ours, seconds):.0%}"]
        if best in times:
            cells.append(f"{median(times, best, seconds) / limit:.1f}")
        yield f"| {' | '.join(cells)} |"


def loss_difference(times: Times) -> float | None:
    """Largest relative difference between the losses of rankscope and TRL, both in float32."""
    pairs = [(times.get(arm, {}).get(0, {}).get("losses", {})) for arm in (OURS[0], PRECISIONS[0])]
    both = [zip(pairs[0][rank], pairs[1][rank], strict=True) for rank in pairs[0].keys() & pairs[1].keys()]
    return max((abs(a - b) / abs(b) for each in both for a, b in each), default=None)


def tables(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """All tables, in Markdown."""
    gains, good = mean_gains(lines), as_good(mean_gains(lines))
    settings, bars, losses = [], [], []
    for model, length in dict.fromkeys((line["model"], line["length"]) for line in lines if line["kind"] == "time"):
        here = [line for line in lines if (line["model"], line["length"]) == (model, length)]
        times: Times = {}
        for line in (line for line in here if line["kind"] == "time"):
            times.setdefault(line["arm"], {})[line["repeat"]] = line
        theirs = [arm for arm in times if arm in good and arm not in OURS]
        best = min(theirs, key=lambda arm: median(times, arm, seconds), default="none")
        own = mean_gains(here)
        settings += setting_rows(model, length, times, own, best)
        bars += bar_rows(model, length, times, best, [line for line in here if line["kind"] == "rate"])
        if (difference := loss_difference(times)) is not None:
            losses.append(f"{model} at {length}: {difference:.1e}")
    yield "| model | length | setting | gain | s a step | peak, GB | private, GB | padded |"
    yield "|---|---:|---|---:|---:|---:|---:|---:|"
    yield from settings
    equal = ", ".join(arm for arm in ARMS if arm in good) if gains else "not measured; float32 alone counts"
    yield f"\nSettings that gain as much as TRL in float32: {equal}.\n"
    yield (
        "| model | length | rankscope in | reference | time, bar 3 | peak, bar 2 | private | TRL float32, bar 4.5 | "
        "plain products, GFLOP/s | limit, s | share of it reached | reference / limit |"
    )
    yield "|---|---:|---|---|---:|---:|---:|---:|---:|---:|---:|---:|"
    yield from bars
    if gains:
        yield "\n| setting | steps | loss before | after, by rank | mean gain |\n|---|---:|---:|---|---:|"
    for line in (line for line in lines if line["kind"] == "gain"):
        after = ", ".join(
            f"{rank}: {loss:.4f}" for rank, loss in sorted(line["after"].items(), key=lambda x: int(x[0]))
        )
        cells = (line["arm"], str(line["case"]["steps"]), f"{line['before']:.4f}", after, f"{gains[line['arm']]:.4f}")
        yield f"| {' | '.join(cells)} |"
    found = "; ".join(losses) or "not measured"
    yield f"\nLargest relative difference of losses, rankscope and TRL in float32: {found}.\n"
    machines = dict.fromkeys("{cpu}, {cores} cores".format(**line["machine"]) for line in lines if "machine" in line)
    packages = ("torch", "transformers", "peft", "rankscope")
    used = dict.fromkeys(f"{name} {line['versions'][name]}" for name in packages for line in lines)
    used |= dict.fromkeys(f"TRL {line['trl']}" for line in lines if "trl" in line)
    dates = sorted({line["date"] for line in lines})
    yield f"{'; '.join(machines)}; {', '.join(used)}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}."


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that children are ended, too
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a JSONL file, of measurements and to be added to")
    parser.add_argument("--model", help="a folder or a hub id; without it only the tables are printed")
    parser.add_argument("--dataset", default="embedded", help="embedded, a file or a hub id")
    parser.add_argument("--ranks", type=numbers, default=[8, 128, 256])
    parser.add_argument("--lengths", type=numbers, default=[128, 1024])
    for option, default in (("--batch-size", 8), ("--steps", 3), ("--repeats", 2)):
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--gain-steps", type=int, default=0, help="0: no gain is measured")
    parser.add_argument("--gain-ranks", type=numbers, default=[8])
    parser.add_argument("--gain-rows", type=int, default=32, help="held-out rows of the gain")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--arms", type=lambda text: text.split(";"), default=ARMS, help=f"of {'; '.join(ARMS)}")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no measurement after so many")
    parser.add_argument("--trl-python", default=sys.executable, help="a Python that has TRL, if this one has not")
    args = parser.parse_args()
    if args.out is None or not set(args.arms) <= set(ARMS) or args.steps < 2:
        parser.error(f"--out is needed, --arms are of {'; '.join(ARMS)}, and --steps at least 2: the first is apart")
    log = Log(args.out, args.minutes)
    if args.model:
        measure(args, log)
    if not log.lines:
        parser.error(f"{args.out} has no measurements: give --model")
    print(*tables(log.lines), sep="\n")


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


if __name__ == "__main__":
    main()
