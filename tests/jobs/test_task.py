"""Scores on a task equal those of PEFT and transformers alone, prompt by prompt and choice by choice."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import rankscope
from experts import moe_model
from marks import mostly_slow
from models import CONFIGS, tiny_model
from rankscope.data.questions import Question, whole_questions
from rankscope.data.tokens import TokenizedData, load
from rankscope.errors import DataError, MissingExtraError, StudyError
from rankscope.jobs import task as job
from rankscope.jobs.generate import adapters_on, answers_of, side_by_side
from rankscope.lora.saved import load_by_peft
from rankscope.lora.targets import find_targets
from rankscope.model.load import load_tokenizer, most_positions
from rankscope.spec.models import ModelSpec
from rankscope.spec.options import assemble
from rankscope.spec.task import code_sha256, parse_task
from rankscope.study import scores
from rankscope.study.records import ChoicesRecord
from rankscope.study.study import Study
from rankscope.ui.plan import plan_study
from recording import RecordingProgress
from study.test_scores import with_task

BASE = "base"


@pytest.fixture(scope="module")
def data(trained: Study) -> TokenizedData:
    return load(trained.path / "data")


@pytest.fixture(scope="module")
def models(trained: Study) -> dict[str, Any]:
    """The base model, and one of each trial, as PEFT loads them."""
    folder = trained.spec.model.id
    found = {BASE: AutoModelForCausalLM.from_pretrained(folder).eval()}
    for trial in trained.trials:
        base = AutoModelForCausalLM.from_pretrained(folder)
        found[trial.name] = load_by_peft(base, trained.adapter_file(trial).parent).eval()
    return found


def work(study: Study) -> None:
    """Score all models of the study in this process."""
    code = code_sha256(str(study.spec.measure.task))
    parts = [[BASE], [trial.name for trial in study.trials]]
    job.work(study.path, {"parts": parts, "code_sha256": code, "folder": "task/p000"})


@torch.no_grad()
def greedy(model: Any, ids: list[int], most: int, end: int) -> list[int]:
    found = torch.tensor([ids])
    for _ in range(most):
        new = model(input_ids=found).logits[0, -1].argmax()
        if new == end:
            break
        found = torch.cat([found, new.reshape(1, 1)], dim=1)
    return list(found[0, len(ids) :].tolist())


@pytest.mark.parametrize("kind", mostly_slow(["opt", "llama", "dora"], "opt"))
def test_adapters_answer_side_by_side_as_each_does_alone(kind: str, root: Path, tmp_path: Path) -> None:
    """OPT's feed-forward layers see all tokens as one list; DoRA answers one adapter at a time."""

    def base() -> Any:
        torch.manual_seed(0)
        small = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**small, intermediate_size=64)).eval()
        return AutoModelForCausalLM.from_pretrained(root / "model").eval()

    folders: dict[str, Path | None] = {BASE: None}
    for rank in (2, 8, 3):
        config = LoraConfig(
            r=rank, lora_alpha=4 * rank, target_modules="all-linear", init_lora_weights=False,
            use_dora=kind == "dora", lora_dropout=0.5, task_type="CAUSAL_LM",
        )  # fmt: skip
        get_peft_model(base(), config).save_pretrained(folder := tmp_path / f"r{rank}")
        folders[folder.name] = folder
    lengths = np.random.default_rng(0).integers(5, 290, (5, 9))
    prompts = [ids[:length].tolist() for ids, length in zip(lengths, (9, 5, 9, 7, 5), strict=True)]
    model, spec, tokenizer = base(), ModelSpec(id=str(root / "model")), AutoTokenizer.from_pretrained(root / "model")
    questions = [Question(number, prompt, []) for number, prompt in enumerate(prompts)]
    found = answers_of(model, load_tokenizer(spec), most_positions(spec), folders, questions, 6)
    assert list(found) == list(folders)
    with adapters_on(model, {name: folder for name, folder in folders.items() if folder}):
        assert side_by_side(model, [name for name in folders if name != BASE]) == (kind != "dora")
    assert len({tuple(texts) for texts in found.values()}) == 4
    for name, folder in folders.items():
        alone = load_by_peft(base(), folder).eval() if folder else base()
        answers = [greedy(alone, prompt, 6, tokenizer.eos_token_id) for prompt in prompts]
        assert found[name] == [tokenizer.decode(ids, skip_special_tokens=True) for ids in answers]
    assert not hasattr(model, "peft_config")


