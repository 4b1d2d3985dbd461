"""Each epoch covers every example once; a batch depends on nothing but its arguments."""

import numpy as np
import pytest

from rankscope.data.batches import _permutation, batch_indices, steps_per_epoch


@pytest.mark.parametrize(("examples", "batch_size"), [(10, 3), (9, 3), (1, 8), (7, 7), (8, 1), (1917, 8)])
def test_each_epoch_covers_every_example_once(examples: int, batch_size: int) -> None:
    steps = steps_per_epoch(examples, batch_size)
    assert steps == -(-examples // batch_size)
    for epoch in range(3):
        batches = [batch_indices(examples, batch_size, 5, epoch * steps + step) for step in range(steps)]
        assert {len(batch) for batch in batches[:-1]} <= {batch_size}
        assert 1 <= len(batches[-1]) <= batch_size
        np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(examples))


def test_an_epoch_is_numpys_permutation_of_seed_and_epoch() -> None:
    found = np.concatenate([batch_indices(10, 4, seed=3, step=step) for step in (6, 7, 8)])
    np.testing.assert_array_equal(found, np.random.default_rng([3, 2]).permutation(10))
    assert found.dtype == np.int64


def test_seeds_and_epochs_differ() -> None:
    orders = {tuple(batch_indices(50, 50, seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9


def test_a_batch_does_not_depend_on_what_was_asked_before() -> None:
    expected = [batch_indices(20, 3, seed=1, step=step) for step in range(14)]
    for step in reversed(range(14)):
        _permutation.cache_clear()
        np.testing.assert_array_equal(batch_indices(20, 3, seed=1, step=step), expected[step])


def test_changing_a_batch_changes_no_other() -> None:
    batch = batch_indices(20, 3, seed=1, step=0)
    expected = batch.copy()
    batch[:] = -1
    np.testing.assert_array_equal(batch_indices(20, 3, seed=1, step=0), expected)
