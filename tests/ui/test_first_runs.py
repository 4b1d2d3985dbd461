"""`rankscope demo`, `run --quick`, `--yes`: what is asked of the main path, and what is said at the end."""

import sys
from pathlib import Path
from typing import Any

import pytest

from rankscope import cli
from rankscope.report.finish import Conclusion
from rankscope.study.study import Study


@pytest.fixture
def asked(trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the main path was asked, which concludes at once."""
    calls: list[Any] = []

    def run_looks(*question: Any) -> Conclusion:
        calls.append(question)
        return Conclusion(trained, trained.evidence(), trained.verdict)

    monkeypatch.setattr("rankscope.pipeline.run_looks", run_looks)
    monkeypatch.chdir(tmp_path)
    return calls


def rankscope(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["rankscope", *words.split()])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code


def test_demo_is_run_alone(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rankscope("run", monkeypatch)
    assert "rankscope init" not in capsys.readouterr().err
    rankscope("demo", monkeypatch)
    assert "Next, with your own model and data:\n  rankscope init" in capsys.readouterr().err
    (spec, path, *_), (same, there, *_) = asked
    assert (spec.model.id, spec.data.id, str(path)) == ("embedded", "embedded", "rankscope-demo")
    assert (spec, path) == (same, there)


def test_a_quick_look_ends_with_the_command_of_the_whole(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rankscope("run --quick --out x --num_train_epochs 0.5", monkeypatch)
    assert capsys.readouterr().out.endswith("the whole study:\n  rankscope run --out x --num_train_epochs 0.5\n")
    ((spec, path, *_),) = asked
    assert (str(path), spec.seeds, spec.training.epochs, spec.data.max_rows) == ("x-quick", (0, 1), 0.5, 1600)


def test_a_quick_look_speaks_its_language(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rankscope("run --quick --out x --lang ko", monkeypatch)
    said = capsys.readouterr().out
    assert said.startswith("스터디 rankscope-demo: x-quick/\n")
    assert said.endswith("전체 스터디:\n  rankscope run --out x --lang ko\n")


@pytest.mark.parametrize(("words", "asks"), [("run", True), ("run --yes", False), ("run --hours 9", False)])
def test_who_has_a_limit_or_says_yes_is_not_asked(
    words: str, asks: bool, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rankscope(words, monkeypatch)
    assert (asked[0][-1].approve is not None) == asks


def test_code_of_a_task_is_refused_until_it_is_repeated(
    asked: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("my.py").write_text("def score(prompt, answer, reference): return 1")
    monkeypatch.setattr(sys, "argv", ["rankscope", "run", "--task", "my.py:score"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "repeat its name: --allow-code my.py" in capsys.readouterr().err
    assert asked == []
    rankscope("run --task my.py:score --allow-code my.py", monkeypatch)
    assert asked[0][-1].allow_code == ["my.py"]
