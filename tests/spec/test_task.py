"""What a task is, and which code it may run."""

from pathlib import Path

import pytest

from rankscope.errors import StudyError
from rankscope.spec.options import assemble
from rankscope.spec.task import Task, check_code, code_sha256, parse_task

MODEL = {"model": {"id": "embedded"}, "data": {"id": "embedded"}}


def test_each_form_is_read() -> None:
    assert parse_task("choice_norm") == Task("choice_norm")
    assert parse_task("regex:a: (b)") == Task("regex", "a: (b)")
    assert parse_task("code/my.py:score") == Task("function", "score", "code/my.py")
    task = parse_task("lm_eval:arc_easy, ./tasks/own.yaml,tasks/")
    assert task.names == ["arc_easy", "./tasks/own.yaml", "tasks/"]
    assert task.code == ["./tasks/own.yaml", "tasks/"]


@pytest.mark.parametrize(
    ("task", "what"),
    [
        ("exactmatch", "did you mean exact_match"),
        ("my.py", "Expected one of"),
        ("regex:(", r"missing \)"),
        ("regex:(?=x)", "no look-around"),
        ("lm_eval:", "Expected one of"),
    ],
)
def test_a_wrong_task_is_refused(task: str, what: str) -> None:
    with pytest.raises(StudyError, match=rf"measure.task: .*{what}"):
        assemble(MODEL, {"task": task})


def test_code_is_refused_until_it_is_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_code("exact_match", ())
    with pytest.raises(StudyError, match=r"my\.py: no such file"):
        check_code("my.py:score", ["my.py"])
    Path("my.py").write_text("def score(prompt, answer, reference): return 1")
    with pytest.raises(StudyError, match=r"--allow-code my\.py"):
        check_code("my.py:score", ["other.py"])
    check_code("my.py:score", [tmp_path / "my.py"])
    check_code("my.py:score", None)
    with pytest.raises(StudyError, match="no function points"):
        check_code("my.py:points", ["my.py"])
    Path("my.py").write_text("def score(")
    with pytest.raises(StudyError, match="not valid Python"):
        check_code("my.py:score", ["my.py"])
    Path("tasks").mkdir()
    with pytest.raises(StudyError, match="--allow-code tasks/"):
        check_code("lm_eval:arc_easy,tasks/", [])


def test_the_hash_of_a_folder_changes_with_the_code_beside_its_task(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("task: own")
    (tmp_path / "utils.py").write_text("x = 1")
    before = code_sha256(f"lm_eval:{tmp_path}/own.yaml")
    assert before == code_sha256(f"lm_eval:{tmp_path}/")
    (tmp_path / "utils.py").write_text("x = 2")
    assert before != code_sha256(f"lm_eval:{tmp_path}/own.yaml")
    assert code_sha256("lm_eval:arc_easy") is None
