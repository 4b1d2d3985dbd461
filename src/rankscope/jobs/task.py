"""Scores of the base model and of every finished trial on the study's task (`measure.task`), item by item.

The adapters of a pack are scored together: where text is generated, rows of a batch go through their own adapters, and
likelihoods are compared by the packed forward. lm-evaluation-harness scores one after the other by its own model class.
"""

import re
import sys
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedModel

from rankscope.data.conversations import Tokenizer
from rankscope.data.questions import Question, held_out_choices, whole_questions
from rankscope.data.tokens import Example, TokenizedData, Tokens
from rankscope.errors import DataError, RankscopeError, StudyError, shortened
from rankscope.files import write_json
from rankscope.jobs import harness
from rankscope.jobs.child import load_base, open_study
from rankscope.jobs.generate import adapters_on, answers_of, ends_of, text_of, until
from rankscope.jobs.job import Job, Run, failure_of
from rankscope.lora.adapters import activate
from rankscope.lora.layout import NotPackable
from rankscope.model.load import load_tokenizer, most_positions
from rankscope.spec.models import StudySpec
from rankscope.spec.task import BASE, CHOICE, Task, code_sha256, compiled, parse_task
from rankscope.study.folder import TASK, StudyFolder
from rankscope.study.records import ChoicesRecord, TaskItems, TaskRecord
from rankscope.study.scores import SCORED, asked, task_file, task_record, unscored
from rankscope.train.engine import EVAL_TOKENS, Engine, ExampleLosses, PackedEngine
from rankscope.train.prepare import read_spec
from rankscope.train.probe import make_packable, peft_engine, use_own_forward

Folders = Mapping[str, Path | None]  # of adapters, by trial; None for the model without one
Score = Callable[[str, str, str], float]  # of a prompt, an answer and the row's own answer
CHOICES = "task/choices.json"
PEFT_TOKENS = 512  # of one forward by PEFT's own, which makes the logits of every token


class Scored(NamedTuple):
    metric: str
    items: TaskItems


def check(text: str | None) -> None:
    """Raise StudyError where the harness lacks the task, MissingExtraError where it is not installed."""
    if text and (task := parse_task(text)).kind == "lm_eval":
        harness.check(task)


class Scorable(NamedTuple):
    rows: int
    choices: ChoicesRecord | None  # of a task by likelihood; None where the study has them


def scorable(spec: StudySpec, data: TokenizedData, study: StudyFolder | None) -> Scorable | None:
    """The held-out rows that can be scored; None where the task has items of its own, or there is no task. Raises
    DataError: the rows are not for the task."""
    task = parse_task(spec.measure.task) if spec.measure.task else Task("")
    if task.kind in ("", "lm_eval"):
        return None
    tokenizer = load_tokenizer(spec.model)
    rows = scored_rows(spec, data, task, tokenizer)
    if task.kind not in CHOICE:
        return Scorable(len(rows), None)
    own = asked(study) if study else {}
    known = ChoicesRecord.find(study.file(CHOICES)) if study else None
    if known is not None and known.asked == own:
        return Scorable(len(known.example), None)
    choices = held_out_choices(read_spec(spec), tokenizer, data.eval, [question for question, _ in rows], own)
    return Scorable(len(choices.example), choices)


def prepare(study: StudyFolder, data: TokenizedData) -> int | None:
    """Find out before anything is trained whether the held-out rows can be scored (`scorable`), and write down their
    choices, which tokens do not have. Return how many rows are scored."""
    found = scorable(study.spec, data, study)
    if found is None:
        return None
    if found.choices:
        found.choices.write(study.file(CHOICES))
    return found.rows


def jobs(run: Run) -> list[Job]:
    """Return the jobs that score what lacks scores: the model without an adapter, then pack by pack. On one device of
    this machine it is one process, which loads the model once; else each pack has its own."""
    study, plan, text, missing = run.study, run.plan, run.study.spec.measure.task, unscored(run.study)
    if text is None or not missing:
        return []
    code = code_sha256(text)
    if old := [one for one in missing if (known := task_record(study, one)) and known.code_sha256 != code]:
        run.say(run.text("notice.task_changed", task=text, models=run.text.count("scored", len(old))))
        for trial in old:
            task_file(study, trial).unlink()
    packs = {name: [trial for trial in pack if trial in missing] for name, pack in study.division().packs.items()}
    parts = {name: [[trial.name for trial in pack]] for name, pack in packs.items() if pack} or {BASE: []}
    first = next(iter(parts))
    if None in missing:
        parts[first].insert(0, [BASE])
    if plan.on_one_device:
        parts = {first: [*chain(*parts.values())]}
    run.say(run.text("notice.task", task=text, models=run.text.count("scored", len(missing))))
    reads = [CHOICES] if study.file(CHOICES).exists() else []
    memory = max(plan.host_bytes(trials) for trials in (*packs.values(), study.trials[:1]) if trials)
    return [
        Job(
            __name__,
            {"parts": own, "code_sha256": code, "folder": f"task/{pack}"},
            f"task/{pack}",
            [*reads, *(f"trials/{name}" for name in chain(*own) if name != BASE)],
            memory,
        )
        for pack, own in parts.items()
    ]


