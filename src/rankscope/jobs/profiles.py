"""Profiles: the cost of each candidate, measured alone."""

from typing import TYPE_CHECKING

from rankscope.jobs.context import WRONG, Place, Progress, failure_of, run_alone
from rankscope.spec.candidates import Trial
from rankscope.study.folder import StudyFolder
from rankscope.study.missing import missing_profiles

if TYPE_CHECKING:
    pass


def measure(study: StudyFolder, place: Place, progress: Progress) -> None:
    """Measures the profiles that are missing, each repeat in a process of its own, one after the other, while nothing
    else of the study runs; one that fails ends no study."""
    failed: set[str] = set()
    for name, repeat in missing_profiles(study):
        if name in failed:
            continue
        content = {"kind": "profile", "profile": name, "repeat": repeat}
        trial = Trial(candidate=study.spec.profiled()[name], seed=study.spec.seeds[0])
        error = run_alone(study, place, content, f"profiles/jobs/{name}", [f"profiles/{name}.json"], [trial], progress)
        if error is not None and error.exit_code in WRONG:
            raise error
        study.write_failure(name, None if error is None else failure_of(error))
        if error is not None:
            failed.add(name)
            progress.say(f"profile of {name} did not finish: {error}")
