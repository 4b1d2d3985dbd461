"""Full fine-tuning equals a plain transformers loop, however its steps are divided; its files, and what goes wrong."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from folders import write_model
from models import UNPACKABLE, tiny_model
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.files import read_json
from rankscope.jobs.reference import make_full_train_state, train_full
from rankscope.model.load import load_model
from rankscope.spec.candidates import FullTrial
from rankscope.spec.models import DataSpec, ModelSpec, ReferenceSpec, StudySpec, TrainingSpec
from rankscope.study.metrics import read_rows
from rankscope.train.engine import PackedEngine
from rankscope.train.loop import choose_engine, train_trials
from rankscope.train.probe import make_packable, use_own_forward
from rankscope.train.step import train_step
from rankscope.train.stopping import StopRequest
from reference import Trained, padded_batch, plain_step, random_tokens

STEPS = 20
RATE = 5e-4
TRIAL = FullTrial(learning_rate=RATE, seed=1)
TRAINING = TrainingSpec(
    steps=STEPS,
    batch_size=4,
    lr_scheduler_type="linear",
    warmup_ratio=0.0,
    weight_decay=0.01,
    adam_epsilon=1e-6,  # OPT's key biases have no gradient but rounding, which 1e-8 would blow up to whole steps
)


def train_plainly(model: PreTrainedModel, tokens: Tokens) -> Trained:
    """The model's own forward, torch's loss, clipping and AdamW; weight decay on matrices only; linear schedule."""
    model.requires_grad_(True)
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=RATE, weight_decay=0.01, betas=(0.9, 0.999), eps=1e-6)
    losses = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (STEPS - step) / STEPS
        batch = padded_batch(tokens, TRIAL.seed, step, TRAINING.batch_size)
        losses.append(plain_step(model, batch, parameters, optimizer, 1.0))
    return Trained(losses, {name: weight.detach() for name, weight in model.named_parameters()})


def train_packed(name: str, tokens: Tokens, dtype: torch.dtype, tokens_per_forward: int = 1 << 30) -> Trained:
    model = tiny_model(name, dtype)
    member = make_full_train_state(model, TRIAL, TRAINING, STEPS)
    make_packable(model, [TRIAL.name])
    engine = PackedEngine(model, tokens_per_forward)
    losses = [train_step(engine, [member], tokens, TRAINING, step)[0].loss for step in range(STEPS)]
    return Trained(losses, {name: weight.detach() for name, weight in member.weights.items()})


def assert_same(got: Trained, expected: Trained, tolerance: float) -> None:
    assert expected.losses[0] - expected.losses[-1] > 1e-2, "the reference did not learn: nothing is shown"
    np.testing.assert_allclose(got.losses, expected.losses, rtol=1e-5)
    assert got.weights.keys() == expected.weights.keys()
    for key, value in expected.weights.items():
        torch.testing.assert_close(
            got.weights[key], value, rtol=0, atol=tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


FULL = [
    pytest.param(name, dtype, tolerance, marks=[] if fast else pytest.mark.slow)
    for name in ("opt-post-norm", "opt-pre-norm", "llama-gqa", "gpt2")
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-9))
    for fast in [name == "opt-post-norm" or (name, dtype) == ("llama-gqa", torch.float64)]
]


@pytest.mark.parametrize(("name", "dtype", "tolerance"), FULL, ids=str)
def test_full_fine_tuning_is_that_of_transformers(name: str, dtype: torch.dtype, tolerance: float) -> None:
    """Tied embeddings (OPT, GPT-2) and untied ones (Llama): the output layer's gradient is worked out in chunks."""
    tokens = random_tokens(30)
    assert_same(train_packed(name, tokens, dtype), train_plainly(tiny_model(name, dtype), tokens), tolerance)


@pytest.mark.parametrize("tokens_per_forward", [1, pytest.param(25, marks=pytest.mark.slow)])
def test_dividing_and_recomputing_change_rounding_only(tokens_per_forward: int) -> None:
    tokens, dtype = random_tokens(30), torch.float64
    whole = train_packed("opt-post-norm", tokens, dtype)
    assert_same(train_packed("opt-post-norm", tokens, dtype, tokens_per_forward), whole, 1e-9)


