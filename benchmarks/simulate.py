"""Accuracy of the verdict, on simulated studies with a known truth.

    python benchmarks/simulate.py --studies 2000 --out docs/results/simulation.md

A study has three ranks (8, 128, 256) or six, and a table of held-out losses, seeds x examples, for each:

    loss[rank, seed, example] = base[example] + effect[rank] + seed effect[seed] + rank's own seed effect[rank, seed]
                                + rank's own example effect[rank, example] + noise[rank, seed, example]
    untrained loss[example] = base[example] + gain + gain's own example effect[example]

`effect` is the rank's true effect: its mean loss over many seeds and examples. Standard deviations are relative to the
mean loss of 2 nats: examples differ by 30% and seeds by 1% (pairing removes both from differences between ranks; the
seeds' stay in the gain), and an example gains half as much more or less, and 2% of the loss; the others depend on the
setting:

- as measured: seeds 0.25%, noise 0.7%: differences between ranks 8 and 128 on the embedded study vary by 0.013 and
  0.036 of 3.8 nats, each rank by that divided by the square root of 2; no example effects
- examples differ: seeds 0.1%, examples 2%, noise 2%: ranks that do better on some examples and worse on others
- seeds differ: seeds 1%, examples 0.5%, noise 1%: unstable training

The margin is 5% of the gain. Effects of the ranks, as multiples of the margin: none; small (0.5, 0.2, 0); at the margin
(1, 1, 0); beyond (1.5, 0.5, 0); large (4, 2, 0). Examples have 10 to 200 label tokens, as real answers have.

**Planted gains.** None: no rank differs from the untrained model. Harmful: all are 2% of the loss worse. Tiny: 0.5% of
the loss. Modest: 4%. Large: 20% of the loss, so that the margin is 1% of it. Columns:

- half-widths: the true gain, in half-widths of the 95% interval between two ranks, if their variance is the true one
- untold: "not trained long enough to tell"
- named: a rank is recommended, or named as the cheapest where none are distinguishable
- wrong: a recommended rank loses the margin or more, one named as the cheapest more than two margins, or there is no
  gain
- right: nothing wrong is said. "Not trained long enough" is wrong where the true gain is six half-widths or more
- kept: studies in which no rank is stated to keep more of the gain than it does

**Large gains**, and which claims are made, on a quarter as many studies:

- coverage: the 95% interval of the difference between two given ranks covers the true one: 93 to 97%. It does not
  depend on the effects, which are added to all losses alike, so it is given once per size. Where seeds hardly differ it
  is higher: with few seeds the interval has to allow for their variance
- bootstrap: coverage of the percentile interval of a hierarchical bootstrap over seeds and examples (on a tenth of the
  studies)
- regret: the 95% interval of a rank's regret covers it
- better: a study calls some rank worse than the margin that is not, or a best one not the best: at most 5%
- recommended: studies that recommend a rank; wrong: the recommended rank's regret is the margin or more: at most 5% of
  all studies, followed by the share of those that recommend
- alike: studies that name the cheapest rank because none are distinguishable, and the 95th percentile of its true
  regret, in margins
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from rankscope.analysis.comparison import Judged, bounds, compare, least_kept
from rankscope.analysis.verdict import GAIN_OVER_WIDTH, MAX_REGRET_MARGINS, _levels, decide

BASE = 2.0
MARGIN = 0.05
"""Share of the gain."""
CONFIDENCE = 0.95


class Setting(NamedTuple):
    """Standard deviations as shares of the mean loss."""

    name: str
    seeds: float
    examples: float
    noise: float


SETTINGS = (
    Setting("as measured", 0.0025, 0.0, 0.007),
    Setting("examples differ", 0.001, 0.02, 0.02),
    Setting("seeds differ", 0.01, 0.005, 0.01),
)
EFFECTS: dict[str, tuple[float, ...]] = {
    "none": (0, 0, 0),
    "small": (0.5, 0.2, 0),
    "at the margin": (1, 1, 0),
    "beyond": (1.5, 0.5, 0),
    "large": (4, 2, 0),
    "six ranks, none": (0, 0, 0, 0, 0, 0),
    "six ranks": (3, 1.05, 1.05, 0.5, 0, 0),
}
SIZES = ((2, 50), (2, 1000), (3, 100), (3, 500), (5, 200), (10, 50), (10, 1000))
"""Numbers of seeds and held-out examples."""
GAIN_SIZES = ((2, 50), (3, 100), (5, 200))

LARGE = 0.2
GAINS: dict[str, tuple[float, str]] = {
    "none": (0.0, "none"),
    "none, six ranks": (0.0, "six ranks, none"),
    "harmful": (-0.02, "none"),
    "tiny": (0.005, "large"),
    "tiny, at the margin": (0.005, "at the margin"),
    "modest": (0.04, "large"),
    "modest, at the margin": (0.04, "at the margin"),
    "large": (LARGE, "large"),
    "large, at the margin": (LARGE, "at the margin"),
}
"""Gains as shares of the mean loss, and the effects of the ranks."""


class Outcome(NamedTuple):
    """Outcome of one simulated study. Rates are over its pairs or ranks."""

    covered: float
    regret_covered: float
    falsely_worse: bool
    recommended: bool
    falsely_recommended: bool
    beyond: float
    """True regret, in margins, of the rank named as cheapest where nothing is distinguishable; else NaN."""
    untold: bool
    named: bool
    wrong: bool
    kept: bool
    """Whether every rank keeps what it is stated to keep, if anything is stated."""


def draw(
    rng: np.random.Generator, setting: Setting, effects: Sequence[float], seeds: int, examples: int, gain: float = LARGE
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw losses (K, S, E), untrained losses (E,) and label tokens (E,)."""
    ranks = len(effects)
    tokens = rng.integers(10, 200, examples).astype(float)
    base = BASE * (1 + rng.normal(0, 0.3, examples))
    own = BASE * (
        margin(gain) * np.array(effects)[:, None, None]
        + rng.normal(0, 0.01, (seeds, 1))
        + rng.normal(0, setting.seeds, (ranks, seeds, 1))
        + rng.normal(0, setting.examples, (ranks, 1, examples))
        + rng.normal(0, setting.noise, (ranks, seeds, examples))
    )
    gains = gain * (1 + rng.normal(0, 0.5, examples)) + rng.normal(0, 0.02, examples)
    return base + own, base + BASE * gains, tokens


