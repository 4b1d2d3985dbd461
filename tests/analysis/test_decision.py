"""What is decided from estimates, without a study."""

import numpy as np
import pytest
from scipy import stats

from rankscope.analysis.comparison import Estimate, estimate
from rankscope.analysis.decision import (
    LEVELS,
    in_contention,
    level_at,
    lower_bound,
    outcome_of,
    pooled,
    states,
    upper_bound,
)
from rankscope.analysis.decision import Decision as Decided

SEEDS, ROWS = 3, 100


def pairs(means: list[float], error: float = 1.0, third: float = 0.0) -> Estimate:
    """Excesses of candidates with these losses over a margin of 10, alike uncertain."""
    mean = np.subtract.outer(np.array(means), np.array(means)) - 10.0
    flat = np.ones_like(mean)
    return Estimate(mean, error * flat, 0 * flat, third * flat, SEEDS, ROWS, ROWS)


def octaves(count: int) -> np.ndarray:
    return 3.0 + np.arange(count)


def test_a_decided_candidate_no_longer_counts_against_the_others() -> None:
    """The same candidate, 3.7 errors within the margin: beside others as open as itself, and beside decided ones."""
    own = 10 - 3.7
    good, worse = states(pairs([own, 9.9, 9.9, 9.9, 9.9, 0.0]), octaves(6), 0.95)
    beside_decided, they_are_worse = states(pairs([own, 1e3, 1e3, 1e3, 1e3, 0.0]), octaves(6), 0.95)
    assert (good[0], worse.any()) == (False, False)
    assert beside_decided.tolist() == [True, False, False, False, False, True]
    assert they_are_worse.tolist() == [False, True, True, True, True, False]


def test_a_candidate_is_worse_where_some_other_one_shows_it() -> None:
    """Beside the second, which may be the best as well, nothing is shown."""
    _, worse = states(pairs([60.0, 45.0, 0.0]), octaves(3), 0.95)
    assert worse.tolist() == [True, True, False]
    _, worse = states(pairs([60.0, 55.0, 50.0]), octaves(3), 0.95)
    assert not worse.any()


def test_beside_a_candidate_that_is_worse_nothing_need_be_shown() -> None:
    """The first is worse than the last. The second is uncertain beside the first alone, which cannot be the best."""
    beside = pairs([60.0, 1.0, 0.0])
    beside.example_error[1, 0] = 1e3
    good, worse = states(beside, octaves(3), 0.95)
    assert (good.tolist(), worse.tolist()) == ([False, True, True], [True, False, False])
    beside.mean[0] -= 55
    good, worse = states(beside, octaves(3), 0.95)
    assert (good[1], worse[0]) == (False, False)


def test_of_pairs_with_more_seeds_more_is_learned() -> None:
    """With as many seeds of one rank as of the others the variance is the mean of all; and fewer weigh less."""
    errors = np.ones((3, 3))
    errors[0, 1] = errors[1, 0] = errors[0, 2] = errors[2, 0] = 5.0
    few = np.array([[3, 3, 3], [3, 12, 12], [3, 12, 12]])
    of_few, of_all = (pooled(pairs([0, 0, 0])._replace(seed_error=errors, seeds=s), octaves(3)) for s in (few, 3))
    assert of_few[0].seed_error[1, 2] < of_all[0].seed_error[1, 2] * np.sqrt(3 / 12)
    assert of_few[1][0, 1] == pytest.approx(2 + (2 + 2 + 11) / 3)


def test_worse_candidates_are_out_of_contention_where_differences_matter() -> None:
    decided = Decided(np.array([False, True, True]), np.array([True, False, False]), True, False)
    assert in_contention(decided).tolist() == [False, True, True]
    assert in_contention(decided._replace(gained=np.False_)).all()


def test_many_studies_at_once_are_decided_as_each_alone() -> None:
    rng = np.random.default_rng(0)
    means = rng.normal(0, 8, (20, 4, 4))
    own, examples = rng.exponential(1, (20, 4, 4)), rng.exponential(0.5, (20, 4, 4))
    together = states(
        Estimate(means, own, examples, rng.normal(0, 1, means.shape), SEEDS, ROWS, ROWS), octaves(4), 0.95
    )
    rng = np.random.default_rng(0)
    means, own, examples = (
        rng.normal(0, 8, (20, 4, 4)),
        rng.exponential(1, (20, 4, 4)),
        rng.exponential(0.5, (20, 4, 4)),
    )
    third = rng.normal(0, 1, means.shape)
    for n in range(20):
        alone = states(Estimate(means[n], own[n], examples[n], third[n], SEEDS, ROWS, ROWS), octaves(4), 0.95)
        assert [side[n].tolist() for side in together] == [side.tolist() for side in alone]
    assert together[0].any()
    assert together[1].any()


def test_the_level_is_that_of_the_last_planned_number_of_seeds() -> None:
    assert [float(level_at(seeds, 0.9)) for seeds in (3, 4, 7, 8, 11, 12, 40)] == pytest.approx(
        [0.1 * LEVELS[look] for look in (3, 3, 5, 8, 8, 12, 12)]
    )
    assert level_at(np.array([2, 5]), 0.95) == pytest.approx(0.05 * np.array([LEVELS[2], LEVELS[5]]))


