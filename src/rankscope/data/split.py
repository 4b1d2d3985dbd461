"""Held-out rows: whole groups of equal prompts, chosen by hash."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def default_eval_rows(rows: int) -> int:
    """Default number of held-out rows: 5%, at least 32 and at most 1,000, but never more than half."""
    return min(max(32, rows // 20), 1000, rows // 2)


def held_out(prompts: Sequence[str], eval_rows: int | None, seed: int) -> npt.NDArray[np.bool_]:
    """Mask of the rows to hold out, (S,) for the S rows with these prompts.

    Rows with the same prompt stay together, so that no question is on both sides. Groups are taken in the order of
    sha256("SEED:PROMPT") until `eval_rows` rows are held out, skipping any that would hold out more than half of all
    rows. The choice depends on the set of rows, not on their order in the file.

    Since groups are taken whole, somewhat more rows than `eval_rows` may be held out, or, where most rows share a few
    prompts, fewer or none.
    """
    wanted = default_eval_rows(len(prompts)) if eval_rows is None else eval_rows
    most = max(wanted, len(prompts) // 2)
    groups: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(index)
    chosen = np.zeros(len(prompts), dtype=np.bool_)
    count = 0
    for prompt in sorted(groups, key=lambda text: hashlib.sha256(f"{seed}:{text}".encode()).digest()):
        if count >= wanted:
            break
        if count + len(groups[prompt]) <= most:
            chosen[groups[prompt]] = True
            count += len(groups[prompt])
    return chosen
