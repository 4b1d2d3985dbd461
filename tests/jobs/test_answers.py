"""Answers equal those of PEFT and transformers alone, for the right part of the right rows."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankscope.data.questions import questions
from rankscope.data.tokens import Example, Tokens, load
from rankscope.files import file_sha256, read_json, write_json
from rankscope.study.folder import ANSWERS
from rankscope.study.study import Study
from recording import RecordingProgress
from small_study import run_small


def example(length: int, prompt: int) -> Example:
    return Example(np.arange(length, dtype=np.int32), np.arange(length) >= prompt)


def test_a_question_ends_where_the_labels_begin() -> None:
    (question,) = questions(Tokens.from_examples([example(6, 4)]), 1, 100)
    assert question.prompt_ids == [0, 1, 2, 3]
    assert question.reference_ids == [4, 5]


def test_of_a_conversation_the_last_answer_is_asked_for() -> None:
    is_label = np.array([False, False, True, True, False, True, True, False])
    (question,) = questions(Tokens.from_examples([Example(np.arange(8, dtype=np.int32), is_label)]), 1, 100)
    assert question.prompt_ids == [0, 1, 2, 3, 4]
    assert question.reference_ids == [5, 6]


def test_a_row_that_is_all_labels_is_asked_for_its_second_half() -> None:
    (question,) = questions(Tokens.from_examples([example(6, 1)]), 1, 100)
    assert question.prompt_ids == [0, 1, 2]


def test_rows_that_were_cut_come_last() -> None:
    rows = Tokens.from_examples([example(8, 2), example(5, 2), example(6, 2)])
    assert [question.example for question in questions(rows, 2, 8)] == [1, 2]
    assert [question.example for question in questions(rows, 3, 8)] == [1, 2, 0]


def test_answers_are_those_of_peft_alone(trained: Study) -> None:
    answers = trained.answers()
    assert list(answers["candidate"].unique()) == ["base", "r002-lr3e-2", "r008-lr3e-2"]
    assert list(answers.groupby("candidate").size()) == [2, 2, 2]
    folder = Path(trained.spec.model.id)
    tokenizer, rows = AutoTokenizer.from_pretrained(folder), load(trained.path / "data").eval
    for candidate, own in answers.groupby("candidate"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        if candidate != "base":
            model = PeftModel.from_pretrained(model, trained.path / "trials" / f"{candidate}-s0" / "adapter")
        for row in own.to_dict("records"):
            ids, labels = rows[row["example"]]
            prompt = torch.tensor(ids[: int(labels.argmax())])[None]
            assert row["prompt"] == tokenizer.decode(prompt[0], skip_special_tokens=True)
            assert row["reference"] == tokenizer.decode(ids[int(labels.argmax()) :], skip_special_tokens=True)
            for _ in range(5):
                next_id = model(input_ids=prompt).logits[0, -1].argmax()
                prompt = torch.cat([prompt, next_id.reshape(1, 1)], dim=1)
                if next_id == tokenizer.eos_token_id:
                    break
            expected = tokenizer.decode(prompt[0, int(labels.argmax()) :], skip_special_tokens=True)
            assert row["answer"] == expected


@pytest.mark.usefixtures("no_report")
def test_answers_differ_between_ranks_and_are_made_once(root: Path, trained: Study, tmp_path: Path) -> None:
    """A run keeps answers that it has, and replaces corrupt ones."""
    study = Study.open(shutil.copytree(trained.path, tmp_path / "study"))
    answers = study.answers()
    assert (answers.groupby("example")["answer"].nunique() > 1).any()
    file = study.path / "answers" / "answers.json"
    before, inode = file.read_bytes(), file.stat().st_ino
    run_small(root, study.path)
    assert file.stat().st_ino == inode
    file.write_bytes(before[:-20])
    run_small(root, study.path)
    assert file.read_bytes() == before


def test_answers_that_fail_end_no_study(root: Path, trained: Study, tmp_path: Path) -> None:
    """An adapter that cannot be read is an error of exit code 3; the study still concludes."""
    copy = Study.open(shutil.copytree(trained.path, tmp_path / "study"))
    file = copy.adapter_file(trial := copy.answered()[0])
    save_file({name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(file).items()}, file)
    record = read_json(trial_json := copy.trial_folder(trial) / "trial.json")
    record["files"][f"adapter/{file.name}"] = file_sha256(file)
    write_json(trial_json, record)
    shutil.rmtree(copy.path / "answers")
    progress = RecordingProgress()
    study = run_small(root, copy.path, progress=progress)
    assert study.open_failures().keys() == {ANSWERS}  # what `rankscope run` then ends with exit code 4 for
    assert "holds NaN or infinity" in study.failures()[ANSWERS].reason
    assert any(line.startswith("The answers did not finish:") for line in progress.lines)
    assert study.file("verdict.json").exists()
    assert study.file("report", "index.html").exists()
