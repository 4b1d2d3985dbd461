"""Which devices there are, what each job gets of them, and what is refused: without a GPU and without a cluster."""

import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from rankscope.errors import MissingExtraError, StudyError, WorkerError
from rankscope.jobs import local, ray
from rankscope.jobs.launchers import make_launcher
from rankscope.jobs.local import LocalLauncher, gpu_environments
from rankscope.jobs.ray import Node, Share, share
from rankscope.spec.models import ModelSpec


def nodes(*sizes: tuple[int, int]) -> list[Node]:
    """Nodes with so many CPUs and GPUs each."""
    return [Node(f"id{number}", f"node{number}", *size, memory_bytes=1 << 33) for number, size in enumerate(sizes)]


def test_each_gpu_is_a_place_that_sees_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "threads", lambda: 5)
    places = gpu_environments(2, {})
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places] == ["0", "1"]
    assert {place["OMP_NUM_THREADS"] for place in places} == {"2"}
    assert gpu_environments(2, {"CUDA_VISIBLE_DEVICES": "3,MIG-5f,7", "OMP_NUM_THREADS": "4"}) == [
        {"CUDA_VISIBLE_DEVICES": "3", "OMP_NUM_THREADS": "4"},
        {"CUDA_VISIBLE_DEVICES": "MIG-5f", "OMP_NUM_THREADS": "4"},
    ]


@pytest.mark.parametrize(("device", "places"), [("auto", 3), ("cuda", 3), ("cuda:1", 1), ("cpu", 1)])
def test_all_visible_gpus_are_used_or_the_one_that_is_named(
    device: str, places: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The free memory is that of the GPU with the least."""
    free = {None: 50, 0: 50, 1: 20, 2: 30}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr("rankscope.jobs.local.free_bytes", lambda device: free[device.index])
    monkeypatch.setattr("rankscope.jobs.local.hardware", dict)
    launcher = LocalLauncher(ModelSpec(id="embedded", device=device))
    assert launcher.slots() == places
    site = launcher.site()
    assert site.free_bytes == (50 if device == "cpu" else 20)
    assert (site.kind, site.dtype) == (("cpu", "float32") if device == "cpu" else ("cuda", "bfloat16"))


def test_a_job_takes_a_place_and_gives_it_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from rankscope.jobs import local
    from rankscope.jobs.job import Job

    started: list[str] = []

    class Process:
        def __init__(self, study: Path, job: Job, environment: dict[str, str]) -> None:
            if job.folder == "full":
                raise StudyError("no room")
            started.append(environment["CUDA_VISIBLE_DEVICES"])
            self.running = True

        def is_running(self) -> bool:
            return self.running

    monkeypatch.setattr(local, "JobProcess", Process)
    launcher = LocalLauncher(ModelSpec(id="embedded", device="cpu"))
    launcher._slots = gpu_environments(2, {"OMP_NUM_THREADS": "1"})
    first, second = (cast(Any, launcher.start(tmp_path, Job("", {}, name))) for name in "ab")
    assert started == ["0", "1"]
    second.running = False
    with pytest.raises(StudyError):
        launcher.start(tmp_path, Job("", {}, "full"))
    third = cast(Any, launcher.start(tmp_path, Job("", {}, "c")))
    assert started == ["0", "1", "1"]
    first.running = third.running = False
    launcher.start(tmp_path, Job("", {}, "d"))
    assert started == ["0", "1", "1", "0"]


@pytest.mark.parametrize(
    ("sizes", "kind", "expected", "places"),
    [
        ([(64, 8)], "cuda", Share(8, 1), 8),
        ([(64, 8), (16, 4), (32, 0)], "cuda", Share(4, 1), 12),
        ([(2, 4)], "cuda", Share(0, 1), 4),
        ([(8, 0), (8, 0), (0, 0)], "cpu", Share(8, 0), 2),
        ([(8, 0), (64, 0)], "cpu", Share(8, 0), 9),
        ([(8, 2)], "cpu", Share(8, 0), 1),
    ],
)
def test_what_a_job_takes_of_a_ray_cluster(
    sizes: list[tuple[int, int]], kind: str, expected: Share, places: int
) -> None:
    assert share(nodes(*sizes), kind) == expected
    assert sum(map(expected.times, nodes(*sizes))) == places


def test_a_cluster_without_a_cpu_is_refused() -> None:
    with pytest.raises(StudyError, match="no node of the Ray cluster has a CPU"):
        share(nodes((0, 0)), "cpu")


def test_the_kind_of_device_is_what_the_cluster_has() -> None:
    assert ray._device_kind("auto", nodes((8, 0), (8, 1))) == "cuda"
    assert ray._device_kind("auto", nodes((8, 0))) == "cpu"
    assert ray._device_kind("cpu", nodes((8, 1))) == "cpu"
    with pytest.raises(StudyError, match="no node of the Ray cluster has a GPU"):
        ray._device_kind("cuda", nodes((8, 0)))
    with pytest.raises(StudyError, match="Ray chooses the device"):
        ray._device_kind("cuda:1", nodes((8, 1)))


def test_wrong_launchers_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelSpec(id="embedded", device="cpu")
    with pytest.raises(StudyError, match="--launcher rai: unknown; did you mean ray"):
        make_launcher("rai", model)
    with pytest.raises(StudyError, match="--ray-address is given, but the launcher is local"):
        make_launcher("local", model, "auto")
    with pytest.raises(StudyError, match="Ray's client cannot stream"):
        make_launcher("ray", model, "ray://head:10001")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingExtraError, match=r"pip install .*\[ray\]'"):
        make_launcher("ray", model)


def test_a_node_without_rankscope_is_told_of() -> None:
    error = ray._cannot_work(RuntimeError("...\nModuleNotFoundError: No module named 'rankscope'"))
    assert type(error) is StudyError
    assert "on every node" in error.todo
    error = ray._cannot_work(RuntimeError("ray::_work()\nValueError: odd"))
    assert type(error) is WorkerError
    assert error.what == "a task on the Ray cluster failed: ValueError: odd"