def margin(gain: float) -> float:
    """Return the margin as a share of the mean loss."""
    return MARGIN * max(gain, 0.0)


def judged(losses: np.ndarray, untrained: np.ndarray, tokens: np.ndarray) -> Judged:
    ranks = [2 ** (number + 3) for number in range(len(losses))]
    names = [f"r{rank:03d}" for rank in ranks]
    tables = dict(zip(names, map(pd.DataFrame, losses), strict=True))
    return Judged(tables, {name: (rank, 1e-4) for name, rank in zip(names, ranks, strict=True)}, tokens, untrained)


def assess(found: Judged, effects: Sequence[float], gain: float = LARGE, shares: bool = False) -> Outcome:
    """Compare the conclusion with the truth; without `shares`, not what each rank is stated to keep."""
    rows = compare(found, MARGIN)
    least = BASE * margin(gain)  # the margin, in nats; the lowest true effect is none
    truth = {row.candidate: least * effect for row, effect in zip(rows, effects, strict=True)}
    covered = [
        low <= truth[row.candidate] - truth[other] <= high
        for row in rows
        for other, difference in row.differences.items()
        for low, high in [difference.interval(CONFIDENCE)]
    ]
    regrets = [
        bound.low is not None and bound.high is not None and bound.low <= truth[row.candidate] <= bound.high
        for row, bound in zip(rows, bounds(rows, CONFIDENCE), strict=True)
    ]
    verdict, states = decide(rows, CONFIDENCE, look_ahead=False)
    # A regret of exactly the margin counts against either claim: so the boundary, the hardest truth, is tested.
    worse = gain > 0 and any(states[name] is False and truth[name] <= least * (1 + 1e-9) for name in truth)
    better = any(
        bound.low is not None and bound.low > 0 and truth[row.candidate] == 0
        for row, bound in zip(rows, bounds(rows, _simultaneous(len(rows))), strict=True)
    )
    outcome, named = verdict["outcome"], verdict.get("candidate")
    recommended, untold = outcome == "recommended", outcome == "not_trained_enough"
    allowed = least * (1.0 if recommended else MAX_REGRET_MARGINS)
    wrong = bool(named) and (gain <= 0 or truth[named] >= allowed * (1 - 1e-9))
    beyond = truth[named] / least if named and not recommended and least else math.nan
    stated = (
        {}
        if untold or not shares
        else {name: least_kept(found, name, _levels(len(rows), CONFIDENCE)[0]) for name in truth}
    )
    kept = all(
        low is None or (gain > 0 and 1 - truth[name] / (BASE * gain) >= low - 1e-9) for name, low in stated.items()
    )
    falsely = recommended and wrong
    return Outcome(
        float(np.mean(covered)), float(np.mean(regrets)), worse or better, recommended, falsely, beyond,
        untold, bool(named), wrong, kept,
    )  # fmt: skip


