"""Tokens of made-up rows."""

import numpy as np

from rankscope.data.tokens import Tokens


def rows_of(length: int, count: int = 50) -> Tokens:
    """Equal rows of `length` tokens, every token a label."""
    offsets = np.arange(0, (count + 1) * length, length, dtype=np.int64)
    return Tokens(np.zeros(count * length, np.int32), np.ones(count * length, np.bool_), offsets)
