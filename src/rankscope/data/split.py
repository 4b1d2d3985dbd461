"""Held-out rows: whole groups of rows that share a question or a conversation's beginning, chosen by hash."""

import hashlib

import numpy as np
import numpy.typing as npt


def default_eval_rows(rows: int) -> int:
    """Default number of held-out rows: 5%, at least 200, at most 1,000, at most a quarter (but 32 of 64 or more)."""
    return max(min(max(200, rows // 20), 1000, rows // 4), 32 if rows >= 64 else min(rows, 1))


def group_key(beginning: str, seed: int) -> int:
    """Key of a group, by which it is also chosen: the first 8 bytes of sha256("SEED:BEGINNING"), as a number."""
    return _hash(f"{seed}:{beginning}".encode())


def held_out(keys: npt.NDArray[np.uint64], eval_rows: int | None) -> tuple[npt.NDArray[np.bool_], bool]:
    """Mask of the rows to hold out, (S,) for S rows with these group keys; and whether groups had to be divided.

    Groups, whose rows stay together so that no question is on both sides, are taken in the order of their keys until
    at least `eval_rows` rows are held out, skipping any that would hold out more than half of all rows: the choice
    depends on the set of rows, not on their order. Where that leaves fewer than half of `eval_rows` (one prompt for all
    rows), rows are taken one by one, in the order of a hash of key and place in the file.
    """
    rows = len(keys)
    wanted = default_eval_rows(rows) if eval_rows is None else eval_rows
    most = min(max(wanted, rows // 2), rows - 1)
    _, group_of, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    taken, count = list[int](), 0
    for group, size in enumerate(sizes.tolist()):
        if count < wanted and count + size <= most:
            taken.append(group)
            count += size
    if count and 2 * count >= min(wanted, rows // 2):
        return np.isin(group_of, taken), False
    hashes = (_hash(b"%d:%d" % (key, index)) for index, key in enumerate(keys))
    chosen = np.zeros(rows, dtype=np.bool_)
    chosen[np.argsort(np.fromiter(hashes, np.uint64, rows), kind="stable")[: min(wanted, rows - 1)]] = True
    return chosen, True


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.sha256(content).digest()[:8])
