"""The search for the best candidate within a budget, by Optuna: `pip install 'rankscope[search]'`.

space      what is searched, and within which budget
folder     the search's directory
sampling   Optuna asked for candidates, and told what became of them
driver     the loop: places in a pack, rungs, the budget
pack       candidates in one pack, each at a step of its own
job        the child process
run        the main path
show       progress and result, in words
"""

from importlib.util import find_spec

from rankscope.errors import MissingExtraError


def require_optuna() -> None:
    """Raises MissingExtraError where Optuna is not installed; the message has the command that installs it."""
    found = find_spec("optuna")
    if found is None or found.origin is None:
        raise MissingExtraError(
            "rankscope search: optuna is not installed", "Install it: pip install 'rankscope[search]'"
        )
