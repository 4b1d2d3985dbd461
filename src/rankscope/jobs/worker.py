"""What a child process does: packs one after the other, a trial of full fine-tuning, one repeat of one profile, the
candidates' answers, or the losses of cut adapters.

    python -m rankscope.jobs.worker STUDY_DIRECTORY JOB_FILE

A failure is recorded in error.json beside the job's file, for the process that started this one.
"""

import faulthandler
import logging
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankscope.errors import StudyDirectoryError
from rankscope.files import read_json, write_json
from rankscope.jobs.child import end_with_parent, known_error, load_base
from rankscope.jobs.curve import cut_adapters
from rankscope.jobs.packs import train_packs
from rankscope.study.folder import StudyFolder
from rankscope.study.records import AnswersRecord, ProfileRecord

if TYPE_CHECKING:
    pass


def run_job(study: StudyFolder, job: dict[str, Any]) -> None:
    """Runs one job of the study in this process."""
    from rankscope.data.tokens import load

    data = load(study.path / "data")
    if job["kind"] == "packs":
        train_packs(study, job["packs"], data)
    elif job["kind"] == "reference":
        from rankscope.jobs.reference import train_full
        from rankscope.train.stopping import StopRequest

        (trial,) = [trial for trial in study.spec.reference_trials() if trial.name == job["trial"]]
        with StopRequest() as stop:
            train_full(study.spec, trial, study.trial_folder(trial), data, stop)
    elif job["kind"] == "answers":
        from rankscope.jobs.answers import answer

        model, _ = load_base(study)
        adapters = {trial: study.adapter_file(trial) for trial in study.answered()}
        record = AnswersRecord(**answer(model, study.spec, adapters, data.eval))
        record.write(study.file("answers", "answers.json"))
    elif job["kind"] == "curve":
        cut_adapters(study, job["wanted"], data)
    else:
        from rankscope.measure.profile import profile_candidate

        name, candidate = job["profile"], study.spec.profiled()[job["profile"]]
        repeats = [*study.profile_repeats(name), profile_candidate(study.spec, candidate, data)]
        profile = ProfileRecord(profile=name, candidate=candidate.model_dump(mode="json"), repeats=repeats)
        profile.write(study.profile_file(name))


def main(study_path: str, job_file: str) -> int:
    """Returns the exit code: 0, or the one that the error asks for."""
    faulthandler.enable()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s")
    job = read_json(Path(job_file))
    try:
        if job["kind"] == "search":
            from rankscope.search.job import run_search

            run_search(Path(study_path), job["places"])
        else:
            run_job(StudyFolder.open(study_path), job)
    except Exception as error:
        with suppress(OSError):  # the log is on the same disk, which may be full
            traceback.print_exc()
        known = known_error(error)
        report = {"kind": type(known).__name__, "what": known.what, "todo": known.todo}
        with suppress(StudyDirectoryError):  # on a full disk the exit code has to do
            write_json(Path(job_file).with_name("error.json"), report)
        return known.exit_code
    return 0


if __name__ == "__main__":
    end_with_parent()
    sys.exit(main(*sys.argv[1:]))
