"""Embeddings as targets, and options of PEFT's LoraConfig: trained as PEFT does, counted, saved, and read back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from marks import mostly_slow
from models import tiny_model
from rankscope.data.tokens import Tokens
from rankscope.errors import StudyError
from rankscope.lora.adapters import lora_layers, remove_adapter, remove_adapters, wrapped_modules
from rankscope.lora.saved import attached, read_adapter
from rankscope.plan.costs import predict
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.train.engine import PeftEngine
from rankscope.train.loop import EngineChoice, choose_engine
from rankscope.train.step import TrainState, make_train_state, save_trained_adapter, train_step
from reference import make_trial, random_tokens, train_with_peft

STEPS = 3
TRAINING = TrainingSpec(steps=STEPS, batch_size=4, lr_scheduler_type="linear", warmup_ratio=0.0)
QV = ("q_proj", "v_proj")

CASES: dict[str, tuple[str, tuple[str, ...], dict[str, Any], str]] = {  # model, targets, options, engine
    "embeddings": ("llama-gqa", ("q_proj", "embed_tokens"), {}, "peft"),
    "embeddings alone": ("llama-gqa", ("embed_tokens",), {}, "peft"),
    "positions": ("gpt2", ("c_attn", "wpe"), {}, "peft"),
    "exclude_modules": ("llama-gqa", QV, {"exclude_modules": ["layers.0.self_attn.q_proj"]}, "packed"),
    "layers_to_transform": ("llama-gqa", QV, {"layers_to_transform": [1]}, "packed"),
    "init_lora_weights": ("llama-gqa", QV, {"init_lora_weights": "orthogonal"}, "packed"),
    "alpha_pattern": ("llama-gqa", QV, {"alpha_pattern": {"q_proj": 64}}, "packed"),
    "modules_to_save": ("llama-gqa", QV, {"modules_to_save": ["norm", "lm_head"]}, "peft"),
    "trainable_token_indices": ("llama-gqa", QV, {"trainable_token_indices": {"embed_tokens": [3, 4, 5, 6]}}, "peft"),
    "lora_bias": ("opt-pre-norm", QV, {"lora_bias": True}, "peft"),
    "target_parameters": ("mixtral", QV, {"target_parameters": ["experts.down_proj"]}, "any"),
}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings"),
    pytest.mark.filterwarnings("ignore:.*target_parameters.*"),
]


def trial_with(rank: int, modules: tuple[str, ...], options: dict[str, Any]) -> Trial:
    trial = make_trial(rank, 1e-2, modules=modules)
    return trial.model_copy(update={"candidate": trial.candidate.model_copy(update={"peft": options})})


def train(model: PreTrainedModel, trials: list[Trial], tokens: Tokens) -> tuple[EngineChoice, list[TrainState], Any]:
    members = [make_train_state(model, trial, TRAINING, STEPS) for trial in trials]
    choice = choose_engine(model, members, TRAINING)
    steps = [train_step(choice.engine, members, tokens, TRAINING, step) for step in range(STEPS)]
    return choice, members, [[step[number].loss for step in steps] for number in range(len(trials))]


FAST = ("embeddings", "layers_to_transform", "modules_to_save", "trainable_token_indices")


@pytest.mark.parametrize("case", mostly_slow(CASES, *FAST, "target_parameters"))
def test_they_are_trained_as_peft_does_and_read_back(case: str, tmp_path: Path) -> None:
    name, modules, options, engine = CASES[case]
    tokens, trials = random_tokens(16), [trial_with(4, modules, options), trial_with(2, modules, options)]
    model = tiny_model(name)
    choice, members, losses = train(model, trials, tokens)
    assert engine in (choice.engine.name, "any")
    assert choice.engine.name == "packed" or choice.reason
    for trial, found in zip(trials, losses, strict=True):  # neither changes the other
        expected = train_with_peft(tiny_model(name), trial, tokens, TRAINING, STEPS)
        assert found == pytest.approx(expected.losses, rel=1e-5)
        member = members[trials.index(trial)]
        assert sum(p.numel() for p in member.parameters) == sum(weight.numel() for weight in expected.weights.values())
    save_trained_adapter(members[0], tmp_path)
    after = choice.engine.evaluate(tokens, [trials[0].name])[0]
    ids = torch.from_numpy(tokens[0].ids).long()[None]
    loaded = PeftModel.from_pretrained(tiny_model(name), str(tmp_path)).eval()  # warns about missing keys
    fresh = tiny_model(name)
    with attached(fresh, "saved", read_adapter(tmp_path)):
        read = PeftEngine(fresh, 4).evaluate(tokens, ["saved"])[0]
        with torch.no_grad():
            torch.testing.assert_close(loaded(input_ids=ids).logits, fresh(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert read.loss == pytest.approx(after.loss, rel=1e-5)
    assert not lora_layers(fresh)
    assert not wrapped_modules(fresh)


@pytest.mark.parametrize("case", mostly_slow(CASES, "embeddings"))
def test_they_are_counted_before_anything_is_loaded(case: str, tmp_path: Path) -> None:
    name, modules, options, engine = CASES[case]
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    adapter = {"target_modules": modules, "peft": options, "alpha": 16}
    study = {"model": {"id": str(tmp_path), "device": "cpu"}, "data": {"id": "unused"}, "ranks": [2, 4], "seeds": [0]}
    spec = StudySpec.model_validate(study | {"adapter": adapter, "training": TRAINING})
    prediction = predict(spec)
    assert engine in (prediction.engine, "any")
    for trial in spec.trials():
        member = make_train_state(model, trial, TRAINING, STEPS)
        assert prediction.params[trial.candidate.name] == sum(p.numel() for p in member.parameters)


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("case", ["embeddings", "modules_to_save", "trainable_token_indices"])
def test_a_model_without_them_is_the_one_it_was(case: str, one_by_one: bool) -> None:
    name, modules, options, _ = CASES[case]
    model, trials = tiny_model(name), [trial_with(4, modules, options), trial_with(2, modules, options)]
    before, weights = dict(model.named_modules()), {key: id(weight) for key, weight in model.named_parameters()}
    for trial in trials:
        make_train_state(model, trial, TRAINING, STEPS)
    if one_by_one:
        for trial in trials:
            remove_adapter(model, trial.name)
    else:
        remove_adapters(model)
    assert dict(model.named_modules()) == before
    assert {key: id(weight) for key, weight in model.named_parameters()} == weights


def test_a_variant_that_begins_from_the_weights_has_none_for_embeddings() -> None:
    trial = trial_with(4, ("q_proj", "embed_tokens"), {})
    trial = trial.model_copy(update={"candidate": trial.candidate.model_copy(update={"variant": "pissa"})})
    with pytest.raises(StudyError, match=r"pissa cannot initialise model.embed_tokens, a Embedding"):
        make_train_state(tiny_model("llama-gqa"), trial, TRAINING, STEPS)
