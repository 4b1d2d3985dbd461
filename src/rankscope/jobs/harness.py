"""lm-evaluation-harness: its tasks, its model class and its scores, for a model that is loaded already."""

from functools import cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from rankscope.data.conversations import Tokenizer
from rankscope.errors import StudyError, did_you_mean, require
from rankscope.spec.task import Task
from rankscope.study.records import TaskItems

BATCH_ROWS = 8


def check(task: Task) -> None:
    """Raise MissingExtraError where the harness is not installed, StudyError where it has no such task."""
    require("lm_eval", "lm-eval", f"measure.task: lm_eval:{task.detail}")
    names, known = set(task.names).difference(task.code), _tasks(task).all_tasks
    for name in sorted(names.difference(known)):
        what = f"measure.task: lm-evaluation-harness has no task {name}{did_you_mean(name, known)}"
        raise StudyError(what, "`lm_eval ls tasks` lists them; a task of your own is a .yaml file, by its path.")


def scores(model: PreTrainedModel, tokenizer: Tokenizer, task: Task, limit: int) -> tuple[str, TaskItems]:
    """Evaluate the model, with the adapter that is attached to it, on the first `limit` documents of each task. Return
    the metrics' names, and the items as the harness has them: of each task the first metric whose values are from 0 to
    1 and better if higher, with the task's first filter. Raises StudyError: a task fails, or has no such metric."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    paths = {name: Path(name) for name in task.code}
    files = {name: sorted(path.glob("*.yaml")) if path.is_dir() else [path] for name, path in paths.items()}
    try:
        tasks = _tasks(task).load([str(one) for name in task.names for one in files.get(name, [name])])
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH_ROWS)
        found: Any = evaluate(lm=lm, task_dict=tasks, limit=limit, bootstrap_iters=0)
    except Exception as error:  # the harness, a task's data or its code may raise anything
        what = f"measure.task: lm_eval:{task.detail}: {type(error).__name__}: {str(error).strip()}"
        raise StudyError(what, "Try it with the harness itself: lm_eval run --model hf --tasks ...") from error
    metrics, examples, values, names = list[str](), list[int](), list[float](), list[str]()
    for name, samples in found["samples"].items():
        own = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        better = found["higher_is_better"].get(name, {})
        metric = next((one for one in own[0]["metrics"] if better.get(one) is not False and _is_score(own, one)), None)
        if metric is None:
            what = f"measure.task: lm_eval:{name} has no metric with a value from 0 to 1 for each document"
            raise StudyError(what, "Choose a task with acc or exact_match.")
        metrics += [metric] if metric not in metrics else []
        examples += [int(sample["doc_id"]) for sample in own]
        values += [float(sample[metric]) for sample in own]
        names += [name] * len(own)
    return ", ".join(metrics), TaskItems(example=examples, score=values, task=names)


def _tasks(task: Task) -> Any:
    return _manager(set(task.names) > set(task.code))


@cache
def _manager(defaults: bool) -> Any:
    """All tasks, by name; without the harness's own, thousands of files less to read."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=defaults)


def _is_score(samples: list[dict[str, Any]], metric: str) -> bool:
    values = [sample[metric] for sample in samples]
    return all(hasattr(value, "__float__") and 0 <= float(value) <= 1 for value in values)
