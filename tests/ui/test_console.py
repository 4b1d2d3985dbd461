"""The terminal at 80 columns: words and commands stay whole."""

import io
import shlex

import pytest
import typer
from rich.cells import cell_len

from rankscope.cli import app
from rankscope.text.catalogue import load
from rankscope.ui import console
from rankscope.ui.console import PlainConsole, make_table, wrapped

SENTENCES = [
    "Costs of r008 are not measured: `rankscope run 'my study' --remeasure --set measure.repeats=3` measures them all.",
    "랭크 8을 권장합니다. 검증 손실이 최선의 후보보다 1% 이상 나쁘지 않음이 확인된 가장 낮은 랭크입니다.",
    "  what to do is indented, and goes on indented where the terminal is too narrow for all of the words of it",
]


def accepts(command: str) -> bool:
    """Whether the command line accepts it, with a study of that name or without."""
    program, *words = shlex.split(command)
    group = typer.main.get_command(app)
    name, found, rest = group.resolve_command(group.make_context("rankscope", list(words)), words)  # type: ignore[attr-defined]
    found.make_context(name, list(rest))
    return program == "rankscope"


@pytest.mark.parametrize("sentence", SENTENCES)
def test_words_stay_whole(sentence: str) -> None:
    rows = list(wrapped(sentence, 80))
    assert len(rows) > 1
    assert " ".join(row.strip() for row in rows) == sentence.strip(), "only spaces became line ends"
    assert max(map(cell_len, rows)) <= 80
    assert all(row.count("`") % 2 == 0 for row in rows)
    assert all(row.startswith("  ") == sentence.startswith("  ") for row in rows)


def test_spaces_within_a_line_stay() -> None:
    line = r'  learned " def f(x):\n    return x"'
    assert list(wrapped(line, 80)) == [line]
    assert list(wrapped("  p000  r008-s0, r064-s0", 16)) == ["  p000  r008-s0,", "  r064-s0"]


def test_a_command_has_a_line_of_its_own_however_long() -> None:
    command = f"  rankscope run {'x' * 60} --set data.eval_rows=192 --out {'y' * 60}"
    output = io.StringIO()
    PlainConsole(file=output, width=80, force_terminal=True).print(f"To settle it:\n{command}")
    assert output.getvalue().splitlines() == ["To settle it:", command]
    assert accepts(command)


@pytest.mark.parametrize("language", ["en", "ko"])
def test_cells_are_wrapped_at_words(language: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console.out_console, "width", 80)
    text, output = load(language), io.StringIO()
    names = ("candidate", "train_loss", "eval_loss", "regret", "cpu_memory", "step_seconds", "runtime")
    headers = [text(f"table.{name}") for name in names]
    row = ["r008-lr1e-3", "3.7143", "3.7824\n± 0.0084", "0.0023\n[0.0000, 0.0219]", "455 MB / 471 MB", "0.28", "23.7 s"]
    PlainConsole(file=output, width=80).print(make_table(headers, [row]))
    shown = output.getvalue()
    assert max(map(cell_len, shown.splitlines())) <= 80
    for word in " ".join([*headers, *row]).split():
        assert word in shown
