"""What a plan says of a shorter study, and a run of hours before it starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import typer
from rich.console import Console

from rankscope.plan.runtime import Forecast, shorter, study_seconds
from rankscope.spec.options import assemble
from rankscope.study.missing import START_SECONDS
from rankscope.text.catalogue import load
from rankscope.ui.plan import approve, shorter_lines
from rankscope.ui.progress import Display
from recording import RecordingProgress

BASE: dict[str, Any] = {"model": "embedded", "data": "embedded", "ranks": [8, 64, 256], "training": {"steps": 60}}
EVALUATION = 5.0


FACTS = {"rows_eval": 200, "eval_label_tokens": 1000}


def forecasts(spec: Any, step_seconds: float = 1.0, steps: int = 60) -> dict[str, Forecast]:
    """Of a step that is longer by a percent for each rank."""
    times = {one.name: step_seconds * (1 + one.rank / 100) for one in spec.candidates()}
    return {
        name: Forecast(1, None, None, None, seconds, seconds * steps + EVALUATION) for name, seconds in times.items()
    }


def plan(step_seconds: float, **more: Any) -> Any:
    spec = assemble(BASE, {})
    found = SimpleNamespace(candidates=forecasts(spec, step_seconds))
    given = {
        "spec": spec,
        "steps": 60,
        "forecast": found,
        "data": SimpleNamespace(facts=FACTS),
        "whole_seconds": study_seconds(spec, found.candidates, FACTS),
        "fleet_estimate": None,
    }
    return SimpleNamespace(**given | more)


def test_a_shorter_study_takes_what_the_plan_of_that_study_says() -> None:
    spec = assemble(BASE, {})
    found = shorter(spec, 60, forecasts(spec), FACTS)
    options: list[dict[str, Any]] = [{"seeds": "0,1"}, {"ranks": "8,256"}, {"steps": 30}]
    options.append(options[0] | options[1] | options[2])
    assert list(found) == [" ".join(f"--{name} {value}" for name, value in one.items()) for one in options]
    for seconds, one in zip(found.values(), options, strict=True):
        asked = assemble(BASE, one)
        told = study_seconds(asked, forecasts(asked, steps=one.get("steps", 60)), FACTS)
        assert told is not None
        assert seconds == pytest.approx(sum(told))
    whole = study_seconds(spec, forecasts(spec), FACTS)
    assert whole is not None
    assert all(seconds < sum(whole) for seconds in found.values())


def test_two_seeds_and_two_ranks_are_the_least() -> None:
    spec = assemble(BASE, {"seeds": [3, 4], "ranks": [8, 64]})
    assert list(shorter(spec, 60, forecasts(spec), FACTS)) == ["--steps 30"]


def test_what_hardly_makes_it_shorter_is_not_offered() -> None:
    """Where starting and costs take nearly all the time, fewer seeds and steps save nothing that shows."""
    spec = assemble(BASE, {})
    found = shorter(spec, 60, forecasts(spec, 1e-3), FACTS)
    assert "--steps 30" not in found
    assert "--seeds 0,1" not in found


def test_nothing_is_said_where_times_are_not_known() -> None:
    spec = assemble(BASE, {})
    unknown = dict.fromkeys(forecasts(spec), Forecast(1, None, None, None, None, None))
    assert shorter(spec, 60, unknown, FACTS) == {}
    lines = shorter_lines(plan(1.0, forecast=SimpleNamespace(candidates=unknown)), load("en"))
    assert lines == []


class Asking(RecordingProgress):
    def __init__(self, answer: bool) -> None:
        super().__init__()
        self.answer, self.asked = answer, 0

    def ask(self, question: str) -> bool:
        self.asked += 1
        return self.answer


def test_a_run_of_hours_says_so_with_what_is_shorter_and_asks() -> None:
    progress: Any = Asking(True)
    approve(progress, plan(60.0), load("en"))
    assert progress.asked == 1
    assert progress.lines[0].startswith("This will take about 26 h ")
    assert [line.strip().partition(":")[0] for line in progress.lines[2:]] == [
        "--seeds 0,1", "--ranks 8,256", "--steps 30", "--seeds 0,1 --ranks 8,256 --steps 30", "--quick",
        "--hours 2",
    ]  # fmt: skip
    korean: Any = Asking(True)
    approve(korean, plan(60.0), load("ko"))
    assert korean.lines[0].startswith("약 26시간 ")
    assert len(korean.lines) == len(progress.lines)
    with pytest.raises(typer.Exit) as ended:
        approve(Asking(False), plan(60.0), load("en"))  # type: ignore[arg-type]
    assert ended.value.exit_code == 130


def test_a_short_run_or_one_on_many_devices_just_starts() -> None:
    for short in (plan(1.0), plan(60.0, fleet_estimate=SimpleNamespace(makespan_seconds=60.0))):
        progress: Any = Asking(False)
        approve(progress, short, load("en"))
        assert progress.lines == []


@pytest.mark.parametrize(("terminal", "keyboard"), [(False, True), (True, False), (True, True)])
def test_only_a_terminal_is_asked(terminal: bool, keyboard: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typer, "confirm", lambda question, default: False)
    monkeypatch.setattr("rankscope.ui.progress.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: keyboard)))
    with Display(Console(force_terminal=terminal)) as display:
        assert display.ask("Start?") is not (terminal and keyboard)


@pytest.mark.parametrize(
    ("task", "each"),
    [("exact_match", 5 * 1.08 / 8 / 8), ("regex:\\d+", 5 * 1.08 / 8 / 8), ("choice", 4 * 1.08 / 3 / 8), (None, 0)],
)
def test_scores_on_a_task_are_counted(task: str | None, each: float) -> None:
    """An answer of 5 tokens, as the held-out ones are, or four choices, for each of 100 rows and each model."""
    spec = assemble(BASE, {"task": task})
    found, without = (study_seconds(one, forecasts(spec), FACTS) for one in (spec, assemble(BASE, {})))
    assert found is not None
    assert without is not None
    items = spec.measure.task_items
    assert items >= 200
    models = 1 + len(spec.trials())
    assert found.others - without.others == pytest.approx(models * 200 * each + (START_SECONDS if task else 0))
