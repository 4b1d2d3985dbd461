"""NVML's view of a GPU, with a stand-in for the driver: no GPU is at hand where the tests run."""

import os
from types import SimpleNamespace

import pynvml
import pytest
import torch

from rankscope.measure.sampler import Nvml, open_nvml


class Driver:
    """Answers of a simulated driver."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.used = 1_000
        self.processes: list[SimpleNamespace] = []
        for name in ("nvmlDeviceGetMemoryInfo", "nvmlDeviceGetComputeRunningProcesses"):
            monkeypatch.setattr(pynvml, name, getattr(self, name))

    def nvmlDeviceGetMemoryInfo(self, handle: object) -> SimpleNamespace:
        return SimpleNamespace(used=self.used)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: object) -> list[SimpleNamespace]:
        return self.processes


def fail(*arguments: object) -> None:
    raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)


def test_the_memory_of_this_process_where_the_driver_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    nvml = Nvml(None)
    driver.used = 9_000
    driver.processes = [
        SimpleNamespace(pid=os.getpid() + 1, usedGpuMemory=6_000),
        SimpleNamespace(pid=os.getpid(), usedGpuMemory=2_000),
    ]
    assert nvml.used_bytes() == 2_000


def test_else_what_the_device_uses_more_than_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(monkeypatch)
    nvml = Nvml(None)
    driver.used = 4_500
    assert nvml.used_bytes() == 3_500, "no process is listed, as in a container"
    driver.processes = [SimpleNamespace(pid=os.getpid(), usedGpuMemory=None)]
    assert nvml.used_bytes() == 3_500, "listed without its memory, as on Windows"
    monkeypatch.setattr(pynvml, "nvmlDeviceGetComputeRunningProcesses", fail)
    assert nvml.used_bytes() == 3_500, "not supported, as under WSL"
    driver.used = 10
    assert nvml.used_bytes() == 0


def test_energy_is_in_joules_where_it_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", lambda handle: 12_500)  # mJ
    assert Nvml(None).energy_joules() == 12.5
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", fail)
    assert Nvml(None).energy_joules() is None


def test_without_a_gpu_or_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_nvml(torch.device("cpu")) is None
    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert open_nvml(torch.device("cuda")) is None


def test_a_device_is_found_by_its_id(monkeypatch: pytest.MonkeyPatch) -> None:
    Driver(monkeypatch)
    asked = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", asked.append)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="12-34"))
    assert open_nvml(torch.device("cuda:1")) is not None
    assert asked == ["GPU-12-34"]
