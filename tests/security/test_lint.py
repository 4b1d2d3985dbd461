"""No code of a file is executed: the linter refuses the ways to do it, and this reads every file of src/ once more."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rankscope.spec.models import ModelSpec

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "src").rglob("*.py"))

EXECUTING_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
EXECUTING_CALLS = {
    "eval", "exec", "compile", "__import__", "torch.load", "torch.save", "torch.jit.load", "torch.hub.load",
    "np.load", "numpy.load", "pd.read_pickle", "pandas.read_pickle", "os.system", "os.popen",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "PeftModel.from_pretrained",
}  # fmt: skip
UNSAFE_ARGUMENTS = {"allow_pickle", "shell", "trust_remote_code", "weights_only", "allow_all_kernels", "use_kernels"}

REFUSED_BY_RUFF = {
    "import pickle": "TID251",
    "from pickle import loads": "TID251",
    "pickle.loads(b'')": "S301",
    "import dill": "TID251",
    "import joblib": "TID251",
    "import marshal": "TID251",
    "import shelve": "TID251",
    "torch.load('x')": "TID251",
    "torch.save({}, 'x')": "TID251",
    "torch.hub.load('x', 'y')": "TID251",
    "np.load('x', allow_pickle=True)": "TID251",
    "pd.read_pickle('x')": "TID251",
    "yaml.load('x', yaml.Loader)": "S506",
    "yaml.unsafe_load('x')": "TID251",
    "PeftModel.from_pretrained(None, 'x')": "TID251",
    "eval('1')": "S307",
    "exec('1')": "S102",
    "subprocess.run('ls', shell=True)": "S602",
    "os.system('ls')": "S605",
    "jinja2.Environment()": "S701",
    "Markup(os.name)": "S704",
}
"""A line, and the rule that refuses it."""
IMPORTS = """\
import os
import subprocess

import jinja2
import numpy as np
import pandas as pd
import torch
import yaml
from markupsafe import Markup
from peft import PeftModel
"""


def ruff(code: str) -> list[tuple[int, str]]:
    """Line and rule of each finding, with the project's settings, as if `code` were a file of the package."""
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "json", "--exit-zero"]
    command += ["--stdin-filename", "src/rankscope/bad.py", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, check=True)
    return [(finding["location"]["row"], finding["code"]) for finding in json.loads(done.stdout)]


SAFETENSORS = ("True", "not checks.is_gguf(spec)")


def unsafe(code: str) -> Iterator[str]:
    """Yield what code does that could execute another file's content."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"imports {name}" for name in names if name.split(".")[0] in EXECUTING_MODULES)
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            if called in EXECUTING_CALLS:
                yield f"calls {called}"
            for name in UNSAFE_ARGUMENTS & given.keys():
                if given[name] != ("True" if name == "weights_only" else "False"):
                    yield f"gives {name}={given[name]}"
            loads = called.endswith((".from_pretrained", ".from_config"))
            # These choose how to quantize, and read JSON.
            if loads and called not in ("AutoHfQuantizer.from_config", "LoraConfig.from_pretrained"):
                if "trust_remote_code" not in given and given.get(None) != "checks.source(spec)":
                    yield f"{called} without trust_remote_code=False"
                if "ForCausalLM.from_pretrained" in called and given.get("use_safetensors") not in SAFETENSORS:
                    yield f"{called} without use_safetensors=True"


def test_every_bad_line_is_refused_by_the_linter() -> None:
    """This fails when the rule for a line is taken out of pyproject.toml."""
    first = IMPORTS.count("\n") + 1
    found = ruff(IMPORTS + "\n".join(REFUSED_BY_RUFF) + "\n")
    for number, (line, rule) in enumerate(REFUSED_BY_RUFF.items(), start=first):
        assert (number, rule) in found, line


def test_the_linter_lets_good_lines_pass() -> None:
    good = 'import yaml\nfrom safetensors.torch import load_file\n\nprint(yaml.safe_load("a: 1"), load_file("x"))\n'
    assert ruff(good) == []


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT / "src")))
def test_no_file_executes_another_s_content(file: Path) -> None:
    assert list(unsafe(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "import dill as d",
        "from joblib import load",
        "torch.load(file, weights_only=True)",
        "np.load(file)",
        "yaml.load(text, Loader=yaml.SafeLoader)",
        "eval(text)",
        "exec(text)",
        "subprocess.run(command, shell=True)",
        "load_dataset(name, trust_remote_code=True)",
        "f(allow_pickle=flag)",
        "AutoConfig.from_pretrained(name)",
        "AutoTokenizer.from_pretrained(name, **options)",
        "AutoTokenizer.from_pretrained(name, trust_remote_code=trusted)",
        "AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)",
        "AutoModelForCausalLM.from_config(config)",
    ],
)
def test_the_check_above_finds_what_it_looks_for(code: str) -> None:
    assert list(unsafe(code))


def test_nobody_silences_these_rules_unseen() -> None:
    """Exceptions are few, and each says why."""
    silenced = [line for file in SOURCES for line in file.read_text().splitlines() if "noqa: S" in line]
    assert all("Markup(" in line and line.count("#") == 2 for line in silenced)
    assert not [file for file in SOURCES if "noqa: TID251" in file.read_text()]


def test_the_models_arguments_are_what_they_are_called(tmp_path: Path) -> None:
    from rankscope.model import checks

    (tmp_path / "a.gguf").touch()
    for name in ("org/name", str(tmp_path), str(tmp_path / "a.gguf")):
        assert checks.source(ModelSpec(id=name))["trust_remote_code"] is False
