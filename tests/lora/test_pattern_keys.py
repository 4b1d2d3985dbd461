"""Keys of rank_pattern: the same matches as PEFT's own, in linear time."""

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from rankscope.lora.adapter_config import by_pattern

PARTS = ["a", "b", ".", r"\.", r"\d", "[ab]", "[^a]", "[0-9]", "1", "_", r"\w", "-"]
one = st.builds("{}{}".format, st.sampled_from(PARTS), st.sampled_from(["", "", "?", "*", "+", "*?", "{2}", "{1,}"]))
plain = st.lists(one, max_size=4).map("".join)
choice = st.lists(plain, min_size=1, max_size=3).map("|".join)
group = st.builds("{}{}){}".format, st.sampled_from(["(", "(?:"]), choice, st.sampled_from(["", "?", "*", "+"]))
keys = st.lists(st.one_of(plain, group, st.sampled_from(["^", "$", "|"])), max_size=4).map("".join)
names = st.text("ab1._-", min_size=1, max_size=8)


@given(st.dictionaries(keys, st.integers(), max_size=3), names)
def test_values_are_those_that_peft_finds(patterns: dict[str, int], name: str) -> None:
    found = get_pattern_key(list(patterns), name)
    assert by_pattern(patterns, -1)(name) == patterns.get(found, -1)


def test_keys_as_people_write_them() -> None:
    layer = "model.layers.12.self_attn.q_proj"
    for key in (
        "q_proj",
        layer,
        r"^model\.layers\.12\.self_attn\.q_proj",
        r"layers\.1[0-9]\.self_attn\.(q|k)_proj",
        r".*\.(q_proj|v_proj)$",
        r"^model.layers.\d+.*q_proj",
    ):
        assert by_pattern({"k_proj": 1, key: 2}, 0)(layer) == 2
    for key in ("proj", "self_attn", r"^layers\.12\.self_attn\.q_proj", "(q|k)"):
        assert by_pattern({key: 2}, 0)(layer) == 0


REFUSED = {
    "incomplete": ["(", ")", "a)", "(a", "a)|(b", "*", "a**", "[b-a]", "[", "\\"],
    "not matched by RE2": [r"(a)\1", "(?=a)", "(?<!a)b", "((a{99}){99}){99}", "a{1001}"],
    "read differently": ["(?i)a", "(?P<x>a)", "a{,2}", "a b", "a\n", "[[:alpha:]]", r"\Z", r"\pL"],
    "too long": ["x" * 501],
}


@pytest.mark.parametrize("key", [key for keys in REFUSED.values() for key in keys])
def test_other_syntax_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match="key"):
        by_pattern({key: 2}, 0)


@pytest.mark.parametrize(
    "key", [".*" * 200 + "x", "a?" * 160 + "a" * 160, "(a|a)" * 99, "(a*a*|a*)" * 50, "(a+)+$", "((a|a)*)*b?c"]
)
def test_no_key_takes_long(key: str) -> None:
    start = time.process_time()
    assert by_pattern({key: 2}, 0)("a" * 320 + "b") == 0
    assert time.process_time() - start < 2


def test_a_hostile_key_takes_exponential_time_in_re() -> None:
    """With `re`, each further letter doubles the time of a hostile key."""
    start = time.process_time()
    assert not re.match(r"(.*\.)?((a+)+$)$", "a" * 20 + "b")
    slow = time.process_time() - start
    start = time.process_time()
    assert not re.match(r"(.*\.)?((a+)+$)$", "a" * 14 + "b")
    assert slow > 8 * (time.process_time() - start)
