"""What NVIDIA's driver says of a GPU: memory as it sees it, and energy. Nothing of it without a driver."""

import os
from typing import Any

import pynvml
import torch


class Nvml:
    """One GPU, by NVML (https://docs.nvidia.com/deploy/nvml-api/)."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._used_at_start = self._device_used()

    def used_bytes(self) -> int:
        """GPU memory of this process, with the driver's own for it, which torch's allocator does not see.

        Where the driver does not give it (it knows no process of most containers), what the device uses more than
        when this object was made: then nothing else may run on it.
        """
        try:
            processes = pynvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except pynvml.NVMLError:  # under WSL, for one
            processes = []
        for process in processes:
            if process.pid == os.getpid() and process.usedGpuMemory is not None:
                return int(process.usedGpuMemory)
        return max(0, self._device_used() - self._used_at_start)

    def energy_joules(self) -> float | None:
        """Energy that the device has used since its driver was loaded; None where it does not count (before Volta)."""
        try:
            return float(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1000
        except pynvml.NVMLError:
            return None

    def _device_used(self) -> int:
        return int(pynvml.nvmlDeviceGetMemoryInfo(self._handle).used)


def open_nvml(device: torch.device) -> Nvml | None:
    """NVML's view of a torch device; None on a CPU, without the driver, and for what NVML does not know (MIG, AMD)."""
    if device.type != "cuda":
        return None
    try:
        pynvml.nvmlInit()
        # by id: CUDA_VISIBLE_DEVICES renumbers torch's devices, and not NVML's
        identity = torch.cuda.get_device_properties(device).uuid
        return Nvml(pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{identity}"))
    except pynvml.NVMLError:
        return None
