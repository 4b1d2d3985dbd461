"""The tour: it runs from its question to its verdict, and what stands in it was made by running it.

`python tests/docs/test_tour.py` executes it anew, and writes its outputs into docs/tour.ipynb.
"""

import json
import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat
import pytest

import rankscope

NOTEBOOK = Path(__file__).parents[2] / "docs" / "tour.ipynb"
TIMEOUT_SECONDS = 900
"""Limit for one cell on a busy machine; on an idle one all cells take about a minute."""


def execute(folder: Path) -> nbformat.NotebookNode:
    """Runs every cell in `folder`; raises nbclient's CellExecutionError where one fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    options = {"timeout": TIMEOUT_SECONDS, "record_timing": False, "coalesce_streams": True}
    client = nbclient.NotebookClient(notebook, resources={"metadata": {"path": str(folder)}}, **options)
    client.execute(env=_environment(folder))
    return notebook


def _environment(folder: Path) -> dict[str, str]:
    """`rankscope` is the one beside this Python; one thread a process, which waits for no other; nothing of the user's
    cache; no warnings of what libraries deprecate, which belong in no tour.
    """
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "RANKSCOPE_CACHE": str(folder / "cache"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONWARNINGS": "ignore",
    }


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_SECONDS)
def test_it_runs_from_question_to_verdict(tmp_path: Path) -> None:
    executed, written = execute(tmp_path), nbformat.read(NOTEBOOK, as_version=4)
    assert [_kinds(cell) for cell in executed.cells] == [_kinds(cell) for cell in written.cells], "its outputs are old"
    said = executed.cells[-2].outputs[-1].text.strip().splitlines()[-1]
    assert said == f"5%: {rankscope.open(tmp_path / 'tour').sentence()}", "it ends in the verdict's sentence"


def test_its_outputs_are_clean() -> None:
    """Every cell has run, in order, without warnings or errors, and nothing says on which machine."""
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for output in (output for cell in cells for output in cell.outputs):
        assert output.output_type != "error"
        assert output.get("name") != "stderr"
        assert "/home/" not in json.dumps(output)
        assert str(Path(sys.prefix)) not in json.dumps(output)


def _kinds(cell: nbformat.NotebookNode) -> list[str]:
    """Kinds of a cell's outputs, which are the same in each run."""
    return [output.get("name") or ",".join(sorted(output.data)) for output in cell.get("outputs", [])]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(execute(Path(folder)), NOTEBOOK)
