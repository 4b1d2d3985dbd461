"""Power, false claims and coverage on simulated studies: benchmarks/simulate.py on a small scale."""

from types import ModuleType

import pytest

from rankscope.analysis.comparison import estimate
from scripts import load_benchmark

STUDIES = 300


def most_false(studies: int) -> float:
    """Largest share of false claims: 5% and three standard errors."""
    return 0.05 + 3 * float((0.05 * 0.95 / studies) ** 0.5)


@pytest.fixture(scope="module")
def simulation() -> ModuleType:
    return load_benchmark("simulate")


@pytest.mark.parametrize(("ranks", "settled", "right"), [(6, 0.5, 0.6), (3, 0.6, 0.75)])
def test_three_seeds_of_a_hundred_rows_often_settle_it(
    simulation: ModuleType, ranks: int, settled: float, right: float
) -> None:
    """A verdict that claimed nothing would never be wrong. At 4,000 studies: docs/results/simulation.md."""
    found = simulation.simulate(simulation.Cell("mix", "demo", 0.21, ranks, (3,), 100), STUDIES, (0,))
    assert found["settled"] >= settled
    assert found["right"] >= right
    assert found["false"] <= 0.01
    assert found["falsely worse"] <= 0.02
    assert 0.92 <= found["coverage"] <= 0.98


WORST = [
    (world, ranks, rows, truth)
    for world in ("quiet", "demo", "noisy", "unstable")
    for ranks, truth in ((2, (1, 0)), (3, (1, 1, 0)), (6, (9, 9, 9, 9, 1, 0)))
    for rows in (30, 100)
]


@pytest.mark.parametrize(
    ("world", "ranks", "rows", "truth"),
    [pytest.param(*case, marks=[] if n % 8 == 0 else [pytest.mark.slow]) for n, case in enumerate(WORST)],
)
def test_ranks_on_the_margin_are_seldom_recommended(
    simulation: ModuleType, world: str, ranks: int, rows: int, truth: tuple[float, ...]
) -> None:
    found = simulation.simulate(simulation.Cell("worst", world, 0.21, ranks, (3,), rows, truth), STUDIES, (1,))
    assert found["false"] <= most_false(STUDIES)
    assert found["falsely worse"] <= most_false(STUDIES)


@pytest.mark.parametrize(("table", "ranks", "truth"), [("growth", 2, (1, 0)), ("until settled", 3, (1, 4, 0))])
def test_a_study_that_grows_until_it_is_settled_is_not_wrong_more_often(
    simulation: ModuleType, table: str, ranks: int, truth: tuple[float, ...]
) -> None:
    looks = simulation.PLANNED if table == "until settled" else tuple(range(2, 13))
    found = simulation.simulate(simulation.Cell(table, "demo", 0.21, ranks, looks, 50, truth), STUDIES, (2,))
    assert found["ever false"] <= most_false(STUDIES)
    assert (found["trials"] < 0.9) == (table == "until settled"), "a rank that is worse gets no more seeds"


def test_ranks_with_different_numbers_of_seeds_are_compared_on_those_that_both_have(simulation: ModuleType) -> None:
    rng, none = simulation.np.random.default_rng(0), simulation.np.zeros((5, 3))
    drawn = simulation.draw(rng, simulation.WORLDS["demo"], none, 5, 30, 0.21)
    looks = [simulation.contrasts(simulation.parts_of(drawn, seeds)) for seeds in (3, 5)]
    look = simulation.np.array([[0, 1, 1]] * 5)
    found = simulation.at_looks(looks, look)
    assert found.excesses.seeds[0].tolist() == [[3, 3, 3], [3, 5, 5], [3, 5, 5]]
    assert (found.excesses.mean[:, 1, 2] == looks[1].excesses.mean[:, 1, 2]).all()
    assert (found.excesses.mean[:, 0, 2] == looks[0].excesses.mean[:, 0, 2]).all()
    assert found.gain.seeds[0].tolist() == [3, 5, 5]


def test_what_is_simulated_is_judged_by_the_estimates_of_real_studies(simulation: ModuleType) -> None:
    """Contrasts from the parts of losses against `estimate` of the contrast itself."""
    rng, truth = simulation.np.random.default_rng(0), simulation.np.zeros((4, 3))
    drawn = simulation.draw(rng, simulation.WORLDS["demo"], truth, 5, 30, 0.21)
    parts, share = simulation.parts_of(drawn, 4), simulation.np.array([0.0, 0.05, 0.3, 1.0])
    losses, before = drawn.losses[:, :, :4].astype(float), drawn.untrained
    found, gain = simulation.excesses_of(parts, share), simulation.gain_of(parts)
    for study, own, other in simulation.product(range(4), range(3), range(3)):
        part, pair = share[study], losses[study]
        contrast = pair[own] - (1 - part) * pair[other] - part * before[study]
        for values, ours, at in (
            (contrast, found, (study, own, other)),
            (before[study] - pair[own], gain, (study, own)),
        ):
            expected = estimate(values, drawn.tokens[study])
            if own != other:
                mine = [getattr(ours, name)[at] for name in ("mean", "seed_error", "example_error", "third")]
                assert mine == pytest.approx(list(expected[:4]), rel=1e-9, abs=1e-18)


@pytest.mark.parametrize("gain", [0.0, -0.02])
def test_where_nothing_is_gained_nothing_is_recommended(simulation: ModuleType, gain: float) -> None:
    found = simulation.simulate(simulation.Cell("little gain", "demo", gain, 3, (3,), 100, (4, 2, 0)), 100, (3,))
    assert found["untold"] >= 0.95
    assert found["named wrongly"] <= 0.05


def test_ranks_keep_what_they_are_shown_to_keep(simulation: ModuleType) -> None:
    found = simulation.simulate(simulation.Cell("mix", "demo", 0.21, 3, (3,), 50), STUDIES, (4,))
    assert 1 - most_false(STUDIES) <= found["kept"] < 1


def test_what_is_drawn_is_what_the_benchmark_says(simulation: ModuleType) -> None:
    """Standard deviation of a pair five octaves apart and one octave apart, over seeds; mean and tail of lengths."""
    rng = simulation.np.random.default_rng(0)
    world = simulation.World(0.003, (200, 200))  # light tails, so that few draws do
    drawn = simulation.draw(rng, world, simulation.np.zeros((400, 6)), 4, 300, 0.21)
    weights = drawn.tokens / drawn.tokens.sum(axis=1, keepdims=True)
    by_seed = (drawn.losses * weights[:, None, None]).sum(axis=-1)
    far, near = by_seed[:, 0] - by_seed[:, 5], by_seed[:, 0] - by_seed[:, 1]
    rest = 3.5**2 * (weights**2).sum(axis=1).mean()
    expected = 0.003 * (1 + rest) ** 0.5
    assert far.std(axis=1, ddof=1).mean() / 0.9213 == pytest.approx(expected, rel=0.05)
    assert near.var(ddof=1) / far.var(ddof=1) == pytest.approx(0.15 + 0.85 * 0.2**1.4, rel=0.2)
    assert drawn.tokens.mean() == pytest.approx(81, rel=0.05)
    assert (drawn.tokens > 480).mean() == pytest.approx(0.007, abs=0.002)


def test_a_part_is_of_all_cells(simulation: ModuleType) -> None:
    kinds = {cell.table for cell in simulation.cells()}
    assert kinds == set(simulation.TABLES)
