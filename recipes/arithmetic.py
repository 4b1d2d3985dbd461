"""Arithmetic with exact answers, as JSONL: a task on which a study's ranks can be told apart by what they answer.

    python recipes/arithmetic.py OUT [--rows 5000] [--seed 0]

Each row is a sum, a difference or a product of two whole numbers below 100, with its answer, four choices (the answer
among three near misses), and which of them it is: `{"prompt", "completion", "choices", "label"}`. No two are equal.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


def rows(count: int, seed: int) -> Iterator[dict[str, Any]]:
    """`count` different problems, the same for the same seed."""
    draw, seen = random.Random(seed), set[tuple[int, str, int]]()
    while len(seen) < count:
        a, b, sign = draw.randrange(100), draw.randrange(100), draw.choice(list(OPERATIONS))
        if (a, sign, b) in seen:
            continue
        seen.add((a, sign, b))
        answer = OPERATIONS[sign](a, b)
        near = [answer + off for off in draw.sample([-20, -10, -9, -2, -1, 1, 2, 9, 10, 20], 3)]
        choices = [str(one) for one in draw.sample([answer, *near], 4)]
        label = choices.index(str(answer))
        prompt = f"What is {a} {sign} {b}?\nAnswer:"
        yield {"prompt": prompt, "completion": f" {answer}", "choices": choices, "label": label}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file to write, such as arithmetic.jsonl")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not 1 <= options.rows <= 20_000:
        parser.error("--rows: from 1 to 20,000")
    with options.out.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows(options.rows, options.seed))
    print(f"{options.out}: {options.rows:,} rows")


if __name__ == "__main__":
    main()
