"""The contract of all launchers: bitwise the same files, whichever slot ran a job, after a stop and after a lost node.

Ray's half is slow, but for one small study.
"""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

import rankscope
from rankscope.errors import RankscopeError
from rankscope.files import read_json
from rankscope.jobs import queue
from rankscope.jobs.job import Job, Launcher
from rankscope.jobs.launchers import make_launcher
from rankscope.jobs.local import LocalLauncher
from rankscope.jobs.queue import run_jobs
from rankscope.spec.models import ModelSpec
from rankscope.study.metrics import read_rows
from rankscope.study.study import Study
from recording import RecordingProgress

LOCAL_STEPS = 60
RAY_STEPS = 150  # Ray reports twice a second, which must happen in mid-training
OPTIONS: dict[str, Any] = {
    "ranks": [2, 4], "seeds": [0], "batch_size": 4, "device": "cpu",
    "sets": (
        "training.trials_per_pack=1", "training.checkpoint_steps=4", "training.evals=2",
        "measure.profiles=false", "measure.answers=0",
    ),
}  # fmt: skip
Trained = Callable[[int], Study]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """All processes round alike, however many cores a slot gives them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_worker_niceness", "0")  # else every other process would come first
        yield


@pytest.fixture(scope="module")
def trained(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The study of so many steps as one process trains it, one pack after the other."""
    folder = tmp_path_factory.mktemp("trained")
    return cache(lambda steps: run(root, folder / f"{steps}-steps", steps=steps))


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Three nodes on this machine, with the processes of a real cluster; the head node runs no jobs."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    yield cluster
    cluster.shutdown()


