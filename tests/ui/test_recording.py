"""A run as a terminal of 80 columns shows it, and what its lines say."""

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from rich.cells import cell_len

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


@pytest.mark.slow
@pytest.mark.parametrize("language", ["en", "ko"])
def test_a_run_at_80_columns(language: str, root: Path, tmp_path: Path) -> None:
    """Lines keep to the terminal's width, and each command that is printed can be copied and run."""
    options = ["--ranks", "2,8", "--seeds", "0,1", "--steps", "5", "--batch-size", "4", "--learning-rates", "3e-2"]
    options += ["--set", "data.eval_rows=12", "--set", "measure.profiles=false", "--set", "measure.answers=1"]
    options += ["--model", str(root / "model"), "--dataset", str(root / "data.json"), "--out", "my study"]
    shown = record([sys.executable, "-m", "rankscope.cli", "run", *options, "--lang", language], tmp_path)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", shown)]
    commands = [line for line in lines if re.match(r"\s+rankscope ", line)] + re.findall(r"`(rankscope [^`]*)`", shown)
    assert {shlex.split(command)[1] for command in commands} >= {"watch"}
    assert all(map(accepts, commands))
    assert max(cell_len(line) for line in lines if line not in commands) <= 80
    assert any(line.startswith(REPORT[language]) for line in lines[-5:])
    assert [line for line in lines if line][-1] in commands, "it ends with what to do next"
    assert not re.search(r"about 0|약 0", shown)
    assert torch.cuda.is_available() or "GPU" not in shown
