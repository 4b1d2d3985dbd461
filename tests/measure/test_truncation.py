"""Truncated adapters against dense updates that are truncated and merged by themselves; recovery training."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from models import VOCAB, tiny_model
from rankscope.data.tokens import Example, TokenizedData, Tokens
from rankscope.errors import ModelError
from rankscope.lora.adapters import (
    adapter_weights,
    add_adapter,
    lora_layers,
    remove_adapters,
    save_adapter,
)
from rankscope.measure import truncation as cuts
from rankscope.measure.truncation import evaluate_truncations, group_ranks
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec
from rankscope.spec.resolve import resolve_spec
from rankscope.study.records import Cut

TRUE_RANK, RANK = 3, 8


def make_tokens(count: int, seed: int) -> Tokens:
    rng = np.random.default_rng(seed)
    rows = [rng.integers(3, VOCAB, int(rng.integers(6, 14)), dtype=np.int32) for _ in range(count)]
    return Tokens.from_examples([Example(ids, np.arange(len(ids)) >= 3) for ids in rows])


DATA = TokenizedData(make_tokens(8, 1), make_tokens(8, 1), {})
"""Trained on what is held out, so that training must lower its loss."""


def make_spec(**values: Any) -> StudySpec:
    training = {"steps": 6, "batch_size": 4} | values.pop("training", {})
    defaults = {"model": {"id": "m"}, "data": {"id": "d"}, "ranks": [2, RANK], "learning_rates": [1e-2]}
    return resolve_spec(defaults | {"training": training} | values)


def plant(model: PreTrainedModel, spec: StudySpec, folder: Path) -> Trial:
    """Saves an adapter of the highest rank whose every update has rank 3, in `adapter`; the model is as before."""
    trial = spec.trials()[len(spec.ranks) - 1]
    rank = trial.candidate.rank
    config = add_adapter(model, trial)
    weights, generator = adapter_weights(model, trial.name), torch.Generator().manual_seed(5)
    for name, weight in weights.items():
        size = weight.shape[1] if ".lora_A." in name else weight.shape[0]
        thin = torch.randn(size, TRUE_RANK, generator=generator) * 0.3
        mixed = thin @ torch.randn(TRUE_RANK, rank, generator=generator) / trial.candidate.scaling**0.5
        weight.data.copy_(mixed.T if ".lora_A." in name else mixed)
    save_adapter(weights, config, folder / "adapter")
    remove_adapters(model)
    return trial


def dense_loss(spec: StudySpec, folder: Path, trial: Trial, rank: int) -> float:
    """The held-out loss of a model into which each update, cut by a dense SVD, is merged; transformers' own forward."""
    model = tiny_model("llama-gqa")
    add_adapter(model, trial)
    saved = load_file(folder / "adapter" / "adapter_model.safetensors")
    updates = {}
    for name, _ in lora_layers(model):
        a, b = (saved[f"base_model.model.{name}.lora_{part}.weight"].double() for part in "AB")
        u, values, v = torch.linalg.svd(trial.candidate.scaling * b @ a, full_matrices=False)
        updates[name] = (u[:, :rank] * values[:rank] @ v[:rank]).float()
    remove_adapters(model)
    for name, update in updates.items():
        model.get_submodule(name).weight.data += update
    total, labels = 0.0, 0
    for ids, is_label in (DATA.eval[number] for number in range(len(DATA.eval))):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor(ids, dtype=torch.int64)[None]).logits[0, :-1]
        wanted = torch.tensor(is_label[1:])
        targets = torch.tensor(ids[1:], dtype=torch.int64)
        total += float(torch.nn.functional.cross_entropy(logits[wanted], targets[wanted], reduction="sum"))
        labels += int(wanted.sum())
    return total / labels


def take(
    spec: StudySpec, folder: Path, requests: list[tuple[int, int]], eval_loss: float | None = None
) -> dict[tuple[int, int], Cut]:
    model = tiny_model("llama-gqa")
    trial = plant(model, spec, folder)
    recorded = dense_loss(spec, folder, trial, TRUE_RANK) if eval_loss is None else eval_loss
    found = [*chain(*evaluate_truncations(model, spec, trial, folder / "adapter", recorded, requests, DATA))]
    assert not lora_layers(model), "the model is as it was"
    assert len({(cut.rank, cut.recover_steps) for cut in found}) == len(found)
    return {(cut.rank, cut.recover_steps): cut for cut in found}


def loss_of(cut: Cut) -> float:
    assert cut.eval_loss is not None
    return cut.eval_loss


