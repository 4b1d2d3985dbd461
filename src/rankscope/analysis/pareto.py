"""Which candidates no other beats in everything at once."""

from collections.abc import Sequence

import pandas as pd


def on_front(table: pd.DataFrame, columns: Sequence[str]) -> "pd.Series[bool]":
    """Of each row of `table`, whether it is on the Pareto front of `columns`, of which less is better.

    A row is beaten by one that is nowhere higher and somewhere lower; rows with equal values do not beat each other. A
    row with NaN is not on the front and beats none. Noise and intervals are not considered.
    """
    values = table[list(columns)].to_numpy(dtype="float64")
    front = []
    for row in values:
        beaten = ((values <= row).all(axis=1) & (values < row).any(axis=1)).any()
        front.append(bool(not beaten and (row == row).all()))
    return pd.Series(front, index=table.index, dtype=bool)
