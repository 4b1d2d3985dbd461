"""Differences in time that are found on a busy machine: planted ones, and none.

    python benchmarks/time_power.py --runs 200
    python benchmarks/time_power.py --runs 100 --first 100 --out second.json
    python benchmarks/time_power.py --read first.json second.json

Each run times four adapters of one rank over the embedded model, while another process keeps one core busy (`--load 0`:
none does). Of these, two take 5% and 20% longer: after each step they loop for that share of the processor time
that the step took. Told apart from the control are:

- now: candidates whose ratio to the control differs from 1 by more than `noise_of`, with rounds as `rankscope run` has
  them (`rankscope.measure.timing.take_turns`), but for at most `--extra` seconds beyond the 24, and without evaluations
- before: two blocks of 8 steps each, one candidate after the other in random order, and differences above (highest -
  lowest) / mean of the equal one's and the control's medians, as rankscope did before. In one process, not in eight

Exit code 1 where +5% is found in fewer than 80% of the runs, +20% not in all, or equal ones in more than 5%.
"""

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in the processes of `rankscope run`

import pandas as pd
import torch

from rankscope.analysis.costs import noise_of
from rankscope.data.batches import total_steps
from rankscope.files import write_json
from rankscope.measure import timing
from rankscope.measure.machine import hardware, versions
from rankscope.model.load import load_model
from rankscope.spec.candidates import CONTROL, Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.train.engine import Engine
from rankscope.train.loop import choose_engine
from rankscope.train.prepare import prepare_data
from rankscope.train.step import TrainState, make_train_state

PLANTED = {CONTROL: 0.0, "equal": 0.0, "+5%": 0.05, "+20%": 0.2}
BARS = {"equal": (0.0, 0.05), "+5%": (0.8, 1.0), "+20%": (1.0, 1.0)}  # least and largest share of runs

Members = dict[str, TrainState]


def make_members(spec: StudySpec, model: Any, steps: int) -> Members:
    """An adapter for each name of `PLANTED`, all of one rank; another rate gives each a name of its own."""
    (one,) = spec.candidates()
    rates = {name: one.learning_rate * (1 + number / 1000) for number, name in enumerate(PLANTED)}
    trials = {
        name: Trial(candidate=one.model_copy(update={"learning_rate": rate}), seed=0) for name, rate in rates.items()
    }
    return {name: make_train_state(model, trial, spec.training, steps, spec.model.id) for name, trial in trials.items()}


@contextmanager
def planted(members: Members) -> Iterator[None]:
    """Have `take_turns` take longer for the members that are to."""
    own, shares = timing.train_step, {member.trial.name: PLANTED[name] for name, member in members.items()}

    def step(engine: Engine, states: list[TrainState], *rest: Any) -> Any:
        start = time.process_time()
        metrics = own(engine, states, *rest)
        now = time.process_time()
        end = now + shares[states[0].trial.name] * (now - start)
        while time.process_time() < end:
            pass
        return metrics

    timing.train_step = step
    try:
        yield
    finally:
        timing.train_step = own


@contextmanager
def busy_core(load: bool) -> Iterator[None]:
    """Keep the first core busy."""
    if not load:
        yield
        return
    core = min(os.sched_getaffinity(0))
    pinned = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", pinned])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def differences_now(rounds: timing.Rounds) -> dict[str, float]:
    """Relative difference of each from the control, over the noise: above 1 where it is told apart."""
    ratios = {name: timing.step_ratio(rounds, name) for name in PLANTED}
    table = pd.DataFrame(
        {"control": name == CONTROL, "rounds": len(rounds.turns), "tokens_per_second": 1.0, "step_ratio_se": ratio.se}
        for name, ratio in ratios.items()
    )
    noise = noise_of(table, "tokens_per_second")
    assert noise is not None
    changes = {name: ratios[name].ratio - 1 for name in BARS}
    return {name: (max(1 + change, 1 / (1 + change)) - 1) / noise.floor for name, change in changes.items()}


def differences_before(medians: Mapping[str, list[float]]) -> dict[str, float]:
    same = [*medians["equal"], *medians[CONTROL]]
    floor = (max(same) - min(same)) / statistics.fmean(same)
    of_control = statistics.median(medians[CONTROL])
    return {name: abs(statistics.median(medians[name]) / of_control - 1) / floor for name in BARS}


