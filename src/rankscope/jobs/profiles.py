"""Profiles: the cost of each candidate, measured alone.

`run --remeasure` measures all of them anew in profiles/again, beside the machine.json of the machine that it runs on.
When they are whole, that folder becomes profiles/whole, and its files replace those of the study: a kill in between
leaves files that the next run moves.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankscope.errors import RankscopeError
from rankscope.files import exists, write_json
from rankscope.jobs.child import open_study
from rankscope.jobs.job import Job, Run, failure_of, raise_fatal
from rankscope.measure.machine import Site, changes_of_costs
from rankscope.spec.candidates import Trial
from rankscope.study.folder import AGAIN, StudyFolder
from rankscope.study.records import MachineRecord, ProfileRecord

WHOLE = "profiles/whole"


def jobs(run: Run) -> list[Job]:
    """Return a job for each repeat of a profile that is missing. Nothing else of the study runs beside one."""
    study, again = run.study, run.plan.remeasure
    candidates, found = study.profiled(again), []
    if again:
        site = run.plan.site
        machine = study.machine | {"hardware": site.hardware, "versions": site.versions, "device": site.device}
        write_json(study.file(AGAIN, "machine.json"), machine)
    for name, repeat, session in run.plan.profiles:
        trial = Trial(candidate=candidates[name], seed=study.spec.seeds[0])
        content = {"profile": name, "repeat": repeat, "session": session, "again": again}
        reads = [str(study.profile_file(name, again).relative_to(study.path))]
        memory = run.plan.host_bytes([trial])
        found.append(Job(__name__, content, f"profiles/jobs/{name}", reads, memory, alone=True))
    return found


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Measure one repeat of a candidate's profile, and add it to its file."""
    from rankscope.measure.profile import profile_candidate

    study, data = open_study(study_path)
    name, again = content["profile"], content.get("again", False)
    candidate = study.profiled(again)[name]
    repeat = profile_candidate(study.spec, candidate, data) | {"session": content.get("session", 0)}
    repeats = [*study.profile_repeats(name, again), repeat]
    record = ProfileRecord(profile=name, candidate=candidate.model_dump(mode="json"), repeats=repeats)
    record.write(study.profile_file(name, again))


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record a failure, which ends no study, and drop the other repeats of that profile."""
    raise_fatal(error)
    name = job.content["profile"]
    run.study.write_failure(name, None if error is None else failure_of(error))
    if error is None:
        return list(waiting)
    run.say(f"profile of {name} did not finish: {error}")
    return [other for other in waiting if other.content["profile"] != name]


def replace_profiles(study: StudyFolder) -> bool:
    """Replace the profiles by those that were measured again, if these have all that are whole; whether they have.
    machine.json comes with them: it is that of the costs."""
    again, whole = study.file(AGAIN), study.file(WHOLE)
    if exists(again):
        names = study.spec.profiled()
        if any(_is_whole(study, name) and not _is_whole(study, name, again=True) for name in names):
            return False
        for name in names:
            if not exists(study.profile_file(name, again=True)):
                study.profile_file(name).unlink(missing_ok=True)
        again.rename(whole)
    if exists(whole):
        for file in sorted(whole.glob("*.json"), key=lambda file: file.name == "machine.json"):
            file.replace(study.path / file.name if file.name == "machine.json" else whole.parent / file.name)
        shutil.rmtree(whole)
    return True


def _is_whole(study: StudyFolder, name: str, again: bool = False) -> bool:
    return len(study.profile_repeats(name, again)) >= study.spec.measure.repeats


def settle_profiles(study: StudyFolder, remeasure: bool, site: Site) -> None:
    """Finish what a killed `--remeasure` left behind; what it has measured here stays for another one."""
    machine = study.file(AGAIN, "machine.json")
    known = exists(machine)
    if known and remeasure and not changes_of_costs(MachineRecord.content(machine), site):
        return
    if not known or not replace_profiles(study):
        shutil.rmtree(study.file(AGAIN), ignore_errors=True)
    replace_profiles(study)
