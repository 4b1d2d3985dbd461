"""Train once, read every rank: the largest rank's adapters, truncated by SVD to each lower one and evaluated."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rankscope.analysis.comparison import judged_examples
from rankscope.errors import DamagedError, RankscopeError, StudyError
from rankscope.jobs.child import load_base, open_study
from rankscope.jobs.job import Job, Launcher, Progress, Say
from rankscope.jobs.queue import run_jobs
from rankscope.spec.candidates import PLAIN, Trial
from rankscope.study.folder import CURVE, StudyFolder
from rankscope.study.records import CurveRecord, Cut
from rankscope.study.study import Study
from rankscope.text.catalogue import Catalogue

MOST_RECOVERY_STEPS = 100_000
"""Most steps of recovery training: more is no short recovery, and would not fit the study's own schedule."""

PART = "truncations.json"
"""File of a job's folder with the truncations that it has measured so far, until curve.json has them."""


def take_curve(
    study: Study, launcher: Launcher, progress: Progress, text: Catalogue, ranks: Sequence[int] | None, recover: int
) -> None:
    """Measure the truncations of these `ranks` that curve.json lacks; `study.cuts()` has the result.

    Without `ranks`: the powers of two below the largest rank, and the study's own. With `recover` each truncation is
    measured once more after so many steps of training. The full adapters are measured too, as the control. The study
    must be locked. Raises StudyError: no trial of the largest rank is done, or a rank is not below it;
    StudyDirectoryError: an adapter of the study is corrupt; ModelError: the model is another, or gives the full adapter
    another loss than was recorded; WorkerError: a child process ended without finishing.
    """
    if not 0 <= recover <= MOST_RECOVERY_STEPS:
        raise StudyError(f"--recover {recover}: expected 0 to {MOST_RECOVERY_STEPS:,} steps", "Give a few: 8.")
    trials = trained_trials(study)
    full = trials[0].candidate.rank
    lower = lower_ranks(full, study.spec.ranks) if ranks is None else validate_ranks(ranks, full)
    wanted = missing(study, trials, [*lower, full], recover, progress.say, text)
    if not wanted:
        return
    counts = {"seeds": text.count("seeds", len(trials)), "losses": text.count("losses", sum(map(len, wanted.values())))}
    sentence = text("notice.curve", rank=full, n=len(wanted), **counts)
    steps = text.count("training_steps", recover)
    progress.say(text("notice.recover", sentence=sentence, steps=steps) if recover else sentence)
    run_jobs(launcher, study.path, jobs(study, wanted, launcher.slots()), progress.poll, partial(ended, study))


def jobs(study: StudyFolder, wanted: Mapping[str, Sequence[tuple[int, int]]], slots: int) -> list[Job]:
    """Return the jobs that measure the wanted pairs of rank and recovery steps of each trial. On one device one job
    measures all of them, and loads the model once; on several each trial is a job."""
    groups = {f"curve/jobs/{name}": {name: pairs} for name, pairs in wanted.items()}
    if slots == 1 and wanted:
        groups = {"curve": dict(wanted)}
    return [
        Job(__name__, {"folder": folder, "wanted": group}, folder, [f"trials/{name}" for name in group])
        for folder, group in groups.items()
    ]


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Measure the wanted truncations of each trial; the job's part of the curve grows piece by piece."""
    from rankscope.measure.truncation import evaluate_truncations

    study, data = open_study(study_path)
    model, _ = load_base(study)
    part, found = study.file(content["folder"], PART), list[Cut]()
    trials = {trial.name: trial for trial in study.spec.trials()}
    for name, pairs in content["wanted"].items():
        trial, results = trials[name], study.trial_record(trials[name]).results
        folder = study.adapter_file(trial).parent
        assert results
        assert results.eval_loss is not None
        wanted, sha256 = [(rank, steps) for rank, steps in pairs], study.adapter_sha256(trial)
        for cuts in evaluate_truncations(model, study.spec, trial, folder, results.eval_loss, wanted, data, sha256):
            found += cuts
            CurveRecord(cuts=found).write(part)


def ended(study: StudyFolder, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    _take_part(study, study.file(job.folder, PART))
    if error is not None:
        raise error
    return list(waiting)


def _take_part(study: StudyFolder, part: Path) -> None:
    if (record := CurveRecord.find(part)) is not None:
        study.add_cuts(record.cuts)
        part.unlink()


def trained_trials(study: Study) -> list[Trial]:
    """Return the trials of the largest rank that are done, at the learning rate that the verdict takes. Raises
    StudyError: there are none."""
    rank, examples = max(study.spec.ranks), study.examples()
    judged = judged_examples(examples[examples["variant"] == PLAIN], study.results())
    names = set(judged.loc[judged["rank"] == rank, "candidate"])
    trials = [trial for trial in study.spec.trials() if trial.candidate.name in names]
    done = [trial for trial in trials if study.trial_record(trial).status == "done"]
    if not done:
        what = f"{study.path}: no trial of rank {rank}, the study's largest, is done without a seed that diverged"
        raise StudyError(what, "Run the study to its end first: lower ranks are cut from the largest.")
    return done


def lower_ranks(rank: int, own: Sequence[int]) -> list[int]:
    """Return the powers of two below `rank`, and the ranks of `own` that are below it. Raises StudyError: there are
    none."""
    powers = [1 << bits for bits in range(rank.bit_length()) if 1 << bits < rank]
    if not powers:
        raise StudyError(f"rank {rank} has no lower rank to be cut to", "Train a larger one.")
    return sorted({*powers, *(one for one in own if one < rank)})


def validate_ranks(ranks: Sequence[int | str], full: int) -> list[int]:
    """Return the ranks, which may be text, in order. Raise StudyError where one is not from 1 to below `full`."""
    wrong = [rank for rank in ranks if not str(rank).isdecimal() or not 1 <= int(rank) < full]
    if wrong or not ranks:
        shown = ", ".join(map(str, wrong)) or "none"
        raise StudyError(f"--ranks {shown}: expected ranks from 1 to {full - 1}", f"Rank {full} is cut to them.")
    return sorted({int(rank) for rank in ranks})


def missing(
    study: StudyFolder, trials: Sequence[Trial], ranks: Sequence[int], recover: int, say: Say, text: Catalogue
) -> dict[str, list[tuple[int, int]]]:
    """Return, by trial, the pairs of rank and recovery steps that curve.json lacks. Parts that an interrupted run left
    behind are moved into curve.json first. Corrupt files are removed."""
    try:
        study.rank_curve()
    except DamagedError:
        study.rank_curve_file.unlink()
        say(text("notice.damaged", file=CURVE))
    for part in sorted(study.file("curve").rglob(PART)):
        try:
            _take_part(study, part)
        except DamagedError:
            part.unlink()
    measured = {(cut.trial, cut.rank, cut.recover_steps) for cut in study.rank_curve()}
    pairs = [(rank, steps) for steps in sorted({0, recover}) for rank in ranks]
    wanted = {trial.name: [pair for pair in pairs if (trial.name, *pair) not in measured] for trial in trials}
    return {name: left for name, left in wanted.items() if left}
