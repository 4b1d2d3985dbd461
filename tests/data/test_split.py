"""No question lies on both sides, and the choice does not depend on the order of the rows."""

import random

import numpy as np
import numpy.typing as npt
import pytest

from rankscope.data.split import default_eval_rows, group_key, held_out


def keys_of(prompts: list[str], seed: int = 0) -> npt.NDArray[np.uint64]:
    return np.array([group_key(prompt, seed) for prompt in prompts], dtype=np.uint64)


def split(prompts: list[str], eval_rows: int | None, seed: int = 0) -> npt.NDArray[np.bool_]:
    chosen, divided = held_out(keys_of(prompts, seed), eval_rows)
    assert not divided
    return chosen


def sides(prompts: list[str], chosen: npt.NDArray[np.bool_]) -> tuple[set[str], set[str]]:
    """Prompts to train on, and prompts held out."""
    train, held = (
        {prompt for prompt, is_held in zip(prompts, chosen, strict=True) if is_held == side} for side in (False, True)
    )
    return train, held


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(0, 0), (1, 1), (3, 1), (24, 6), (50, 12), (63, 15), (64, 32), (100, 32), (200, 50), (640, 160), (2000, 200),
     (5000, 250), (20_000, 1000), (10**6, 1000)],
)  # fmt: skip
def test_default_size(rows: int, expected: int) -> None:
    assert default_eval_rows(rows) == expected


def test_groups_go_in_the_order_of_their_keys() -> None:
    prompts = [f"p{number}" for number in range(100)]
    order = sorted(prompts, key=lambda prompt: group_key(prompt, 7))
    assert sides(prompts, split(prompts, 10, seed=7))[1] == set(order[:10])


@pytest.mark.parametrize("seed", range(5))
def test_equal_prompts_stay_together_whatever_the_order(seed: int) -> None:
    rng = random.Random(seed)
    prompts = [f"p{rng.randrange(150)}" for _ in range(400)]
    found = []
    for _ in range(3):
        chosen = split(prompts, None, seed)
        train, held = sides(prompts, chosen)
        assert not held & train
        assert 100 <= chosen.sum() < 113
        found.append(held)
        rng.shuffle(prompts)
    assert found[0] == found[1] == found[2]


def test_another_seed_holds_out_other_rows() -> None:
    prompts = [f"p{number}" for number in range(400)]
    assert (split(prompts, None, 0) != split(prompts, None, 1)).any()


def test_one_huge_group_does_not_take_over() -> None:
    prompts = ["same"] * 90 + [f"p{number}" for number in range(20)]
    for seed in range(10):
        chosen = split(prompts, None, seed)
        assert not chosen[:90].any()
        assert chosen.sum() == 20


@pytest.mark.parametrize(
    ("prompts", "eval_rows"),
    [(["same"] * 40, None), (["same"] * 40, 39), (["same"] * 40, 100), (["same"] * 39 + ["other"], 10)],
)
def test_groups_are_divided_where_whole_ones_leave_too_few(prompts: list[str], eval_rows: int | None) -> None:
    keys = keys_of(prompts)
    chosen, divided = held_out(keys, eval_rows)
    assert divided
    assert chosen.sum() == min(eval_rows or 10, 39)
    assert (held_out(keys, eval_rows)[0] == chosen).all()


def test_large_groups_may_hold_out_somewhat_more() -> None:
    prompts = [f"p{number % 10}" for number in range(1000)]
    assert split(prompts, 50, 0).sum() == 100


def test_an_explicit_size_may_exceed_half() -> None:
    prompts = [f"p{number}" for number in range(100)]
    chosen = split(prompts, 80, 0)
    assert chosen.dtype == np.bool_
    assert chosen.sum() == 80
