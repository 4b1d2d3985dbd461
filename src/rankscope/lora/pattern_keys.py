"""Keys of rank_pattern and alpha_pattern: names of modules, or simple regular expressions of them.

PEFT gives the keys to Python's `re`, in which one such as `(a+)+` can take for ever. Those of an adapter that somebody
else made are read here: the ways through a name are followed all at once, so that the time is at most proportional to
the key's length times the name's.
"""

import re
from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

Value = TypeVar("Value")

LONGEST = 500
"""Characters of a key, and of a layer's name."""

_TOKEN = re.compile(r"(\\[dw]|\\[^A-Za-z0-9]|\[\^?[A-Za-z0-9_-]+\]|[A-Za-z0-9_.-]|\(\?:|[()|^$])([*+?]\??)?")


class _Item(NamedTuple):
    """One character, an anchor, or alternatives in parentheses; and how often."""

    what: "re.Pattern[str] | str | list[list[_Item]]"
    repeat: str  # "", "?", "*" or "+"


class PatternKeys(Generic[Value]):
    """A mapping of such keys, by which a layer's value is found as PEFT finds it (`get_pattern_key`): that of the first
    key that is the end of the layer's name, after a dot, or all of it.

    Raises:
        ValueError: a key is none of those that are read.
    """

    def __init__(self, patterns: Mapping[str, Value]) -> None:
        self._patterns = [(_parse(key), value) for key, value in patterns.items()]

    def get(self, layer: str, otherwise: Value) -> Value:
        """The value of the layer of this name."""
        starts = {0, *(place + 1 for place, character in enumerate(layer) if character == ".")}
        for alternatives, value in self._patterns:
            if len(layer) in _after(alternatives, layer, starts):
                return value
        return otherwise


def _parse(key: str) -> list[list[_Item]]:
    """The key's alternatives."""
    if len(key) > LONGEST:
        raise ValueError(f"a key of {len(key):,} characters, more than {LONGEST}")
    tokens, place = [], 0
    while place < len(key):
        found = _TOKEN.match(key, place)
        if found is None:
            raise ValueError(f"the key {key!r}: from its character {place + 1} on it is none of those that are read")
        tokens.append((found[1], (found[2] or "")[:1]))  # a lazy * finds the same names
        place = found.end()
    tokens.reverse()
    alternatives = _alternatives(key, tokens)
    if tokens:
        raise ValueError(f"the key {key!r}: ) without (")
    return alternatives


def _alternatives(key: str, tokens: list[tuple[str, str]]) -> list[list[_Item]]:
    """Takes tokens from the end of the list up to the closing parenthesis of the group, which stays."""
    found: list[list[_Item]] = [[]]
    while tokens and tokens[-1][0] != ")":
        token, repeat = tokens.pop()
        what: re.Pattern[str] | str | list[list[_Item]] = token
        if token in ("(", "(?:"):
            inner = [] if repeat else _alternatives(key, tokens)
            if not inner or not tokens:
                raise ValueError(f"the key {key!r}: ( without )")
            what, repeat = inner, tokens.pop()[1]
        elif token not in "|^$":
            try:
                what = re.compile(token)
            except re.error as error:
                raise ValueError(f"the key {key!r}: {error}") from None
        if repeat and (what in ("|", "^", "$") or (isinstance(what, list) and repeat != "?")):
            raise ValueError(f"the key {key!r}: {repeat} after what is no single character")
        if what == "|":
            found.append([])
        else:
            found[-1].append(_Item(what, repeat))
    return found


def _after(alternatives: list[list[_Item]], text: str, starts: set[int]) -> set[int]:
    """The places in `text` at which a match that begins at one of `starts` may end."""
    ends: set[int] = set()
    for items in alternatives:
        places = starts
        for item in items:
            if not places:
                break
            places = _after_one(item, text, places)
        ends |= places
    return ends


def _after_one(item: _Item, text: str, places: set[int]) -> set[int]:
    what, repeat = item
    if isinstance(what, str):
        return places & {0 if what == "^" else len(text)}
    if isinstance(what, list):
        return _after(what, text, places) | (places if repeat else set())
    taken = {place + 1 for place in places if place < len(text) and what.fullmatch(text[place])}
    if repeat in ("*", "+"):
        for place in range(min(taken, default=len(text)), len(text)):
            if place in taken and what.fullmatch(text[place]):
                taken.add(place + 1)
    return taken | (places if repeat in ("?", "*") else set())
