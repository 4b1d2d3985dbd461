"""The search for the best candidate within a budget, by Optuna: `pip install 'rankscope[search]'`."""

from importlib.util import find_spec

from rankscope.errors import MissingExtraError


def require_optuna() -> None:
    """Raise MissingExtraError where Optuna is not installed; the message has the command that installs it."""
    found = find_spec("optuna")
    if found is None or found.origin is None:
        what = "rankscope search: optuna is not installed"
        raise MissingExtraError(what, "Install it: pip install 'rankscope[search]'")
