"""Accuracy of the verdict, on simulated studies with a known truth.

    python benchmarks/simulate.py --studies 4000 --out simulation.jsonl      # adds a line for each cell
    python benchmarks/simulate.py --tables simulation.jsonl                  # prints them in Markdown

A study has a table of held-out losses, seeds x rows, for each rank (8 and 64; 8, 64 and 256; or 8, 16, ... 256):

    loss[rank, seed, row] = base[row] + shared[seed] + shared[seed, row]
                            + effect[rank] * concentration[row]
                            + of seed[rank, seed] + of row[rank, row] + rest[rank, seed, row]
    untrained[row] = base[row] + gain[row]

Everything is a share of the mean loss:

- Label tokens of a row, its weight: lognormal, median 55, sigma 0.88, from 1 to 1,024. That gives a mean of 81, 0.7% of
  rows above 480 and 0.05% above 1,000, as CodeAlpaca's answers have.
- `base`: lognormal with a standard deviation of 23%; `gain`: a gamma variable with a standard deviation of 76% of its
  mean (both as in the embedded study).
- `concentration`: exponential times the root of the row's loss, mean 1: few rows have most of a rank's effect.
- The last three terms: over ranks fractional Brownian motion in log2(rank) with H = 0.7 and a nugget of 15% (the share
  of a pair's variance that does not depend on their distance); over seeds, rows and both, Student's t with 3 to 5
  degrees of freedom, drawn for each study. The standard deviation of the difference of ranks 8 and 256 is the world's;
  `of row` has the same, `rest` 3.5 times as much (in the embedded study: 0.31, 0.31 and 1.14% of the loss).
- `shared`: 0.5% a seed, 1% a seed and row. Pairing removes both from differences; they stay in the gain.

Worlds: quiet 0.1%, demo 0.3%, noisy 1%, and unstable: 0.4%, 3 degrees of freedom, 7% of the seeds with three times the
deviations, and up to 2.5 times as much noise at the highest rank.

Truths. Mix: 20% no effect; else A (r / r0)^-g with A log-uniform from 0.1 to 5% and g from 0.25 to 2; in a quarter the
loss rises again towards the highest rank, there by 10 to 100% of A. Others are multiples of the margin, which is 5% of
the gain; the worst truths have ranks on the margin itself.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rankscope.analysis.comparison import Estimate, estimate
from rankscope.analysis.decision import MAX_REGRET_MARGINS, Decision, decide_arrays, outcome_of, states

MARGIN = 0.05  # of the gain
CONFIDENCE = 0.95
BASE_SPREAD, GAIN_SPREAD = 0.23, 0.76
HURST, NUGGET = 0.7, 0.15
REST = 3.5  # times the world's standard deviation
CHUNK = 100  # studies at once
RANKS = {2: (8, 64), 3: (8, 64, 256), 6: (8, 16, 32, 64, 128, 256)}


class World(NamedTuple):
    pair: float  # standard deviation of a pair five octaves apart, as a share of the loss
    degrees: tuple[int, int] = (3, 5)
    bad_seeds: float = 0.0
    high_rank: float = 1.0  # noise of the highest rank, as a multiple of the lowest's


WORLDS = {
    "quiet": World(0.001),
    "demo": World(0.003),
    "noisy": World(0.01),
    "unstable": World(0.004, (3, 3), 0.07, 2.5),
}


class Drawn(NamedTuple):
    """Studies: losses (N, K, S, E), losses before training (N, E), label tokens (N, E), true effects (N, K)."""

    losses: np.ndarray
    untrained: np.ndarray
    tokens: np.ndarray
    truth: np.ndarray


def octaves(ranks: int) -> np.ndarray:
    return np.log2(np.array(RANKS[ranks], dtype=float))


def factor(ranks: int) -> np.ndarray:
    """Root of the covariance of ranks' deviations, (K, K); a pair five octaves apart differs with a variance of 1."""
    place = (octaves(ranks) - 3) / 5
    power = 2 * HURST
    brownian = place[:, None] ** power + place**power - np.abs(place[:, None] - place) ** power
    values, vectors = np.linalg.eigh(0.5 * ((1 - NUGGET) * brownian + NUGGET * np.eye(len(place))))
    root: np.ndarray = vectors * np.sqrt(np.maximum(values, 0))
    return root


