"""Profiles: the memory of each candidate, measured alone, and the time of all, measured side by side.

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
from rankscope.spec.candidates import CONTROL, TIME, Trial
from rankscope.study.folder import AGAIN, StudyFolder
from rankscope.study.missing import ProfileJob, missing_profiles, profile_seconds
from rankscope.study.records import BUSY_PRESSURE, MachineRecord, ProfileRecord
from rankscope.text.formats import percent

WHOLE = "profiles/whole"


def jobs(run: Run) -> list[Job]:
    """Return a job for each repeat of a profile that is missing. Nothing else of the study runs beside one. Candidates
    that do not fit into memory together are timed by several jobs, each beside the control."""
    study, plan, again = run.study, run.plan, run.plan.remeasure
    candidates, found = study.profiled(again), []
    if again:
        site = plan.site
        machine = study.machine | {"hardware": site.hardware, "versions": site.versions, "device": site.device}
        write_json(study.file(AGAIN, "machine.json"), machine)
    trials = {name: Trial(candidate=one, seed=study.spec.seeds[0]) for name, one in candidates.items()}
    forecasts = plan.forecast.candidates if plan.timed else {}
    steps = {name: forecasts[one.name].step_seconds or 0.0 for name, one in candidates.items() if forecasts}
    for name, members in plan.profiles:
        reads = [str(study.profile_file(name, again).relative_to(study.path))]
        for part in plan.fitting(trials, members) if members else [[]]:
            content = {"profile": name, "members": part, "again": again}
            memory = plan.host_bytes([trials[member] for member in part or [name]])
            seconds = profile_seconds(study.spec.measure, ProfileJob(name, tuple(part)), steps) if steps else 0.0
            found.append(Job(__name__, content, f"profiles/jobs/{name}", reads, memory, seconds, alone=True))
    return found


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Measure one repeat of a profile, and add it to its file."""
    from rankscope.measure.profile import profile_candidate
    from rankscope.measure.timing import time_candidates

    study, data = open_study(study_path)
    name, members, again = content["profile"], content["members"], content["again"]
    candidates = study.profiled(again)
    if members:
        timed = {member: candidates[member] for member in members}
        if not all(timed[member].packable == timed[members[-1]].packable for member in members):
            timed[CONTROL] = timed[members[-1]]  # PEFT's own forward is compared with itself
        candidate, repeat = None, time_candidates(study.spec, timed, data)
    else:
        candidate = candidates[name].model_dump(mode="json")
        repeat = profile_candidate(study.spec, candidates[name], data)
    record = ProfileRecord(profile=name, candidate=candidate, repeats=[*study.profile_repeats(name, again), repeat])
    record.write(study.profile_file(name, again))


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record a failure, which ends no study, and drop the other repeats of that profile."""
    raise_fatal(error)
    name = job.content["profile"]
    run.study.write_failure(name, None if error is None else failure_of(error))
    if error is None:
        busy = [one.get("cpu_pressure") or 0.0 for one in run.study.profile_repeats(name, run.plan.remeasure)[-1:]]
        if busy and busy[0] > BUSY_PRESSURE:
            run.say(run.text("noise.busy", share=percent(busy[0])))
        return list(waiting)
    run.say(run.text("notice.failed", what=run.text("notice.profile", name=name), error=error))
    return [other for other in waiting if other.content["profile"] != name]


def replace_profiles(study: StudyFolder) -> bool:
    """Replace the profiles by those that were measured again, if these have all that are whole; whether they have.
    machine.json comes with them: it is that of the costs."""
    again, whole = study.file(AGAIN), study.file(WHOLE)
    if exists(again):
        lacking, before = ({job.profile for job in missing_profiles(study.spec, study, x)} for x in (True, False))
        if lacking - before:
            return False
        for name in (*study.spec.profiled(), TIME):
            if not exists(study.profile_file(name, again=True)):
                study.profile_file(name).unlink(missing_ok=True)
        again.rename(whole)
    if exists(whole):
        for file in sorted(whole.glob("*.json"), key=lambda file: file.name == "machine.json"):
            file.replace(study.path / file.name if file.name == "machine.json" else whole.parent / file.name)
        shutil.rmtree(whole)
    return True


def settle_profiles(study: StudyFolder, remeasure: bool, site: Site) -> None:
    """Finish what a killed `--remeasure` left behind; what it has measured here stays for another one."""
    machine = study.file(AGAIN, "machine.json")
    known = exists(machine)
    if known and remeasure and not changes_of_costs(MachineRecord.content(machine), site):
        return
    if not known or not replace_profiles(study):
        shutil.rmtree(study.file(AGAIN), ignore_errors=True)
    replace_profiles(study)