class TwoSlots(LocalLauncher):
    """Two slots on a CPU, as two GPUs give."""

    def __init__(self, model: ModelSpec) -> None:
        super().__init__(model)
        self._slots = [{}, {}]


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def options(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Options of a run by each launcher, on two slots."""
    if request.param == "local":
        monkeypatch.setattr(queue, "POLL_SECONDS", 0.1)
        monkeypatch.setattr("rankscope.begin.make_launcher", lambda name, model, *_: TwoSlots(model))
        return {"steps": LOCAL_STEPS}
    return {"launcher": "ray", "ray_address": request.getfixturevalue("cluster").address, "steps": RAY_STEPS}


def run(root: Path, out: Path, progress: Any = None, **options: Any) -> Study:
    model, data = str(root / "model"), str(root / "data.json")
    return rankscope.run(
        model=model, dataset=data, out=out, progress=progress or RecordingProgress(), **(OPTIONS | options)
    )


class Until(RecordingProgress):
    """Acts once, when both trials of a study have reached a step; `seen` is the step of each at that time."""

    def __init__(self, study: Path, step: int, act: Callable[[], None]) -> None:
        super().__init__()
        self.study, self.step, self.act = study, step, act
        self.seen: dict[str, int] = {}

    def poll(self) -> None:
        files = list(self.study.glob("trials/*/metrics.jsonl"))
        steps = {file.parent.name: max((row["step"] for row in read_rows(file)), default=0) for file in files}
        if not self.seen and len(files) == 2 and min(steps.values()) >= self.step:
            self.seen = steps
            self.act()


def interrupt() -> None:
    raise KeyboardInterrupt


def contents(study: Study) -> dict[str, Any]:
    """Metrics, held-out losses and adapters by trial, without times."""
    by_trial: dict[str, Any] = {}
    for trial in study.spec.trials():
        folder = study.trial_folder(trial)
        rows = [{k: v for k, v in row.items() if k != "step_seconds"} for row in read_rows(folder / "metrics.jsonl")]
        by_trial[trial.name] = [
            rows,
            read_json(folder / "eval.json"),
            (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
            json.loads((folder / "adapter" / "adapter_config.json").read_text()),
        ]
    return by_trial


def test_a_stopped_study_resumes_bitwise(root: Path, trained: Trained, tmp_path: Path, options: dict[str, Any]) -> None:
    """Two jobs run at a time, and both stop at a checkpoint."""
    total = options["steps"]
    out = tmp_path / "study"
    stopping = Until(out, 6, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(root, out, stopping, **options)
    assert stopping.seen
    study = Study.open(out)
    steps = {}
    for trial in study.spec.trials():
        assert study.trial_record(trial).status == "interrupted"
        steps[trial.name] = len(read_rows(study.trial_folder(trial) / "metrics.jsonl"))
    assert all(6 < count < total for count in steps.values())
    checkpoints = sorted(out.glob("packs/*/checkpoints/step-*/manifest.json"))
    assert {path.parts[-4] for path in checkpoints} == {"p000", "p001"}
    again = run(root, out, **options)
    assert contents(again) == contents(trained(total))
    assert not list(out.glob("packs/*/checkpoints"))
    for pack in ("p000", "p001"):
        assert "from step" in (out / "packs" / pack / "log.txt").read_text()
        record = study.pack_record(pack)
        assert record is not None
        assert record.results
        assert record.results["steps"] == total
    assert (out / "report" / "index.html").exists()


def launcher_of(options: dict[str, Any]) -> Launcher:
    model = ModelSpec(id="embedded", device="cpu")
    return make_launcher("ray", model, options["ray_address"], print) if "launcher" in options else TwoSlots(model)


def test_the_error_of_a_failed_job_names_the_studys_files(
    trained: Trained, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Its paths are those of the study's directory, wherever the job ran."""
    path = tmp_path / "study"
    shutil.copytree(trained(options["steps"]).path, path)
    ends: list[RankscopeError | None] = []
    wrong = Job("rankscope.jobs.profiles", {"profile": "r002", "members": [], "again": False}, "profiles/jobs/r002")
    (path / "profiles").mkdir(exist_ok=True)
    (path / "profiles" / "r002.json").write_text("no JSON")

    def ended(job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
        ends.append(error)
        return list(waiting)

    with launcher_of(options) as launcher:
        run_jobs(launcher, path, [wrong._replace(reads=["profiles/r002.json"])], lambda: None, ended)
    (error,) = ends
    assert type(error).__name__ == "DamagedError"
    assert str(path / "profiles" / "r002.json") in str(error)
    assert "Traceback" in (path / "profiles" / "jobs" / "r002" / "log.txt").read_text()
    assert read_json(path / "profiles" / "jobs" / "r002" / "error.json")["kind"] == "DamagedError"
    assert (path / "profiles" / "r002.json").read_text() == "no JSON"


@pytest.mark.slow
def test_ray_trains_bitwise_as_this_machine_alone(
    root: Path, trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One pack, on a Ray that rankscope starts and ends."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    study = run(root, tmp_path / "study", launcher="ray", ranks=[2], steps=LOCAL_STEPS)
    (trial,) = study.spec.trials()
    assert contents(study) == {trial.name: contents(trained(LOCAL_STEPS))[trial.name]}
    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_lost_node_costs_only_the_steps_since_the_last_checkpoint(
    root: Path, trained: Trained, tmp_path: Path, cluster: Cluster
) -> None:
    """Its processes are killed in mid-pack; the pack resumes bitwise on the other node."""
    out, (lost, _) = tmp_path / "study", list(cluster.worker_nodes)  # each has one of the two packs

    def kill() -> None:
        cluster.remove_node(lost, allow_graceful=False)

    try:
        killing = Until(out, 10, kill)
        study = run(root, out, killing, launcher="ray", ray_address=cluster.address, steps=RAY_STEPS)
    finally:
        cluster.add_node(num_cpus=1)  # for others
    assert killing.seen
    assert contents(study) == contents(trained(RAY_STEPS))
    (told,) = (line for line in killing.lines if "lost" in line)
    pack = told.partition(":")[0]
    assert told.startswith("packs/p00")
    assert told.endswith("it goes on elsewhere from its last checkpoint")
    (trial,) = read_json(out / pack / "pack.json")["trials"]
    first, again = map(int, re.findall(rf"from step (\d+) of {RAY_STEPS}", (out / pack / "log.txt").read_text()))
    assert first == 0
    assert killing.seen[trial] - 4 <= again < RAY_STEPS  # a checkpoint was written every 4 steps