def test_a_function_of_the_users_own_scores(trained: Study, data: TokenizedData, tmp_path: Path) -> None:
    code = tmp_path / "my.py"
    code.write_text("def score(prompt, answer, reference):\n    return len(prompt + answer + reference) % 3 / 2\n")
    study = with_task(trained, tmp_path / "study", f"{code}:score", task_items=5, task_tokens=4)
    work(study)
    tokenizer, table = AutoTokenizer.from_pretrained(study.spec.model.id), study.task_scores()
    rows = whole_questions(data.eval, 5, 1024)
    for trial in (None, *study.trials):
        record = scores.task_record(study, trial)
        assert record is not None
        assert (record.metric, record.step) == ("score", 5 if trial else 0)
        assert record.items.example == [row.example for row in rows]
        texts = [
            tokenizer.decode(row.prompt_ids, skip_special_tokens=True)
            + answer
            + tokenizer.decode(row.reference_ids, skip_special_tokens=True)
            for row, answer in zip(rows, record.items.answer or [], strict=True)
        ]
        assert record.items.score == [len(text) % 3 / 2 for text in texts]
    assert len(table) == 5 * len(study.trials)
    assert table["score"].nunique() > 1
    assert scores.unscored(study) == []


def test_the_likeliest_choice_is_transformers_and_no_text_is_kept(
    trained: Study, data: TokenizedData, models: dict[str, Any], tmp_path: Path
) -> None:
    rows, words = whole_questions(data.eval, 6, 1024), [[5], [40, 41, 42, 43], [7, 8], [90, 60, 30]]
    for task, metric in (("choice", "acc"), ("choice_norm", "acc_norm")):
        study = with_task(trained, tmp_path / task, task, answers=0)
        ChoicesRecord(
            asked=scores.asked(study),
            example=[row.example for row in rows],
            gold=[number % 4 for number in range(6)],
            ids=[[row.prompt_ids + word for word in words] for row in rows],
            label_tokens=[[len(word) for word in words]] * 6,
            characters=[[1, 9, 3, 5]] * 6,
        ).write(study.file("task", "choices.json"))
        work(study)
        for trial in (None, *study.trials[1:3]):
            model, expected = models[trial.name if trial else BASE], []
            for number, row in enumerate(rows):
                with torch.no_grad():
                    logits = [model(input_ids=torch.tensor([row.prompt_ids + word])).logits[0] for word in words]
                likelihoods = [
                    float(one[-len(word) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(word)[:, None]).sum())
                    for one, word in zip(logits, words, strict=True)
                ]
                over = np.array([1, 9, 3, 5] if task == "choice_norm" else [1] * 4)
                expected.append(float(np.argmax(np.array(likelihoods) / over) == number % 4))
            record = scores.task_record(study, trial)
            assert record is not None
            assert record.items.score == expected
            assert (record.metric, record.items.answer) == (metric, None)
        assert 0 < study.task_scores()["score"].mean() < 1


@pytest.mark.usefixtures("no_report")
def test_a_run_scores_what_is_missing_and_says_when_code_has_changed(trained: Study, tmp_path: Path) -> None:
    code, progress = tmp_path / "my.py", RecordingProgress()
    code.write_text("def score(prompt, answer, reference):\n    return 1\n")
    study = with_task(trained, tmp_path / "study", f"{code}:score", task_items=2, task_tokens=2)
    asked = {"study": study.path / "study.yaml", "out": study.path, "progress": progress}
    with pytest.raises(StudyError, match=r"my\.py is code"):
        rankscope.run(**asked)
    assert scores.unscored(study) == [None, *study.trials]
    study = rankscope.run(**asked, allow_code=code)
    assert set(study.task_scores()["score"]) == {1.0}
    scores.task_file(study, study.trials[0]).unlink()
    kept = scores.task_file(study, None).stat().st_ino
    rankscope.run(**asked, allow_code=code)
    assert scores.task_file(study, None).stat().st_ino == kept
    code.write_text("def score(prompt, answer, reference):\n    return 2\n")
    study = rankscope.run(**asked, allow_code=str(code))
    assert f"{code}:score has changed since it scored 5 models: scoring again" in progress.lines
    assert "it returned 2, and a score is a number from 0 to 1" in study.open_failures()["task"].reason
    assert study.task_scores().empty


