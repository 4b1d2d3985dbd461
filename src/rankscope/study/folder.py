"""A study's directory: its files, each with one writer.

NAME/
  study.yaml                  the question, resolved and complete, and a log of what was added to it
  machine.json                hardware, versions, model (its fingerprint is in trial.json, the data's in facts.json)
  data/                       tokens.safetensors, facts.json (what every trial reads)
  prediction.json             memory and time of each candidate, predicted before anything was trained
  trials/r008-lr2e-4-s0/      trial.json, metrics.jsonl, untrained.json, eval.json, adapter/; task.json: its scores
  reference/full-lr2e-5-s0/   full fine-tuning: the same files without weights, and job.json, log.txt
  retrained/TRIAL/            a trial that `export --retrain` has trained on all rows: the same files
  packs/division.json         which trials train together
  packs/p000/                 pack.json, job.json, log.txt; checkpoints/ until it has ended
  profiles/r008.json          memory of each repeat of a rank's profile, with samples
  profiles/control.json       second profile of the lowest rank: the noise of every cost
  profiles/time.json          time of all of them, side by side
  profiles/again/             the same files while `run --remeasure` measures all costs anew
  rows/                       job.json, log.txt of evaluations on evaluation rows that were added
  failures.json               profiles and answers that did not finish when they were last tried, and why
  answers/                    answers.json: answers of the base and each candidate to the same held-out prompts
  task/                       base.json: scores of the model without an adapter; choices.json, job.json, log.txt
  curve/                      curve.json: held-out losses of the largest rank's adapters, truncated to lower ranks
  tracking/                   records of what trackers have been sent
  verdict.json
  report/                     index.html, report.md, results.csv, results.parquet, figures/; made-of.json
"""

import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

from rankscope import __version__, files
from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.spec.candidates import CONTROL, TIME, AnyTrial, Candidate, FullTrial, Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import LOG, resolve_spec, write_yaml
from rankscope.study import records
from rankscope.study.growth import grow
from rankscope.study.metrics import read_rows
from rankscope.study.question import Holder, lock_folder, read_question, write_question

FINISHED = ("done", "diverged")  # statuses that are results: a trial with any other is trained again
NOT_ENDED = ("pending", "running")

TRIAL_FILES = ("metrics.jsonl", "untrained.json", "eval.json", "adapter/*")  # with a hash in trial.json at its end
ADAPTER = "adapter/adapter_model.safetensors"
CURVE = "curve/curve.json"
OF_HELD_OUT = ("untrained.json", "eval.json")  # files of a trial with its losses on held-out rows
ANSWERS = "answers"  # key of the answers in failures.json
TASK = "task"  # key of the scores on a task in failures.json
AGAIN = "profiles/again"  # profiles of `run --remeasure`, until all are measured


class Division(NamedTuple):
    """Division of a study's trials into packs, kept for good so that a resumed run rounds as it did before."""

    packs: dict[str, list[Trial]]  # in the order of training
    divided: dict[str, list[str]]  # parts of each pack that ended with an error, and so left `packs`

    def trials(self) -> set[str]:
        return {trial.name for trials in self.packs.values() for trial in trials}

    def named(self, trials: Sequence[Sequence[Trial]]) -> dict[str, list[Trial]]:
        """Name new packs; a name is never used twice."""
        first = len(self.packs) + len(self.divided)
        return {f"p{number:03d}": list(pack) for number, pack in enumerate(trials, start=first)}


