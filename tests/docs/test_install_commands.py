"""Commands that install optional parts, in guides and docstrings: those that rankscope gives itself."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankscope.errors import install_command

ROOT = Path(__file__).parents[2]
COMMAND = re.compile(r"""pip install (?:-\S+ )*(?:'[^'\n]*'|"[^"\n]*"|\S+)""")
PART = re.compile(r"(?:rankscope|\.)\[([a-z,-]+)\]")
ORIGINS = ('{"url": "file:.", "dir_info": {}}', None)  # the clone that a command is given in, and git


def texts() -> dict[str, str]:
    """What people read, by the file's name: pages, notebooks, and Python with its docstrings."""
    files = [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.yml")]
    for folder in ("docs", "recipes", "benchmarks", "src"):
        files += [file for kind in ("md", "ipynb", "py", "yaml") for file in (ROOT / folder).rglob(f"*.{kind}")]
    return {str(file.relative_to(ROOT)): file.read_text(encoding="utf-8") for file in files}


def test_every_command_is_one_that_rankscope_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    def forms(extras: str) -> Iterator[str]:
        for origin in ORIGINS:
            installed = SimpleNamespace(read_text={"direct_url.json": origin}.get)
            monkeypatch.setattr("importlib.metadata.distribution", lambda name, found=installed: found)
            yield install_command(extras)

    read = texts()
    commands = [(file, command) for file, text in read.items() for command in COMMAND.findall(text) if "[" in command]
    assert len(commands) >= 10
    assert [one for one in commands if not any(one[1] in forms(extras) for extras in PART.findall(one[1]))] == []
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {(file, name) for file, text in read.items() for part in PART.findall(text) for name in part.split(",")}
    assert {one for one in named if one[1] not in extras} == set()
