"""Held-out rows: whole groups of rows that share a question or a conversation's beginning, chosen by hash."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def default_eval_rows(rows: int) -> int:
    """Default number of held-out rows: 5%, at least 200, at most 1,000, at most a quarter (but 32 of 64 or more)."""
    return max(min(max(200, rows // 20), 1000, rows // 4), 32 if rows >= 64 else min(rows, 1))


def group_key(beginning: str, seed: int) -> bytes:
    """Key of a group, by which it is also chosen: half of sha256("SEED:BEGINNING")."""
    return hashlib.sha256(f"{seed}:{beginning}".encode()).digest()[:16]


def held_out(keys: Sequence[bytes], eval_rows: int | None) -> tuple[npt.NDArray[np.bool_], bool]:
    """Mask of the rows to hold out, (S,) for S rows with these group keys; and whether groups had to be divided.

    Rows of one group stay together, so that no question is on both sides. Groups are taken in the order of their keys
    until `eval_rows` rows are held out, skipping any that would hold out more than half of all rows. The choice depends
    on the set of rows, not on their order in the file. Since groups are taken whole, somewhat more rows than
    `eval_rows` may be held out.

    Where large groups leave fewer than half of `eval_rows` (one prompt for all rows), rows are taken one by one, in the
    order of a hash of key and place in the file.
    """
    rows = len(keys)
    wanted = default_eval_rows(rows) if eval_rows is None else eval_rows
    most = max(wanted, rows // 2)
    groups: dict[bytes, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    chosen = np.zeros(rows, dtype=np.bool_)
    count = 0
    for key in sorted(groups):
        if count >= wanted:
            break
        if count + len(groups[key]) <= min(most, rows - 1):
            chosen[groups[key]] = True
            count += len(groups[key])
    if 2 * count >= min(wanted, rows // 2) and count:
        return chosen, False
    order = sorted(range(rows), key=lambda index: hashlib.sha256(b"%b:%d" % (keys[index], index)).digest())
    chosen[:] = False
    chosen[order[: min(wanted, rows - 1)]] = True
    return chosen, True
