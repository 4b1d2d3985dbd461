"""Completion in the shell: it can be installed, and completes commands and options."""

import os
import subprocess
import sys

import pytest

COMMAND = [sys.executable, "-m", "rankscope.cli"]


def _ask(words: str, shell: str = "bash") -> list[str]:
    """Completions of the last word that the shell receives."""
    asked = {
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
        "_RANKSCOPE_COMPLETE": f"complete_{shell}",
    }
    program = "import sys; sys.argv = ['rankscope']; from rankscope.cli import app; app()"
    answer = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | asked, capture_output=True, encoding="utf-8", check=False
    )
    return answer.stdout.split()


def test_commands() -> None:
    assert {"run", "report"} <= set(_ask("rankscope r"))
    assert "plan" not in _ask("rankscope r")


def test_options() -> None:
    assert "--learning-rates" in _ask("rankscope run --lea")


@pytest.mark.parametrize("option", ["--install-completion", "--show-completion"])
def test_it_is_offered(option: str) -> None:
    shown = subprocess.run([*COMMAND, "--help"], capture_output=True, encoding="utf-8", check=True).stdout
    assert option in shown
