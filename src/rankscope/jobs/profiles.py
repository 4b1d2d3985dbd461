"""Profiles: the cost of each candidate, measured alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.errors import RankscopeError
from rankscope.jobs.child import open_study
from rankscope.jobs.job import Job, Run, failure_of, raise_fatal
from rankscope.spec.candidates import Trial
from rankscope.study.records import ProfileRecord


def jobs(run: Run) -> list[Job]:
    """Return a job for each repeat of a profile that is missing. Nothing else of the study runs beside one."""
    found = []
    for name, repeat in run.plan.profiles:
        trial = Trial(candidate=run.study.spec.profiled()[name], seed=run.study.spec.seeds[0])
        content = {"profile": name, "repeat": repeat}
        memory = run.plan.host_bytes([trial])
        found.append(Job(__name__, content, f"profiles/jobs/{name}", [f"profiles/{name}.json"], memory, alone=True))
    return found


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Measure one repeat of a candidate's profile, and add it to `profiles/NAME.json`."""
    from rankscope.measure.profile import profile_candidate

    study, data = open_study(study_path)
    name = content["profile"]
    candidate = study.spec.profiled()[name]
    repeats = [*study.profile_repeats(name), profile_candidate(study.spec, candidate, data)]
    record = ProfileRecord(profile=name, candidate=candidate.model_dump(mode="json"), repeats=repeats)
    record.write(study.profile_file(name))


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record a failure, which ends no study, and drop the other repeats of that profile."""
    raise_fatal(error)
    name = job.content["profile"]
    run.study.write_failure(name, None if error is None else failure_of(error))
    if error is None:
        return list(waiting)
    run.say(f"profile of {name} did not finish: {error}")
    return [other for other in waiting if other.content["profile"] != name]
