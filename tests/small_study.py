"""The study that several files share, and its options, to run it again on a copy."""

from pathlib import Path
from typing import Any

import rankscope
from rankscope.study.study import Study

OPTIONS: dict[str, Any] = {"ranks": [2, 8], "seeds": [0, 1], "steps": 5, "batch_size": 4, "learning_rates": [3e-2]}
SETS = (
    "measure.profiles=false", "measure.answers=2", "measure.answer_tokens=5", "data.eval_rows=12", "training.evals=1"
)  # fmt: skip


def run_small(root: Path, out: Path, **options: Any) -> Study:
    """Runs the study of the model and data in `root`; four trials in one pack, and two answers."""
    return rankscope.run(
        model=str(root / "model"), dataset=str(root / "data.json"), out=out, sets=SETS, **(OPTIONS | options)
    )