def test_the_variance_over_seeds_is_drawn_to_what_grows_with_the_octaves() -> None:
    """A pair whose seeds agree by luck has more, one whose seeds do not has less, and one on the line stays."""
    line = np.sqrt(np.abs(octaves(3)[:, None] - octaves(3)) + 0.5)
    on_line, degrees = pooled(pairs([0, 0, 0])._replace(seed_error=line), octaves(3))
    off = ~np.eye(3, dtype=bool)
    assert on_line.seed_error[off] == pytest.approx(line[off])
    assert degrees[off] == pytest.approx(2 * (SEEDS - 1)), "two pairs' worth: its own, and one of the others"
    lucky = line.copy()
    lucky[0, 1] = 0.0
    drawn, _ = pooled(pairs([0, 0, 0])._replace(seed_error=lucky), octaves(3))
    assert 0 < drawn.seed_error[0, 1] < line[0, 1]
    _, degrees = pooled(pairs([0] * 6), octaves(6))
    assert degrees[0, 1] == pytest.approx(3 * (SEEDS - 1)), "its own, and the root of four"
    two, degrees = pooled(pairs([0, 0])._replace(seed_error=np.array([[0.0, 2.0], [2.0, 0.0]])), octaves(2))
    assert (two.seed_error[0, 1], degrees[0, 1]) == (2.0, SEEDS - 1), "no other pair to learn from"


def test_one_seed_shows_nothing() -> None:
    good, worse = states(pairs([0.0, 100.0], error=np.inf)._replace(seeds=1), octaves(2), 0.95)
    assert not good.any()
    assert not worse.any()


@pytest.mark.parametrize("third", [0.0, 0.4, -0.4])
def test_bounds_know_of_skewness_and_are_never_narrower_than_students(third: float) -> None:
    of = Estimate(2.0, 0.0, 1.0, third, SEEDS, ROWS, ROWS)
    t = stats.t.ppf(0.95, ROWS - 1)
    high, low = upper_bound(of, 2, 0.05), lower_bound(of, 2, 0.05)
    if third <= 0:
        assert high == pytest.approx(2 + t)
    else:
        x = 2 - high  # in standard errors: Hall's transformation of it is the quantile
        assert x + third * x**2 / 3 + third**2 * x**3 / 27 + third / 6 == pytest.approx(-t)
        assert high > 2 + t
    assert low == pytest.approx(4 - upper_bound(of._replace(third=-third), 2, 0.05))


@pytest.mark.parametrize("third", [1.0, 5.0, 100.0])
def test_far_out_where_halls_bound_is_below_students_students_holds(third: float) -> None:
    """As with two seeds, at their small level; or where seeds hide what examples vary by, and skewness is luck."""
    level, of = 0.001, Estimate(2.0, 1.0, 0.5, third, 2, ROWS, ROWS)
    assert upper_bound(of, 1, level) >= 2 + of.t(1 - level, 1, ROWS - 1) * of.error * (1 - 1e-12)
    assert lower_bound(of._replace(third=-third), 1, level) <= 2 - of.t(1 - level, 1, ROWS - 1) * of.error * (1 - 1e-12)


def test_rows_of_unequal_weight_have_the_degrees_of_freedom_of_fewer() -> None:
    tokens = np.array([1.0, 1.0, 1.0, 9.0])
    of = estimate(np.ones((SEEDS, 4)) * [0.0, 0.0, 1.0, 1.0], tokens)
    assert of.effective == pytest.approx(12**2 / 84)
    assert estimate(np.ones((SEEDS, 4)), np.full(4, 7.0)).effective == pytest.approx(4)
    few = Estimate(2.0, 0.0, 1.0, 0.0, SEEDS, 10.0, ROWS)
    assert upper_bound(few, 2, 0.05) == pytest.approx(2 + stats.t.ppf(0.95, 9))
    assert few.half_width(0.9) == pytest.approx(stats.t.ppf(0.95, ROWS - 1)), "the plain interval, which is shown"


def test_the_outcome_names_the_lowest_rank_that_is_good_enough_within_the_budget() -> None:
    decided = Decided(np.array([False, True, True]), np.array([True, False, False]), True, False)
    assert outcome_of(decided, [True, True, True]) == ("recommended", 1)
    assert outcome_of(decided, [True, False, True]) == ("recommended", 2)
    assert outcome_of(decided, [True, False, False]) == ("best_in_budget", None)
    assert outcome_of(decided, [False] * 3) == ("nothing_in_budget", None)
    assert outcome_of(decided._replace(gained=False), [True] * 3) == ("not_trained_enough", None)
    nothing = decided._replace(good=np.zeros(3, bool), worse=np.zeros(3, bool))
    assert outcome_of(nothing, [True] * 3) == ("not_enough_evidence", None)
    assert outcome_of(nothing._replace(alike=True), [True] * 3) == ("not_distinguishable", 0)
