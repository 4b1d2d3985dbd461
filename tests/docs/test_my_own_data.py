"""The guide on one's own data: each command prints what stands there, and each example is read as the guide says.

`python tests/docs/test_my_own_data.py` runs the commands anew, and writes what they print into the guide.
"""

import ast
import csv
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

import forking
from rankscope.cli import app
from rankscope.data.records import load_records
from rankscope.errors import RankscopeError
from rankscope.spec.models import DataSpec
from rankscope.spec.options import assemble, read_study_file
from rankscope.text.catalogue import load
from rankscope.train.prepare import describe_data, prepare_data

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "my-own-data.md"
ELIDED = "…"
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


class Block(NamedTuple):
    """A fenced block."""

    language: str
    title: str  # empty for none
    text: str


class Shown(NamedTuple):
    """A command and the lines that the guide shows of what it prints."""

    command: str
    lines: list[str]


def blocks() -> list[Block]:
    found = re.findall(
        r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', GUIDE.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    return [Block(*one) for one in found]


def commands() -> list[Shown]:
    texts = [text for block in blocks() if block.language == "console" for text in block.text.split("$ ")[1:]]
    return [Shown(text.splitlines()[0], text.strip().splitlines()[1:]) for text in texts]


def write_files(folder: Path) -> None:
    """Write the files that the guide's commands name: 1,200 rows each, where the guide says nothing else."""
    asked = [f"What is {WORDS[i % 10]} and {WORDS[i // 10 % 10]} and {i}?" for i in range(1200)]
    said = [f"It is {i % 10 + i // 10 % 10 + i}." for i in range(1200)]
    plain = [{"instruction": question, "output": answer} for question, answer in zip(asked, said, strict=True)]
    chats = [_chat(question, answer) for question, answer in zip(asked, said, strict=True)]
    _json_lines(folder / "rows.jsonl", [row | {"input": f"[{i}]" if i % 3 == 0 else ""} for i, row in enumerate(plain)])
    _json_lines(folder / "folder" / "train.jsonl", plain[:1000])
    _json_lines(folder / "folder" / "test.jsonl", plain[1000:])
    _json_lines(folder / "broken.jsonl", [row | ({"output": i} if i % 200 == 7 else {}) for i, row in enumerate(plain)])
    untidy = [row if i % 10 else row | {"output": ""} for i, row in enumerate(plain)]
    _json_lines(folder / "untidy.jsonl", untidy + untidy[:100])
    _json_lines(folder / "verses.jsonl", [{"prompt": "Write a verse.\n", "completion": text} for text in asked])
    _json_lines(folder / "chat.jsonl", [{"messages": chat} for chat in chats])
    _json_lines(
        folder / "thoughts.jsonl",
        [{"messages": [question, answer | {"reasoning_content": "I add."}]} for question, answer in chats],
    )
    _json_lines(
        folder / "talks.jsonl",
        [
            {"messages": chat + (_chat("Why?", "It adds up. " * 9) if i % 2 else [])}
            for i, chat in enumerate(chats[:200])
        ],
    )
    pairs = list(zip(asked, said, strict=True))
    _csv(folder / "faq.csv", ["id", "question", "answer"], [[i, f"Again: {q}", a] for i, (q, a) in enumerate(pairs)])
    _csv(folder / "fragen.csv", ["Frage", "Antwort"], pairs)
    _csv(folder / "rows.csv", ["instruction", "output"], pairs)
    _csv(folder / "validation.csv", ["instruction", "output"], pairs[900:])
    for block in blocks():
        if block.title:
            (folder / block.title).write_text(block.text, encoding="utf-8")


def _chat(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _json_lines(path: Path, rows: Sequence[Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _csv(path: Path, header: list[str], rows: Sequence[Sequence[Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_files(root)
    return root


class _DataReadError(Exception):
    """The plan got as far as its data."""


def printed_on_data(command: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that a command prints on its data; what it would print on memory and time is not computed."""

    def stop(spec: Any, data: Any, *_: Any) -> None:
        raise _DataReadError(describe_data(data.facts, load("en")))

    monkeypatch.setattr("rankscope.ui.plan.make_plan", stop)
    error = CliRunner().invoke(app, shlex.split(command)[1:]).exception
    assert isinstance(error, RankscopeError | _DataReadError), error
    return f"{'' if isinstance(error, _DataReadError) else 'error: '}{error}".splitlines()


def printed(command: str, folder: Path) -> list[str]:
    """Lines that a command prints, in a process of its own."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = forking.rankscope(shlex.split(command)[1:], folder, environment)
    return (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("shown", commands(), ids=lambda shown: shown.command)
def test_a_command_says_of_the_data_what_stands_there(
    shown: Shown, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    expected = [line for line in shown.lines if line != ELIDED and not line.startswith("Model ")]
    assert printed_on_data(shown.command, monkeypatch) == expected


@pytest.mark.slow
@pytest.mark.parametrize("shown", commands(), ids=lambda shown: shown.command)
def test_a_command_prints_what_stands_there(shown: Shown, folder: Path) -> None:
    assert _visible(shown, printed(shown.command, folder)) == shown.lines


def _visible(shown: Shown, lines: list[str]) -> list[str]:
    """What the guide shows of printed lines: all of an error; of a plan, the lines on its data."""
    if lines[0].startswith("error: "):
        return lines
    table = next(number for number, line in enumerate(lines) if line.startswith(("Adapters: ", "candidate ")))
    with_model = any(line.startswith("Model ") for line in shown.lines)
    return [*lines[0 if with_model else 1 : table], ELIDED]


ROWS = [line for block in blocks() if block.language == "json" for line in block.text.splitlines()]
FORMATS = (
    *("alpaca", "prompt_completion", "messages", "text"),
    *("alpaca", "alpaca", "prompt_completion", "prompt_completion", "messages"),
    *("messages", "messages", "messages"),
)


@pytest.mark.parametrize(("row", "format"), [*zip(ROWS, FORMATS, strict=True)])
def test_an_example_is_read_whole(row: str, format: str, tmp_path: Path) -> None:
    (tmp_path / "row.jsonl").write_text(row + "\n", encoding="utf-8")
    records = load_records(DataSpec(id=str(tmp_path / "row.jsonl")))
    assert records.format == format
    assert records.unread_columns == (("rejected",) if "rejected" in row else ())
    for value in _leaves([value for name, value in json.loads(row).items() if name not in records.unread_columns]):
        assert value in [*_leaves(records.rows), "human", "gpt"]


def _leaves(value: Any) -> list[Any]:
    """Values of a nested value that hold no others."""
    if isinstance(value, dict | list):
        return [leaf for item in (value.values() if isinstance(value, dict) else value) for leaf in _leaves(item)]
    return [value or ""]


def test_the_study_and_the_call_are_valid(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    [study] = [block.title for block in blocks() if block.language == "yaml"]
    data = assemble(read_study_file(Path(study)), {}).data
    assert data.template.endswith("### Response:\n")
    assert data.template_without_input is not None
    [code] = [block.text for block in blocks() if block.language == "python"]
    [call] = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    options = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert prepare_data(assemble({}, options)).facts["eval_id"] == options["eval_dataset"] == "validation.csv"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write_files(Path(name))
        text = GUIDE.read_text(encoding="utf-8")
        for one in commands():
            new = "\n".join([one.command, *_visible(one, printed(one.command, Path(name)))])
            text = text.replace("\n".join([one.command, *one.lines]), new)
        GUIDE.write_text(text, encoding="utf-8")
        sys.stdout.write(f"{GUIDE}: {len(commands())} commands\n")
