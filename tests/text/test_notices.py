"""What a user reads comes from the catalogue: no sentence stands in the code that says it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankscope

SOURCE = Path(rankscope.__file__).parent
SAYS = ("say", "show", "print")
NAMES = {"error: ", "PDF: "}
"""A word that is the same in every language, and how an error begins: errors are English, so that they are found."""

APART = {"keywords", "slice", "test", "format_spec"}
"""Parts of an expression that are not said."""


def literals(node: ast.AST) -> Iterator[str]:
    """Words that an expression says; what the functions in it return, such as the catalogue's, is no matter here."""
    if isinstance(node, ast.Call):
        return
    if isinstance(node, ast.Constant) and re.search(r"[^\W\d_]", str(node.value)) and isinstance(node.value, str):
        yield node.value
    for name, child in ast.iter_fields(node):
        for part in child if isinstance(child, list) else [child]:
            yield from literals(part) if isinstance(part, ast.AST) and name not in APART else ()


def said(code: str) -> list[str]:
    """Words that stand in the arguments of calls that say something."""
    calls = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    saying = (call for call in calls if getattr(call.func, "attr", getattr(call.func, "id", "")) in SAYS)
    return [word for call in saying for argument in call.args for word in literals(argument)]


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("run.say('Trained')", ["Trained"]),
        ("progress.say(f'{name} did not finish: {error:.3f}')", [" did not finish: "]),
        ("show(*lines, 'a' if found['all'] else text('b'), style='bold')", ["a"]),
        ("run.say(run.text('notice.failed', what='Pack'))", []),
        ("say(f'  {line}')", []),
    ],
)
def test_words_in_the_code_are_seen(code: str, words: list[str]) -> None:
    assert said(code) == words


def test_no_sentence_stands_in_the_code_that_says_it() -> None:
    files = [file for file in SOURCE.rglob("*.py") if "report" not in file.relative_to(SOURCE).parts]
    found = {str(file.relative_to(SOURCE)): set(said(file.read_text("utf-8"))) - NAMES for file in files}
    assert {name: words for name, words in found.items() if words} == {}
