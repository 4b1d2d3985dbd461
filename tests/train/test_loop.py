"""The pack's loop: a trial that diverges is recorded and harms no other; schedules and lengths."""

import math
from pathlib import Path

import pytest

from folders import write_model
from rankscope.data.batches import total_steps
from rankscope.data.tokens import TokenizedData
from rankscope.files import read_json
from rankscope.model.load import load_model
from rankscope.spec.models import DataSpec, ModelSpec, StudySpec, TrainingSpec
from rankscope.study.metrics import read_rows
from rankscope.train.loop import train_pack
from rankscope.train.stopping import StopRequest
from reference import random_tokens


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def data() -> TokenizedData:
    return TokenizedData(random_tokens(40), random_tokens(8, seed=1), {})


def study(model: str, **changes: object) -> StudySpec:
    values = {"ranks": (4,), "seeds": (0,), "learning_rates": (1e-3,)} | changes
    return StudySpec(model=ModelSpec(id=model), data=DataSpec(id="unused"), **values)  # type: ignore[arg-type]


def run(spec: StudySpec, data: TokenizedData, folder: Path) -> dict[str, dict]:
    trials = spec.trials()
    train_pack(
        load_model(spec.model),
        spec,
        trials,
        {t.name: folder / t.name for t in trials},
        folder / "checkpoints",
        data,
        "p000",
        "hash",
        StopRequest(),
    )
    return {t.name: read_json(folder / t.name / "trial.json") for t in trials}


def test_a_diverging_trial_is_recorded_and_harms_no_other(model: str, data: TokenizedData, tmp_path: Path) -> None:
    training = TrainingSpec(steps=8, batch_size=4, warmup_ratio=0.0, max_grad_norm=0.0)
    alone = run(study(model, training=training), data, tmp_path / "alone")
    mixed = run(study(model, training=training, learning_rates=(1e-3, 1e30)), data, tmp_path / "mixed")
    bad, good = mixed["r004-lr1e30-s0"], mixed["r004-lr1e-3-s0"]
    assert bad["status"] == "diverged"
    assert "not finite at step" in bad["reason"]
    assert bad["results"] is None
    assert not (tmp_path / "mixed" / "r004-lr1e30-s0" / "adapter").exists()
    assert good["status"] == "done"
    assert isinstance(good["results"]["tokens"], int), "no 1234.0"
    losses = {
        kind: [
            row["train_loss"]
            for row in read_rows(tmp_path / kind / good["trial"] / "metrics.jsonl")
            if "train_loss" in row
        ]
        for kind in ("alone", "mixed")
    }
    assert len(losses["mixed"]) == 8
    assert losses["mixed"] == pytest.approx(losses["alone"], rel=1e-5)
    assert alone["r004-lr1e-3-s0"]["results"]["eval_loss"] == pytest.approx(good["results"]["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_are_those_of_transformers(model: str, data: TokenizedData, tmp_path: Path, schedule: str) -> None:
    training = TrainingSpec(steps=10, batch_size=4, warmup_ratio=0.2, lr_scheduler_type=schedule)  # type: ignore[arg-type]
    run(study(model, training=training), data, tmp_path)
    rows = read_rows(tmp_path / "r004-lr1e-3-s0" / "metrics.jsonl")
    rates = [row["step_learning_rate"] for row in rows if "step_learning_rate" in row]
    after = {
        "cosine": [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(8)],
        "linear": [1 - i / 8 for i in range(8)],
        "constant": [1.0] * 8,
    }[schedule]
    assert rates == pytest.approx([1e-3 * share for share in [0.0, 0.5, *after]])


def test_both_engines_and_a_kept_base_dropout(model: str, data: TokenizedData, tmp_path: Path) -> None:
    """The engines agree with the base's dropout off; with it on, training differs and evaluation still has none."""
    training = TrainingSpec(steps=5, batch_size=4)
    packed = run(study(model, training=training), data, tmp_path / "packed")["r004-lr1e-3-s0"]
    peft = run(study(model, training=training.model_copy(update={"engine": "peft"})), data, tmp_path / "peft")[
        "r004-lr1e-3-s0"
    ]
    assert (packed["engine"], peft["engine"]) == ("packed", "peft")
    assert packed["results"]["eval_loss"] == pytest.approx(peft["results"]["eval_loss"], rel=1e-5)
    for engine in ("packed", "peft"):
        kept = training.model_copy(update={"base_dropout": "keep", "engine": engine})
        first = run(study(model, training=kept), data, tmp_path / f"{engine}-keep")["r004-lr1e-3-s0"]
        again = run(study(model, training=kept), data, tmp_path / f"{engine}-again")["r004-lr1e-3-s0"]
        assert first["results"]["train_loss"] != packed["results"]["train_loss"]
        assert first["results"]["eval_loss"] == again["results"]["eval_loss"], "the same seed gives the same dropout"
        assert abs(first["results"]["eval_loss"] - packed["results"]["eval_loss"]) < 0.02


def test_length_of_the_schedule() -> None:
    assert total_steps(TrainingSpec(steps=7), 100) == 7
    assert total_steps(TrainingSpec(batch_size=8), 100) == 13
    assert total_steps(TrainingSpec(batch_size=4, gradient_accumulation_steps=2, epochs=2), 100) == 26
    assert total_steps(TrainingSpec(batch_size=8, epochs=0.5), 100) == 7
