"""No question lies on both sides, and the choice does not depend on the order of the rows."""

import hashlib
import random

import numpy as np
import pytest

from rankscope.data.split import default_eval_rows, held_out


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 0), (1, 0), (3, 1), (50, 25), (64, 32), (640, 32), (2000, 100), (20_000, 1000), (10**6, 1000)],
)
def test_default_size(rows: int, expected: int) -> None:
    assert default_eval_rows(rows) == expected


def test_groups_go_in_the_order_of_their_hash() -> None:
    prompts = [f"p{number}" for number in range(100)]
    order = sorted(prompts, key=lambda prompt: hashlib.sha256(f"7:{prompt}".encode()).hexdigest())
    chosen = held_out(prompts, 10, seed=7)
    assert {prompt for prompt, held in zip(prompts, chosen, strict=True) if held} == set(order[:10])


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_stay_together_whatever_the_order(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [f"p{rng.randrange(150)}" for _ in range(400)]
    sides = []
    for _ in range(3):
        chosen = held_out(prompts, None, seed)
        held = {prompt for prompt, is_held in zip(prompts, chosen, strict=True) if is_held}
        trained = {prompt for prompt, is_held in zip(prompts, chosen, strict=True) if not is_held}
        assert not held & trained
        assert 32 <= chosen.sum() < 45
        sides.append(held)
        rng.shuffle(prompts)
    assert sides[0] == sides[1] == sides[2]


def test_another_seed_holds_out_other_rows() -> None:
    prompts = [f"p{number}" for number in range(400)]
    assert (held_out(prompts, None, 0) != held_out(prompts, None, 1)).any()


def test_one_huge_group_does_not_take_over() -> None:
    prompts = ["same"] * 90 + [f"p{number}" for number in range(20)]
    for seed in range(10):
        chosen = held_out(prompts, None, seed)
        assert not chosen[:90].any()
        assert chosen.sum() == 20


def test_large_groups_may_hold_out_somewhat_more() -> None:
    prompts = [f"p{number % 10}" for number in range(1000)]
    assert held_out(prompts, 50, 0).sum() == 100


def test_an_explicit_size_may_exceed_half() -> None:
    prompts = [f"p{number}" for number in range(100)]
    chosen = held_out(prompts, 80, 0)
    assert chosen.dtype == np.bool_
    assert chosen.sum() == 80
