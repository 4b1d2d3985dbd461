"""Differences in time that are found on a busy machine: planted ones, and none.

    python benchmarks/time_power.py --runs 200 --out runs.json
    python benchmarks/time_power.py --read runs.json

This process is pinned to one core, and so is another that loops all the time (`--load 0`: none does). Each run times
four adapters of rank 8 over a Llama of two layers, of which two take 5% and 20% longer: after each step they loop for
that share of the processor time that it took. Told apart from the control are:

- now: candidates whose ratio to the control differs from 1 by more than `noise_of`, after the rounds of
  `rankscope.measure.timing.take_turns`, but with at most `--extra` seconds beyond the first 24, not 120
- before: two blocks of 8 steps each, one candidate after the other in random order, and differences above (highest -
  lowest) / mean of the equal one's and the control's medians, as rankscope did before. In one process, not in eight

Exit code 1 where +5% is found in fewer than 80% of the runs, +20% not in all, or equal ones in more than 5%.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rankscope.analysis.costs import noise_of
from rankscope.data.tokens import Example, Tokens
from rankscope.files import write_json
from rankscope.measure import timing
from rankscope.measure.machine import hardware, versions
from rankscope.model.load import freeze
from rankscope.spec.candidates import CONTROL, Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.options import assemble
from rankscope.train.engine import Engine
from rankscope.train.loop import choose_engine
from rankscope.train.step import TrainState, make_train_state

PLANTED = {CONTROL: 0.0, "equal": 0.0, "+5%": 0.05, "+20%": 0.2}
BARS = {"equal": (0.0, 0.05), "+5%": (0.8, 1.0), "+20%": (1.0, 1.0)}  # least and largest share of runs

STEPS = 500

Members = dict[str, TrainState]


def tiny_model() -> Any:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return freeze(LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **shape)), torch.float32)


def some_tokens(count: int = 500) -> Tokens:
    draw = np.random.default_rng(0)
    ids = [draw.integers(3, 256, draw.integers(10, 40)).astype(np.int32) for _ in range(count)]
    return Tokens.from_examples([Example(each, np.arange(len(each)) > 4) for each in ids])


def make_members(spec: StudySpec, model: Any) -> Members:
    """An adapter for each name of `PLANTED`, all of one rank; another rate gives each a name of its own."""
    (one,) = spec.candidates()
    rates = {name: one.learning_rate * (1 + number / 1000) for number, name in enumerate(PLANTED)}
    candidates = {name: one.model_copy(update={"learning_rate": rate}) for name, rate in rates.items()}
    trials = {name: Trial(candidate=candidate, seed=0) for name, candidate in candidates.items()}
    return {name: make_train_state(model, trial, spec.training, STEPS) for name, trial in trials.items()}


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
def one_core(load: bool) -> Iterator[None]:
    """Keep this process on one core, and that core busy."""
    os.sched_setaffinity(0, [max(os.sched_getaffinity(0))])
    if not load:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])  # inherits the core
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
    floor = (max(same) - min(same)) / fmean(same)
    return {name: abs(median(medians[name]) / median(medians[CONTROL]) - 1) / floor for name in BARS}


def run(number: int, spec: StudySpec, members: Members, engine: Engine, tokens: Tokens, before: bool) -> dict[str, Any]:
    spec = spec.model_copy(update={"seeds": (number,)})
    held_out = timing.first_examples(tokens, 1)
    start = time.perf_counter()
    rounds = timing.take_turns(spec, members, engine, tokens, held_out)
    seconds = time.perf_counter() - start
    medians: dict[str, list[float]] = {name: [] for name in PLANTED}
    shuffle = random.Random(number)
    for _ in range(2 if before else 0):
        for name in shuffle.sample(list(PLANTED), len(PLANTED)):
            turns = [timing._turn(engine, members[name], spec, tokens, step, held_out)[0] for step in range(10)]
            medians[name].append(median(turn.step for turn in turns[2:]))
    return {
        "now": differences_now(rounds),
        "before": differences_before(medians) if before else None,
        "rounds": len(rounds.turns),
        "seconds": seconds,
        "cpu_pressure": rounds.cpu_pressure,
        "clock": rounds.clock,
        "steps": {name: rounds.seconds(name, "step").tolist() for name in PLANTED},
        "cpu": {name: rounds.seconds(name, "step_cpu").tolist() for name in PLANTED},
    }


def table(runs: list[dict[str, Any]]) -> tuple[str, bool]:
    """Runs in which each was told apart, and whether all bars are kept."""
    lines, kept = ["| planted | before | now | bar |", "|---|---:|---:|---:|"], True
    for name, (least, most) in BARS.items():
        told = {how: [one[how][name] > 1 for one in runs if one[how]] for how in ("before", "now")}
        shares = [f"{sum(each)} of {len(each)} ({fmean(each):.1%})" if each else "" for each in told.values()]
        bar = f"at most {most:.0%}" if least == 0 else f"at least {least:.0%}"
        lines.append(f"| {name} | {' | '.join(shares)} | {bar} |")
        kept &= least <= fmean(told["now"]) <= most
    rounds, pressure, seconds = (median(one[name] for one in runs) for name in ("rounds", "cpu_pressure", "seconds"))
    wall, cpu = (1000 * median(second for one in runs for second in one[of][CONTROL]) for of in ("steps", "cpu"))
    lines.append(
        f"\nMedians: {rounds:.0f} rounds in {seconds:.1f} s; a step takes {wall:.1f} ms, {cpu:.1f} ms of a processor; "
        f"something waited for a processor {pressure:.0%} of the time."
    )
    return "\n".join(lines), kept


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    options = {"model": "embedded", "dataset": "embedded", "ranks": [8], "seeds": [0], "batch_size": 2, "steps": STEPS}
    spec, model, tokens = assemble({}, options, []), tiny_model(), some_tokens()
    members = make_members(spec, model)
    engine = choose_engine(model, list(members.values()), spec.training).engine
    timing.MAX_EXTRA_SECONDS = arguments.extra
    engine.evaluate = lambda *_: []  # type: ignore[method-assign]  # its time is not looked at here
    runs = []
    with one_core(bool(arguments.load)), planted(members):
        for number in range(arguments.runs):
            runs.append(run(number, spec, members, engine, tokens, number < arguments.before))
            if arguments.out:
                write_json(arguments.out, {"machine": hardware(), "versions": versions(), "runs": runs})
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--extra", type=float, default=2.0)
    parser.add_argument("--before", type=int, default=40, help="runs that are also measured as before")
    parser.add_argument("--load", type=int, choices=(0, 1), default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--read", type=Path, help="show the runs of this file instead")
    arguments = parser.parse_args()
    runs = json.loads(arguments.read.read_text())["runs"] if arguments.read else measure(arguments)
    text, kept = table(runs)
    print(text)
    sys.exit(not kept)


if __name__ == "__main__":
    main()
