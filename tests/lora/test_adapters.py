"""Adapters: their start depends on the seed alone, and what is saved loads in PEFT and does the same."""

from pathlib import Path

import pytest
import torch
from peft import PeftModel

from models import CONFIGS, tiny_model
from rankscope.data.tokens import Tokens
from rankscope.errors import StudyError
from rankscope.lora.adapters import (
    adapter_weights,
    add_adapter,
    lora_config,
    remove_adapter,
    remove_adapters,
    save_adapter,
)
from rankscope.lora.layout import Slice, flatten
from rankscope.spec.candidates import Trial
from rankscope.spec.models import ModelSpec, TrainingSpec
from rankscope.train.engine import PackedEngine
from rankscope.train.loop import choose_engine
from rankscope.train.step import TrainState, make_train_state, train_step
from reference import make_trial, random_tokens

CPU = torch.device("cpu")
TRAINING = TrainingSpec(steps=5, batch_size=4, warmup_ratio=0.0)


def train(name: str, trials: list[Trial], tokens: Tokens) -> tuple[PackedEngine, list[TrainState]]:
    model = tiny_model(name)
    base = ModelSpec(id="base/model", commit="0" * 40)
    members = [make_train_state(model, trial, TRAINING, 5, base) for trial in trials]
    engine, reason, _ = choose_engine(model, members, TRAINING)
    assert reason is None
    for step in range(5):
        train_step(engine, members, tokens, TRAINING, step)
    return engine, members  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_kill_before_a_file_has_its_name_leaves_the_old_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == name:
            raise KeyboardInterrupt
        return own(self, target)

    config = lora_config(make_trial(2, 1e-3).candidate, tiny_model("llama-gqa"))
    save_adapter({"a": torch.zeros(2)}, config, tmp_path)
    before = (tmp_path / name).read_bytes()
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        save_adapter({"a": torch.ones(2)}, config, tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


SAVED = [
    pytest.param(name, rslora, marks=[] if fast else pytest.mark.slow)
    for name in CONFIGS
    for rslora in (False, True)
    for fast in [(name, rslora) in {("opt-post-norm", False), ("gpt2", True), ("mixtral", False)}]
]


@pytest.mark.parametrize(("name", "rslora"), SAVED)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_saved_adapter_gives_the_same_logits_in_peft(name: str, rslora: bool, tmp_path: Path) -> None:
    tokens = random_tokens(20)
    plain = [make_trial(8, 1e-2), make_trial(3, 1.5e-2, seed=1)]
    trials = [t.model_copy(update={"candidate": t.candidate.model_copy(update={"use_rslora": rslora})}) for t in plain]
    engine, members = train(name, trials, tokens)
    for member in members:
        folder = tmp_path / member.trial.name
        size = save_adapter(member.weights, member.config, folder)
        assert size == (folder / "adapter_model.safetensors").stat().st_size
        batch = flatten(tokens, [Slice(member.trial.name, [0])], CPU)
        loaded = PeftModel.from_pretrained(tiny_model(name), str(folder)).eval()
        with torch.no_grad():
            got = engine.head(engine.hidden(batch))
            logits = loaded(input_ids=batch.input_ids).logits[0, batch.label_positions]
            base = tiny_model(name)(input_ids=batch.input_ids).logits[0, batch.label_positions]
        torch.testing.assert_close(got, logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, base, atol=1e-2), "the adapter must do something"
        own = loaded.peft_config["default"]
        assert (own.base_model_name_or_path, own.revision) == ("base/model", "0" * 40)


def test_start_depends_on_the_seed_alone() -> None:
    """Initial weights depend on the trial alone, not on adapters injected before or on torch's random state."""
    first, second = tiny_model("llama-gqa"), tiny_model("llama-gqa")
    trial = make_trial(8, 1e-3, seed=5)
    add_adapter(first, trial)
    add_adapter(second, make_trial(3, 1e-3, seed=9))
    torch.manual_seed(1234)
    add_adapter(second, trial)
    expected, got = adapter_weights(first, trial.name), adapter_weights(second, trial.name)
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[key], got[key]) for key in expected)
    other = tiny_model("llama-gqa")
    add_adapter(other, make_trial(8, 1e-3, seed=6))
    assert any(
        not torch.equal(a, b)
        for a, b in zip(expected.values(), adapter_weights(other, "r008-lr1e-3-s6").values(), strict=True)
    )


def test_all_adapters_stay_trainable_and_the_base_frozen() -> None:
    model = tiny_model("llama-gqa")
    for rank in (2, 4, 8):
        add_adapter(model, make_trial(rank, 1e-3))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name for name, _ in model.named_parameters() if "lora_" in name} == trainable


def test_modules_that_match_nothing_are_named() -> None:
    with pytest.raises(StudyError, match=r"target_modules[\s\S]*q_proj"):
        add_adapter(tiny_model("llama-gqa"), make_trial(8, 1e-3, modules=("query",)))


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "mixtral"])
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning")
def test_a_model_without_its_adapters_is_the_one_it_was(name: str, one_by_one: bool) -> None:
    """PEFT nests two wrappers around Mixtral's experts: neither may stay, nor put the experts into themselves."""
    asked = "all-linear+experts" if name == "mixtral" else "all-linear"
    model, trials = tiny_model(name), [make_trial(2, 1e-3, modules=asked), make_trial(4, 1e-3, modules=asked)]
    modules, weights = dict(model.named_modules()), dict(model.named_parameters())
    for _ in range(2):  # as one pack follows another
        for trial in trials:
            add_adapter(model, trial)
        if one_by_one:
            for trial in trials:
                remove_adapter(model, trial.name)
        else:
            remove_adapters(model)
        assert dict(model.named_modules()) == modules
        assert {key: id(weight) for key, weight in model.named_parameters()} == {k: id(w) for k, w in weights.items()}