def _simultaneous(candidates: int) -> float:
    """Return the level at which a claim that a rank is not the best is made."""
    return 1 - (1 - CONFIDENCE) / (candidates - 1)


def half_width(setting: Setting, seeds: int, examples: int) -> float:
    """Return half of the interval of the difference of two ranks with the true variances, as a share of the loss."""
    tokens = np.arange(10, 200)
    examples_by_weight = examples / float((tokens**2).mean() / tokens.mean() ** 2)
    of_seeds = 2 * (setting.seeds**2 / seeds + setting.noise**2 / (seeds * examples_by_weight))
    of_examples = 2 * setting.examples**2 / examples_by_weight
    t = stats.t.ppf((1 + CONFIDENCE) / 2, [seeds - 1, examples - 1])
    return float(t @ [of_seeds, of_examples] / math.sqrt(of_seeds + of_examples))


def simulate(
    setting: Setting, effects: Sequence[float], seeds: int, examples: int, studies: int, random: Sequence[int] = (0,),
    gain: float = LARGE, shares: bool = False,
) -> pd.DataFrame:  # fmt: skip
    """Return one row per study: the fields of `Outcome`."""
    rng = np.random.default_rng(random)
    drawn = (judged(*draw(rng, setting, effects, seeds, examples, gain)) for _ in range(studies))
    return pd.DataFrame([assess(found, effects, gain, shares) for found in drawn])


def bootstrap_coverage(
    setting: Setting, effects: Sequence[float], seeds: int, examples: int, studies: int, random: Sequence[int] = (0,)
) -> float:
    """Return how often a hierarchical percentile bootstrap (999 resamples) covers the first rank's true difference."""
    rng = np.random.default_rng(random)
    truth, covered = BASE * margin(LARGE) * (effects[0] - effects[-1]), 0
    for _ in range(studies):
        losses, _, tokens = draw(rng, setting, effects, seeds, examples)
        difference = losses[0] - losses[-1]
        means = []
        for _ in range(999):
            chosen = rng.integers(examples, size=examples)
            weights = tokens[chosen] / tokens[chosen].sum()
            by_seed = difference[rng.integers(seeds, size=seeds)][:, chosen] @ weights
            means.append(by_seed.mean())
        low, high = np.quantile(means, (0.025, 0.975))
        covered += bool(low <= truth <= high)
    return covered / studies


class Cell(NamedTuple):
    """One row of a table."""

    kind: str  # gain, intervals or claims
    setting: int
    size: int
    name: str  # of GAINS or EFFECTS
    studies: int


def gain_row(cell: Cell) -> list[Any]:
    setting, (seeds, examples), (gain, effects) = SETTINGS[cell.setting], SIZES[cell.size], GAINS[cell.name]
    random = (cell.setting, cell.size, 50 + list(GAINS).index(cell.name))
    found = simulate(setting, EFFECTS[effects], seeds, examples, cell.studies, random, gain, shares=True)
    widths = gain / half_width(setting, seeds, examples)
    wrong = found["wrong"] | (found["untold"] & (widths >= 2 * GAIN_OVER_WIDTH))
    rates = [f"{found[name].mean():.1%}" for name in ("untold", "named", "wrong")]
    return [cell.name, f"{widths:.1f}", *rates, f"{1 - wrong.mean():.1%}", f"{found['kept'].mean():.1%}"]


