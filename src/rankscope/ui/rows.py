"""Rows as they are trained on: `rankscope plan --show-rows`."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice, pairwise
from typing import Any

import numpy as np

from rankscope.data.conversations import Tokenizer
from rankscope.data.tokens import Example
from rankscope.model.load import load_tokenizer
from rankscope.plan.plan import Plan
from rankscope.text.catalogue import Catalogue


def spans(example: Example, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """A row's text, divided where it begins or ceases to be learned. Spans are differences of decoded prefixes: alone,
    SentencePiece would decode a span without its first space."""
    edges = [0, *(np.flatnonzero(np.diff(example.is_label)) + 1), len(example.ids)]
    texts = [str(tokenizer.decode(example.ids[:edge], skip_special_tokens=False)) for edge in edges]
    learned = example.is_label[edges[:-1]].tolist()
    parts = [to.removeprefix(start) for start, to in pairwise(texts)]
    return [{"is_learned": of_it, "text": text} for of_it, text in zip(learned, parts, strict=True)]


def describe_rows(plan: Plan, count: int) -> list[dict[str, Any]]:
    """First rows to train on, for `--json`: token ids, labels (-100 for a token that is not learned) and spans."""
    tokenizer = load_tokenizer(plan.spec.model)
    return [
        {
            "ids": example.ids.tolist(),
            "labels": np.where(example.is_label, example.ids, -100).tolist(),
            "spans": spans(example, tokenizer),
        }
        for example in islice(plan.data.train, count)
    ]


def row_lines(rows: Iterable[dict[str, Any]], text: Catalogue) -> Iterator[str]:
    """What is read and what is learned of each row, as JSON strings."""
    for number, row in enumerate(rows, start=1):
        learned = sum(label != -100 for label in row["labels"])
        yield text("plan.row", number=number, tokens=f"{len(row['ids']):,}", learned=f"{learned:,}")
        for span in row["spans"]:
            key = "plan.learned" if span["is_learned"] else "plan.read"
            yield text(key, text=json.dumps(span["text"], ensure_ascii=False))
