"""Adapters of every variant, a study's own chat template, a tokenizer larger than the model: whole
studies, exported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from peft.utils import CONFIG_NAME as CONFIG
from transformers import AutoTokenizer

import rankscope
from export.loaded import logits, own_logits
from rankscope.export.command import export
from rankscope.export.show import serving_lines
from rankscope.report.card import prompt_format
from rankscope.spec.models import DataSpec
from rankscope.study.study import Study
from small_study import SETS

VARIANTS = ["rslora", "pissa", "olora", "loraplus", "dora"]


@pytest.fixture(scope="module")
def variants(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    return rankscope.run(
        model=str(root / "model"), dataset=str(root / "data.json"), ranks=[4], seeds=[0], steps=12, batch_size=4,
        learning_rates=[1e-2], variants=VARIANTS, out=tmp_path_factory.mktemp("variants") / "study",
        sets=["measure.profiles=false", "measure.answers=0", "data.eval_rows=12", "training.evals=1"],
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_is_used_over_the_original_base(variants: Study, tmp_path: Path, variant: str) -> None:
    """PiSSA and OLoRA train over a base that they have changed; what is exported is of the unchanged one."""
    (trial,) = (one for one in variants.trials if one.candidate.variant == variant)
    found = export(variants, tmp_path / "out", trial=trial.name, over=["bf16"])
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))  # just written
    torch.testing.assert_close(logits(model, variants), own_logits(variants, trial.name), rtol=1e-4, atol=1e-4)
    assert abs(found.deployed["float32"][1].mean) < 1e-5
    assert abs(found.deployed["bf16"][1].mean) > 1e-6
    merged = export(variants, tmp_path / "merged", trial=trial.name, merge="float32")
    assert abs(merged.deployed["float32"][1].mean) < 1e-5
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert config["r"] == (8 if variant in ("pissa", "olora") else 4)
    assert config["use_dora"] == (variant == "dora")
    assert not config["use_rslora"]


@pytest.mark.slow
def test_a_chat_template_of_the_study_goes_along(root: Path, tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": f"Add {n}"}, {"role": "assistant", "content": f"{n} + {n}"}]}
        for n in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    study = rankscope.run(
        model=str(root / "model"), dataset=str(tmp_path / "chat.jsonl"), ranks=[4], seeds=[0], steps=2, batch_size=4,
        chat_template=template, out=tmp_path / "study", sets=SETS,
    )  # fmt: skip
    found = export(study, tmp_path / "out", 4)
    assert found.made.own_template
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False) == "[user] Add 0\n[assistant] 0 + 0\n"
    assert template in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(("format", "own"), [("prompt_completion", True), ("alpaca", False)])
def test_a_tokenizer_larger_than_the_model_stays_away(
    trained: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, own: bool
) -> None:
    """PEFT would enlarge the model to it, by rows of random numbers. Its chat template is written, if it is the
    study's."""
    data = trained.spec.data.model_copy(update={"chat_template": "chatml"})
    trained = Study.of(trained, trained.spec.model_copy(update={"data": data}))
    monkeypatch.setattr(Study, "data_facts", trained.data_facts | {"format": format})
    shutil.copytree(trained.spec.model.id, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.add_tokens([f"<more-{n}>" for n in range(9)])
    tokenizer.save_pretrained(tmp_path / "model")
    found = export(trained, tmp_path / "out", 8, model=str(tmp_path / "model"))
    assert not list((tmp_path / "out").glob("tokenizer*"))
    assert (tmp_path / "out" / "chat_template.jinja").exists() == own
    assert ("chat_template.jinja" in serving_lines(found.made)["vLLM"]) == own
    model = AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "out"))  # just written
    torch.testing.assert_close(logits(model, trained), own_logits(trained, found.trial.name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("format", "changes", "said"),
    [
        ("alpaca", {"template": "```{instruction}``` {input} "}, ["````text\n```{instruction}``` {input}\n````"]),
        ("alpaca", {"template_without_input": "Q: {instruction}"}, ["### Question: {instruction}", "Q: {instruction}"]),
        ("messages", {"chat_template": "chatml"}, ["by the chat template: chatml."]),
        ("messages", {}, ["that of the base model's tokenizer"]),
        ("prompt_completion", {}, ["as it stands in the data"]),
        ("text", {}, ["plain text"]),
    ],
)
def test_a_card_names_the_template_that_was_used(format: str, changes: dict[str, str], said: list[str]) -> None:
    text = "\n".join(prompt_format(DataSpec(id="x", **changes), format))  # type: ignore[arg-type]
    assert [one for one in said if one not in text] == []
    assert ("### Question" in text) == (format == "alpaca" and "template" not in changes)
