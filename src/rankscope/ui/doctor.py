"""Facts of the system for `rankscope doctor`: versions, devices, optional packages."""

import shutil
from typing import Any

from rich.console import Console

from rankscope.errors import install_command
from rankscope.measure.machine import hardware, installed, versions
from rankscope.text.formats import size
from rankscope.track import TRACKERS


def describe_system() -> dict[str, Any]:
    """Everything that `rankscope doctor --json` prints."""
    return {"versions": versions(), "hardware": hardware(), "optional": _optional()}


def show_system(console: Console) -> None:
    facts, free = hardware(), shutil.disk_usage(".").free
    gpus = [f"{gpu['name']}, {size(gpu['memory_bytes'])}" for gpu in facts["gpus"]]
    lines = [(name, version or "not installed") for name, version in versions().items()]
    lines += [("cpu", f"{facts['cpu']}, {facts['cores']} cores, {size(facts['memory_bytes'])}")]
    lines += [("gpu", gpu) for gpu in gpus or ["none that torch can use: studies run on the CPU"]]
    for name, version in _optional().items():
        lines += [(name, version or f"not installed (optional: {install_command(name)})")]
    for name, text in [*lines, ("disk", f"{size(free)} free here")]:
        console.print(f"{name:<14} {text}")


def _optional() -> dict[str, str | None]:
    """Versions of optional packages by the names of their extras; None for those that are not installed."""
    extras = {name: installed(name) for name in TRACKERS}
    return extras | {"search": installed("optuna"), "ray": installed("ray"), "quantization": installed("bitsandbytes")}