def run(number: int, spec: StudySpec, members: Members, engine: Engine, data: Any, before: bool) -> dict[str, Any]:
    spec = spec.model_copy(update={"seeds": (number,)})
    held_out = timing.first_examples(data.eval, 1)
    start = time.perf_counter()
    rounds = timing.take_turns(spec, members, engine, data.train, held_out)
    seconds = time.perf_counter() - start
    medians: dict[str, list[float]] = {name: [] for name in PLANTED}
    shuffle = random.Random(number)
    for _ in range(2 if before else 0):
        for name in shuffle.sample(list(PLANTED), len(PLANTED)):
            block = [
                timing._turn(engine, members[name], spec, data.train, step, held_out)[0].step for step in range(10)
            ]
            medians[name].append(statistics.median(block[2:]))
    return {
        "now": differences_now(rounds),
        "before": differences_before(medians) if before else None,
        "rounds": len(rounds.turns),
        "seconds": seconds,
        "cpu_pressure": rounds.cpu_pressure,
        "ratios": {name: timing.step_ratio(rounds, name).ratio for name in PLANTED},
        "steps": {name: rounds.seconds(name, "step").tolist() for name in PLANTED},
        "cpu": {name: rounds.seconds(name, "step_cpu").tolist() for name in PLANTED},
    }


def table(runs: list[dict[str, Any]]) -> tuple[str, bool]:
    """Shares of runs in which each was told apart, and whether all bars are kept."""
    lines, kept = ["| planted | before | now | bar |", "|---|---:|---:|---:|"], True
    for name, (least, most) in BARS.items():
        found = {how: [one[how][name] > 1 for one in runs if one[how]] for how in ("before", "now")}
        before, now = (statistics.fmean(each) if each else math.nan for each in found.values())
        bar = f"at most {most:.0%}" if least == 0 else f"at least {least:.0%}"
        lines.append(f"| {name} | {before:.1%} | {now:.1%} | {bar} |")
        kept &= least <= now <= most
    rounds, pressure = (statistics.median(one[name] for one in runs) for name in ("rounds", "cpu_pressure"))
    step = statistics.median(second for one in runs for second in one["steps"][CONTROL])
    lines.append(
        f"\n{len(runs)} runs of {rounds:.0f} rounds in {statistics.median(one['seconds'] for one in runs):.1f} s"
    )
    lines[-1] += (
        f" (medians); a step takes {step * 1000:.0f} ms; something waited for a core {pressure:.0%} of the time."
    )
    return "\n".join(lines), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first run, its seed")
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument("--extra", type=float, default=2.0)
    parser.add_argument("--before", type=int, default=40, help="runs that are measured as before too")
    parser.add_argument("--load", type=int, choices=(0, 1), default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path, nargs="+", help="show the runs of these files instead")
    arguments = parser.parse_args()
    if arguments.read:
        runs = [one for file in arguments.read for one in json.loads(file.read_text())["runs"]]
    else:
        runs = measure(arguments)
    text, kept = table(runs)
    print(text)
    sys.exit(not kept)


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    options = {"model": "embedded", "dataset": "embedded", "ranks": [8], "seeds": [0], "batch_size": 1}
    sets = [f"measure.rounds={arguments.rounds}", "data.max_length=32"]
    spec = assemble({}, options, sets)
    data, model = prepare_data(spec), load_model(spec.model)
    members = make_members(spec, model, total_steps(spec.training, len(data.train)))
    engine = choose_engine(model, list(members.values()), spec.training).engine
    timing.MAX_EXTRA_SECONDS = arguments.extra
    engine.evaluate = lambda *_: []  # type: ignore[method-assign]  # its time is not looked at here
    runs = []
    with busy_core(bool(arguments.load)), planted(members):
        for number in range(arguments.first, arguments.first + arguments.runs):
            runs.append(run(number, spec, members, engine, data, number < arguments.before))
            if arguments.out:
                machine = hardware() | {"torch_threads": torch.get_num_threads()}
                write_json(arguments.out, {"machine": machine, "versions": versions(), "runs": runs})
    return runs


if __name__ == "__main__":
    main()
