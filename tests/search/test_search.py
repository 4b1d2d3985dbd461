"""Searches that train: the same losses as `run`, adapters, what was killed and goes on, the storage, the command."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import optuna
import optuna_dashboard
import psutil
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from peft.tuners.lora import LoraLayer
from rich.console import Console
from safetensors.torch import load_file

import rankscope
from forking import HOOK
from launchers import FakeLauncher
from rankscope.data.tokens import TokenizedData, load
from rankscope.errors import KilledError, OutOfMemoryError, StudyDirectoryError, StudyError
from rankscope.jobs.local import LocalLauncher
from rankscope.lora.saved import find_adapter, read_adapter
from rankscope.model.load import load_model
from rankscope.search.folder import Search
from rankscope.search.run import run
from rankscope.search.sampling import NAME
from rankscope.search.space import Point, SearchSpec, SearchTrial, modules_text, resolve_search
from rankscope.search.trainer import PackTrainer, rung_rows, step_tokens
from rankscope.study.question import lock_folder
from rankscope.text import catalogue
from rankscope.train.step import batch_at
from rankscope.ui.search import progress_line, show_result

STEPS = 9
"""Rungs at 1 and 3."""


def asked(root: Path, **options: Any) -> SearchSpec:
    values = {"model": str(root / "model"), "dataset": str(root / "data.json"), "steps": STEPS, "batch_size": 4}
    space = {"ranks": "2,4,8", "learning_rates": "1e-3..1e-1", "alpha": "8,2r", "device": "cpu"}
    sets = ("data.eval_rows=12", "training.trials_per_pack=3")
    return resolve_search({}, values | space | {"target_modules": "q_proj,v_proj", "trials": 8} | options, sets)


GROUPS = "all-linear;q_proj,v_proj"


def opened(folder: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / "optuna.log")))
    return optuna.load_study(study_name=NAME, storage=storage)


@pytest.fixture(scope="module")
def found(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Search, dict[str, Any]]:
    spec, folder = asked(root), tmp_path_factory.mktemp("search") / "found"
    said: list[str] = []
    result = search_in(spec, folder, said.append)
    assert any("\nWarning: With only 12 rows held out" in message for message in said)
    return Search(folder, spec), result


def search_in(spec: SearchSpec, out: Path, say: Any) -> dict[str, Any]:
    return run(spec, out, LocalLauncher(spec.study.model), say)


def test_ranks_that_were_not_named_end_at_the_models_full_rank(root: Path, tmp_path: Path) -> None:
    said: list[str] = []
    spec = asked(root, ranks=None, target_modules="all-linear", trials=None, tokens=1)
    with pytest.raises(StudyError, match="one candidate alone takes"):
        search_in(spec, tmp_path / "out", said.append)
    assert "Ranks up to 32, the full rank of the model's layers" in said
    assert Search.open(tmp_path / "out").spec.space.ranks == (4, 8, 16, 32)
    with pytest.raises(StudyError, match="64 is larger than 32"):
        search_in(asked(root, ranks="4..64"), tmp_path / "other", said.append)


def test_the_best_is_found_and_kept(found: tuple[Search, dict[str, Any]]) -> None:
    search, result = found
    candidates = {c["trial"]: c for c in result["candidates"]}
    done = {name: c for name, c in candidates.items() if c["state"] == "done"}
    assert len(candidates) == 8
    assert result["schema"] == 1
    assert result["finished"]
    assert result["best"] == min(done, key=lambda name: done[name]["eval_loss"])
    limit = done[result["best"]]["eval_loss"] * 1.01
    assert set(result["within_margin"]) == {name for name in done if done[name]["eval_loss"] <= limit}
    kept = {path.name for path in (search.path / "adapters").iterdir()}
    assert kept == set(result["within_margin"])
    for name in kept:
        saved = read_adapter(find_adapter(str(search.path / "adapters" / name)))
        assert saved.config.r == done[name]["rank"]
        assert saved.config.lora_alpha == done[name]["lora_alpha"]
    data = load(search.path / "data")
    assert result["spent"]["tokens"] == sum(
        sum(step_tokens(search.spec, data)[: c["steps"]]) for c in candidates.values()
    )


@pytest.mark.slow
def test_a_finished_candidate_is_the_same_trial_of_a_run(found: tuple[Search, dict[str, Any]], tmp_path: Path) -> None:
    """Its held-out loss and its weights."""
    search, result = found
    best = next(c for c in result["candidates"] if c["trial"] == result["best"])
    modules = best["target_modules"] if best["target_modules"] == "all-linear" else best["target_modules"].split(",")
    model, data = search.spec.study.model.id, search.spec.study.data.id
    study = rankscope.run(
        model=model, dataset=data, ranks=[best["rank"]], learning_rates=[best["learning_rate"]], seeds=[0],
        alpha=best["alpha"], target_modules=modules, steps=STEPS, batch_size=4, device="cpu", out=tmp_path / "study",
        sets=("data.eval_rows=12", "measure.profiles=false", "measure.answers=0"),
    )  # fmt: skip
    (row,) = study.results().to_dict("records")
    assert best["eval_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
    assert best["tokens"] == row["tokens"]
    ours = load_file(search.path / "adapters" / result["best"] / "adapter_model.safetensors")
    theirs = load_file(study.adapter_file(study.spec.trials()[0]))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-3, atol=1e-4)


def test_an_adapter_names_its_base_and_the_commit(root: Path, tmp_path: Path) -> None:
    """By which PEFT loads it."""
    spec = asked(root)
    pinned = spec.study.model_copy(update={"model": spec.study.model.model_copy(update={"commit": "0" * 40})})
    data = TokenizedData(*(_tokens(seed, rows) for seed, rows in ((0, 8), (1, 4))), {})
    trainer = PackTrainer(load_model(spec.study.model), spec.model_copy(update={"study": pinned}), data, 1)
    trial = spec.trial(Point(2, 1e-2, 8.0, "all-linear"), 0)
    trainer.add(trial)
    trainer.save(trial.name, tmp_path / "adapter")
    saved = read_adapter(tmp_path / "adapter").config
    assert (saved.base_model_name_or_path, saved.revision) == (str(root / "model"), "0" * 40)


@pytest.mark.parametrize("engine", ["packed", "peft"])
def test_places_at_different_steps_train_as_alone(root: Path, engine: str) -> None:
    """Candidates begin at different times, the newest is removed and its place taken: all have the losses that they
    have alone."""
    spec = asked(root, engine=engine, target_modules=GROUPS)
    data = TokenizedData(*(_tokens(seed, rows) for seed, rows in ((0, 40), (1, 12))), {})
    all_linear, some = map(modules_text, spec.space.target_modules)
    points = [Point(2, 2e-1, 8.0, some), Point(4, 1e-1, 8.0, all_linear), Point(8, 2e-1, "2r", some)]
    points.append(Point(4, 2e-1, 8.0, some))
    trials = [spec.trial(point, n) for n, point in enumerate(points)]
    stopped, *others = trials

    def alone(trial: SearchTrial) -> tuple[list[float], float]:
        trainer = PackTrainer(load_model(spec.study.model), spec, data, 1)
        trainer.add(trial)
        losses = [trainer.step({trial.name: step})[trial.name] for step in range(STEPS)]
        return losses, trainer.evaluate({trial.name: STEPS})[trial.name]

    model = load_model(spec.study.model)
    before = dict(model.named_parameters())
    trainer = PackTrainer(model, spec, data, 3)
    assert trainer.engine.name == engine
    together: dict[str, list[float]] = {trial.name: [] for trial in trials}
    ends: dict[str, float] = {}
    training: dict[str, int] = {}
    begins = {0: others[0], 1: others[1], 2: stopped, 6: others[2]}
    for round_ in range(6 + STEPS):
        if round_ == 5:  # PEFT's active adapter: deleting it freezes all but one of the others
            trainer.remove(stopped.name)
            del training[stopped.name]
        if round_ in begins:
            trainer.add(begins[round_])
            training[begins[round_].name] = 0
        for name, loss in trainer.step(training).items():
            together[name].append(loss)
            training[name] += 1
        for name in [name for name, step in training.items() if step == STEPS]:
            ends |= trainer.evaluate({name: STEPS})
            trainer.remove(name)
            del training[name]
    for trial in others:
        losses, end = alone(trial)
        assert together[trial.name] == pytest.approx(losses, rel=1e-5)
        assert ends[trial.name] == pytest.approx(end, rel=1e-5)
    assert len({round(end, 3) for end in ends.values()}) == len(others), "losses tell candidates apart"
    assert together[stopped.name] == pytest.approx(alone(stopped)[0][:3], rel=1e-5)
    assert not [module for module in model.modules() if isinstance(module, LoraLayer)]
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}


def _tokens(seed: int, rows: int) -> Any:
    from reference import random_tokens

    return random_tokens(rows, seed=seed)


def test_at_rungs_a_part_of_the_rows_is_looked_at(root: Path) -> None:
    spec, data = asked(root), TokenizedData(_tokens(0, 40), _tokens(1, 30), {})
    assert len(rung_rows(spec, data, steps=18)) == 2 * 4
    assert len(rung_rows(spec, data, steps=900)) == 30
    trial = spec.trial(Point(4, 1e-3, 8.0, "all-linear"), 0)
    expected = [
        int(data.train.lengths[batch_at(trial, data.train, spec.study.training, s)].sum()) for s in range(STEPS)
    ]
    assert step_tokens(spec, data) == expected


def test_optuna_and_its_dashboard_open_the_storage(found: tuple[Search, dict[str, Any]]) -> None:
    search, result = found
    study = opened(search.path)
    assert study.best_trial.user_attrs["trial"] == result["best"]
    assert study.best_value == next(c["eval_loss"] for c in result["candidates"] if c["trial"] == result["best"])
    for trial in study.trials:
        assert {"tokens", "seconds", "steps", "ended"} <= trial.user_attrs.keys()
        assert trial.params.keys() == {"rank", "learning_rate", "alpha", "target_modules"}
        assert all(step in (1, 3) for step in trial.intermediate_values)
    app = optuna_dashboard.wsgi(study._storage)
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": "/api/studies", "SERVER_NAME": "localhost", "SERVER_PORT": "80",
        "wsgi.input": BytesIO(), "wsgi.errors": sys.stderr, "wsgi.url_scheme": "http", "QUERY_STRING": "",
    }  # fmt: skip
    body = b"".join(app(environ, lambda line, *_: status.append(line)))
    assert status == ["200 OK"]
    (summary,) = json.loads(body)["study_summaries"]
    assert summary["study_name"] == NAME


def test_the_confirming_study_runs_the_best_with_new_seeds(found: tuple[Search, dict[str, Any]]) -> None:
    from rankscope.spec.options import assemble, read_study_file

    search, result = found
    study = assemble(read_study_file(search.path / "confirm.yaml"), {})
    best = next(c for c in result["candidates"] if c["trial"] == result["best"])
    assert study.seeds == (1, 2, 3)
    assert (best["rank"], best["learning_rate"]) in {(c.rank, c.learning_rate) for c in study.candidates()}
    assert {c.lora_alpha for c in study.candidates() if c.rank == best["rank"]} == {best["lora_alpha"]}
    assert study.training == search.spec.study.training


@pytest.mark.slow
def test_a_search_that_is_done_is_told_again_and_a_larger_budget_goes_on(
    root: Path, found: tuple[Search, dict[str, Any]], tmp_path: Path
) -> None:
    import shutil

    shutil.copytree(found[0].path, tmp_path / "more")
    spec = asked(root)
    assert search_in(spec, tmp_path / "more", lambda line: None) == found[1]
    more = search_in(asked(root, trials=10), tmp_path / "more", lambda line: None)
    assert len(more["candidates"]) == 10
    assert more["candidates"][:8] == found[1]["candidates"]
    assert more["spent"]["tokens"] > found[1]["spent"]["tokens"]
    with pytest.raises(StudyError, match="holds another search"):
        search_in(asked(root, steps=STEPS + 1), tmp_path / "more", lambda line: None)
    with lock_folder(tmp_path / "more"), pytest.raises(StudyDirectoryError, match="another run is writing"):
        search_in(asked(root, trials=12), tmp_path / "more", lambda line: None)


@pytest.mark.slow
def test_a_killed_search_goes_on(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child kills itself in its eighth step; the same search then finishes, and what had ended stays."""
    hook = """
    import os, signal
    import rankscope.search.trainer as pack
    own, count = pack.train_step, []
    def harmed(*args):
        count.append(1)
        if len(count) == 8:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args)
    pack.train_step = harmed
    """
    (tmp_path / "hook.py").write_text(textwrap.dedent(hook))
    with monkeypatch.context() as patch:
        patch.setenv(HOOK, str(tmp_path / "hook.py"))
        with pytest.raises(KilledError, match="signal 9"):
            search_in(asked(root, target_modules=GROUPS), tmp_path / "search", lambda line: None)
    search = Search(tmp_path / "search", asked(root, target_modules=GROUPS))
    trials = opened(search.path).get_trials()
    left = [t.params for t in trials if t.state == optuna.trial.TrialState.RUNNING]
    ended = {t.user_attrs["trial"]: t.params for t in trials if t.state != optuna.trial.TrialState.RUNNING}
    before, done = search.spent(), sum(t.user_attrs.get("tokens", 0) for t in trials)
    assert left
    assert ended
    result = search_in(search.spec, search.path, lambda line: None)
    trials = opened(search.path).get_trials()
    after = {t.user_attrs["trial"]: t.params for t in trials if t.state != optuna.trial.TrialState.FAIL}
    assert len(after) == len(result["candidates"]) == 8
    assert {name: after[name] for name in ended} == ended
    again = [params for name, params in after.items() if name not in ended]
    assert [params for params in left if params not in again] == [], "begun anew"
    lost = before.tokens - done
    assert lost > 0
    assert result["spent"]["tokens"] == lost + sum(c["tokens"] for c in result["candidates"]), "what was lost counts"
    assert {c["state"] for c in result["candidates"]} <= {"done", "stopped", "diverged"}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens": 100, "trials": None}, r"--tokens 100: one candidate alone takes \d"),
        ({"ranks": "4..64"}, "64 is larger than 32, the full rank"),
    ],
)
def test_what_cannot_be_searched_is_refused(root: Path, tmp_path: Path, options: dict[str, Any], told: str) -> None:
    with pytest.raises(StudyError, match=told):
        search_in(asked(root, **options), tmp_path / "search", lambda line: None)


