"""The arithmetic task: answers are right, one choice is each, and no two rows are equal."""

import ast
import operator

import arithmetic

SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}


def test_answers_are_right_and_among_the_choices() -> None:
    rows = list(arithmetic.rows(500, 0))
    assert len({row["prompt"] for row in rows}) == 500
    assert rows == list(arithmetic.rows(500, 0))
    assert rows != list(arithmetic.rows(500, 1))
    for row in rows:
        problem = row["prompt"].removeprefix("What is ").removesuffix("?\nAnswer:")
        sides = ast.parse(problem, mode="eval").body
        assert isinstance(sides, ast.BinOp)
        one, other = (ast.literal_eval(side) for side in (sides.left, sides.right))
        answer = str(SIGNS[type(sides.op)](one, other))
        assert row["completion"] == f" {answer}"
        assert row["choices"][row["label"]] == answer
        assert len(set(row["choices"])) == 4
    assert {row["label"] for row in rows} == {0, 1, 2, 3}
