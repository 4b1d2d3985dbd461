"""What is not here: an optional part, or the system that rankscope runs on. What errors say."""

import sys
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import rankscope
from rankscope import cli
from rankscope.errors import DataError, MissingExtraError, RankscopeError, install_command, reason_of, require

GIT = "git+https://github.com/rankscope/rankscope"


@pytest.mark.parametrize(
    ("origin", "command"),
    [
        (None, f"pip install 'rankscope[wandb] @ {GIT}'"),
        ('{"url": "https://github.com/x/y", "vcs_info": {}}', f"pip install 'rankscope[wandb] @ {GIT}'"),
        ('{"url": "file:///home/me/my%20tools", "dir_info": {}}', "pip install '/home/me/my tools[wandb]'"),
        ('{"url": "file:///src", "dir_info": {"editable": true}}', "pip install -e '/src[wandb]'"),
        ('{"url": "file:///a/rankscope-1-py3-none-any.whl"}', "pip install '/a/rankscope-1-py3-none-any.whl[wandb]'"),
    ],
    ids=["an index", "git", "a folder", "an editable folder", "a wheel"],
)
def test_a_part_is_installed_from_where_rankscope_came(
    origin: str | None, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = SimpleNamespace(read_text=lambda name: {"direct_url.json": origin}[name])
    monkeypatch.setattr("importlib.metadata.distribution", lambda name: found)
    assert install_command("wandb") == command


def test_what_is_not_installed_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtraError, match="--report-to nothing: no_such_package is not installed") as caught:
        require("no_such_package", "wandb", "--report-to nothing")
    assert caught.value.todo == f"Install it: `{install_command('wandb')}`"


@pytest.mark.parametrize("arguments", [["run"], ["doctor"], ["report", "x"]])
def test_on_windows_every_command_names_wsl(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, RankscopeError)
    assert "on Windows run it in WSL" in str(result.exception)
    assert CliRunner().invoke(cli.app, ["--version"]).output.startswith("rankscope ")


def test_the_reason_in_a_message_is_one_line_that_says_something() -> None:
    assert reason_of(RuntimeError("size mismatch for\n\tweight")) == "size mismatch for weight"
    assert reason_of(KeyError()) == "KeyError"
    assert reason_of(DataError("data.csv: no rows", "Give some.")) == "data.csv: no rows"
    assert reason_of(ValueError("a" * 300), 100) == "a" * 97 + "..."


def test_on_windows_python_is_told_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RankscopeError, match="WSL"):
        rankscope.run(model="embedded", dataset="embedded")
