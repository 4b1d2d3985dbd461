"""rankscope: which LoRA rank should I use, and what does it cost me?

study = rankscope.run(model="facebook/opt-350m", dataset="code.jsonl", ranks=[8, 64])
study.verdict, study.results(), study.curves()
rankscope.open("opt-350m-code")
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankscope.pipeline import run
    from rankscope.study.study import Study

    open = Study.open

__all__ = ["Study", "open", "run"]
__version__ = "0.2.0"


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: torch takes seconds, `import rankscope` should not."""
    if name == "run":
        from rankscope.pipeline import run

        return run
    if name in ("Study", "open"):
        from rankscope.study.study import Study

        return Study if name == "Study" else Study.open
    raise AttributeError(f"module 'rankscope' has no attribute {name!r}")
