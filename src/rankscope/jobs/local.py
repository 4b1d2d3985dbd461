"""Jobs as child processes on this machine: a fresh process for each job, one at a time on each visible GPU."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import torch

from rankscope.jobs.job import Job
from rankscope.jobs.process import JobProcess
from rankscope.measure.cores import threads
from rankscope.measure.machine import Site, hardware, versions
from rankscope.model.device import free_bytes, resolve_device
from rankscope.model.load import resolve_dtype
from rankscope.spec.models import ModelSpec

VISIBLE = "CUDA_VISIBLE_DEVICES"


class LocalLauncher:
    """Local child processes. With `model.device` `auto` or `cuda` each visible GPU is a slot; with `cuda:1` that GPU
    alone is one, and on a CPU the machine. Raises StudyError: the device does not exist here."""

    def __init__(self, model: ModelSpec) -> None:
        self._model, self._device = model, resolve_device(model.device)
        self._devices, self._slots = [self._device], list[Mapping[str, str]]([{}])
        if self._device.type == "cuda" and ":" not in model.device and torch.cuda.device_count() > 1:
            self._devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
            self._slots = gpu_environments(len(self._devices), os.environ)
        self._jobs: dict[int, JobProcess] = {}  # the last job of each slot

    def site(self) -> Site:
        dtype = str(resolve_dtype(self._model, self._device)).removeprefix("torch.")
        free = min(map(free_bytes, self._devices))
        return Site(self._device.type, True, free, str(self._device), dtype, hardware(), versions())

    def slots(self) -> int:
        return len(self._slots)

    def start(self, study: Path, job: Job) -> JobProcess:
        busy = {slot for slot, process in self._jobs.items() if process.is_running()}
        slot = min(set(range(len(self._slots))) - busy)
        self._jobs[slot] = JobProcess(study, job, self._slots[slot])
        return self._jobs[slot]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


def gpu_environments(count: int, environment: Mapping[str, str]) -> list[Mapping[str, str]]:
    """Environment of the process on each of `count` visible GPUs: that GPU alone, and its share of the cores."""
    visible = environment.get(VISIBLE)
    names = visible.split(",")[:count] if visible else list(map(str, range(count)))
    share = environment.get("OMP_NUM_THREADS", str(max(1, threads() // count)))
    return [{VISIBLE: name, "OMP_NUM_THREADS": share} for name in names]
