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
  mean (both as in a study of the embedded model).
- `concentration`: exponential times the root of the row's loss, mean 1: few rows have most of a rank's effect.
- The last three terms: over ranks fractional Brownian motion in log2(rank) with H = 0.7 and a nugget of 15% (the share
  of a pair's variance that does not depend on their distance); over seeds, rows and both, Student's t with 3 to 5
  degrees of freedom, drawn for each study. The standard deviation of the difference of ranks 8 and 256 is the world's;
  `of row` has the same, `rest` 3.5 times as much (in a study of the embedded model: 0.31, 0.31 and 1.14% of the loss).
- `shared`: 0.5% a seed, 1% a seed and row. Pairing removes both from differences; they stay in the gain.

Worlds: quiet 0.1%, demo 0.3%, noisy 1%, and unstable: 0.4%, 3 degrees of freedom, 7% of the seeds with three times the
deviations, and up to 2.5 times as much noise at the highest rank.

Truths. Mix: 20% no effect; else A (r / r0)^-g with A log-uniform from 0.1 to 5% and g from 0.25 to 2; in a quarter the
loss rises again towards the highest rank, there by 10 to 100% of A. Others are multiples of the margin, which is 5% of
the gain; the worst truths have ranks on the margin itself.

The table `task` has outcomes of 0 and 1 in place of losses: whether a latent normal variable is above zero,

    place[rank] + item + of item[rank, item] + shared[seed] + of seed[rank, seed] + shared[seed, item] + rest

whose variance is 1, so that a rank's true score is the normal distribution's at `place`. Two thirds of the untrained
model's variance is the same item's. Worlds: nested (items have 99.9% of the variance: a better rank is right wherever a
worse one is), typical (70%) and erratic (40%, and a seed moves a score of 50% by 3 points). The margin
is 10% of the gain on the task.
"""

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from rankscope.analysis.comparison import Estimate, effective_number, estimate_of
from rankscope.analysis.decision import (
    MAX_REGRET_MARGINS,
    Decision,
    decide_arrays,
    in_contention,
    outcome_of,
    states,
)
from rankscope.analysis.task import add_items

MARGIN = 0.05  # of the gain
TASK_MARGIN = 0.1
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


class TaskWorld(NamedTuple):
    """Shares of the latent variance; what is left is drawn for each outcome."""

    item: float
    rank_item: float
    seed: float  # of one rank; half as much is shared by all
    seed_item: float


TASK_WORLDS = {
    "nested": TaskWorld(0.999, 0.0, 0.0, 0.0005),
    "typical": TaskWorld(0.7, 0.05, 0.001, 0.1),
    "erratic": TaskWorld(0.4, 0.1, 0.004, 0.2),
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


def draw_task(
    rng: np.random.Generator, world: TaskWorld, truth: np.ndarray, seeds: int, items: int, before: float, gain: float
) -> Drawn:
    """Errors (1 - outcome) in place of losses. `truth` is how far each rank is behind the best, which scores `before`
    and `gain`."""
    studies, ranks = truth.shape

    def normal(variance: float, *shape: int) -> np.ndarray:
        drawn: np.ndarray = rng.standard_normal((studies, *shape), dtype=np.float32) * np.float32(math.sqrt(variance))
        return drawn

    item = normal(world.item, 1, 1, items)
    rest = 1 - world.item - world.rank_item - 1.5 * world.seed - world.seed_item
    latent = normal(rest, ranks, seeds, items) + normal(world.rank_item, ranks, 1, items) + item
    latent += normal(world.seed, ranks, seeds, 1) + normal(world.seed / 2, 1, seeds, 1)
    latent += normal(world.seed_item, 1, seeds, items)
    latent += special.ndtri(before + gain - truth).astype(np.float32)[:, :, None, None]
    untrained = math.sqrt(2 / 3 / world.item) * item[:, 0, 0] + normal(1 / 3, items) + special.ndtri(before)
    return Drawn((latent <= 0).astype(np.float32), (untrained <= 0).astype(float), np.ones((studies, items)), truth)


class Parts(NamedTuple):
    """Parts of the losses of the first seeds, as `rankscope.analysis.comparison.estimate` divides them. A contrast is a
    sum of losses with coefficients, and its parts are the same sum of theirs."""

    mean: np.ndarray  # (N, K)
    by_seed: np.ndarray  # (N, K, S)
    by_row: np.ndarray  # (N, K, E)
    left: np.ndarray  # (N, K, K), products of what is left of two ranks, summed over seeds and rows
    untrained: np.ndarray  # (N,)
    untrained_by_row: np.ndarray  # (N, E)
    effective: np.ndarray  # (N, 1), rows of equal weight that would tell as much


def parts_of(drawn: Drawn, seeds: int) -> Parts:
    weights = drawn.tokens / drawn.tokens.mean(axis=-1, keepdims=True)
    weighed = weights[:, None, None]
    parts = weighed * drawn.losses[:, :, :seeds]
    mean, before = parts.mean(axis=(-2, -1)), (weights * drawn.untrained).mean(axis=-1)
    parts -= mean[..., None, None] * weighed
    by_seed, by_row = parts.mean(axis=-1), parts.mean(axis=-2)
    parts -= by_seed[..., None] * weighed
    parts -= by_row[:, :, None]
    flat = parts.reshape(*mean.shape, -1)
    untrained_by_row = weights * (drawn.untrained - before[:, None])
    products, effective = flat @ flat.transpose(0, 2, 1), effective_number(weights)[:, None]
    return Parts(mean, by_seed, by_row, products, before, untrained_by_row, effective)


def excesses_of(parts: Parts, share: np.ndarray) -> Estimate:
    """Estimates, (N, K, K), of each rank's loss minus what a margin of `share` (N,) allows beside each other rank."""
    share, keep = share[:, None, None], 1 - share[:, None, None]
    own, keeps = np.diagonal(parts.left, axis1=1, axis2=2), keep[..., None]
    before = share[..., None] * parts.untrained_by_row[:, None, None]
    return estimate_of(
        parts.mean[:, :, None] - keep * parts.mean[:, None] - share * parts.untrained[:, None, None],
        parts.by_seed[:, :, None] - keeps * parts.by_seed[:, None],
        parts.by_row[:, :, None] - keeps * parts.by_row[:, None] - before,
        np.maximum(0.0, own[:, :, None] - 2 * keep * parts.left + keep**2 * own[:, None]),
        parts.effective[..., None],
    )


def gain_of(parts: Parts) -> Estimate:
    by_row = parts.untrained_by_row[:, None] - parts.by_row
    own = np.diagonal(parts.left, axis1=1, axis2=2)
    return estimate_of(parts.untrained[:, None] - parts.mean, -parts.by_seed, by_row, own, parts.effective)


class Contrasts(NamedTuple):
    differences: Estimate  # (N, K, K)
    excesses: Estimate
    gain: Estimate  # (N, K)


def contrasts(parts: Parts, margin: float = MARGIN) -> Contrasts:
    none = np.zeros(len(parts.mean))
    return Contrasts(excesses_of(parts, none), excesses_of(parts, none + margin), gain_of(parts))


def at_looks(found: Sequence[Contrasts], look: np.ndarray) -> Contrasts:
    """Contrasts of studies whose ranks have different numbers of seeds: of each rank those of its look, (N, K); of a
    pair those of the seeds that both have."""

    def chosen(estimates: Sequence[Estimate], where: np.ndarray) -> Estimate:
        fields = [[np.broadcast_to(part, where.shape) for part in one[:-1]] for one in estimates]
        taken = [np.take_along_axis(np.array(parts), where[None], 0)[0] for parts in zip(*fields, strict=True)]
        return Estimate(*taken, estimates[0].examples)

    pair = np.minimum(look[:, :, None], look[:, None])
    sides = zip(*found, strict=True)
    return Contrasts(*(chosen(side, where) for side, where in zip(sides, (pair, pair, look), strict=True)))


class Assessed(NamedTuple):
    """What is said of each study, (N,), held against the truth; and which ranks are in contention, (N, K)."""

    rates: dict[str, np.ndarray]
    contention: np.ndarray


def assess(found: Contrasts, truth: np.ndarray, gain: float, share: float = MARGIN) -> Assessed:
    margin, place = share * gain, octaves(truth.shape[1])
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
    return Assessed(rates, in_contention(decision))


def keeps(parts: Parts, truth: np.ndarray, gain: float) -> np.ndarray:
    """Whether each rank keeps what it is shown to keep, (N,)."""
    place = octaves(truth.shape[1])
    gained = decide_arrays(*contrasts(parts), place, CONFIDENCE).gained
    claimed = [
        states(excesses_of(parts, share * (1 - 1e-9)), place, CONFIDENCE)[0][:, rank] & (share > 0)
        for rank, share in enumerate((truth / gain).T)
    ]
    found: np.ndarray = ~(np.array(claimed).any(axis=0) & gained)
    return found


class Cell(NamedTuple):
    table: str
    world: str
    gain: float
    ranks: int
    seeds: tuple[int, ...]  # at which the study is judged
    rows: int
    truth: tuple[float, ...] = ()  # multiples of the margin; the mix without
    before: float = 0.0  # untrained score of a task


def grow(found: Sequence[Contrasts], truth: np.ndarray, cell: Cell) -> dict[str, np.ndarray]:
    """Rates of studies, (N,), that are judged at each number of seeds: of all ranks; or `until settled`, of those in
    contention alone, until nothing is open."""
    contend = cell.table == "until settled"
    look, open_ = np.zeros(truth.shape, dtype=int), np.ones(len(truth), dtype=bool)
    rates: dict[str, np.ndarray] = {}
    for number in range(len(found)):
        judged = assess(at_looks(found, look) if contend else found[number], truth, cell.gain)
        for ever, name in (("ever false", "false"), ("ever worse", "falsely worse")):
            judged.rates[ever] = judged.rates[name] | rates.get(ever, False)
        rates |= {name: np.where(open_, values, rates.get(name, values)) for name, values in judged.rates.items()}
        if contend and number + 1 < len(found):
            open_ &= ~judged.rates["settled"]
            look[open_[:, None] & judged.contention] = number + 1
    trained = np.array(cell.seeds)[look] if contend else np.full(truth.shape, cell.seeds[-1])
    return rates | {"trials": trained.sum(axis=1) / (cell.ranks * cell.seeds[-1])}


def judge_tasks(rng: np.random.Generator, cell: Cell, studies: int) -> dict[str, np.ndarray]:
    """Rates of studies, (N,), that are judged by a task."""
    truth = mixed(rng, studies, cell.ranks) * 10 * max(cell.gain, 0.0)  # effects of 1 to 50% of the gain
    if cell.truth:
        truth = np.tile(np.array(cell.truth) * TASK_MARGIN * max(cell.gain, 0.0), (studies, 1))
    world, seeds = TASK_WORLDS[cell.world], cell.seeds[-1]
    parts = parts_of(draw_task(rng, world, truth, seeds, cell.rows, cell.before, cell.gain), seeds)
    found = Contrasts(*(add_items(one, CONFIDENCE) for one in contrasts(parts, TASK_MARGIN)))
    rates = assess(found, truth, cell.gain, TASK_MARGIN).rates
    errors = estimate_of(
        0.5 - parts.mean, parts.by_seed, parts.by_row, np.diagonal(parts.left, axis1=1, axis2=2), parts.effective
    )
    low, high = add_items(errors, CONFIDENCE, 0.5).interval(CONFIDENCE)
    score = cell.before + cell.gain - truth - 0.5
    rates["score"] = ((low <= score) & (score <= high)).mean(axis=1)
    return rates


def simulate(cell: Cell, studies: int, random: Sequence[int] = ()) -> dict[str, Any]:
    """Rates over studies at the last number of seeds, and `ever false` over all of them."""
    rng, sums = np.random.default_rng([*random, studies]), dict[str, float]()
    for start in range(0, studies, CHUNK):
        count = min(CHUNK, studies - start)
        if cell.table == "task":
            for name, values in judge_tasks(rng, cell, count).items():
                sums[name] = sums.get(name, 0.0) + float(values.sum())
            continue
        truth = mixed(rng, count, cell.ranks)
        if cell.truth:
            truth = np.tile(np.array(cell.truth) * MARGIN * max(cell.gain, 0.0), (count, 1))
        drawn = draw(rng, WORLDS[cell.world], truth, cell.seeds[-1], cell.rows, cell.gain)
        parts = [parts_of(drawn, seeds) for seeds in cell.seeds]
        rates = grow([contrasts(part) for part in parts], truth, cell)
        if cell.table == "mix" and cell.ranks < 6:
            rates["kept"] = keeps(parts[-1], truth, cell.gain)
        for name, values in rates.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    return {**cell._asdict(), "studies": studies, **{name: total / studies for name, total in sums.items()}}


WORST = {2: ((1, 0),), 3: ((1, 1, 0), (1, 4, 0)), 6: ((9, 9, 9, 9, 1, 0), (1, 1, 1, 1, 1, 0))}
ONE_BY_ONE = (2, 3, 4, 5, 6, 8, 10, 12)
PLANNED = (3, 5, 8, 12)


def cells() -> Iterator[Cell]:
    """All cells: what matters most first, the demo world and a gain of 21% before the others."""
    studies = list(product((0.21, 0.05), ("demo", "unstable", "noisy", "quiet"), (6, 3, 2), (100, 30)))
    for seeds in ((3,), (5,)):
        for gain, world, ranks, rows in studies:
            yield Cell("mix", world, gain, ranks, seeds, rows)
            for truth in WORST[ranks]:
                yield Cell("worst", world, gain, ranks, seeds, rows, truth)
    for gain, world, ranks, rows in studies:
        for settled in (*WORST[ranks], ()):
            yield Cell("until settled", world, gain, ranks, PLANNED, rows, settled)
    for gain, world, ranks, rows in studies:
        for truth in WORST[ranks]:
            yield Cell("growth", world, gain, ranks, ONE_BY_ONE, rows, truth)
    for gain, world, rows in product((0.0, -0.02, 0.005), WORLDS, (100, 30)):
        yield Cell("little gain", world, gain, 3, (3,), rows, (4, 2, 0))
    for seeds, items, ranks, world in product((3, 5), (200, 100, 1000), (3, 2, 6), TASK_WORLDS):
        if items == 1000 and (world != "typical" or (seeds, ranks) == (5, 6)):
            continue  # for time
        for before, gain in ((0.5, 0.3), (0.05, 0.9), (0.05, 0.3), (0.95, 0.03))[: 4 if ranks == 3 else 2]:
            for truth in ((), *WORST[ranks], (0.0,) * ranks):
                yield Cell("task", world, gain, ranks, (seeds,), items, truth, before)
        yield Cell("task", world, 0.0, ranks, (seeds,), items, (0.0,) * ranks, 0.5)


TABLES = {
    "mix": ("settled", "right", "recommended", "false", "falsely worse", "coverage", "kept"),
    "worst": ("recommended", "false", "falsely worse", "coverage"),
    "growth": ("settled", "right", "ever false", "ever worse"),
    "until settled": ("settled", "right", "ever false", "ever worse", "trials"),
    "little gain": ("untold", "recommended", "named wrongly"),
    "task": ("settled", "right", "recommended", "false", "falsely worse", "untold", "coverage", "score"),
}


def known_in(file: Path) -> dict[Cell, dict[str, Any]]:
    """Cells that were simulated, with their rates; of one that was simulated several times, the last."""
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    lines = [json.loads(line) for line in text.splitlines()]
    return {cell_of(line): line for line in lines}


def cell_of(line: dict[str, Any]) -> Cell:
    values = [line.get(name, Cell._field_defaults.get(name)) for name in Cell._fields]  # the oldest lack the last
    return Cell(*(tuple(value) if isinstance(value, list) else value for value in values))


def tables(file: Path) -> Iterator[str]:
    """Markdown, line by line."""
    lines = list(known_in(file).values())
    for table, columns in TABLES.items():
        cells_of = [line for line in lines if line["table"] == table]
        if not cells_of:
            continue
        yield f"\n## {table.capitalize()}\n"
        heads = ("world", "gain", "ranks", "rows", "seeds", "truth", "studies", *columns)
        yield f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}"
        for line in cells_of:
            own = (
                line["world"],
                f"{line['gain']:.1%}",
                line["ranks"],
                line["rows"],
                ", ".join(map(str, line["seeds"])),
            )
            rates = [f"{line[name]:.1%}" if name in line else "" for name in columns]
            truth = ", ".join(f"{one:g}" for one in line["truth"]) or "mix"
            own = (own[0], f"{line['before']:.0%} + {own[1]}", *own[2:]) if table == "task" else own
            yield f"| {' | '.join(map(str, [*own, truth, line['studies'], *rates]))} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=4000, help="of each cell")
    parser.add_argument(
        "--out", type=Path, help="a file of JSON lines, to which the rates of each cell that it lacks are added"
    )
    parser.add_argument("--part", default="1/1", help="2/3: the second of every three cells")
    parser.add_argument("--table", choices=TABLES, help="only this table's cells")
    parser.add_argument("--tables", type=Path, help="print the tables of such a file, and simulate nothing")
    args = parser.parse_args()
    if args.tables:
        print("\n".join(tables(args.tables)))
        return
    part, parts = map(int, args.part.split("/"))
    known = {cell for cell, line in known_in(args.out).items() if line["studies"] >= args.studies} if args.out else ()
    for number, cell in enumerate(cells()):
        if number % parts != part - 1 or args.table not in (None, cell.table) or cell in known:
            continue
        line = json.dumps(simulate(cell, args.studies, (number,)))
        print(line, flush=True)
        if args.out:
            with args.out.open("a", encoding="utf-8") as out:
                out.write(line + "\n")


if __name__ == "__main__":
    main()
