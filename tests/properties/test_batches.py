"""Batches and the split: every example once an epoch, and nothing depends on what was asked before."""

import random

import numpy as np
import numpy.typing as npt
from hypothesis import given
from hypothesis import strategies as st

from rankscope.data.batches import _permutation, batch_indices, steps_per_epoch
from rankscope.data.split import default_eval_rows, group_key, held_out
from rankscope.data.tokens import Example, Tokens
from rankscope.spec.models import TrainingSpec
from rankscope.spec.resolve import resolve_spec
from rankscope.train.step import batch_at

SEEDS = st.integers(0, 2**63 - 1)
PROMPTS = st.lists(st.text(max_size=3) | st.sampled_from(["", "same", " same"]), min_size=1, max_size=120)


@given(examples=st.integers(1, 200), batch_size=st.integers(1, 40), seed=SEEDS, epoch=st.integers(0, 2**40))
def test_an_epoch_is_every_example_once(examples: int, batch_size: int, seed: int, epoch: int) -> None:
    steps = steps_per_epoch(examples, batch_size)
    batches = [batch_indices(examples, batch_size, seed, epoch * steps + step) for step in range(steps)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(examples))
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) == examples - batch_size * (steps - 1)


@given(
    examples=st.integers(1, 60), batch_size=st.integers(1, 9), asked=st.lists(st.tuples(SEEDS, st.integers(0, 99))),
    seed=SEEDS, step=st.integers(0, 99),
)  # fmt: skip
def test_a_batch_is_a_function_of_its_arguments(
    examples: int, batch_size: int, asked: list[tuple[int, int]], seed: int, step: int
) -> None:
    _permutation.cache_clear()
    expected = batch_indices(examples, batch_size, seed, step)
    for other_seed, other_step in asked:
        batch_indices(examples, batch_size, other_seed, other_step)[:] = -1  # a caller may write into its batch
    batch_indices(examples, batch_size, seed, step)[:] = -1
    np.testing.assert_array_equal(batch_indices(examples, batch_size, seed, step), expected)


@given(
    examples=st.integers(1, 40), step=st.integers(0, 30), batch_size=st.integers(1, 9), accumulated=st.integers(1, 4)
)
def test_candidates_with_one_seed_see_the_same_examples(
    examples: int, step: int, batch_size: int, accumulated: int
) -> None:
    grid = {"ranks": [1, 64], "learning_rates": [1e-4, 1e-2], "seeds": [3, 5]}
    spec = resolve_spec({"model": {"id": "m"}, "data": {"id": "d"}, **grid})
    training = TrainingSpec(batch_size=batch_size, gradient_accumulation_steps=accumulated)
    one = Example(np.zeros(2, np.int32), np.array([False, True]))
    tokens = Tokens.from_examples([one] * examples)
    for seed in spec.seeds:
        trials = [trial for trial in spec.trials() if trial.seed == seed]
        batches = [batch_at(trial, tokens, training, step).tolist() for trial in trials]
        assert len(batches) == 4
        assert batches == batches[:1] * 4
        assert batches[0] == batch_indices(examples, batch_size * accumulated, seed, step).tolist()


def keys_of(prompts: list[str], seed: int) -> npt.NDArray[np.uint64]:
    return np.array([group_key(prompt, seed) for prompt in prompts], dtype=np.uint64)


@given(prompts=PROMPTS, wanted=st.none() | st.integers(1, 150), seed=SEEDS)
def test_the_split_is_whole_groups_of_prompts(prompts: list[str], wanted: int | None, seed: int) -> None:
    chosen, divided = held_out(keys_of(prompts, seed), wanted)
    assert chosen.shape == (len(prompts),)  # each row is on one side
    asked = default_eval_rows(len(prompts)) if wanted is None else wanted
    if divided:
        assert chosen.sum() == min(asked, len(prompts) - 1)
        return
    held = {prompt for prompt, is_held in zip(prompts, chosen, strict=True) if is_held}
    trained = {prompt for prompt, is_held in zip(prompts, chosen, strict=True) if not is_held}
    assert not held & trained
    assert chosen.sum() <= max(asked, len(prompts) // 2)
    if len(set(prompts)) == len(prompts):
        assert chosen.sum() == min(asked, len(prompts) - 1)


@given(prompts=PROMPTS, wanted=st.none() | st.integers(1, 150), seed=SEEDS, shuffle=st.integers())
def test_the_split_depends_on_the_set_of_rows(prompts: list[str], wanted: int | None, seed: int, shuffle: int) -> None:
    chosen, divided = held_out(keys_of(prompts, seed), wanted)
    order = random.Random(shuffle).sample(range(len(prompts)), len(prompts))
    moved, divided_too = held_out(keys_of([prompts[index] for index in order], seed), wanted)
    assert divided == divided_too
    if not divided:
        np.testing.assert_array_equal(moved, chosen[order])
