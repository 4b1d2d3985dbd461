"""The command line as a user meets it: in a process of its own, with its exit codes and messages."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

import forking
from folders import write_data, write_model
from rankscope.files import read_json
from rankscope.study.metrics import read_rows


def rankscope(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return forking.rankscope(arguments, cwd, {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200"})


def warnings_in(output: str) -> list[str]:
    return re.findall(r"^Warning: (With only \d+ rows held out, .*)$", output, re.MULTILINE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    write_model(root / "model")
    write_data(root / "data.json")
    return root


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """`--help` takes 0.16 s without these modules, 0.26 s with pydantic and yaml, seconds with torch."""
    code = (
        "import os, sys, rankscope.cli\n"
        "sys.argv = ['rankscope', '--help']\n"
        "try: rankscope.cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'pandas', 'numpy', 'altair', 'datasets', 'peft', 'pydantic', 'yaml'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)), os.environ['GOMP_SPINCOUNT'])"
    )
    here = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True, env=here
    )
    assert "HEAVY [] 1000" in done.stdout, "and what is timed here waits as a job does"
    for command in ("run", "plan", "report", "doctor"):
        assert command in done.stdout


def test_run_and_report(folder: Path) -> None:
    arguments = ["--model", "model", "--dataset", "data.json", "--ranks", "2,4", "--seeds", "0", "--steps", "3"]
    done = rankscope("run", *arguments, "--out", "out", "--set", "measure.profiles=false", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "r002-lr2e-4" in done.stdout
    assert "There is no verdict yet: one seed does not show" in done.stdout
    assert "rankscope run out --until-settled" in done.stdout
    assert len(warnings_in(done.stdout)) == 2, "before training, and with the verdict"
    assert (folder / "out" / "report" / "index.html").exists()
    assert "step" in done.stdout
    dry = rankscope("run", *arguments, "--out", "out", "--set", "measure.profiles=false", "--dry-run", cwd=folder)
    assert "out has 2 of the 2 trials" in " ".join(dry.stdout.split()), dry.stderr
    other = rankscope("run", *arguments, "--out", "out", "--dry-run", "--steps", "4", cwd=folder)
    assert other.returncode == 2, "it would be refused"
    (folder / "out" / "report" / "index.html").unlink()
    again = rankscope("report", "out", "--lang", "ko", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert 'lang="ko"' in (folder / "out" / "report" / "index.html").read_text()


def test_results_for_scripts(folder: Path) -> None:
    arguments = ["run", "--model", "model", "--dataset", "data.json", "--ranks", "2", "--seeds", "0", "--steps", "3"]
    arguments += ["--out", "scripts", "--set", "measure.profiles=false", "--set", "measure.answers=0"]
    done = rankscope(*arguments, "--json", cwd=folder)
    found = json.loads(done.stdout)
    assert found["verdict"] == read_json(folder / "scripts/verdict.json", schema=3)
    (trial,) = found["trials"]
    assert trial["eval_loss"] == read_json(folder / "scripts/trials/r002-lr2e-4-s0/trial.json")["results"]["eval_loss"]
    assert found["candidates"][0]["cpu_mean_bytes"] is None, "it was not measured"
    assert "Pack p000" in done.stderr
    assert len(warnings_in(done.stderr)) == 1
    assert "few_held_out_rows" in found["verdict"]["caveats"]
    again = rankscope("report", "scripts", "--json", cwd=folder)
    assert json.loads(again.stdout) == found
    assert Path(folder, found["report"]).is_file()
    planned = json.loads(rankscope(*arguments, "--json", "--dry-run", cwd=folder).stdout)
    assert planned["packs"] == {}, "nothing is missing"
    arguments[arguments.index("scripts")] = "elsewhere"
    planned = json.loads(rankscope(*arguments, "--json", "--dry-run", cwd=folder).stdout)
    assert planned["packs"] == {"p000": ["r002-lr2e-4-s0"]}
    assert planned["warnings"] == warnings_in(done.stderr)[:1]
    assert planned["prediction"]["candidates"]["r002-lr2e-4"]["trainable_params"] == trial["trainable_params"]
    assert json.loads(rankscope("doctor", "--json", cwd=folder).stdout)["versions"]["torch"]


SLOWLY = [pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGKILL)]


@pytest.mark.parametrize("how", [signal.SIGINT, *SLOWLY], ids=lambda how: how.name)
@pytest.mark.slow
def test_a_run_that_is_stopped_goes_on(folder: Path, how: signal.Signals) -> None:
    """In mid-training: nothing half-made passes for done, the child ends too, the same command finishes. A run that is
    asked to stop goes on from where it was; as in a terminal, SIGINT reaches the child too."""
    out = f"stopped-{how.name}"
    arguments = ["run", "--model", "model", "--dataset", "data.json", "--ranks", "2", "--seeds", "0", "--steps", "300"]
    arguments += ["--out", out, "--set", "measure.profiles=false", "--set", "measure.answers=0"]
    command = [sys.executable, "-m", "rankscope.cli", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    metrics = folder / out / "trials" / "r002-lr2e-4-s0" / "metrics.jsonl"
    process = subprocess.Popen(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_bytes().splitlines()) > 2):
        assert process.poll() is None, "ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    assert len(children) == 1
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    psutil.wait_procs(children, timeout=20)
    assert not children[0].is_running(), "a child outlived its parent"
    reached = len(metrics.read_bytes().splitlines())
    if how != signal.SIGKILL:
        assert process.returncode == 130
        assert b"Stopping after this step" in errors
        assert b"To resume, run the same command:\n  rankscope run --model" in errors
        assert read_json(metrics.with_name("trial.json"))["status"] == "interrupted"
    else:
        assert process.returncode == -signal.SIGKILL
    assert read_json(metrics.with_name("trial.json"))["status"] != "done"
    assert rankscope(*arguments, cwd=folder).returncode == 0
    assert read_json(metrics.with_name("trial.json"))["results"]["steps"] == 300
    steps = [row["step"] for row in read_rows(metrics) if "train_loss" in row]
    assert steps == list(range(1, 301))
    (log,) = (folder / out).glob("packs/p000/log.txt")
    begun = [int(step) for step in re.findall(r"from step (\d+) of", log.read_text())]
    assert begun[0] == 0
    assert begun[1] >= 2 if how != signal.SIGKILL else begun[1] == 0  # five minutes between checkpoints
    assert begun[1] <= reached


def test_plan_trains_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    arguments = ["--model", str(folder / "model"), "--dataset", str(folder / "data.json"), "--ranks", "2,4"]
    done = rankscope("plan", *arguments, "--steps", "5", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "6 trials of 5 steps in 3 packs" in done.stdout
    assert len(warnings_in(done.stdout)) == 1
    assert "r002-lr2e-4-s0, r004-lr2e-4-s0: about" in done.stdout
    # q, k, v, out: 32x32; fc1, fc2: 32x64; project_in and project_out: 16x32; two layers
    assert f"{2 * (2 * (4 * 64 + 2 * 96) + 2 * 48):,}" in done.stdout
    for told in ("activations", "logits", "fits", "Largest rank that fits: 32 on all-linear", "The whole study: about"):
        assert told in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_plan_for_a_gpu_that_is_not_here(folder: Path) -> None:
    arguments = ["plan", "--model", "model", "--dataset", "data.json", "--ranks", "2,4", "--steps", "5"]
    fleet = ["--devices", "2", "--gpu-flops", "0.1GFLOPS", "--price", "2.5"]
    done = rankscope(*arguments, "--gpu-memory", "24GB", *fleet, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "within 90% of a GPU with 24.0 GB" in done.stdout
    assert "cuda, bfloat16" in done.stdout
    assert "FLOPs at 50% of plain matrix products (0 GFLOP/s as given), a share that was" in done.stdout
    found = re.search(r"On 2 GPUs of 24.0 GB: about .*: trials .* \(no order .* than .*\), then", done.stdout)
    assert found, done.stdout
    hours = re.search(r"  ([0-9.]+) device hours .* Cost: ([0-9.]+), at 2.50 a device hour", done.stdout)
    assert hours
    assert float(hours[2]) == pytest.approx(2.5 * float(hours[1]), abs=0.01)
    assert "6 trials of 5 steps in 2 packs" in done.stdout
    assert max(len(line) for line in done.stdout.splitlines() if line.startswith(("r002", "candidate"))) <= 120
    small = rankscope(*arguments, "--gpu-memory", "10kB", cwd=folder)
    assert "Largest rank that fits: none" in small.stdout
    assert "Time: not predicted, since this device's speed is not known here. --gpu-flops" in small.stdout
    wrong = rankscope(*arguments, "--gpu-memory", "plenty", cwd=folder)
    assert wrong.returncode == 2
    assert "--gpu-memory plenty" in wrong.stderr
    assert "24GB" in wrong.stderr


def test_a_trial_that_diverges_gives_exit_code_4(folder: Path) -> None:
    done = rankscope(
        "run", "--model", "model", "--dataset", "data.json", "--ranks", "2", "--seeds", "0", "--steps", "4",
        "--learning-rates", "1e-3,1e30", "--out", "diverging", "--set", "measure.profiles=false",
        "--set", "training.max_grad_norm=0", "--set", "training.warmup_ratio=0", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 4, done.stderr
    assert "r002-lr1e30-s0: diverged" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model", "model", "--dataset", "data.json", "--ranks", "0"], 2, "ranks, 1st value"),
        (["--model", "model", "--dataset", "data.json", "--ranks", "eight"], 2, "ranks, 1st value"),
        (["--model", "model", "--dataset", "data.json", "--ranks", "8,8"], 2, "listed twice"),
        (["--model", "model", "--dataset", "data.json", "--ranks", "full"], 2, "at least one number"),
        (
            ["--model", "model", "--dataset", "data.json", "--set", "measure.forgetting=no.txt"],
            3,
            "no.txt: no such file",
        ),
        (["--model", "model"], 2, "--dataset is missing"),
        (["--model", "model", "--dataset", "data.json", "--set", "training.stepz=3"], 2, "did you mean steps?"),
        (["--model", "model", "--dataset", "data.json", "--target-modules", "query"], 2, "q_proj"),
        (["--model", "model", "--dataset", "data.json", "--device", "cuda:7"], 2, "doctor"),
        (["missing.yaml"], 2, "no such study file"),
        (["--model", "nowhere/nothing", "--dataset", "data.json"], 3, "nowhere/nothing"),
        (["--model", "model", "--dataset", "missing.json"], 3, "missing.json"),
    ],
)
def test_errors_are_short_and_leave_nothing(folder: Path, arguments: list[str], code: int, message: str) -> None:
    before = set(folder.iterdir())
    done = rankscope("run", *arguments, "--out", "wrong", cwd=folder)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) <= 6
    assert set(folder.iterdir()) == before, "no half-made study"


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = rankscope("--debug", "report", "nothing", cwd=tmp_path)
    assert "Traceback" in done.stderr


def test_doctor(tmp_path: Path) -> None:
    done = rankscope("doctor", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "transformers" in done.stdout
    assert "cores" in done.stdout