def work(study_path: Path, content: Mapping[str, Any]) -> None:
    """Score the models of one job. The code that runs is that which was allowed when the job was made."""
    study, data = open_study(study_path)
    text, trials = str(study.spec.measure.task), {trial.name: trial for trial in study.trials}
    if code_sha256(text) != content["code_sha256"]:
        raise StudyError(f"measure.task: {text} is not here, or has changed since the run began", "Run it again.")
    task, (model, _) = parse_task(text), load_base(study)

    score = {"lm_eval": by_harness, **dict.fromkeys(CHOICE, likeliest)}.get(task.kind, generated)
    parts = [
        {name: study.adapter_file(trials[name]).parent if name in trials else None for name in part}
        for part in content["parts"]
    ]
    for name, scored in score(model, study, data, task, parts, study.file(content["folder"], SCORED)):
        trial = trials.get(name)
        results = study.trial_record(trial).results if trial else None
        record = TaskRecord(
            task=text,
            metric=scored.metric,
            step=int(results.steps or 0) if results else 0,
            asked=asked(study),
            adapter_sha256=study.adapter_sha256(trial) if trial else None,
            code_sha256=content["code_sha256"],
            items=scored.items,
        )
        record.write(task_file(study, trial))


def by_harness(
    model: PreTrainedModel, study: StudyFolder, data: TokenizedData, task: Task, parts: Sequence[Folders], _: Path
) -> Iterator[tuple[str, Scored]]:
    """Scores by lm-evaluation-harness."""
    tokenizer = load_tokenizer(study.spec.model)
    for name, folder in chain(*(part.items() for part in parts)):
        with adapters_on(model, {name: folder} if folder else {}):
            scored = Scored(*harness.scores(model, tokenizer, task, study.spec.measure.task_items))
        yield name, scored


def ended(run: Run, job: Job, error: RankscopeError | None, waiting: Sequence[Job]) -> list[Job]:
    """Record a failure, whatever it is: the study concludes by the loss, and the next run scores what is missing."""
    if error is not None:
        run.study.write_failure(TASK, failure_of(error))
        run.say(run.text("notice.failed", what=run.text("notice.scores"), error=error))
    return list(waiting)


def scored_rows(spec: StudySpec, data: TokenizedData, task: Task, tokenizer: Tokenizer) -> list[tuple[Question, str]]:
    """Held-out rows that are scored, with the text of their own answers; those in which a pattern finds nothing are
    left out. Raises DataError: none is left."""
    pattern = compiled(task.detail) if task.kind == "regex" else None
    questions = whole_questions(data.eval, spec.measure.task_items, data.facts["max_length"])
    ends = ends_of(tokenizer, questions)  # an answer stops before it, and is compared with the text before it
    rows = [(question, text_of(tokenizer, until(ends, question.reference_ids))) for question in questions]
    if not rows:
        todo = "Raise data.max_length; or give prompts and answers, and learn the answers (data.loss_on)."
        raise DataError("measure.task: no held-out row has an answer of its own that is whole", todo)
    found = [row for row in rows if extracted(pattern, row[1]) is not None]
    if not found:
        what = f"measure.task: the pattern {task.detail!r} finds nothing in the answers of {len(rows):,} held-out rows"
        raise DataError(f"{what}; the first is {shortened(repr(rows[0][1]))}", "Correct it to find the result in each.")
    return found


def generated(
    model: PreTrainedModel,
    study: StudyFolder,
    data: TokenizedData,
    task: Task,
    parts: Sequence[Folders],
    progress: Path,
) -> Iterator[tuple[str, Scored]]:
    """Scores of greedy answers to the held-out prompts. `progress` has how many models of a part have answered."""
    measure, score, tokenizer = study.spec.measure, score_function(task), load_tokenizer(study.spec.model)
    rows, positions = scored_rows(study.spec, data, task, tokenizer), most_positions(study.spec.model)
    questions, examples = [question for question, _ in rows], [question.example for question, _ in rows]
    texts, done = [text_of(tokenizer, one.prompt_ids) for one in questions], list[int]()

    def tell(answers: int) -> None:
        done.append(answers)
        write_json(progress, {"models": sum(done) / len(questions)})

    for folders in parts:
        answered = answers_of(model, tokenizer, positions, folders, questions, measure.task_tokens, tell)
        for name, answers in answered.items():
            values = [score(*one) for one in zip(texts, answers, [own for _, own in rows], strict=True)]
            items = TaskItems(example=examples, score=values, answer=answers if measure.answers else None)
            yield name, Scored(task.detail if task.file else "exact_match", items)
        done.clear()
        progress.unlink(missing_ok=True)