@pytest.mark.parametrize(
    ("engine", "adapter"),
    [
        ("packed", {"alpha": 32}),
        ("packed", {"alpha": "2r"}),
        ("packed", {"alpha": 4, "use_rslora": True}),
        ("peft", {"alpha": 4, "use_rslora": True}),
    ],
)
def test_a_cut_is_the_best_update_of_its_rank(tmp_path: Path, engine: str, adapter: dict[str, Any]) -> None:
    """A planted update of rank 3 loses nothing down to rank 3."""
    spec = make_spec(adapter=adapter, training={"engine": engine})
    ranks = [1, 3, 5, RANK]
    found = take(spec, tmp_path, [(rank, 0) for rank in ranks])
    assert sorted(found) == [(rank, 0) for rank in ranks]
    trial = plant(tiny_model("llama-gqa"), spec, tmp_path)
    for rank in ranks:
        expected = dense_loss(spec, tmp_path, trial, rank)
        assert loss_of(found[rank, 0]) == pytest.approx(expected, rel=1e-4)
    whole = loss_of(found[RANK, 0])
    for rank in (3, 5):
        assert loss_of(found[rank, 0]) == pytest.approx(whole, rel=1e-4)
        assert found[rank, 0].kept_energy == pytest.approx(1)
    assert abs(loss_of(found[1, 0]) - whole) > 1e-2, "which is seen where something is lost"
    assert found[1, 0].kept_energy < 0.99


def test_a_rank_that_no_layer_has_loses_nothing(tmp_path: Path) -> None:
    """The keys of the tiny model are 16 wide, so an update of them has 16 directions: four of the twenty stay zero."""
    found = take(make_spec(ranks=[2, 24]), tmp_path, [(20, 0), (24, 0)])
    assert loss_of(found[20, 0]) == pytest.approx(loss_of(found[24, 0]), rel=1e-5)


def test_another_loss_than_the_recorded_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"held-out loss is .* here, and 3 was recorded"):
        take(make_spec(), tmp_path, [(2, 0)], eval_loss=3.0)
    with pytest.raises(ModelError, match="nan"):
        take(make_spec(), tmp_path, [(2, 0)], eval_loss=math.nan)


def test_only_what_is_wanted_is_measured(tmp_path: Path) -> None:
    assert list(take(make_spec(), tmp_path, [(2, 3)])) == [(2, 3)]


def test_recovery_goes_on_where_the_schedule_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recovery trains all truncations of a group together, on the next batches, at a tenth of the rate; losses fall."""
    seen: list[Any] = []

    def noted(engine: Any, members: Any, tokens: Tokens, training: Any, step: int) -> Any:
        found = own(engine, members, tokens, training, step)
        seen.append((step, [member.trial.candidate.rank for member in members], found[0].learning_rate))
        return found

    own = cuts.train_step
    monkeypatch.setattr(cuts, "train_step", noted)
    wanted = [(rank, steps) for rank in (1, 2, 4) for steps in (0, 6)]
    found = take(make_spec(), tmp_path, wanted)
    assert [step for step, _, _ in seen] == list(range(6, 12))
    assert {tuple(ranks) for _, ranks, _ in seen} == {(1, 2, 4)}
    assert [rate for _, _, rate in seen] == pytest.approx([5e-4] + 5 * [1e-3])
    for rank in (1, 2, 4):
        assert loss_of(found[rank, 6]) < loss_of(found[rank, 0])
    alone = take(make_spec(), tmp_path, [(2, 6)])
    assert loss_of(alone[2, 6]) == pytest.approx(loss_of(found[2, 6]), rel=1e-4)


def test_a_recovery_that_diverges_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def harmed(engine: Any, members: Any, tokens: Tokens, training: Any, step: int) -> Any:
        found = own(engine, members, tokens, training, step)
        bad = [member.trial.candidate.rank == 2 for member in members]
        return [one._replace(loss=math.nan) if wrong else one for wrong, one in zip(bad, found, strict=True)]

    own = cuts.train_step
    monkeypatch.setattr(cuts, "train_step", harmed)
    found = take(make_spec(), tmp_path, [(2, 2), (4, 2)])
    assert (found[2, 2].losses, found[2, 2].eval_loss) == (None, None)
    assert math.isfinite(loss_of(found[4, 2]))


def test_groups_take_no_more_memory_than_the_trial() -> None:
    assert group_ranks([1, 2, 4, 8, 16, 32, 64, 128], 256) == [[1, 2, 4, 8, 16, 32, 64, 128]]
    assert group_ranks([1, 2, 4, 8, 32, 128], 128) == [[1, 2, 4, 8, 32], [128]]
    assert group_ranks([3, 200, 255], 256) == [[3, 200], [255]]
    assert group_ranks([1, 2], 256, alone=True) == [[1], [2]]
    assert group_ranks([], 4) == []
