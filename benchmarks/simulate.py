"""Accuracy of the verdict, on simulated studies with a known truth.

    python benchmarks/simulate.py --studies 2000 --out docs/results/simulation.md

A study has three ranks (8, 128, 256) or six, and a table of held-out losses, seeds x examples, for each:

    loss[rank, seed, example] = base[example] + effect[rank] + seed effect[seed] + rank's own seed effect[rank, seed]
                                + rank's own example effect[rank, example] + noise[rank, seed, example]

`effect` is the rank's true effect: its mean loss over many seeds and examples. Standard deviations are relative to the
mean loss of 2 nats: examples differ by 30% and seeds by 1% (pairing removes both); the others depend on the setting:

- as measured: seeds 0.25%, noise 0.7%: differences between ranks 8 and 128 on the embedded study vary by 0.013 and
  0.036 of 3.8 nats, each rank by that divided by the square root of 2; no example effects
- examples differ: seeds 0.1%, examples 2%, noise 2%: ranks that do better on some examples and worse on others
- seeds differ: seeds 1%, examples 0.5%, noise 1%: unstable training

Effects of the ranks, as multiples of the margin (1% of the loss): none; small (0.5, 0.2, 0); at the margin (1, 1, 0);
beyond (1.5, 0.5, 0); large (4, 2, 0). Examples have 10 to 200 label tokens, as real answers have.

Checked over all studies of a setting:

- coverage: the 95% interval of the difference between two given ranks covers the true one: 93 to 97%. It does not
  depend on the effects, which are added to all losses alike, so it is given once per size. Where seeds hardly differ it
  is higher: with few seeds the interval has to allow for their variance
- bootstrap: coverage of the percentile interval of a hierarchical bootstrap over seeds and examples (on 200 studies)
- regret: the 95% interval of a rank's regret covers it
- better: a study calls some rank worse than the margin that is not, or a best one not the best: at most 5%
- recommended: studies that recommend a rank; wrong: the recommended rank's regret is the margin or more: at most 5% of
  all studies, followed by the share of those that recommend
- alike: studies that name the cheapest rank because none are distinguishable, and the 95th percentile of its true
  regret, in margins
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from rankscope.analysis.comparison import Comparison, Judged, bounds, compare
from rankscope.analysis.verdict import decide

BASE = 2.0
MARGIN = 0.01


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


class Outcome(NamedTuple):
    """Outcome of one simulated study. Rates are over its pairs or ranks."""

    covered: float
    regret_covered: float
    falsely_worse: bool
    recommended: bool
    falsely_recommended: bool
    beyond: float
    """True regret, in margins, of the rank named as cheapest where nothing is distinguishable; else NaN."""


def draw(
    rng: np.random.Generator, setting: Setting, effects: Sequence[float], seeds: int, examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw losses (K, S, E) and label tokens (E,)."""
    ranks = len(effects)
    tokens = rng.integers(10, 200, examples).astype(float)
    shared = BASE * (1 + rng.normal(0, 0.3, examples)) + rng.normal(0, 0.01 * BASE, (seeds, 1))
    own = BASE * (
        MARGIN * np.array(effects)[:, None, None]
        + rng.normal(0, setting.seeds, (ranks, seeds, 1))
        + rng.normal(0, setting.examples, (ranks, 1, examples))
        + rng.normal(0, setting.noise, (ranks, seeds, examples))
    )
    return shared + own, tokens


def comparisons(losses: np.ndarray, tokens: np.ndarray) -> list[Comparison]:
    """Return the output of `rankscope.analysis.comparison.compare` for a study with these losses."""
    ranks = [2 ** (number + 3) for number in range(len(losses))]
    names = [f"r{rank:03d}" for rank in ranks]
    identity = {name: (rank, 1e-4) for name, rank in zip(names, ranks, strict=True)}
    tables = dict(zip(names, map(pd.DataFrame, losses), strict=True))
    return compare(Judged(tables, identity, tokens), MARGIN)  # a margin of the loss