def score_function(task: Task) -> Score:
    if task.file:
        return _own_function(task)
    pattern = compiled(task.detail) if task.kind == "regex" else None

    def same(prompt: str, answer: str, reference: str) -> float:
        one, other = (extracted(pattern, text) for text in (answer, reference))
        return float(one is not None and other is not None and normalised(one) == normalised(other))

    return same


def normalised(text: str) -> str:
    """Text by which answers are compared: without case, with single spaces, without commas between thousands, dollar
    signs and a full stop at the end, as lm-evaluation-harness has it for GSM8K."""
    text = unicodedata.normalize("NFKC", text).casefold().replace("$", "")
    return " ".join(re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text).split()).removesuffix(".")


def extracted(pattern: Any, text: str) -> str | None:
    """What a pattern finds first: its first group that holds something, or all of it; None where it finds nothing. The
    whole text without a pattern."""
    if pattern is None:
        return text
    match = pattern.search(text)
    return None if match is None else next((group for group in match.groups() if group), match.group(0))


def _own_function(task: Task) -> Score:
    """The user's function, whose values are checked. Raises StudyError: it fails, or returns another thing."""
    spec = spec_from_file_location("rankscope_task", task.file)
    assert spec is not None  # its name ends in .py
    assert spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)  # where a dataclass of the file's looks its names up
    with _faults_of(task):
        spec.loader.exec_module(module)

    def score(prompt: str, answer: str, reference: str) -> float:
        with _faults_of(task):
            value = getattr(module, task.detail)(prompt, answer, reference)
            if not 0 <= float(value) <= 1:
                raise ValueError(f"it returned {value!r}, and a score is a number from 0 to 1")
        return float(value)

    return score


@contextmanager
def _faults_of(task: Task) -> Iterator[None]:
    try:
        yield
    except (Exception, SystemExit) as error:  # a script's sys.exit() would end the job as if all were scored
        what = f"measure.task: {task.file}:{task.detail}: {type(error).__name__}: {error}"
        raise StudyError(what, "Correct it, and run the study again: what is trained is only scored.") from error


def likeliest(
    model: PreTrainedModel, study: StudyFolder, data: TokenizedData, task: Task, parts: Sequence[Folders], _: Path
) -> Iterator[tuple[str, Scored]]:
    """Whether the right choice has the highest log-likelihood, summed over its tokens (`choice`, the harness's acc), or
    that over its length in characters (`choice_norm`, its acc_norm)."""
    record = ChoicesRecord.find(study.file(CHOICES))
    assert record is not None  # `prepare` wrote it
    pairs = zip(chain(*record.ids), chain(*record.label_tokens), strict=True)
    rows = [Example(np.array(ids, np.int32), np.arange(len(ids)) >= len(ids) - labels) for ids, labels in pairs]
    characters = np.array([*chain(*record.characters)]) if task.kind == "choice_norm" else 1
    ends, tokens = np.cumsum([0, *map(len, record.ids)]).tolist(), Tokens.from_examples(rows)
    for name, losses in chain.from_iterable(losses_of(model, folders, tokens).items() for folders in parts):
        likelihoods = -losses.loss * losses.label_tokens / characters
        chosen = [int(likelihoods[start:end].argmax()) for start, end in pairwise(ends)]
        scores = [float(one == gold) for one, gold in zip(chosen, record.gold, strict=True)]
        yield name, Scored(CHOICE[task.kind], TaskItems(example=record.example, score=scores))


def losses_of(model: PreTrainedModel, folders: Folders, tokens: Tokens) -> dict[str, ExampleLosses]:
    """Losses under each adapter: of all in one forward where the model can be packed."""
    adapters = {name: folder for name, folder in folders.items() if folder is not None}
    found, attention = dict[str, ExampleLosses](), model.config._attn_implementation
    if BASE in folders:
        found[BASE] = peft_engine(model, tokens_per_forward=PEFT_TOKENS).evaluate(tokens, [BASE])[0]
    with adapters_on(model, adapters):
        if adapters:
            engine = _engine(model, list(adapters))
            found |= zip(adapters, engine.evaluate(tokens, list(adapters)), strict=True)
            use_own_forward(model, attention)
    return found


def _engine(model: PreTrainedModel, names: Sequence[str]) -> Engine:
    activate(model, names[0])  # the probe holds it against the model's own forward
    try:
        make_packable(model, names)
    except NotPackable:
        return peft_engine(model, tokens_per_forward=PEFT_TOKENS)
    return PackedEngine(model, EVAL_TOKENS)