@pytest.mark.slow
def test_the_command_is_stopped_and_goes_on(root: Path, tmp_path: Path) -> None:
    arguments = [
        "search", "--model", str(root / "model"), "--dataset", str(root / "data.json"), "--ranks", "2..8",
        "--steps", "60", "--batch-size", "4", "--trials", "6", "--device", "cpu", "--set", "data.eval_rows=12",
        "--set", "training.trials_per_pack=3", "--out", "out",
    ]  # fmt: skip
    command = [sys.executable, "-m", "rankscope.cli", *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    found, deadline = tmp_path / "out" / "result.json", time.monotonic() + 120
    while not (found.exists() and json.loads(found.read_text())["candidates"][0]["losses"]):
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"To resume, run the same command:\n  rankscope search --model" in errors
    psutil.wait_procs(children, timeout=20)
    assert not any(child.is_running() for child in children)
    done = subprocess.run(
        [*command, "--json"], cwd=tmp_path, capture_output=True, text=True, check=True, env={**os.environ}
    )
    result = json.loads(done.stdout)
    assert len(result["candidates"]) == 6
    assert result["confirm"] == "rankscope run out/confirm.yaml --out out-confirm"
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    best = next(c for c in result["candidates"] if c["trial"] == result["best"])
    assert f"Best: rank {best['rank']} at learning rate {best['learning_rate']:.3g}" in shown
    assert "of them stopped early" in shown
    assert f"{best['eval_loss']:.4f}" in shown


def test_where_memory_is_short_fewer_train_at_a_time(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rankscope.search.run._slots", lambda *_: 3)
    said: list[str] = []
    launcher = FakeLauncher(lambda *_: OutOfMemoryError("no room"))
    with pytest.raises(OutOfMemoryError, match="no room"):
        run(asked(root), tmp_path / "search", launcher, said.append)
    assert [job.content["places"] for job in launcher.started] == [3, 2, 1]
    assert sum("goes on with fewer at a time" in line for line in said) == 2


def test_progress_says_what_is_left(found: tuple[Search, dict[str, Any]]) -> None:
    _, result = found
    line = progress_line(
        result | {"budget": {"trials": 9, "tokens": result["spent"]["tokens"] + 1500, "hours": None}},
        catalogue.load("en"),
    )
    ended = [c["state"] for c in result["candidates"]]
    assert f"8 candidates begun, {ended.count('stopped')} stopped early, {ended.count('done')} done" in line
    assert f"best {result['best']} " in line
    assert line.endswith("left: 1 candidate, 1,500 tokens")


def test_the_result_is_told_in_the_language_that_is_asked_for(found: tuple[Search, dict[str, Any]]) -> None:
    search, result = found
    text, shown = catalogue.load("ko"), StringIO()
    show_result(search.path, result, Console(file=shown, width=400), text)
    lines = [
        line for line in (*shown.getvalue().splitlines(), progress_line(result, text)) if line.endswith((".", ":"))
    ]
    assert len(lines) > 3, "in each line that is a sentence, or begins a command"
    assert [line for line in lines if not re.search("[가-힣]", line)] == []
