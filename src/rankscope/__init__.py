"""rankscope: which LoRA rank should I use, and what does it cost me?

study = rankscope.run(model="facebook/opt-350m", dataset="code.jsonl", ranks=[8, 64])
print(study.sentence()); study.best, study.adapter(8), study.results(), study.conclude(margin="2%")
rankscope.open("opt-350m-code")
"""

import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankscope.api import Study, run

    open = Study.open

__all__ = ["Study", "open", "run"]
__version__ = "0.2.0"

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on some CPUs it warns whenever PEFT is imported


def __getattr__(name: str) -> Any:
    """Imports what is asked for when it is asked for: pandas takes its time, `import rankscope` should not."""
    if name not in __all__:
        raise AttributeError(f"module 'rankscope' has no attribute {name!r}")
    from rankscope.errors import check_system

    check_system()
    from rankscope.api import Study, run

    return {"Study": Study, "open": Study.open, "run": run}[name]