def test_a_model_that_cannot_be_packed_is_trained_on_padded_batches() -> None:
    name, tokens = "bloom", random_tokens(30)
    assert name in UNPACKABLE
    model = tiny_model(name)
    member = make_full_train_state(model, TRIAL, TRAINING, STEPS)
    engine, reason, _ = choose_engine(model, [member], TRAINING)
    assert (engine.name, reason is None) == ("peft", False)
    assert all(weight.grad is None for weight in member.parameters), "counting left gradients"
    losses = [train_step(engine, [member], tokens, TRAINING, step)[0].loss for step in range(STEPS)]
    got = Trained(losses, {key: weight.detach() for key, weight in member.weights.items()})
    assert_same(got, train_plainly(tiny_model(name), tokens), 1e-4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def data() -> TokenizedData:
    return TokenizedData(random_tokens(40), random_tokens(8, seed=1), {}, random_tokens(5, seed=2))


def study(model: str, training: TrainingSpec, dtype: str = "float32") -> StudySpec:
    spec = ModelSpec(id=model, dtype=dtype, device="cpu")  # type: ignore[arg-type]
    return StudySpec(model=spec, data=DataSpec(id="unused"), training=training, reference=ReferenceSpec(full=True))


def test_the_files_of_a_trial(folder: str, data: TokenizedData, tmp_path: Path) -> None:
    training = TrainingSpec(steps=4, batch_size=4, evals=2)
    train_full(study(folder, training), TRIAL, tmp_path, data, StopRequest())
    assert {path.name for path in tmp_path.iterdir()} == {"trial.json", "metrics.jsonl", "eval.json", "untrained.json"}
    record = read_json(tmp_path / "trial.json")
    assert (record["trial"], record["status"], record["engine"]) == ("full-lr5e-4-s1", "done", "packed")
    assert "not saved" in record["weights"]
    results = record["results"]
    assert results["trainable_params"] == sum(p.numel() for p in load_model(ModelSpec(id=folder)).parameters())
    assert results["adapter_bytes"] is None
    assert results["general_loss_after"] != results["general_loss_before"]
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if "train_loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 2, 4]
    assert len(read_json(tmp_path / "eval.json")["examples"]["loss"]) == 8


def test_a_trial_that_diverges_is_recorded(folder: str, data: TokenizedData, tmp_path: Path) -> None:
    training = TrainingSpec(steps=4, batch_size=4, warmup_ratio=0.0, max_grad_norm=0.0)
    train_full(study(folder, training), FullTrial(learning_rate=1e30, seed=0), tmp_path, data, StopRequest())
    record = read_json(tmp_path / "trial.json")
    assert record["status"] == "diverged"
    assert not (tmp_path / "eval.json").exists()


def test_over_a_bfloat16_base_the_weights_are_float32_and_products_are_not(
    folder: str, data: TokenizedData, tmp_path: Path
) -> None:
    training = TrainingSpec(steps=6, batch_size=4, warmup_ratio=0.0)
    losses = {}
    for dtype in ("float32", "bfloat16"):
        trial = FullTrial(learning_rate=1e-3, seed=0)
        train_full(study(folder, training, dtype), trial, tmp_path / dtype, data, StopRequest())
        results = read_json(tmp_path / dtype / "trial.json")["results"]
        losses[dtype] = [results["train_loss"], results["eval_loss"], results["general_loss_after"]]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=1e-2)
    assert losses["bfloat16"] != pytest.approx(losses["float32"], rel=1e-7), "no product was in bfloat16"


def test_general_loss_is_that_of_the_trained_model(folder: str, data: TokenizedData, tmp_path: Path) -> None:
    model = load_model(ModelSpec(id=folder))
    own = model.config._attn_implementation
    before = general_loss(model, data.general)
    training = TrainingSpec(steps=5, batch_size=4)
    member = make_full_train_state(model, TRIAL, training, 5)
    choice = choose_engine(model, [member], training)
    folders, facts = {TRIAL.name: tmp_path}, {"model_sha256": "x"}
    checkpoints = tmp_path / "checkpoints"
    train_trials(model, training, [member], choice, folders, checkpoints, data, facts, StopRequest())
    use_own_forward(model, own)
    results = read_json(tmp_path / "trial.json")["results"]
    assert results["general_loss_before"] == pytest.approx(before, rel=1e-5)
    assert results["general_loss_after"] == pytest.approx(general_loss(model, data.general), rel=1e-5)


@torch.no_grad()
def general_loss(model: PreTrainedModel, tokens: Tokens | None) -> float:
    """transformers' own loss, a mean over all labels of all sequences."""
    assert tokens is not None
    total = count = 0.0
    for ids, is_label in tokens:
        labels = torch.where(torch.from_numpy(is_label), torch.from_numpy(ids).long(), -100)[None]
        loss = model(input_ids=torch.from_numpy(ids).long()[None], labels=labels).loss
        total += float(loss) * is_label.sum()
        count += is_label.sum()
    return total / count
