"""Rows as they are trained on: `rankscope plan --show-rows`."""

import json
from itertools import islice, pairwise
from typing import Any, NamedTuple

import numpy as np

from rankscope.data.conversations import Tokenizer
from rankscope.data.tokens import Example
from rankscope.model.load import load_tokenizer
from rankscope.plan.plan import Plan
from rankscope.ui.console import out_console


class Span(NamedTuple):
    """Consecutive tokens of a row, all of which are learned, or none."""

    is_learned: bool
    text: str


def spans(example: Example, tokenizer: Tokenizer) -> list[Span]:
    """A row's text, divided where it begins or ceases to be learned. Spans are differences of decoded prefixes: alone,
    SentencePiece would decode a span without its first space."""
    edges = [0, *(np.flatnonzero(np.diff(example.is_label)) + 1), len(example.ids)]
    texts = [str(tokenizer.decode(example.ids[:edge], skip_special_tokens=False)) for edge in edges]
    learned = example.is_label[edges[:-1]].tolist()
    return [Span(of_it, to.removeprefix(start)) for of_it, (start, to) in zip(learned, pairwise(texts), strict=True)]


def describe_rows(plan: Plan, count: int) -> list[dict[str, Any]]:
    """First rows to train on, for `--json`: token ids, labels (-100 for a token that is not learned) and spans."""
    tokenizer = load_tokenizer(plan.spec.model)
    return [
        {
            "ids": example.ids.tolist(),
            "labels": np.where(example.is_label, example.ids, -100).tolist(),
            "spans": [span._asdict() for span in spans(example, tokenizer)],
        }
        for example in islice(plan.data.train, count)
    ]


def show_rows(plan: Plan, count: int) -> None:
    """Print the first rows to train on: what is read and what is learned, each as a JSON string."""
    for number, row in enumerate(describe_rows(plan, count), start=1):
        learned = sum(label != -100 for label in row["labels"])
        out_console.print(f"Row {number}: {len(row['ids']):,} tokens, {learned:,} learned")
        for span in row["spans"]:
            what = "learned" if span["is_learned"] else "read   "
            out_console.print(f"  {what} {json.dumps(span['text'], ensure_ascii=False)}", soft_wrap=True)
