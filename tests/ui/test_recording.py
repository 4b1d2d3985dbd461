"""Commands as a terminal of 80 columns shows them, and what their lines say."""

import fcntl
import os
import pty
import re
import shlex
import shutil
import struct
import subprocess
import sys
import termios
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

from rankscope import cli
from rankscope.study.study import Study
from rankscope.ui import plan
from rankscope.ui.console import error_console, out_console
from ui.test_console import accepts

REPORT = {"en": "Report: my study/", "ko": "보고서: my study/"}


def record(command: list[str], folder: Path, columns: int = 80, rows: int = 24) -> str:
    """All that the command writes to a terminal of this size, without colours and movements of the cursor."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns), "LINES": str(rows)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=folder, env=environment)
    os.close(theirs)
    written = b""
    while True:
        try:
            new = os.read(ours, 1 << 16)
        except OSError:  # Linux: the other end is closed
            new = b""
        if not new:
            break
        written += new
    os.close(ours)
    assert process.wait() == 0, written.decode()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written.decode())


def lines_of(shown: str) -> list[str]:
    return [line.rstrip() for line in re.split(r"[\r\n]+", shown)]


def commands_of(shown: str) -> list[str]:
    """Commands of rankscope that can be copied from a line of their own, or from between backquotes in one line."""
    own = [line for line in lines_of(shown) if re.match(r"\s+rankscope ", line)]
    return own + re.findall(r"`(rankscope [^`\n]*)`", shown)


@pytest.fixture
def studies(trained: Study, tmp_path: Path, no_report: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two studies in the current directory; all plans are one."""
    for name in ("my study", "the other study"):
        shutil.copytree(trained.path, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    made = cache(lambda: plan_study(trained.spec, None))  # its times differ from plan to plan
    plan_study = plan.plan_study
    monkeypatch.setattr(plan, "plan_study", lambda *_, **__: made())


@pytest.fixture
def shown_at(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[list[str], int], str]:
    """Function that runs a command in this process, as in a terminal of so many columns."""

    def shown(words: list[str], columns: int) -> str:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["rankscope", *words])
            for console in (out_console, error_console):
                patch.setattr(console, "width", columns)
                patch.setattr(console, "_force_terminal", True)
            with pytest.raises(SystemExit):
                cli.main()
        return "".join(capsys.readouterr())

    return shown


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["report", "my study"], "Report: my study/"),
        (["report", "my study", "--lang", "ko"], "보고서: my study/"),
        (["compare", "my study", "the other study"], "Studies with the same tokens"),
        (["compare", "my study", "the other study", "--lang", "ko"], "추정합니다."),
        (["plan", "--out", "new"], "On the disk: "),
        (["run", "my study", "--set", "training.gradient_accumulation_steps=3"], "error: "),
        (["report", "a study that is not in this folder, whose name is longer than the terminal is wide"], "error: "),
    ],
    ids=["report", "report in Korean", "compare", "compare in Korean", "plan", "another study", "no study"],
)
def test_what_a_command_shows_at_80_columns(
    words: list[str], told: str, studies: None, shown_at: Callable[[list[str], int], str]
) -> None:
    """As in a terminal without an end of its lines, but for where words begin a new line."""
    shown, whole = shown_at(words, 80), shown_at(words, 10_000)
    assert told in shown
    assert set(shown.split()) == set(whole.split()), "a word is broken"
    assert sorted(commands_of(shown)) == sorted(commands_of(whole)), "a command is broken"
    assert all(map(accepts, commands_of(shown)))
    own = {*commands_of(shown), *re.findall(r"\S*`[^`]+`\S*", shown)}
    assert [line for line in lines_of(shown) if cell_len(line) > 80 and line not in own] == []


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_run_at_80_columns(language: str, root: Path, tmp_path: Path) -> None:
    """Lines keep to the terminal's width, and each command that is printed can be copied and run."""
    options = ["--ranks", "2,8", "--seeds", "0,1", "--steps", "5", "--batch-size", "4", "--learning-rates", "3e-2"]
    options += ["--set", "data.eval_rows=12", "--set", "measure.profiles=false", "--set", "measure.answers=1"]
    options += ["--model", str(root / "model"), "--dataset", str(root / "data.json"), "--out", "my study"]
    shown = record([sys.executable, "-m", "rankscope.cli", "run", *options, "--lang", language], tmp_path)
    lines, commands = lines_of(shown), commands_of(shown)
    assert {shlex.split(command)[1] for command in commands} >= {"watch"}
    assert all(map(accepts, commands))
    assert max(cell_len(line) for line in lines if line not in commands) <= 80
    assert any(line.startswith(REPORT[language]) for line in lines[-5:])
    assert [line for line in lines if line][-1] in commands, "it ends with what to do next"
    assert not re.search(r"about 0|약 0", shown)
    assert torch.cuda.is_available() or "GPU" not in shown