def judge(rows: Sequence[Comparison], effects: Sequence[float], confidence: float = 0.95) -> Outcome:
    """Compare the conclusion with the truth."""
    truth = {row.candidate: BASE * MARGIN * effect for row, effect in zip(rows, effects, strict=True)}
    least = min(truth.values())
    lowest = BASE + least  # the true loss of the best, of which the margin is a share
    covered = [
        low <= truth[row.candidate] - truth[other] <= high
        for row in rows
        for other, difference in row.differences.items()
        for low, high in [difference.interval(confidence)]
    ]
    regrets = [
        bound.low is not None and bound.high is not None and bound.low <= truth[row.candidate] - least <= bound.high
        for row, bound in zip(rows, bounds(rows, confidence), strict=True)
    ]
    verdict, states = decide(rows, confidence)
    # A regret of exactly the margin counts against either claim: so the boundary, the hardest truth, is tested.
    worse = any(states[name] is False and truth[name] - least <= MARGIN * lowest * (1 + 1e-9) for name in truth)
    better = any(
        bound.low is not None and bound.low > 0 and truth[row.candidate] == least
        for row, bound in zip(rows, bounds(rows, _simultaneous(len(rows), confidence)), strict=True)
    )
    recommended = verdict["outcome"] == "recommended"
    wrong = recommended and truth[verdict["candidate"]] - least >= MARGIN * lowest * (1 - 1e-9)
    named = verdict.get("candidate")
    beyond = (truth[named] - least) / (MARGIN * lowest) if named and not recommended else float("nan")
    return Outcome(float(np.mean(covered)), float(np.mean(regrets)), worse or better, recommended, wrong, beyond)


def _simultaneous(candidates: int, confidence: float) -> float:
    """Return the level at which a claim that a rank is not the best is made."""
    return 1 - (1 - confidence) / (candidates - 1)


def simulate(
    setting: Setting, effects: Sequence[float], seeds: int, examples: int, studies: int, random: Sequence[int] = (0,)
) -> pd.DataFrame:
    """Return one row per study: the fields of `Outcome`."""
    rng = np.random.default_rng(random)
    outcomes = []
    for _ in range(studies):
        losses, tokens = draw(rng, setting, effects, seeds, examples)
        outcomes.append(judge(comparisons(losses, tokens), effects))
    return pd.DataFrame(outcomes)


def bootstrap_coverage(
    setting: Setting, effects: Sequence[float], seeds: int, examples: int, studies: int, random: Sequence[int] = (0,)
) -> float:
    """Return how often a hierarchical percentile bootstrap (999 resamples) covers the first rank's true difference."""
    rng = np.random.default_rng(random)
    truth, covered = BASE * MARGIN * (effects[0] - effects[-1]), 0
    for _ in range(studies):
        losses, tokens = draw(rng, setting, effects, seeds, examples)
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


def tables(studies: int, bootstraps: int) -> Iterator[str]:
    """Yield two Markdown tables per setting, by line: intervals and claims."""
    for number, setting in enumerate(SETTINGS):
        yield f"\n## {setting.name.capitalize()}\n\nSeeds {setting.seeds:.2%}, examples {setting.examples:.2%}, "
        yield f"noise {setting.noise:.2%} of the mean loss.\n\n"
        yield "| seeds | examples | coverage | bootstrap |\n|---:|---:|---:|---:|\n"
        for size, (seeds, examples) in enumerate(SIZES):
            found = simulate(setting, EFFECTS["small"], seeds, examples, studies, (number, size, 99))
            plain = bootstrap_coverage(setting, EFFECTS["small"], seeds, examples, bootstraps, (number, size, 98))
            yield f"| {seeds} | {examples:,} | {found['covered'].mean():.1%} | {plain:.0%} |\n"
        names = [
            "seeds",
            "examples",
            "effects",
            "regret",
            "better",
            "recommended",
            "wrong",
            "of those",
            "alike",
            "regret",
        ]
        yield f"\n| {' | '.join(names)} |\n{'|---:' * len(names)}|\n"
        for size, (seeds, examples) in enumerate(SIZES):
            for effect, (name, effects) in enumerate(EFFECTS.items()):
                found = simulate(setting, effects, seeds, examples, studies, (number, size, effect))
                alike, wrong = found["beyond"].dropna(), found["falsely_recommended"].sum()
                cells: list[Any] = [seeds, f"{examples:,}", name, f"{found['regret_covered'].mean():.1%}"]
                cells += [f"{found['falsely_worse'].mean():.1%}", f"{found['recommended'].mean():.0%}"]
                cells += [f"{wrong / studies:.1%}", f"{wrong / max(1, found['recommended'].sum()):.1%}"]
                cells += [f"{len(alike) / studies:.0%}", f"{alike.quantile(0.95):.2g}" if len(alike) else ""]
                yield f"| {' | '.join(map(str, cells))} |\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--studies", type=int, default=2000, help="of each row")
    parser.add_argument("--bootstraps", type=int, default=200, help="studies of each bootstrapped row")
    parser.add_argument("--out", type=Path, help="a Markdown file")
    args = parser.parse_args()
    command = f"python benchmarks/simulate.py --studies {args.studies} --bootstraps {args.bootstraps}"
    text = f"# How often the verdict is right\n\n```\n{command}\n```\n\n{(__doc__ or '').partition('A study has')[2]}"
    text = text.replace("```\n\n three ranks", "```\n\nA study has three ranks")
    for part in tables(args.studies, args.bootstraps):
        text += part
        print(part, end="", flush=True)
    if args.out:
        args.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
