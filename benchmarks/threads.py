"""Seconds of a step by the way in which OpenMP's threads wait for each other, on an idle machine and with a core taken.

    python benchmarks/threads.py

Processes with two threads train the embedded model (rank 8, batches of 8) in turns, a few seconds each: with libgomp's
default, with passive waiting, and as jobs are started (`rankscope.measure.cores.ENVIRONMENT`). Then they do so again
while another process, pinned to the first core, loops. Exit code 1 where a job's step
takes more than 2.5 times as long.
"""

import json
import os
import subprocess
import sys
import time
from statistics import median

import torch

from rankscope.data.batches import total_steps
from rankscope.measure.cores import ENVIRONMENT
from rankscope.model.load import load_model
from rankscope.spec.candidates import Trial
from rankscope.spec.options import assemble
from rankscope.train.loop import choose_engine
from rankscope.train.prepare import prepare_data
from rankscope.train.step import make_train_state, train_step

SPINNING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_WAIT_POLICY")
WAITING = {
    "libgomp's default": {},
    "`OMP_WAIT_POLICY=passive`": {"OMP_WAIT_POLICY": "passive"},
    "as jobs are started": {name: value for name, value in ENVIRONMENT.items() if name in SPINNING},
}
TURNS, SECONDS, MOST_STEPS = 6, 3.0, 8
LIMIT = 2.5


def train() -> None:
    """For each line of standard input, print the wall and processor seconds of some steps."""
    torch.set_num_threads(2)
    spec = assemble({}, {"model": "embedded", "dataset": "embedded", "ranks": [8], "seeds": [0], "batch_size": 8}, [])
    data, model = prepare_data(spec), load_model(spec.model)
    trial, steps = Trial(candidate=spec.candidates()[0], seed=0), total_steps(spec.training, len(data.train))
    state = make_train_state(model, trial, spec.training, steps)
    engine = choose_engine(model, [state], spec.training).engine
    train_step(engine, [state], data.train, spec.training, 0)
    print("ready", flush=True)
    for _ in sys.stdin:
        seconds: list[tuple[float, float]] = []
        end = time.perf_counter() + SECONDS
        while not seconds or (len(seconds) < MOST_STEPS and time.perf_counter() < end):
            cpu, start = time.process_time(), time.perf_counter()
            train_step(engine, [state], data.train, spec.training, len(seconds))
            seconds.append((time.perf_counter() - start, time.process_time() - cpu))
        print(json.dumps(seconds), flush=True)


def take_turns(processes: dict[str, "subprocess.Popen[str]"]) -> dict[str, tuple[float, float]]:
    """Median wall and processor seconds of a step of each."""
    found: dict[str, list[list[float]]] = {name: [] for name in processes}
    for _ in range(TURNS):
        for name, process in processes.items():
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("\n")
            process.stdin.flush()
            found[name] += json.loads(process.stdout.readline())
    return {name: (median(one[0] for one in each), median(one[1] for one in each)) for name, each in found.items()}


def main() -> None:
    inherited = {name: value for name, value in os.environ.items() if name not in SPINNING}
    command, processes = [sys.executable, __file__, "train"], {}
    for name, own in WAITING.items():
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        processes[name] = subprocess.Popen(command, text=True, env=inherited | own, **pipes)
    for process in processes.values():
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    idle = take_turns(processes)
    loop = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\nwhile True: pass"
    busy_process = subprocess.Popen([sys.executable, "-c", loop])
    try:
        busy = take_turns(processes)
    finally:
        for process in (busy_process, *processes.values()):
            process.kill()
            process.wait()
    print("| waiting | seconds | core taken | times as long | processor seconds | core taken |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in processes:
        (wall, cpu), (busy_wall, busy_cpu) = idle[name], busy[name]
        print(f"| {name} | {wall:.3f} | {busy_wall:.3f} | {busy_wall / wall:.2f} | {cpu:.3f} | {busy_cpu:.3f} |")
    sys.exit(busy[name][0] > LIMIT * idle[name][0])  # the last is that of jobs


if __name__ == "__main__":
    train() if sys.argv[1:] else main()
