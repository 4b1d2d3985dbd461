"""The search for the best candidate within a budget, by Optuna: `pip install 'rankscope[search]'`.

space      the space of candidates and the budget
folder     the search's directory
sampling   candidates drawn by Optuna, and their ends reported to it
driver     the loop: slots in a pack, rungs, the budget
trainer    candidates in one pack, each at a step of its own
job        the kind of job
run        the main path
"""

from importlib.util import find_spec

from rankscope.errors import MissingExtraError


def require_optuna() -> None:
    """Raise MissingExtraError where Optuna is not installed; the message has the command that installs it."""
    found = find_spec("optuna")
    if found is None or found.origin is None:
        raise MissingExtraError(
            "rankscope search: optuna is not installed", "Install it: pip install 'rankscope[search]'"
        )