class StudyFolder:
    """A study's directory: its question, its files, and the lock. Opening reads nothing but study.yaml."""

    def __init__(self, path: Path, spec: StudySpec, log: Sequence[records.LogEntry] = ()) -> None:
        self.path, self.spec, self.log = path, spec, list(log)

    @classmethod
    def create(cls, path: Path, spec: StudySpec) -> Self:
        """Make the directory; or open the study that it holds, grown by what `spec` adds. Raises StudyError: it holds
        another study; the message shows the difference."""
        if begun := cls.begun_at(path, spec):
            return begun
        write_question(path / "study.yaml", write_yaml(spec))
        return cls(path, spec)

    @classmethod
    def begun_at(cls, path: Path, asked: StudySpec) -> Self | None:
        """The study in `path`, grown by what `asked` adds; None where one may begin there. Raises as `create`."""
        if not cls.is_at(path):
            if not files.is_free(path):
                raise StudyError(f"{path} exists and is not a study", "Choose another --out.")
            return None
        return cls.open(path).grown(asked)

    @staticmethod
    def is_at(path: Path) -> bool:
        with files.reading(path):
            return (path / "study.yaml").is_file()

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Open an existing study. Raises StudyDirectoryError: `path` holds no study, or a symbolic link leads out of
        it; StudyError: its study.yaml is corrupt."""
        path = Path(path)
        if not cls.is_at(path):
            raise StudyDirectoryError(f"{path}: not a study (no study.yaml)", "Give the directory that `run` printed.")
        files.refuse_links_out(path)
        return cls(path, *_read(path / "study.yaml"))

    @classmethod
    def of(cls, folder: "StudyFolder", spec: StudySpec | None = None) -> Self:
        """The study of `folder` as this class, or with `spec` in place of its question; study.yaml stays as it is."""
        return cls(folder.path, spec or folder.spec, folder.log)

    def grown(self, asked: StudySpec) -> Self:
        """The study with what `asked` adds, which `publish` writes: see `rankscope.study.growth`. Raises StudyError:
        `asked` is another study."""
        spec, added = grow(self.spec, asked, self.path)
        return type(self)(self.path, spec, [*self.log, *([_entry(added=added)] if added else [])])

    def publish(self, changed: dict[str, dict[str, list[Any]]] | None = None) -> None:
        """Write the question and the log to study.yaml where it has others; `changed` is of the machine."""
        if changed:
            self.log.append(_entry(changed=changed))
        if self.has_changed():
            log = [entry.model_dump(exclude_unset=True) for entry in self.log]
            write_question(self.path / "study.yaml", write_yaml(self.spec, log))

    def has_changed(self) -> bool:
        """Whether study.yaml has another question or log than this object."""
        return _read(self.path / "study.yaml") != (self.spec, self.log)

    def file(self, *parts: str) -> Path:
        """A file or folder of the study: see `rankscope.files.inside`."""
        return files.inside(self.path, *parts)

    @cached_property
    def trials(self) -> list[Trial]:
        return self.spec.trials()

    @cached_property
    def reference_trials(self) -> list[FullTrial]:
        return self.spec.reference_trials()

    def all_trials(self) -> list[AnyTrial]:
        """Candidate trials followed by reference trials."""
        return [*self.trials, *self.reference_trials]

    def trial_folder(self, trial: AnyTrial) -> Path:
        return self.file("trials" if isinstance(trial, Trial) else "reference", trial.name)

    def profiled(self, again: bool = False) -> dict[str, Candidate]:
        """`StudySpec.profiled`, with the control that control.json has: it stays when a lower rank is added. With
        `again` those that are being measured anew, as in the two functions below."""
        found = self.spec.profiled()
        record = records.ProfileRecord.find(self.profile_file(CONTROL, again))
        if record is not None and record.candidate is not None:
            with files.corrupt_on_error(self.profile_file(CONTROL, again)):
                control = Candidate.model_validate(record.candidate)
            found |= {CONTROL: control} if control in self.spec.candidates() else {}
        return found

    def profile_file(self, name: str, again: bool = False) -> Path:
        return self.file(AGAIN if again else "profiles", f"{name}.json")

    def profile_repeats(self, name: str, again: bool = False) -> list[dict[str, Any]]:
        """Repeats measured so far (`rankscope.measure.profile.profile_candidate`); those of `TIME` are
        `rankscope.measure.timing.time_candidates`."""
        record = records.ProfileRecord.find(self.profile_file(name, again))
        return record.repeats if record else []

    def whole_repeats(self, name: str, again: bool = False) -> list[dict[str, Any]]:
        """`profile_repeats`, checked to be complete. Raises DamagedError: a repeat is incomplete."""
        repeats = self.profile_repeats(name, again)
        kind = records.TimeRepeat if name == TIME else records.Repeat
        for repeat in repeats:
            kind.of(repeat, self.profile_file(name, again))
        return repeats

    def failures(self) -> dict[str, records.Failure]:
        """failures.json: how unfinished profiles, by name, and `answers` ended when a run last tried them."""
        record = records.FailuresRecord.find(self.file("failures.json"))
        return record.failures if record else {}

    def write_failure(self, name: str, failure: records.Failure | None) -> None:
        """Record how a profile, or the answers, ended; None where they are whole."""
        before = self.failures()
        after = {one: known for one, known in {**before, name: failure}.items() if known is not None}
        if after != before:
            records.FailuresRecord(failures=after).write(self.file("failures.json"))

    def trial_record(self, trial: AnyTrial) -> records.TrialRecord:
        """trial.json; its status is `pending` before the trial has begun. Without results, and as `interrupted`, where
        these are on fewer evaluation rows than the study has by now."""
        record = self.saved_record(trial)
        if record.status not in FINISHED or not self.is_stale(record):
            return record
        kept = {name: sha256 for name, sha256 in (record.files or {}).items() if name not in OF_HELD_OUT}
        reason = "not yet evaluated on the rows that were added"
        return record.model_copy(update={"status": "interrupted", "reason": reason, "results": None, "files": kept})

    def saved_record(self, trial: AnyTrial) -> records.TrialRecord:
        """trial.json as it is on the disk, or a record that is `pending`."""
        file = self.trial_folder(trial) / "trial.json"
        return records.TrialRecord.find(file) or records.TrialRecord(status="pending")

    def is_stale(self, record: records.TrialRecord) -> bool:
        """Whether evaluation rows were added since the trial began, or was last evaluated."""
        return record.tokens_sha256 in {entry.tokens_sha256[0] for entry in self.log if entry.tokens_sha256}

    def with_known_model(self) -> Trial | None:
        """First trial that has begun; its record has the fingerprint of the study's model."""
        return next((trial for trial in self.trials if self.trial_record(trial).model_sha256 is not None), None)

    def division(self) -> Division:
        """Division of the trials into packs; empty before it is made."""
        file = self.file("packs", "division.json")
        record = records.DivisionRecord.find(file)
        if record is None:
            return Division({}, {})
        for pack in record.packs:
            self.file("packs", pack)  # refused where it leads elsewhere: folders of that name are written and removed
        trials = {trial.name: trial for trial in self.trials}
        with files.corrupt_on_error(file):
            packs = {pack: [trials[name] for name in names] for pack, names in record.packs.items()}
        return Division(packs, record.divided)

    def write_division(self, division: Division) -> None:
        packs = {pack: [trial.name for trial in trials] for pack, trials in division.packs.items()}
        records.DivisionRecord(packs=packs, divided=division.divided).write(self.file("packs", "division.json"))

    def divide(self, pack: str, trials: Sequence[Trial]) -> dict[str, list[Trial]]:
        """Divide the `trials` of a pack into two packs, remove its checkpoints, and return the two."""
        division, half = self.division(), (len(trials) + 1) // 2
        parts = division.named([trials[:half], trials[half:]])
        packs: dict[str, list[Trial]] = {}
        for name, members in division.packs.items():
            packs |= parts if name == pack else {name: members}
        self.write_division(Division(packs, division.divided | {pack: list(parts)}))
        shutil.rmtree(self.file("packs", pack, "checkpoints"), ignore_errors=True)
        return parts

    def pack_record(self, pack: str) -> records.PackRecord | None:
        """pack.json; None before the pack has begun."""
        return records.PackRecord.find(self.file("packs", pack, "pack.json"))

    def lock(self) -> AbstractContextManager[None]:
        return lock_folder(self.path)

    def holder(self) -> Holder | None:
        """Process that runs the study now, or None."""
        file = self.file(".lock-holder")
        found = re.fullmatch(r"process (\d+) on (.*)", files.text_or_empty(file))
        if not found:
            return None
        holder = Holder(int(found[1]), found[2])
        # A killed run leaves the file behind, and another process may have its number by now.
        return holder if not holder.is_here or holder.began() <= file.stat().st_mtime else None

    def mark_ended(self, trial: AnyTrial, status: str, reason: str, pack: str | None = None) -> None:
        """Give a trial that is still pending or running a final `status` and `reason`."""
        record, folder = self.trial_record(trial), self.trial_folder(trial)
        if record.status not in NOT_ENDED:
            return
        last = max((row["step"] for row in read_rows(folder / "metrics.jsonl")), default=0)
        reason += f", after step {last}" if last else ""
        ended = {"trial": trial.name, "status": status, "reason": reason, "pack": record.pack or pack}
        written = {"files": files.file_hashes(folder, TRIAL_FILES), "results": record.results}
        record.model_copy(update=ended | written | trial.model_dump(mode="json")).write(folder / "trial.json")

    def whole_file(self, trial: AnyTrial, name: str) -> Path:
        """Path of a trial's file, checked against its hash in trial.json where the trial has ended. Raises
        StudyDirectoryError: it is missing or corrupt."""
        path, sha256 = self.find_file(trial, name)
        if sha256 is not None and files.file_sha256(path) != sha256:
            raise files.unlike_its_hash(path)
        return path

    def find_file(self, trial: AnyTrial, name: str) -> tuple[Path, str | None]:
        """Path of a trial's file, unread, and its hash in trial.json; None where the trial has not ended."""
        return files.inside(self.trial_folder(trial), name), self.trial_record(trial).sha256(name)

    def adapter_file(self, trial: Trial) -> Path:
        """Weights of a trial that is done. Raises StudyDirectoryError: they are missing or corrupt."""
        return self.whole_file(trial, ADAPTER)

    def adapter_sha256(self, trial: Trial) -> str | None:
        return self.trial_record(trial).sha256(ADAPTER)

    @property
    def machine(self) -> dict[str, Any]:
        """machine.json: hardware, versions and the model that the study began with."""
        return records.MachineRecord.content(self.file("machine.json"))

    @property
    def data_facts(self) -> dict[str, Any]:
        """data/facts.json: source, counts and treatment of the rows (`rankscope.data.tokens.TokenizedData`)."""
        return records.FactsRecord.content(self.file("data", "facts.json"))

    @property
    def prediction(self) -> dict[str, Any]:
        """prediction.json (`rankscope.plan.runtime.StudyForecast.describe`), or empty before it is written."""
        file = self.file("prediction.json")
        return records.PredictionRecord.content(file) if files.exists(file) else {}

    def find_verdict(self) -> dict[str, Any]:
        """verdict.json as it is now; empty before there is one."""
        file = self.file("verdict.json")
        return records.VerdictRecord.content(file) if files.exists(file) else {}

    def held_out(self, trial: AnyTrial, name: str = "eval.json") -> records.Examples:
        """Held-out examples of a trial that is done: in eval.json, or in untrained.json, before it was trained. Raises
        StudyDirectoryError: it is missing or corrupt."""
        file, sha256 = self.find_file(trial, name)
        examples = records.EvalRecord.of(files.parse_json(files.read_whole(file, sha256), file), file).examples
        counts = {len(examples.loss), len(examples.label_tokens), len(examples.correct_tokens)}
        if counts != {len(examples.example)}:
            raise files.damaged_error(file, "not as it is written: its lists are not of one length")
        return examples

    def answered(self) -> list[Trial]:
        """Trials that answer the held-out prompts: each candidate's first that is done."""
        done: dict[str, Trial] = {}
        for trial in self.trials:
            if self.trial_record(trial).status == "done":
                done.setdefault(trial.candidate.name, trial)
        return list(done.values())

    def answers_record(self) -> records.AnswersRecord:
        """answers.json (`rankscope.jobs.answers.work`), or a record without answers before it is written."""
        file = self.file("answers", "answers.json")
        return records.AnswersRecord.find(file) or records.AnswersRecord(questions=[], answers={})

    def kept_answers(self) -> dict[str, list[str]]:
        """Answers by `base` and trial; none where more, fewer, longer or shorter ones are wanted by now."""
        record, measure = self.answers_record(), self.spec.measure
        return record.answers if record.asked in (None, [measure.answers, measure.answer_tokens]) else {}

    def unanswered(self) -> list[Trial]:
        kept = self.kept_answers()
        return [trial for trial in self.answered() if trial.name not in kept]

    @property
    def rank_curve_file(self) -> Path:
        return self.file(CURVE)

    def rank_curve(self) -> list[records.Cut]:
        """Truncations in curve.json of adapters that are still those of their trials."""
        record = records.CurveRecord.find(self.rank_curve_file)
        if record is None:
            return []
        own = {trial.name: self.adapter_sha256(trial) for trial in self.trials}
        return [cut for cut in record.cuts if own.get(cut.trial) == cut.adapter_sha256]

    def add_cuts(self, cuts: Sequence[records.Cut]) -> None:
        if cuts:
            records.CurveRecord(cuts=[*self.rank_curve(), *cuts]).write(self.rank_curve_file)

    def open_failures(self) -> dict[str, records.Failure]:
        """`failures()` of profiles, answers and scores that are still missing."""
        from rankscope.study.scores import unscored  # which reads this module's folders

        measure = self.spec.measure
        profiled = self.spec.profiled() if measure.profiles else ()
        done = {name: len(self.profile_repeats(name)) >= measure.repeats for name in profiled}
        done[TIME] = not measure.profiles
        done[ANSWERS] = not measure.answers or not self.unanswered()
        done[TASK] = not unscored(self)
        return {name: failure for name, failure in self.failures().items() if not done.get(name, True)}


def _read(file: Path) -> tuple[StudySpec, list[records.LogEntry]]:
    question = read_question(file)
    log = [records.LogEntry.of(entry, file) for entry in question.pop(LOG, [])]
    if isinstance(verdict := question.get("verdict"), dict):
        verdict.setdefault("margin_of", "loss")  # before there were margins of the gain
    return resolve_spec(question, source=str(file)), log


def _entry(**what: Any) -> records.LogEntry:
    return records.LogEntry(when=datetime.now(UTC).isoformat(timespec="seconds"), version=__version__, **what)
