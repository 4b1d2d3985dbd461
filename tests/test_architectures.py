"""The benchmark of architectures: three of them here, its command and its page among the slow tests."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "architectures.py"


@pytest.fixture(scope="module")
def benchmark() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of what the reference reads
@pytest.mark.parametrize(("name", "engine"), [("gpt2", "packed"), ("bloom", "peft"), ("prophetnet", "peft")])
def test_an_architecture_trains_as_transformers_and_peft_do(
    benchmark: dict[str, Any], name: str, engine: str, tmp_path: Path
) -> None:
    result: dict[str, Any] = {}
    benchmark["examine"](name, tmp_path, lambda **known: result.update(known))
    assert benchmark["verdict"](result) == engine
    assert result["dtype"] == "float64"
    assert 0 < result["loss"] < 1e-6
    assert 0 < result["gradient"] < 1e-4
    assert result["read_back"] == 0


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({}, "packed"),
        ({"loss": 2e-5}, "differs"),
        ({"gradient": 2e-3}, "differs"),
        ({"gradient": 2e-3, "rounding": 1e-3}, "packed"),
        ({"read_back": float("nan")}, "differs"),
        ({"fault": "evaluated 1, trained with 2"}, "differs"),
        ({"error": "KeyError: 'x'", "stage": "engine"}, "fails"),
        ({"error": "KeyError: 'x'", "stage": "its own forward"}, "not built"),
        ({"refused": "not a causal language model"}, "refused"),
    ],
)
def test_the_verdict_of_a_result(benchmark: dict[str, Any], known: dict[str, Any], expected: str) -> None:
    good = {"engine": "packed", "loss": 1e-7, "gradient": 1e-6, "rounding": 1e-6, "read_back": 0.0, "stage": None}
    assert benchmark["verdict"](good | known) == expected


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped_and_writes_the_page(tmp_path: Path) -> None:
    out, page = tmp_path / "results.jsonl", tmp_path / "page.md"

    def run(*options: str) -> None:
        subprocess.run([sys.executable, str(SCRIPT), "--out", str(out), *options], check=True)

    run("--only", "llama,xlnet", "--limit", "100")
    run("--only", "llama,xlnet,opt", "--limit", "0.01", "--jobs", "2")
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(one["name"], one["verdict"]) for one in found[:2]] == [("llama", "packed"), ("xlnet", "refused")]
    assert (found[2]["name"], found[2]["error"]) == ("opt", "no answer within 0 s")
    run("--table", str(page))
    assert "| llama | LlamaForCausalLM |" in page.read_text()


@pytest.mark.slow
def test_the_page_has_every_architecture_and_no_fault(benchmark: dict[str, Any]) -> None:
    text = (ROOT / "docs" / "reference" / "architectures.md").read_text()
    rows = re.findall(r"^\| ([\w-]+)\*? \|", text, re.MULTILINE)
    assert sorted(set(rows) - {"architecture"}) == benchmark["names"]()
    assert not re.search(r"^## (Fails|Other numbers)", text, re.MULTILINE)
    packed, *_ = text.partition("## Trained by")
    assert packed.count("\n| ") - 1 >= 110
