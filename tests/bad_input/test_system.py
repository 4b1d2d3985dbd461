"""Errors of the system: names that are too long, a full output, an invalid port."""

import subprocess
import sys
from pathlib import Path

import pytest

from rankscope import cli

LONG = "a" * 300
DATA = ["--model", "model", "--dataset", "data.json", "--ranks", "2"]
COMMANDS: dict[str, tuple[list[str], int]] = {
    "a model": (["plan", "--model", LONG, "--dataset", "data.json", "--ranks", "2"], 2),
    "a model's folder": (["plan", "--model", f"./{LONG}", "--dataset", "data.json", "--ranks", "2"], 2),
    "data": (["plan", "--model", "model", "--dataset", f"./{LONG}", "--ranks", "2"], 3),
    "the study to be written": (["run", *DATA, "--out", LONG], 2),
    "a study's file": (["run", f"{LONG}.yaml"], 2),
    "a study": (["report", LONG], 2),
    "a study that is watched": (["watch", LONG], 2),
    "an adapter": (["spectrum", f"./{LONG}"], 3),
    "an adapter to resize": (["resize", f"./{LONG}", "--rank", "1"], 3),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_a_name_too_long_is_an_error_of_a_few_lines(
    what: str, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, code = COMMANDS[what]
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["rankscope", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    told = capsys.readouterr().err
    assert ended.value.code == code, told
    assert "Traceback" not in told
    assert told.startswith("error: ")
    assert "aaa" in told
    assert 2 <= len(told.splitlines()) <= 4


DOCTOR = pytest.param("doctor", marks=pytest.mark.slow)  # a process that imports torch


def run(*arguments: str, into: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rankscope.cli", *arguments]
    return subprocess.run(
        ["/bin/sh", "-c", f'"$@" {into}', "sh", *command], capture_output=True, text=True, check=False, timeout=120
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("command", ["schema", DOCTOR, "--version", "--help"])
def test_an_output_without_room_is_an_error_of_two_lines(command: str) -> None:
    done = run(command, into="> /dev/full")
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: the output: No space left on device\n")
    assert len(done.stderr.splitlines()) == 2


@pytest.mark.parametrize("command", ["schema", DOCTOR, "--help"])
def test_a_reader_that_has_gone_is_no_error_to_speak_of(command: str) -> None:
    """A reader such as `head -1` closes the pipe before all output is written."""
    done = run(command, into="| true")
    assert done.stderr == ""


@pytest.mark.parametrize("port", ["99999", "-1", "x"])
def test_a_port_that_is_none(
    port: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["rankscope", "watch", str(tmp_path), "--port", port])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "--port" in capsys.readouterr().err
