"""The distributions: what is built installs elsewhere and works there; what people read before says the same."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest
import yaml

import rankscope
from rankscope.errors import RankscopeError, check_system
from ui.test_console import accepts

ROOT = Path(__file__).parents[1]


def test_the_changelog_begins_with_this_version() -> None:
    newest = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert newest is not None
    assert newest[1] == rankscope.__version__


def test_the_tree_in_contributing_is_that_of_the_source() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    tree = text.split("```\nsrc/rankscope/\n")[1].split("```")[0]
    named: set[str] = set()
    folder = ""
    for line in tree.splitlines():
        name = line.split()[0]
        if line.startswith("    "):
            named.add(folder + name)
        elif name.endswith("/"):
            folder = name
        else:
            named.add(name)
    source = ROOT / "src" / "rankscope"
    files = (file.relative_to(source) for file in source.rglob("*.py") if file.name != "__init__.py")
    assert named == {file.as_posix() for file in files if file.parts[0] != "demo"}


def test_the_workflow_asks_what_can_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its commands are accepted, what it looks for on Windows is said there, and it tests the oldest Python."""
    jobs = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))["jobs"]
    lines = [line for job in jobs.values() for step in job["steps"] for line in step.get("run", "").splitlines()]
    found = [re.match(r"(?:if )?(rankscope [a-z][^#;>]*?)(?: \d?>|;| *#|$)", line) for line in lines]
    commands = [one[1] for one in found if one]
    assert len(commands) >= 5
    assert all(map(accepts, commands))
    (sought,) = (line.split("'")[1] for line in lines if line.startswith("grep "))
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(RankscopeError, match=sought):
        check_system()
    assert f'requires-python = ">={jobs["test"]["strategy"]["matrix"]["python"][0]}"' in (
        ROOT / "pyproject.toml"
    ).read_text(encoding="utf-8")
    assert all(os.access(ROOT / line, os.X_OK) for line in lines if line.startswith(".ci/"))


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a source distribution, and of the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], check=True)
    return folder


@pytest.mark.slow
def test_an_index_would_take_the_distributions(distributions: Path) -> None:
    subprocess.run([sys.executable, "-m", "twine", "check", "--strict", *distributions.iterdir()], check=True)


@pytest.mark.slow
def test_the_source_distribution_has_what_builds_and_tests_it(distributions: Path) -> None:
    (file,) = distributions.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = "pyproject.toml Makefile constraints.txt README.md CHANGELOG.md CONTRIBUTING.md CITATION.cff LICENSE"
    assert names >= {*needed.split(), "src/rankscope/py.typed", "tests/conftest.py", "docs/index.md"}


@pytest.mark.slow
def test_the_wheel_runs_the_demo_where_only_it_is_installed(distributions: Path, tmp_path: Path) -> None:
    """In an empty environment. The dependencies are those of this one, by a .pth file: to download them would take
    gigabytes. Its own rankscope stands before them on the path."""
    (wheel,) = distributions.glob("*.whl")
    place = tmp_path / "venv"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    install = ["-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run([sys.executable, *install], check=True)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def rankscope_says(*arguments: str) -> str:
        command = [place / "bin" / "rankscope", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    code = "import rankscope; print(rankscope.__file__)"
    where = subprocess.run([python, "-c", code], cwd=tmp_path, env=environment, check=True, stdout=subprocess.PIPE)
    assert where.stdout.decode().startswith(str(packages))
    assert rankscope_says("--version") == f"rankscope {rankscope.__version__}\n"
    sets = ("measure.profiles=false", "measure.answers=0", "data.eval_rows=8", "training.evals=1")
    said = rankscope_says(
        "run", "--out", "demo", "--ranks", "2,4", "--seeds", "0", "--steps", "2", *(f"--set={item}" for item in sets)
    )
    assert "rankscope-demo" in said
    assert (tmp_path / "demo" / "report" / "index.html").is_file()
    assert (tmp_path / "demo" / "trials" / "r004-lr1e-3-s0" / "adapter" / "adapter_model.safetensors").is_file()
