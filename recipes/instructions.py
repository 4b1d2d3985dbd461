"""Remake the embedded instruction data: functions of the standard library that the embedded model has not
seen.

    python recipes/instructions.py

writes `src/rankscope/demo/data/stdlib-functions.jsonl` and, with the counts,
`recipes/results/instructions.json`. A row asks for a function by its docstring (`instruction`) and signature
(`input`), and answers with its body (`output`). It needs the tokenizer that `recipes/pretrain.py` makes, to
keep the rows short.
"""

from __future__ import annotations

import ast
import inspect
import json
import random
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from corpus import SourceFile, read_corpus

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER_FILE = ROOT / "src" / "rankscope" / "demo" / "model" / "tokenizer.json"
DATA_FILE = ROOT / "src" / "rankscope" / "demo" / "data" / "stdlib-functions.jsonl"
SUMMARY_FILE = Path(__file__).resolve().parent / "results" / "instructions.json"

MAX_TOKENS = 128  # of the whole prompt with `</s>` at both ends: short rows keep the study to minutes
MAX_INSTRUCTION_CHARACTERS = 400
SEED = 0
PROMPT = "### Question: {instruction}\n{input}\n ### Answer: {output}"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class Row(NamedTuple):
    """One line of the data file."""

    instruction: str
    input: str
    output: str


class Dropped(Exception):
    """A function that gives no row; the message is the reason it is counted under."""


def parse(text: str) -> ast.Module:
    """Parse source, silent about old escapes in the library's strings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(text)


def functions(node: ast.AST, class_name: str | None = None) -> Iterator[tuple[FunctionNode, str | None]]:
    """Yield every function below `node`, in source order, with the class whose method it is, if it is one."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield child, class_name
            yield from functions(child)
        else:
            yield from functions(child, child.name if isinstance(child, ast.ClassDef) else class_name)


def first_paragraphs(docstring: str) -> str:
    """Return as many whole paragraphs of a docstring as fit into `MAX_INSTRUCTION_CHARACTERS`."""
    kept = ""
    for paragraph in inspect.cleandoc(docstring).split("\n\n"):
        longer = f"{kept}\n\n{paragraph}" if kept else paragraph
        if len(longer) > MAX_INSTRUCTION_CHARACTERS:
            break
        kept = longer
    return kept.strip()


def is_trivial(statements: list[ast.stmt]) -> bool:
    """Say whether a body, without its docstring, does nothing that a docstring could ask for."""
    if len(statements) != 1:
        return not statements
    match statements[0]:
        case ast.Pass() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Raise(exc=ast.Name(id="NotImplementedError")):
            return True
        case ast.Raise(exc=ast.Call(func=ast.Name(id="NotImplementedError"))):
            return True
    return False


def make_row(node: FunctionNode, class_name: str | None, lines: list[str]) -> Row:
    """Make the row of a documented function; `lines` is its file's text. Raises `Dropped` with the reason."""
    docstring = node.body[0]
    statements = node.body[1:]
    if is_trivial(statements):
        raise Dropped("trivial body")
    if docstring.lineno == node.lineno or statements[0].lineno == docstring.end_lineno:
        raise Dropped("docstring shares its line")
    instruction = first_paragraphs(ast.get_docstring(node, clean=False) or "")
    if not instruction:
        raise Dropped("docstring empty or its first paragraph too long")

    signature = textwrap.dedent("\n".join(lines[node.lineno - 1 : docstring.lineno - 1])).rstrip()
    if class_name is not None:
        signature = f"class {class_name}:\n{textwrap.indent(signature, '    ')}"
    output = textwrap.dedent("\n".join(lines[docstring.end_lineno : node.end_lineno])).strip("\n")

    # Dedenting fails on a string whose lines start further left than the code around it.
    try:
        rebuilt = parse(f"async def f():\n{textwrap.indent(output, '    ')}").body[0]
    except SyntaxError:
        raise Dropped("body cannot be dedented") from None
    assert isinstance(rebuilt, ast.AsyncFunctionDef)
    if list(map(ast.dump, rebuilt.body)) != list(map(ast.dump, statements)):
        raise Dropped("body cannot be dedented")
    return Row(instruction, signature, output)


class PretrainingText:
    """The pretraining files as lines without indentation or blank lines, to find copied code in."""

    def __init__(self, files: Iterable[SourceFile]) -> None:
        self._text = "\n\0".join(f"\n{self._normalized(file.text)}\n" for file in files)
        self._lines = set(self._text.split("\n"))

    @staticmethod
    def _normalized(text: str) -> str:
        return "\n".join(stripped for line in text.split("\n") if (stripped := line.strip()))

    def contains(self, code: str) -> bool:
        """Say whether the lines of `code` stand one after another in one of the files."""
        code = self._normalized(code)
        return self._lines.issuperset(code.split("\n")) and f"\n{code}\n" in self._text


def main() -> None:
    """Write the data file and the summary."""
    corpus = read_corpus()
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FILE))
    pretraining = PretrainingText(corpus.part("pretrain"))

    dropped: Counter[str] = Counter()
    seen = 0
    rows: dict[Row, int] = {}  # and the tokens of each
    asked: set[tuple[str, str]] = set()
    answered: set[str] = set()
    for file in corpus.part("instructions"):
        lines = file.text.split("\n")
        for node, class_name in functions(parse(file.text)):
            seen += 1
            try:
                if ast.get_docstring(node) is None:
                    raise Dropped("no docstring")
                row = make_row(node, class_name, lines)
                tokens = len(tokenizer.encode(PROMPT.format(**row._asdict())).ids) + 1  # and a closing `</s>`
                if tokens > MAX_TOKENS:
                    raise Dropped(f"more than {MAX_TOKENS} tokens")
                if (row.instruction, row.input) in asked or row.output in answered:
                    raise Dropped("duplicate")
                if pretraining.contains(row.output):
                    raise Dropped("body is in a pretraining file")
            except Dropped as reason:
                dropped[str(reason)] += 1
                continue
            rows[row] = tokens
            asked.add((row.instruction, row.input))
            answered.add(row.output)

    shuffled = list(rows)
    random.Random(SEED).shuffle(shuffled)
    DATA_FILE.parent.mkdir(parents=True, exist_ok=True)
    with DATA_FILE.open("w", encoding="utf-8", newline="\n") as data:
        data.writelines(json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in shuffled)

    summary = {
        "python_version": corpus.python_version,
        "corpus_fingerprint": corpus.fingerprint,
        "files": len(corpus.part("instructions")),
        "functions_seen": seen,
        "dropped": dict(dropped.most_common()),
        "kept": len(rows),
        "mean_tokens": round(sum(rows.values()) / len(rows), 1),
        "max_tokens": max(rows.values()),
    }
    SUMMARY_FILE.parent.mkdir(parents=True, exist_ok=True)
    SUMMARY_FILE.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
