"""The beginning of a run: what needs no training is settled before anything that takes seconds is imported. A complete
study concludes; a model or data that cannot be used are refused."""

from pathlib import Path
from typing import TYPE_CHECKING

from rankscope.jobs.job import Progress, Settings
from rankscope.jobs.launchers import make_launcher
from rankscope.model.checks import check_inputs
from rankscope.spec.models import StudySpec
from rankscope.spec.task import check_code

if TYPE_CHECKING:
    from rankscope.report.finish import Conclusion
    from rankscope.study.study import Study


def run_in(
    path: Path,
    asked: StudySpec,
    begun: "Study | None",
    progress: Progress,
    how: Settings,
    launcher: str = "local",
    ray_address: str | None = None,
) -> "Conclusion":
    """Run what is `asked` in `path`, or what the study that has `begun` there lacks. A complete study concludes without
    imports that take seconds, such as torch. Raises as `run` does."""
    question = begun.spec if begun else asked
    if begun and not (how.remeasure or how.trackers):
        from rankscope.report.finish import finish_complete, for_next_look

        if conclusion := finish_complete(begun, how.language):
            look = for_next_look(conclusion) if how.until_settled else None
            if look is None:
                return conclusion
            question = look
    check_code(question.measure.task, how.allow_code)
    question = check_inputs(question, data=begun is None)
    from rankscope.pipeline import run_looks

    with make_launcher(launcher, question.model, ray_address, progress.say, how.language) as launching:
        return run_looks(question, path, launching, progress, how)
