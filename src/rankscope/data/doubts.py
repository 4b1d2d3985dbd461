"""What is doubtful about the data: said before training, with the verdict, and first in the report."""

from collections.abc import Callable, Mapping
from typing import Any

from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import percent

MAX_CUT_SHARE = 0.05  # of the rows: above it the loss is no longer that of the data as it was written
MIN_EVAL_ROWS = 200  # with fewer, what differs between held-out rows hides differences of a percent between ranks
DOUBTS = ("rows_cut", "answers_cut_off", "few_held_out_rows")  # the second: rows of which a whole answer is cut off


def doubts(facts: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Codes of `DOUBTS` that hold for data/facts.json, each with its numbers. A count that an older study lacks is no
    doubt."""
    held_out = facts.get("rows_eval", MIN_EVAL_ROWS)
    share = facts.get("truncated", 0) / max(1, facts.get("rows_train", 0) + held_out)
    cut_off = facts.get("answers_cut_off", 0)
    found = {
        "rows_cut": (share > MAX_CUT_SHARE, {"share": share, "max_length": facts.get("max_length")}),
        "answers_cut_off": (cut_off > 0, {"rows": cut_off}),
        "few_held_out_rows": (held_out < MIN_EVAL_ROWS, {"rows": held_out}),
    }
    return {code: values for code, (holds, values) in found.items() if holds}


def data_warnings(facts: Mapping[str, Any], text: Catalogue) -> list[str]:
    """Sentences on the doubts, then the warnings that the facts hold, which are in English."""
    shown: dict[str, Callable[[Any], str]] = {
        "share": percent,
        "max_length": "{:,}".format,
        "rows": lambda rows: text.count("rows", rows),
    }
    found = {code: {name: shown[name](value) for name, value in own.items()} for code, own in doubts(facts).items()}
    return [*(text(f"caveat.{code}", **values) for code, values in found.items()), *facts.get("warnings", [])]
