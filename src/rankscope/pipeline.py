"""The main path of a study: prepare, plan, train, measure, conclude.

Every step looks at the study's directory first and does only what is missing.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rankscope.data.tokens import save, sha256_of
from rankscope.errors import DataError, ModelError
from rankscope.files import exists, write_json
from rankscope.jobs import answers, packs, profiles, reference, rows, task
from rankscope.jobs.curve import take_curve
from rankscope.jobs.job import Kind, Launcher, Progress, Run, Say, Settings
from rankscope.jobs.queue import run_jobs
from rankscope.jobs.repair import remove_corrupt, remove_leftovers
from rankscope.measure.machine import Site, changes, describe_machine
from rankscope.plan.plan import Plan, make_plan, with_site_dtype
from rankscope.plan.runtime import Fleet
from rankscope.report.finish import Conclusion, finish, for_next_look
from rankscope.spec.models import StudySpec
from rankscope.spec.task import check_code
from rankscope.study.folder import CURVE
from rankscope.study.missing import unevaluated
from rankscope.study.study import Study
from rankscope.text.catalogue import Catalogue
from rankscope.text.catalogue import load as load_catalogue
from rankscope.text.coverage import coverage_sentences
from rankscope.track.tracker_process import run_trackers
from rankscope.train.prepare import describe_data, study_data

KINDS: tuple[Kind, ...] = (rows, packs, profiles, reference, task, answers)


def run_looks(spec: StudySpec, out: Path, launcher: Launcher, progress: Progress, how: Settings) -> Conclusion:
    """Run a study (`run_study`), and look at it: `until_settled`, the ranks in contention then get the seeds of the
    next planned look (`next_look` of verdict.json), until nothing is open or the last look was taken. Only the study's
    files say where it stands: a killed run is taken up by another."""
    text, conclusion = load_catalogue(how.language), run_study(spec, out, launcher, progress, how)
    while how.until_settled and (asked := for_next_look(conclusion)):
        look = conclusion.verdict["next_look"]
        ranks = text("name.ranks" if len(look["ranks"]) > 1 else "name.rank", rank=", ".join(map(str, look["ranks"])))
        progress.say(text("notice.look", ranks=ranks, seeds=look["seeds"]))
        conclusion = run_study(asked, out, launcher, progress, how._replace(remeasure=False))
    return conclusion


def run_study(spec: StudySpec, out: Path, launcher: Launcher, progress: Progress, how: Settings) -> Conclusion:
    """Run a study with the commits of its hub ids. A trial or profile that fails is recorded, not raised: see
    `rankscope.study.missing`. What `spec` adds to a study in `out` is written to its study.yaml once it is known that
    it can be trained here."""
    text = load_catalogue(how.language)  # an unknown language is refused now, not when all is trained
    with ExitStack() as resources:
        study, site = None, None
        if Study.is_at(out):
            resources.enter_context(_held(Study.open(out)))
            study, site = Study.create(out, spec), launcher.site()
            spec = study.spec
            _repair(study, how.remeasure, site, progress.say, text)
        check_code(spec.measure.task, how.allow_code)
        task.check(spec.measure.task)
        data, fleet, site = study_data(spec, study), Fleet(launcher.slots(), None), site or launcher.site()
        spec = spec if study else with_site_dtype(spec, site)
        plan = make_plan(spec, data, site, fleet, study, remeasure=how.remeasure, timed=how.limit is not None)
        plan.check(out)
        if study is None:  # nothing is written before the data, the model and the disk are known to do
            if how.approve:
                how.approve(plan)
            study = Study.create(out, spec)
            resources.enter_context(_held(study, is_new=True))
        study.publish()  # before the tokens change: the log has the hashes of those before and now
        _write_facts(study, plan, progress.say, text)
        scored = task.prepare(study, plan.data)
        if plan.packs or plan.reference or plan.profiles or unevaluated(study):
            study.publish(changes(study.machine, [entry.changed for entry in study.log], site))
        for sentence in _opening(study, plan, scored, text):
            progress.say(sentence)
        resources.enter_context(run_trackers(study, how.trackers, progress.say, how.language))
        run = Run(study, plan, progress.say, text)
        for kind in KINDS:
            run_jobs(launcher, study.path, kind.jobs(run), progress.poll, partial(kind.ended, run), how.limit)
        if plan.remeasure and not profiles.replace_profiles(study):
            progress.say(text("notice.not_remeasured"))
        progress.say(text("live.conclude"))
        progress.poll()
        return finish(study, how.language)


def _opening(study: Study, plan: Plan, scored: int | None, text: Catalogue) -> Iterator[str]:
    """What is trained on, and what the adapters reach; how many rows are `scored`, and which costs are not measured."""
    yield describe_data(plan.data.facts, text)
    if coverage := coverage_sentences(study.prediction.get("coverage"), study.spec.ranks, text):
        yield " ".join(coverage)
    if scored is not None:
        yield text("plan.task", task=study.spec.measure.task, rows=f"{scored:,}", all=f"{len(plan.data.eval):,}")
    if plan.unmeasured:
        yield text("plan.unmeasured", **plan.unmeasured)


def _repair(study: Study, remeasure: bool, site: Site, say: Say, text: Catalogue) -> None:
    """Remove temporary and corrupt files, which are made again; checkpoints stay, and training resumes from them."""
    remove_leftovers(study)
    for name in remove_corrupt(study):
        say(text("notice.damaged_curve" if name == CURVE else "notice.damaged", file=name))
    profiles.settle_profiles(study, remeasure, site)


def _write_facts(study: Study, plan: Plan, say: Say, text: Catalogue) -> None:
    """Write the tokens, the machine and the forecast, where the study lacks them.

    Tokens with more evaluation rows replace others, after all that was made from those and is not of one trial.
    """
    facts, data = study.file("data", "facts.json"), plan.data
    if not exists(facts) or study.data_facts["tokens_sha256"] != sha256_of(data):
        if any(entry.tokens_sha256 for entry in study.log):
            if exists(study.rank_curve_file):
                say(text("notice.curve_removed", file=CURVE))
            for name in ("curve", "answers", "task"):
                shutil.rmtree(study.file(name), ignore_errors=True)
            note = "evaluation rows were added: evaluations while earlier trials were trained are on fewer"
            data = replace(data, facts=data.facts | {"notes": [*data.facts.get("notes", []), note]})
        save(data, facts.parent)
    if not (study.path / "machine.json").exists():
        machine = describe_machine(study.spec, plan.prediction.base_params, plan.site)
        write_json(study.path / "machine.json", machine)
    known = study.prediction
    if any(candidate.name not in known.get("candidates", {}) for candidate in study.spec.candidates()):
        found = plan.forecast.describe(plan.prediction)
        candidates = found["candidates"] | known.get("candidates", {})  # those of the study stay as they were
        write_json(study.path / "prediction.json", found | known | {"candidates": candidates})


def measure_curve(
    study: Study,
    launcher: Launcher,
    progress: Progress,
    ranks: Sequence[int] | None = None,
    recover: int = 0,
    language: str = "en",
) -> Conclusion:
    """Measure what the study's curve lacks of these ranks (see `take_curve`), and conclude again."""
    text = load_catalogue(language)
    with study.lock():
        take_curve(study, launcher, progress, text, ranks, recover)
        return finish(study, language)


@contextmanager
def _held(study: Study, is_new: bool = False) -> Iterator[None]:
    """Hold the study's directory. Where the user ends the body, running trials are marked as interrupted; a new study
    that cannot begin, since its model or data are unusable and no step is trained, is removed."""
    with study.lock():
        try:
            yield
        except KeyboardInterrupt:
            now = Study.open(study.path)  # it may have grown
            for trial in now.all_trials():
                if now.trial_record(trial).status == "running":
                    now.mark_ended(trial, "interrupted", "interrupted by the user")
            raise
        except (ModelError, DataError):
            if is_new and not any(file.stat().st_size for file in study.path.glob("trials/*/metrics.jsonl")):
                shutil.rmtree(study.path)
            raise
