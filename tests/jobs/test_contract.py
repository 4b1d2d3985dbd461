"""What holds for every launcher: the same files, bit by bit, whichever place a job had, however often it was stopped,
and though a node was lost."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

import rankscope
from folders import write_data, write_model
from rankscope import pipeline
from rankscope.errors import RankscopeError
from rankscope.files import read_json, read_jsonl
from rankscope.jobs.job import Job, Launcher
from rankscope.jobs.launchers import make_launcher
from rankscope.jobs.local import LocalLauncher
from rankscope.jobs.queue import run_jobs
from rankscope.spec.models import ModelSpec
from rankscope.study.study import Study
from recording import RecordingProgress

STEPS = 150
OPTIONS: dict[str, Any] = {
    "ranks": [2, 4], "seeds": [0], "steps": STEPS, "batch_size": 4, "device": "cpu",
    "sets": (
        "training.trials_per_pack=1", "training.checkpoint_steps=4", "training.evals=2",
        "measure.profiles=false", "measure.answers=0",
    ),
}  # fmt: skip
MAKERS = ("local", "ray")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """So that all processes round alike, whatever share of the cores a place gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # else all that runs beside would come first
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("contract")
    write_model(root / "model")
    write_data(root / "data.json")
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> Study:
    """The study as one process makes it, one pack after the other."""
    return run(root, root / "expected")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes on this machine, of which the first runs no jobs: the processes that a real cluster has."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


class TwoPlaces(LocalLauncher):
    """As on two GPUs, but on a CPU."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        self._places = [{}, {}]
        self._free = [0, 1]


@pytest.fixture(params=MAKERS)
def making(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The options of a run by each launcher, on two places."""
    if request.param == "local":
        monkeypatch.setattr(pipeline, "make_launcher", lambda name, model, address, say: TwoPlaces(model))
        return {}
    return {"launcher": "ray", "ray_address": request.getfixturevalue("cluster").address}


def run(root: Path, out: Path, progress: Any = None, **options: Any) -> Study:
    model, data = str(root / "model"), str(root / "data.json")
    return rankscope.run(
        model=model, dataset=data, out=out, progress=progress or RecordingProgress(), **OPTIONS, **options
    )


class Until(RecordingProgress):
    """Does something once all trials of a study are at some step, and then no more; notes at which they are."""

    def __init__(self, study: Path, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.study, self.step, self.act = study, step, act
        self.seen: dict[str, int] = {}

    def poll(self) -> None:
        files = list(self.study.glob("trials/*/metrics.jsonl"))
        steps = {file.parent.name: max((row["step"] for row in read_jsonl(file)), default=0) for file in files}
        if not self.seen and len(files) == 2 and min(steps.values()) >= self.step:
            self.seen = steps
            self.act()


def interrupt() -> None:
    raise KeyboardInterrupt


def contents(study: Study) -> dict[str, Any]:
    """What a study's trials have learned: all but times, and what follows from times."""
    found: dict[str, Any] = {}
    for trial in study.spec.trials():
        folder = study.trial_folder(trial)
        rows = [{k: v for k, v in row.items() if k != "step_seconds"} for row in read_jsonl(folder / "metrics.jsonl")]
        found[trial.name] = [
            rows,
            read_json(folder / "eval.json"),
            (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
            json.loads((folder / "adapter" / "adapter_config.json").read_text()),
        ]
    return found


def test_a_study_that_was_stopped_and_goes_on_is_what_it_would_have_been(
    root: Path, expected: Study, tmp_path: Path, making: dict[str, Any]
) -> None:
    """Two jobs at a time, both stopped at a checkpoint."""
    out = tmp_path / "study"
    stopping = Until(out, 6, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(root, out, stopping, **making)
    assert stopping.seen
    study = Study.open(out)
    steps = {}
    for trial in study.spec.trials():
        assert study.trial_record(trial).status == "interrupted"
        steps[trial.name] = len(read_jsonl(study.trial_folder(trial) / "metrics.jsonl"))
    assert all(6 < count < STEPS for count in steps.values())
    checkpoints = sorted(out.glob("packs/*/checkpoints/step-*/manifest.json"))
    assert {path.parts[-4] for path in checkpoints} == {"p000", "p001"}
    again = run(root, out, **making)
    assert contents(again) == contents(expected)
    assert not list(out.glob("packs/*/checkpoints"))
    for pack in ("p000", "p001"):
        assert "from step" in (out / "packs" / pack / "log.txt").read_text()
        record = study.pack_record(pack)
        assert record is not None
        assert record.results
        assert record.results["steps"] == STEPS
    assert (out / "report" / "index.html").exists()


def launcher_of(making: dict[str, Any]) -> Launcher:
    model = ModelSpec(id="embedded", device="cpu")
    return make_launcher("ray", model, making["ray_address"], print) if making else TwoPlaces(model)


def test_a_job_that_fails_says_why_and_where_its_log_is(
    expected: Study, tmp_path: Path, making: dict[str, Any]
) -> None:
    """In words of the study's directory, wherever the job ran."""
    path = tmp_path / "study"
    shutil.copytree(expected.path, path)
    ends: list[RankscopeError | None] = []
    wrong = Job({"kind": "profile", "profile": "r002", "repeat": 0}, "profiles/jobs/r002")
    (path / "profiles").mkdir(exist_ok=True)
    (path / "profiles" / "r002.json").write_text("no JSON")

    def ended(job: Job, error: RankscopeError | None) -> list[Job]:
        ends.append(error)
        return []

    with launcher_of(making) as launcher:
        run_jobs(launcher, path, [wrong._replace(reads=["profiles/r002.json"])], lambda: None, ended)
    (error,) = ends
    assert type(error).__name__ == "DamagedError"
    assert str(path / "profiles" / "r002.json") in str(error)
    assert "Traceback" in (path / "profiles" / "jobs" / "r002" / "log.txt").read_text()
    assert read_json(path / "profiles" / "jobs" / "r002" / "error.json")["kind"] == "DamagedError"
    assert (path / "profiles" / "r002.json").read_text() == "no JSON"


def test_a_node_that_is_lost_costs_no_more_than_what_came_after_the_last_checkpoint(
    root: Path, expected: Study, tmp_path: Path, cluster: Cluster
) -> None:
    """Its processes are killed in mid-pack; the pack goes on on the other node, bit by bit as it would have been."""
    out, (lost, _) = tmp_path / "study", list(cluster.worker_nodes)  # each has one of the two packs

    def kill() -> None:
        cluster.remove_node(lost, allow_graceful=False)

    try:
        killing = Until(out, 10, kill)
        study = run(root, out, killing, launcher="ray", ray_address=cluster.address)
    finally:
        cluster.add_node(num_cpus=1)  # for others
    assert killing.seen
    assert contents(study) == contents(expected)
    (told,) = (line for line in killing.lines if "lost" in line)
    pack = told.partition(":")[0]
    assert told.startswith("packs/p00")
    assert told.endswith("it goes on elsewhere from its last checkpoint")
    (trial,) = read_json(out / pack / "pack.json")["trials"]
    first, again = map(int, re.findall(rf"from step (\d+) of {STEPS}", (out / pack / "log.txt").read_text()))
    assert first == 0
    assert killing.seen[trial] - 4 <= again < STEPS  # a checkpoint was written every 4 steps