@pytest.mark.parametrize(
    ("task", "error", "what"),
    [
        ("regex:#### ([0-9]+)", DataError, "finds nothing in the answers of 12 held-out rows; the first is ' def"),
        ("choice", DataError, "no held-out row of .* has choices: no column choices, options, endings"),
    ],
)
def test_rows_that_cannot_be_scored_are_refused_before_training(
    trained: Study, data: TokenizedData, tmp_path: Path, task: str, error: type[Exception], what: str
) -> None:
    study = with_task(trained, tmp_path / "study", task)
    with pytest.raises(error, match=what):
        job.prepare(study, data)
    for begun in (study, None):
        with pytest.raises(error, match=what):
            plan_study(study.spec, begun)


def test_rows_without_an_answer_of_their_own_are_refused(trained: Study, data: TokenizedData, tmp_path: Path) -> None:
    study = with_task(trained, tmp_path / "study", "exact_match")
    assert job.prepare(study, data) == 12
    data.facts["max_length"], whole = 3, data.facts["max_length"]
    with pytest.raises(DataError, match="no held-out row has an answer of its own that is whole"):
        job.prepare(study, data)
    data.facts["max_length"] = whole


@pytest.mark.parametrize(
    ("task", "answer", "reference", "score"),
    [
        ("exact_match", " The  Answer.\n", "the answer", 1),
        ("exact_match", "$1,234", "1234.", 1),
        ("exact_match", "1,23", "123", 0),
        ("exact_match", "", "x", 0),
        (r"regex:#### (-?[0-9.,]+)", "so #### 1,000.", "other words #### 1000", 1),
        (r"regex:#### (-?[0-9.,]+)", "1000", "#### 1000", 0),
        (r"regex:[0-9]+", "a 5 and 6", "5", 1),
        (r"regex:(A)|(B)", "it is B", "B", 1),
    ],
)
def test_answers_are_compared_after_normalisation(task: str, answer: str, reference: str, score: float) -> None:
    assert job.score_function(parse_task(task))("", answer, reference) == score