def intervals_row(cell: Cell) -> list[Any]:
    setting, size, random = SETTINGS[cell.setting], SIZES[cell.size], (cell.setting, cell.size)
    found = simulate(setting, EFFECTS["small"], *size, cell.studies, (*random, 99))
    plain = bootstrap_coverage(setting, EFFECTS["small"], *size, max(1, cell.studies // 10), (*random, 98))
    return [f"{found['covered'].mean():.1%}", f"{plain:.0%}"]


def claims_row(cell: Cell) -> list[Any]:
    random = (cell.setting, cell.size, list(EFFECTS).index(cell.name))
    found = simulate(SETTINGS[cell.setting], EFFECTS[cell.name], *SIZES[cell.size], cell.studies, random)
    alike, wrong = found["beyond"].dropna(), found["falsely_recommended"].sum()
    return [
        cell.name, f"{found['regret_covered'].mean():.1%}", f"{found['falsely_worse'].mean():.1%}",
        f"{found['recommended'].mean():.0%}", f"{wrong / cell.studies:.1%}",
        f"{wrong / max(1, found['recommended'].sum()):.1%}", f"{len(alike) / cell.studies:.0%}",
        f"{alike.quantile(0.95):.2g}" if len(alike) else "",
    ]  # fmt: skip


TABLES = {
    "gain": ("gain", "half-widths", "untold", "named", "wrong", "right", "kept"),
    "intervals": ("coverage", "bootstrap"),
    "claims": ("effects", "regret", "better", "recommended", "wrong", "of those", "alike", "regret"),
}
"""Columns of each kind of table, after those of the seeds and examples."""


def cells(studies: int) -> list[Cell]:
    """Return the rows of all tables, in order."""
    names = {"gain": list(GAINS), "intervals": [""], "claims": list(EFFECTS)}
    sizes = {"gain": GAIN_SIZES, "intervals": SIZES, "claims": SIZES}
    return [
        Cell(kind, setting, size, name, studies if kind == "gain" else max(1, studies // 4))
        for kind in TABLES
        for setting, size in product(range(len(SETTINGS)), map(SIZES.index, sizes[kind]))
        for name in names[kind]
    ]


def run(cell: Cell) -> str:
    """Return the row of a cell in Markdown."""
    row = {"gain": gain_row, "intervals": intervals_row, "claims": claims_row}[cell.kind](cell)
    seeds, examples = SIZES[cell.size]
    return f"| {' | '.join(map(str, [seeds, f'{examples:,}', *row]))} |\n"


def lines(studies: int, processes: int) -> Iterator[str]:
    """Yield Markdown tables by line: planted gains, intervals and claims, each in every setting."""
    before: tuple[str, int] | None = None
    everything = cells(studies)
    with ProcessPoolExecutor(processes) as pool:
        for cell, row in zip(everything, pool.map(run, everything), strict=True):
            if (cell.kind, cell.setting) != before:
                setting, columns = SETTINGS[cell.setting], ("seeds", "examples", *TABLES[cell.kind])
                title = {"gain": "Planted gains", "intervals": "Intervals", "claims": "Claims"}[cell.kind]
                yield f"\n## {title}: {setting.name}\n\nSeeds {setting.seeds:.2%}, examples {setting.examples:.2%}, "
                yield f"noise {setting.noise:.2%} of the mean loss.\n\n| {' | '.join(columns)} |\n"
                yield f"{'|---:' * len(columns)}|\n"
            before = cell.kind, cell.setting
            yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--studies", type=int, default=2000, help="of each row of planted gains; a quarter for the others"
    )
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    command = f"python benchmarks/simulate.py --studies {args.studies}"
    about = (__doc__ or "").partition("A study has")[2]
    text = f"# How often the verdict is right\n\n```\n{command}\n```\n\nA study has{about}"
    for line in lines(args.studies, args.processes):
        text += line
        print(line, end="", flush=True)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
