"""The likeliest mistakes in docs/reference/errors.md, with what is really said of each."""

import json
import shlex
import sys
from pathlib import Path

import pytest

from folders import write_data, write_model
from rankscope import cli
from rankscope.spec.options import assemble
from rankscope.study.folder import StudyFolder

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "errors.md"

GOOD = "rankscope run --model model --dataset data.json"
MISTAKES = {
    "No data": "rankscope run --model model",
    "A path that is not there": "rankscope run --model ./modle --dataset data.json",
    "A file that is not there": "rankscope run --model model --dataset data.jsonl",
    "Columns of other names": "rankscope run --model model --dataset tickets.csv",
    "Too few rows": "rankscope run --model model --dataset few.json",
    "Chats, and a base model without a chat template": "rankscope run --model model --dataset chats.jsonl",
    "An option of another tool": f"{GOOD} --load_in_4bit",
    "A misspelt field": "rankscope run study.yaml",
    "A misspelt module": f"{GOOD} --target-modules q_porj,v_proj",
    "A rank above the layers' own": f"{GOOD} --ranks 8..64",
    "A GPU that is not there": f"{GOOD} --device cuda:7",
    "Another recipe in the directory of a study": f"{GOOD} --out begun --steps 200",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "model")
    write_data(tmp_path / "data.json")
    rows = [{"instruction": f"Say {number}.", "output": f"{number}"} for number in range(5)]
    chats = [{"messages": [{"role": role, "content": f"{n}"} for role in ("user", "assistant")]} for n in range(40)]
    (tmp_path / "few.json").write_text(json.dumps(rows))
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (tmp_path / "tickets.csv").write_text("topic,team\nlogin,web\n")
    (tmp_path / "study.yaml").write_text("model: model\ndata: data.json\ntraining:\n  stepz: 200\n")
    StudyFolder.create(tmp_path / "begun", assemble({"model": "model", "data": "data.json"}, {"steps": 100}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def test_the_page_has_what_is_said(
    folder: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = ["| mistake | what you typed | what is said |", "|---|---|---|"]
    for mistake, command in MISTAKES.items():
        monkeypatch.setattr(sys, "argv", shlex.split(command))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (2, 3), mistake
        lines = capsys.readouterr().err.splitlines()
        said = lines[next(number for number, line in enumerate(lines) if line.startswith("error: ")) :]
        code = [f"`` {line.strip()} ``" if "`" in line else f"`{line.strip()}`" for line in said]
        table.append(f"| {mistake} | `{command}` | {'<br>'.join(code)} |")
    assert "\n".join(table) in PAGE.read_text(encoding="utf-8"), "put this table there:\n" + "\n".join(table)
