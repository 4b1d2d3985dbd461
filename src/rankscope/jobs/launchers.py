"""Launchers by name."""

from rankscope.errors import StudyError, did_you_mean, require
from rankscope.jobs.job import Launcher, Say
from rankscope.spec.models import ModelSpec
from rankscope.text.catalogue import load

LAUNCHERS = ("local", "ray")


def check_launcher(name: str, address: str | None) -> None:
    """Raise as `make_launcher` does for a name or an address, without importing anything."""
    if name not in LAUNCHERS:
        what = f"--launcher {name}: unknown{did_you_mean(name, LAUNCHERS)}"
        raise StudyError(what, f"Known: {', '.join(LAUNCHERS)}.")
    if name == "local" and address is not None:
        raise StudyError("--ray-address is given, but the launcher is local", "Add --launcher ray.")
    if name == "ray":
        require("ray", "ray", "--launcher ray")


def make_launcher(
    name: str, model: ModelSpec, address: str | None = None, say: Say = print, language: str = "en"
) -> Launcher:
    """Create the launcher of that name, for a study's model. `address` is that of a Ray cluster; `say` is called with
    what a user should know, in `language`. Raises StudyError: the name is unknown, or the device does not exist;
    MissingExtraError: Ray is not installed."""
    check_launcher(name, address)
    if name == "ray":
        from rankscope.jobs.ray import RayLauncher

        return RayLauncher(model, address, say, load(language))
    from rankscope.jobs.local import LocalLauncher

    return LocalLauncher(model)
