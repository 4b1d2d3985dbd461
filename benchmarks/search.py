"""Success of a search within a third of a grid's tokens: does it find the grid's best?

    python benchmarks/search.py grid      trains the grid once, and keeps its held-out losses (docs/results/search.json)
    python benchmarks/search.py replay    searches over these curves, with many seeds, against random search
    python benchmarks/search.py real      one search that trains, against its replay

The grid: the embedded model and data, 6 ranks by 5 learning rates, one seed. A replay runs the search's own driver
with losses from the grid's curves instead of training. The budget is a third of the grid's training tokens. A search
succeeds if a candidate that it trained to the end is within the margin (1%) of the grid's best.

Among the grid's 30 candidates that is easy, so the benchmark also has smaller budgets and a second space: all learning
rates between the grid's, with interpolated losses.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rankscope.data.tokens import TokenizedData
from rankscope.jobs.local import LocalLauncher
from rankscope.model.load import load_model
from rankscope.search.driver import drive
from rankscope.search.run import run
from rankscope.search.sampling import DONE, make_study, point_of
from rankscope.search.space import Budget, SearchSpec, SearchTrial, resolve_search
from rankscope.search.trainer import PackTrainer, step_tokens
from rankscope.spec.options import read_study_file
from rankscope.train.prepare import prepare_data

DEMO = Path(__file__).parents[1] / "src/rankscope/demo/study.yaml"
CURVES = Path(__file__).parents[1] / "docs/results/search.json"
RANKS, RATES = (4, 8, 16, 32, 64, 128), (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
STEPS, SLOTS = 36, 4
MARGIN = 0.01
PARTS = (3, 5, 8)
"""Budgets, as shares of the grid's tokens."""
RECORDED = (4, 9, 12, 18, 36)
"""Steps at which held-out losses are measured: the rungs of several reductions, and the end."""

SETTINGS = {
    "TPE, halving": {"sampler": "tpe", "pruner": "halving"},
    "TPE": {"sampler": "tpe", "pruner": "none"},
    "random, halving": {"sampler": "random", "pruner": "halving"},
    "random": {"sampler": "random", "pruner": "none"},
}


def spec_of(seed: int = 0, between: bool = False, **changes: Any) -> SearchSpec:
    """Return the search over the grid's candidates, or also `between` its learning rates; `seed` is the sampler's, and
    training's is 0."""
    values = {name: value for name, value in read_study_file(DEMO).items() if name not in ("ranks", "learning_rates")}
    options = {"ranks": RANKS, "learning_rates": "1e-4..1e-2" if between else RATES, "steps": STEPS, "trials": 1}
    sets = ("training.trials_per_pack=4", "data.eval_rows=96")  # as when the grid in docs/results was trained
    return resolve_search(values, options, sets).model_copy(update={"seed": seed, **changes})