@pytest.mark.parametrize(
    ("body", "what"),
    [
        ("return 1 / 0", "ZeroDivisionError"),
        ("return 'x'", "ValueError"),
        ("return -1", "it returned -1"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_function_that_fails_is_named(tmp_path: Path, body: str, what: str) -> None:
    code = tmp_path / "my.py"
    code.write_text(f"def score(prompt, answer, reference):\n    {body}\n")
    with pytest.raises(StudyError, match=f"my.py:score: .*{what}"):
        job.score_function(parse_task(f"{code}:score"))("", "", "")


def test_a_functions_file_may_have_a_dataclass(tmp_path: Path) -> None:
    code = tmp_path / "my.py"
    code.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n\n"
        "@dataclass\nclass Answer:\n    value: float\n\n"
        "def score(prompt, answer, reference):\n    return Answer(0.5).value\n"
    )
    assert job.score_function(parse_task(f"{code}:score"))("", "", "") == 0.5


HARNESS_TASK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
doc_to_text: "{{{{prompt}}}}"
{rest}
"""


def test_the_harness_scores_as_it_does_by_itself(trained: Study, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    file, folder = tmp_path / "items.jsonl", tmp_path / "tasks"
    rows = [
        {"prompt": f"def number_{n}(x): return", "choices": [" x", " list", " x + 1"], "label": n % 3} for n in range(9)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder.mkdir()
    choice = "output_type: multiple_choice\ndoc_to_choice: choices\ndoc_to_target: label"
    asked = "output_type: generate_until\ndoc_to_target: ' x'\ngeneration_kwargs: {until: [')'], max_gen_toks: 4}"
    for name, rest in (("own_choice", choice), ("own_text", asked + "\nmetric_list: [{metric: exact_match}]")):
        (folder / f"{name}.yaml").write_text(HARNESS_TASK.format(name=name, file=file, rest=rest))
    study = with_task(trained, tmp_path / "study", f"lm_eval:{folder}/", task_items=7)
    work(study)
    manager = TaskManager(include_defaults=False)
    for trial in (None, study.trials[1]):
        arguments = f"pretrained={study.spec.model.id},dtype=float32"
        arguments += f",peft={study.adapter_file(trial).parent}" if trial else ""
        tasks = [str(folder / f"{name}.yaml") for name in ("own_choice", "own_text")]
        expected = simple_evaluate(
            "hf", arguments, tasks, device="cpu", batch_size=8, limit=7, bootstrap_iters=0, task_manager=manager
        )
        record = scores.task_record(study, trial)
        assert record is not None
        assert record.metric == "acc, exact_match"
        samples = [(name, expected["samples"][name]) for name in ("own_choice", "own_text")]
        assert record.items.task == [name for name, own in samples for _ in own]
        assert record.items.example == [*range(7), *range(7)]
        metrics = {"own_choice": "acc", "own_text": "exact_match"}
        assert record.items.score == [float(one[metrics[name]]) for name, own in samples for one in own]
    assert 0 < study.task_scores()["score"].mean() < 1


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="it is installed")
def test_without_the_harness_the_command_that_installs_it_is_named(tmp_path: Path) -> None:
    """Before the data are tokenized, and nothing is left behind."""
    with pytest.raises(MissingExtraError, match="lm_eval is not installed"):
        rankscope.run(model="embedded", dataset="embedded", task="lm_eval:arc_easy", out=tmp_path / "study")
    assert not (tmp_path / "study").exists()
    with pytest.raises(MissingExtraError, match="lm_eval is not installed"):
        plan_study(assemble({"model": "embedded", "data": "embedded"}, {"task": "lm_eval:arc_easy"}), None)


class Ids:
    """A tokenizer that writes ids as numbers."""

    def __init__(self, eos: int | None = 7, special: Sequence[int] = ()) -> None:
        self.eos_token_id, self.all_special_ids = eos, list(special)

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def test_an_answer_ends_where_the_rows_own_answers_do() -> None:
    """A chat template ends a turn by a token that is not the eos token of many base models."""
    model, prompt = tiny_model("gpt2").eval(), [5, 6, 8]
    model.generation_config.eos_token_id = None

    def answer(*reference: int, special: Sequence[int] = ()) -> list[str]:
        questions = [Question(0, prompt, list(reference))]
        return answers_of(model, Ids(None, special), None, {BASE: None}, questions, 6)[BASE][0].split()

    whole = answer()
    assert len(whole) == 6
    end = int(whole[-1])
    assert answer(9, end, special=[]) == whole
    assert answer(9, end, 10, special=[end]) == whole[: whole.index(str(end))]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONFIGS, "qwen3_moe", "gpt_oss", "mamba"])
def test_architectures_answer_side_by_side(name: str, tmp_path: Path) -> None:
    """Mamba's own kernels take its layers' weights, so that its adapters answer one at a time."""

    def base() -> Any:
        return (tiny_model(name) if name in CONFIGS else moe_model(name)).eval()

    model, folders = base(), dict[str, Path | None]()
    targets = find_targets(model, "all-linear")
    for rank in (2, 8, 3):
        torch.manual_seed(rank)
        config = LoraConfig(
            r=rank, lora_alpha=4 * rank, target_modules=list(targets.modules), init_lora_weights=False,
            task_type="CAUSAL_LM",
        )  # fmt: skip
        get_peft_model(base(), config).save_pretrained(folder := tmp_path / f"r{rank}")
        folders[folder.name] = folder
    ids = np.random.default_rng(0).integers(8, model.config.get_text_config().vocab_size, (5, 9))
    questions = [Question(0, row[:length].tolist(), []) for row, length in zip(ids, (9, 5, 9, 7, 5), strict=True)]
    with adapters_on(model, {key: folder for key, folder in folders.items() if folder}):
        assert side_by_side(model, list(folders)) == (name != "mamba")
    found = answers_of(model, Ids(), None, folders, questions, 6)
    assert len({tuple(texts) for texts in found.values()}) == 3
    for key, folder in folders.items():
        assert answers_of(base(), Ids(), None, {key: folder}, questions, 6)[key] == found[key]
