"""Which rows are held out: whole groups of equal prompts, chosen by hash."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def default_eval_rows(rows: int) -> int:
    """5% of the rows, at least 32 and at most 1,000, but never more than half of them."""
    return min(max(32, rows // 20), 1000, rows // 2)


def held_out(prompts: Sequence[str], eval_rows: int | None, seed: int) -> npt.NDArray[np.bool_]:
    """Marks the rows to hold out, (S,) for the S rows with these prompts.

    Rows with the same prompt stay together, so that no question lies on both sides. The groups are taken in
    the order of sha256("SEED:PROMPT") until `eval_rows` rows are held out; one too large for that (it would
    hold out more than half of all rows) is passed over. The choice depends on the set of rows, not on their
    order in the file.

    A group counts as a whole, so that somewhat more rows than `eval_rows` may be held out, or, where a few
    prompts are shared by most rows, fewer or none.
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