def mixed(rng: np.random.Generator, studies: int, ranks: int) -> np.ndarray:
    """True effects (N, K) of the mix."""
    place = octaves(ranks) - 3
    size, power = np.exp(rng.uniform(math.log(0.001), math.log(0.05), studies)), rng.uniform(0.25, 2, studies)
    effects = size[:, None] * 2.0 ** (-power[:, None] * place)
    rise = np.where(rng.random(studies) < 0.25, size * rng.uniform(0.1, 1, studies), 0.0)
    effects += rise[:, None] * (place / place[-1]) ** 2
    effects[rng.random(studies) < 0.2] = 0.0
    found: np.ndarray = effects - effects.min(axis=1, keepdims=True)
    return found


def heavy(rng: np.random.Generator, shape: tuple[int, ...], root: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Deviations (N, ..., K) of Student's t, correlated over ranks, of variance one before correlation."""
    degrees = np.broadcast_to(degrees.reshape(-1, *[1] * (len(shape) - 1)), shape)
    scale = np.sqrt((degrees - 2) / rng.chisquare(degrees))
    found: np.ndarray = rng.standard_normal((*shape, len(root)), dtype=np.float32) @ root.T * scale[..., None]
    return found


def draw(
    rng: np.random.Generator, world: World, truth: np.ndarray, seeds: int, rows: int, gain: float
) -> Drawn:  # fmt: skip
    studies, ranks = truth.shape
    tokens = np.clip(np.round(rng.lognormal(4.0, 0.88, (studies, rows))), 1, 1024)
    sigma = math.sqrt(math.log(1 + BASE_SPREAD**2))
    base = rng.lognormal(-(sigma**2) / 2, sigma, (studies, rows))
    concentration = rng.exponential(1, (studies, rows)) * np.sqrt(base) * math.exp(sigma**2 / 8)
    degrees = rng.integers(world.degrees[0], world.degrees[1] + 1, studies)
    louder = world.high_rank ** ((octaves(ranks) - 3) / (octaves(ranks)[-1] - 3))
    root = (factor(ranks) * louder[:, None] * world.pair).astype(np.float32)
    of_seed = heavy(rng, (studies, seeds), root, degrees)
    of_seed *= np.where(rng.random((studies, seeds, 1)) < world.bad_seeds, 3.0, 1.0)
    of_row = heavy(rng, (studies, rows), root, degrees)
    rest = REST * heavy(rng, (studies, seeds, rows), root, degrees)
    shared = rng.normal(0, 0.005, (studies, seeds, 1)) + rng.normal(0, 0.01, (studies, seeds, rows))
    own = np.moveaxis(of_seed[:, :, None] + of_row[:, None] + rest, -1, 1)
    own += (base[:, None] + shared)[:, None] + (truth[:, :, None] * concentration[:, None])[:, :, None]
    gained = gain * rng.gamma(GAIN_SPREAD**-2, GAIN_SPREAD**2, (studies, rows))
    return Drawn(own.astype(np.float32), base + gained, tokens, truth)


class Contrasts(NamedTuple):
    differences: Estimate  # (N, K, K)
    excesses: Estimate
    gain: Estimate  # (N, K)


def excesses_at(drawn: Drawn, seeds: int, share: np.ndarray) -> Estimate:
    """Estimates of each rank's loss minus what a margin of `share` (N,) allows beside each other rank."""
    own, other = drawn.losses[:, :, None, :seeds], drawn.losses[:, None, :, :seeds]
    part = share.astype(np.float32)[:, None, None, None, None]
    before = drawn.untrained.astype(np.float32)[:, None, None, None]
    return estimate(own - other - part * (before - other), drawn.tokens[:, None, None])


def contrasts(drawn: Drawn, seeds: int) -> Contrasts:
    none = np.zeros(len(drawn.truth))
    gain = estimate(drawn.untrained[:, None, None] - drawn.losses[:, :, :seeds], drawn.tokens[:, None])
    return Contrasts(excesses_at(drawn, seeds, none), excesses_at(drawn, seeds, none + MARGIN), gain)


def assess(drawn: Drawn, seeds: int, gain: float, kept: bool = False) -> dict[str, np.ndarray]:
    """What is said of each study, (N,), held against the truth; with `kept` also whether each rank keeps what it is
    shown to keep."""
    truth, margin, place = drawn.truth, MARGIN * gain, octaves(drawn.truth.shape[1])
    found = contrasts(drawn, seeds)
    decision = decide_arrays(*found, place, CONFIDENCE)
    good_enough = truth < margin * (1 - 1e-9)  # a rank exactly on the margin is the hardest that may not be recommended
    right = good_enough.argmax(axis=1)
    outcomes = [outcome_of(Decision(*one), [True] * len(place)) for one in zip(*decision, strict=True)]
    named = np.array([-1 if number is None else number for _, number in outcomes])
    of_outcome = np.array([outcome for outcome, _ in outcomes])
    recommended = of_outcome == "recommended"
    below = np.arange(len(place)) < named[:, None]
    loss = np.where(named >= 0, np.take_along_axis(truth, np.maximum(named, 0)[:, None], 1)[:, 0], -np.inf)
    allowed = margin * np.where(recommended, 1.0, MAX_REGRET_MARGINS) * (1 - 1e-9)
    low, high = found.differences.interval(CONFIDENCE)
    real = truth[:, :, None] - truth[:, None]
    others = ~np.eye(len(place), dtype=bool)
    rates = {
        "settled": recommended & ~(below & ~decision.worse).any(axis=1),
        "right": (named == right) & (gain > 0),
        "recommended": recommended,
        "false": recommended & ((loss >= allowed) | (gain <= 0)),
        "named wrongly": (named >= 0) & ((loss >= allowed) | (gain <= 0)),
        "falsely worse": (decision.worse & (truth <= margin * (1 + 1e-9))).any(axis=1) & (gain > 0),
        "untold": of_outcome == "not_trained_enough",
        "coverage": ((low <= real) & (real <= high))[:, others].mean(axis=1),
    }
    if kept:
        lost = truth / gain
        claimed = [
            (states(excesses_at(drawn, seeds, share * (1 - 1e-9)), place, CONFIDENCE)[0][:, rank] & (share > 0))
            for rank, share in enumerate(lost.T)
        ]
        rates["kept"] = ~(np.array(claimed).any(axis=0) & decision.gained)
    return rates


class Cell(NamedTuple):
    table: str
    world: str
    gain: float
    ranks: int
    seeds: tuple[int, ...]  # at which the study is judged
    rows: int
    truth: tuple[float, ...] = ()  # multiples of the margin; the mix without


def simulate(cell: Cell, studies: int, random: Sequence[int] = ()) -> dict[str, Any]:
    """Rates over studies at the last number of seeds, and `ever false` over all of them."""
    rng, sums = np.random.default_rng([*random, studies]), dict[str, float]()
    for start in range(0, studies, CHUNK):
        count = min(CHUNK, studies - start)
        truth = mixed(rng, count, cell.ranks)
        if cell.truth:
            truth = np.tile(np.array(cell.truth) * MARGIN * max(cell.gain, 0.0), (count, 1))
        drawn = draw(rng, WORLDS[cell.world], truth, cell.seeds[-1], cell.rows, cell.gain)
        looks = [assess(drawn, seeds, cell.gain, kept=cell.table == "mix" and cell.ranks == 3) for seeds in cell.seeds]
        rates = looks[-1] | {"ever false": np.any([look["false"] for look in looks], axis=0)}
        rates["ever worse"] = np.any([look["falsely worse"] for look in looks], axis=0)
        for name, values in rates.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    return {**cell._asdict(), "studies": studies, **{name: total / studies for name, total in sums.items()}}


WORST = {2: ((1, 0),), 3: ((1, 1, 0), (1, 4, 0)), 6: ((9, 9, 9, 9, 1, 0), (1, 1, 1, 1, 1, 0))}
ONE_BY_ONE = (2, 3, 4, 5, 6, 8, 10, 12)
PLANNED = (3, 5, 8, 12)


def cells() -> Iterator[Cell]:
    """All cells, those that matter most first."""
    for world in ("demo", "unstable", "noisy", "quiet"):
        for ranks in (6, 3):
            yield Cell("mix", world, 0.21, ranks, (3,), 100)
        for ranks, truths in WORST.items():
            for rows in (30, 100):
                yield Cell("worst", world, 0.21, ranks, (3,), rows, truths[0])
        for ranks in (2, 3):
            yield Cell("growth", world, 0.21, ranks, ONE_BY_ONE, 100, WORST[ranks][0])
        for gain in (0.0, -0.02, 0.005):
            yield Cell("little gain", world, gain, 3, (3,), 100, (4, 2, 0))
    for world in WORLDS:
        yield Cell("growth", world, 0.21, 6, PLANNED, 100, WORST[6][0])
        for ranks in (6, 3):
            yield Cell("mix", world, 0.05, ranks, (3,), 100)
            yield Cell("mix", world, 0.21, ranks, (5,), 100)
        for ranks in (3, 6):
            yield Cell("worst", world, 0.21, ranks, (3,), 100, WORST[ranks][1])
        yield Cell("worst", world, 0.05, 3, (3,), 100, WORST[3][0])


TABLES = {
    "mix": ("settled", "right", "recommended", "false", "falsely worse", "coverage", "kept"),
    "worst": ("recommended", "false", "falsely worse", "coverage"),
    "growth": ("settled", "right", "ever false", "ever worse"),
    "little gain": ("untold", "recommended", "named wrongly"),
}


def tables(file: Path) -> Iterator[str]:
    """Markdown, line by line; of cells that were simulated several times, the last."""
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    for table, columns in TABLES.items():
        cells_of = [line for line in lines if line["table"] == table]
        yield f"\n## {table.capitalize()}\n"
        heads = ("world", "gain", "ranks", "rows", "seeds", "truth", "studies", *columns)
        yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        for line in {str([line[key] for key in Cell._fields]): line for line in cells_of}.values():
            own = (
                line["world"],
                f"{line['gain']:.1%}",
                line["ranks"],
                line["rows"],
                ", ".join(map(str, line["seeds"])),
            )
            rates = [f"{line[name]:.1%}" if name in line else "" for name in columns]
            truth = ", ".join(f"{one:g}" for one in line["truth"]) or "mix"
            yield f"| {' | '.join(map(str, [*own, truth, line['studies'], *rates]))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=4000, help="of each cell")
    parser.add_argument("--out", type=Path, help="a file of JSON lines, to which each cell's rates are added")
    parser.add_argument("--part", default="1/1", help="2/3: the second of every three cells")
    parser.add_argument("--table", choices=TABLES, help="only this table's cells")
    parser.add_argument("--tables", type=Path, help="print the tables of such a file, and simulate nothing")
    args = parser.parse_args()
    if args.tables:
        print("\n".join(tables(args.tables)))
        return
    part, parts = map(int, args.part.split("/"))
    for number, cell in enumerate(cells()):
        if number % parts != part - 1 or args.table not in (None, cell.table):
            continue
        line = json.dumps(simulate(cell, args.studies, (number,)))
        print(line, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