def train_grid(spec: SearchSpec, data: TokenizedData) -> dict[str, Any]:
    """Train the grid; return every candidate's held-out losses at `RECORDED` steps, and the tokens of each step."""
    trainer = PackTrainer(load_model(spec.study.model), spec, data, SLOTS)
    curves, points, start = [], spec.space.points(), time.perf_counter()
    trials = [spec.trial(point, number) for number, point in enumerate(points)]
    for first in range(0, len(trials), SLOTS):
        pack = trials[first : first + SLOTS]
        names = [asked.name for asked in pack]
        losses: dict[str, dict[int, float]] = {name: {} for name in names}
        for asked in pack:
            trainer.add(asked)
        for step in range(STEPS):
            trained = trainer.step(dict.fromkeys(names, step))
            assert all(math.isfinite(loss) for loss in trained.values()), "none of the grid diverges"
            if step + 1 in RECORDED:
                for name, loss in trainer.evaluate(dict.fromkeys(names, step + 1)).items():
                    losses[name][step + 1] = loss
        for asked in pack:
            trainer.remove(asked.name)
            place = {"rank": asked.candidate.rank, "learning_rate": asked.candidate.learning_rate}
            curves.append(place | {"losses": losses[asked.name]})
        print(f"{len(curves)} of {len(points)}, {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return {"steps": STEPS, "step_tokens": step_tokens(spec, data), "curves": curves}


class Replay:
    """A `PackTrainer` over recorded curves; between two learning rates the losses lie on a line
    over their logarithm."""

    def __init__(self, curves: Mapping[tuple[int, float], Mapping[int, float]]) -> None:
        self.curves = curves
        self.training: dict[str, Mapping[int, float]] = {}

    def add(self, asked: SearchTrial) -> None:
        rank, rate = asked.candidate.rank, math.log(asked.candidate.learning_rate)
        known = [self.curves[rank, each] for each in RATES]
        self.training[asked.name] = {
            step: float(np.interp(rate, np.log(RATES), [curve[step] for curve in known])) for step in RECORDED
        }

    def remove(self, name: str) -> None:
        del self.training[name]

    def step(self, steps: Mapping[str, int]) -> dict[str, float]:
        return dict.fromkeys(steps, 1.0)

    def evaluate(self, steps: Mapping[str, int]) -> dict[str, float]:
        return {name: self.training[name][step] for name, step in steps.items()}


class Found(NamedTuple):
    """Result of one search."""

    regret: float
    """Regret of its best candidate, as a share of the grid's best loss; infinity if none was trained to its end."""
    share: float
    """Share of the grid's tokens until a candidate within the margin was done; infinity if none was."""
    begun: int
    stopped: int
    best: tuple[int, float]


class Grid(NamedTuple):
    step_tokens: list[int]
    curves: dict[tuple[int, float], dict[int, float]]

    @classmethod
    def read(cls) -> "Grid":
        record = json.loads(CURVES.read_text())
        curves = {
            (curve["rank"], curve["learning_rate"]): {int(step): loss for step, loss in curve["losses"].items()}
            for curve in record["curves"]
        }
        return cls(record["step_tokens"], curves)

    @property
    def best(self) -> float:
        return min(curve[STEPS] for curve in self.curves.values())

    @property
    def tokens(self) -> int:
        return sum(self.step_tokens) * len(self.curves)


def replay(grid: Grid, slots: int, part: int = 3, **changes: Any) -> Found:
    """Replay one search over the curves, within a third, or another share, of the grid's tokens."""
    spec = spec_of(budget=Budget(tokens=grid.tokens // part), **changes)
    study, spent, first, best, of = make_study(spec), 0, float("inf"), float("inf"), (0, 0.0)
    begun: set[str] = set()
    stopped = 0
    for moment in drive(study, spec, Replay(grid.curves), grid.step_tokens, slots):
        spent = moment.spent.tokens
        begun |= moment.losses.keys()
        for name, how in moment.ended.items():
            stopped += how != DONE
            if how == DONE and moment.held_out[name] < best:
                best = moment.held_out[name]
                number = int(name[1:].split("-")[0])
                of = point_of(study.trials[number])[:2]
                if best <= grid.best * (1 + MARGIN):
                    first = min(first, spent / grid.tokens)
    assert spent <= grid.tokens // part
    return Found(best / grid.best - 1, first, len(begun), stopped, of)


def show_grid(grid: Grid) -> Iterator[str]:
    yield "| rank | " + " | ".join(f"{rate:g}" for rate in RATES) + " |"
    yield "|---:|" + "---:|" * len(RATES)
    for rank in RANKS:
        yield (
            f"| {rank} | "
            + " | ".join(f"{grid.curves[rank, rate][STEPS] / grid.best - 1:.2%}" for rate in RATES)
            + " |"
        )


def show_replays(grid: Grid, slots: int, seeds: int, between: bool) -> Iterator[str]:
    """Yield, for each setting and budget, the share of seeds within the margin, the mean regret and the worst."""
    yield f"| of {seeds} seeds | " + " | ".join(f"1/{part}: within | regret, mean | worst" for part in PARTS) + " |"
    yield "|---|" + "---:|---:|---:|" * len(PARTS)
    for name, setting in SETTINGS.items():
        cells = []
        for part in PARTS:
            found = [replay(grid, slots, part, seed=seed, between=between, **setting) for seed in range(seeds)]
            regrets = [one.regret for one in found]
            within = sum(regret <= MARGIN for regret in regrets) / seeds
            cells += [f"{within:.0%}", f"{statistics.mean(regrets):.2%}", f"{max(regrets):.2%}"]
        yield f"| {name} | " + " | ".join(cells) + " |"


def show_five(grid: Grid, slots: int) -> Iterator[str]:
    yield "| | seed | best found | regret | tokens until within | begun | stopped early |"
    yield "|---|---:|---|---:|---:|---:|---:|"
    for name, setting in SETTINGS.items():
        for seed in range(5):
            one = replay(grid, slots, seed=seed, **setting)
            yield (
                f"| {name} | {seed} | rank {one.best[0]}, {one.best[1]:g} | {one.regret:.2%} | {one.share:.1%} | "
                f"{one.begun} | {one.stopped} |"
            )


def show_reductions(grid: Grid, slots: int, seeds: int) -> Iterator[str]:
    for reduction, rungs in ((2, 1), (2, 2), (3, 1), (3, 2), (4, 1)):
        for sampler in ("tpe", "random"):
            found = [
                replay(grid, slots, seed=seed, sampler=sampler, reduction=reduction, rungs=rungs)
                for seed in range(seeds)
            ]
            within = sum(one.regret <= MARGIN for one in found) / seeds
            yield (
                f"reduction {reduction}, {rungs} rungs, {sampler}: {within:.0%} within, mean regret "
                f"{statistics.mean(one.regret for one in found):.2%}, worst {max(one.regret for one in found):.2%}, "
                f"tokens until within, median {statistics.median(one.share for one in found):.1%}"
            )


def real(grid: Grid, seed: int) -> Iterator[str]:
    """Run a search that trains, and yield lines that compare it with its replay."""
    spec = spec_of(seed=seed, budget=Budget(tokens=grid.tokens // 3))
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        out, launcher = Path(folder) / "search", LocalLauncher(spec.study.model)
        with launcher:
            result = run(spec, out, launcher, lambda line: print(line, file=sys.stderr))
    candidates = {candidate["trial"]: candidate for candidate in result["candidates"]}
    differences = [
        abs(loss / grid.curves[c["rank"], c["learning_rate"]][int(step)] - 1)
        for c in candidates.values()
        for step, loss in [*c["losses"].items(), *([(STEPS, c["eval_loss"])] if c["eval_loss"] else [])]
    ]
    replayed = replay(grid, SLOTS, seed=seed)
    best = candidates[result["best"]]
    yield f"{time.perf_counter() - start:.0f} s; best: rank {best['rank']}, {best['learning_rate']:g}; "
    yield f"regret {best['eval_loss'] / grid.best - 1:.2%} (replay {replayed.regret:.2%}), "
    yield f"{len(candidates)} begun ({replayed.begun}), {result['spent']['tokens'] / grid.tokens:.1%} of its tokens; "
    yield f"largest relative difference of a loss from the grid's: {max(differences):.1e} of {len(differences)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["grid", "replay", "reductions", "real"])
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the real search")
    parser.add_argument("--slots", type=int, default=SLOTS)
    arguments = parser.parse_args()
    if arguments.what == "grid":
        spec = spec_of()
        CURVES.write_text(json.dumps(train_grid(spec, prepare_data(spec.study))) + "\n")
        return
    grid = Grid.read()
    if arguments.what == "replay":
        lines = [*show_grid(grid), "", *show_five(grid, arguments.slots)]
        for between in (False, True):
            lines += ["", *show_replays(grid, arguments.slots, arguments.seeds, between)]
    elif arguments.what == "reductions":
        lines = list(show_reductions(grid, arguments.slots, arguments.seeds))
    else:
        lines = list(real(grid, arguments.seed))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
