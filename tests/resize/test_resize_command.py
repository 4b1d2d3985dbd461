"""`rankscope resize` as a user meets it: on a study's trained adapter, and on one that was made elsewhere."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import Result
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import rankscope
from rankscope.cli import app
from rankscope.data.tokens import Tokens, load
from rankscope.errors import ModelError, RankscopeError, StudyError
from rankscope.lora.saved import CONFIG, WEIGHTS, SavedAdapter, read_adapter, write_adapter
from rankscope.study.study import Study

RANK = 6


@pytest.fixture(scope="module")
def study(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Study:
    sets = ("measure.profiles=false", "measure.answers=0", "data.eval_rows=12", "training.evals=1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rankscope.report.finish.build", lambda *_, **__: Path())
        return rankscope.run(
            model=str(root / "model"), dataset=str(root / "data.json"), ranks=[RANK], seeds=[0], steps=60, batch_size=8,
            learning_rates=[1e-3], out=tmp_path_factory.mktemp("resize") / "study", sets=sets,
        )  # fmt: skip


@pytest.fixture(scope="module")
def adapter(study: Study) -> Path:
    (trial,) = study.spec.trials()
    return study.trial_folder(trial) / "adapter"


@pytest.fixture(scope="module")
def losses(study: Study, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """Held-out loss by rank of the truncated adapter; 0 is the whole one."""
    tokens, folder = load(study.path / "data").eval, tmp_path_factory.mktemp("ranks")
    found = {0: mean_loss(study.spec.model.id, adapter, tokens)}
    for rank in range(1, RANK + 1):
        answer(adapter, "--rank", rank, "--out", folder / str(rank))
        found[rank] = mean_loss(study.spec.model.id, folder / str(rank), tokens)
    return found


def test_an_adapter_that_is_not_what_was_measured_is_an_error(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(smaller: SavedAdapter, folder: Path) -> int:
        return write_adapter(smaller._replace(layers=[one._replace(b=-one.b) for one in smaller.layers]), folder)

    monkeypatch.setattr("rankscope.resize.command.write_adapter", spoil)
    done = resize(adapter, "--max-loss-increase", 0.1, "--out", tmp_path / "out")
    assert isinstance(done.exception, ModelError)
    assert "before it was written" in done.exception.what
    assert "bug in rankscope" in done.exception.todo


def resize(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["resize", *map(str, arguments)])


def answer(*arguments: object) -> Any:
    done = resize(*arguments, "--json")
    assert done.exit_code == 0, (done.output, done.exception)
    return json.loads(done.stdout)


@torch.no_grad()
def mean_loss(model_folder: str, folder: Path, tokens: Tokens) -> float:
    """Held-out loss by PEFT's own loading and forward, one example at a time."""
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model: Any = PeftModel.from_pretrained(base, str(folder)).eval()  # noqa: TID251  # just written
    total, labels = 0.0, 0
    for ids, is_label in tokens:
        wanted, row = torch.from_numpy(is_label[1:]), torch.from_numpy(ids.astype(np.int64))
        logits = model(input_ids=row[None], use_cache=False).logits[0, :-1]
        total += float(F.cross_entropy(logits[wanted], row[1:][wanted], reduction="sum"))
        labels += int(wanted.sum())
    return total / labels


def test_a_rank_for_all_layers(adapter: Path, tmp_path: Path) -> None:
    found = answer(adapter, "--rank", 2, "--out", tmp_path / "cut")
    config, weights = json.loads((tmp_path / "cut" / CONFIG).read_text()), load_file(tmp_path / "cut" / WEIGHTS)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (2, 2, {}, {})
    assert found["parameters_after"] == sum(weight.numel() for weight in weights.values())
    assert found["parameters_before"] == sum(weight.numel() for weight in load_file(adapter / WEIGHTS).values())
    assert found["parameters_before"] == 3 * found["parameters_after"]
    assert found["file_bytes_after"] == (tmp_path / "cut" / WEIGHTS).stat().st_size
    assert {(row["old_rank"], row["new_rank"]) for row in found["layers"]} == {(RANK, 2)}
    for row, old, new in zip(
        found["layers"], read_adapter(adapter).layers, read_adapter(tmp_path / "cut").layers, strict=True
    ):
        whole, cut = (f.scaling * f.b.double() @ f.a.double() for f in (old, new))
        assert row["relative_error"] == pytest.approx(float((whole - cut).norm() / whole.norm()), rel=1e-6)
        assert row["kept_energy"] == pytest.approx(1 - row["relative_error"] ** 2, rel=1e-4)
    assert found["largest_relative_error"] == max(row["relative_error"] for row in found["layers"])
    assert found["loss"] is None


def test_each_layer_its_own_rank(adapter: Path, tmp_path: Path) -> None:
    energy = answer(adapter, "--energy", "90%", "--out", tmp_path / "energy")
    assert energy["rule"] == {"energy": 0.9}
    assert min(row["kept_energy"] for row in energy["layers"]) >= 0.9
    assert len({row["new_rank"] for row in energy["layers"]}) > 1
    config = json.loads((tmp_path / "energy" / CONFIG).read_text())
    ranks = {row["layer"]: row["new_rank"] for row in energy["layers"]}
    assert config["rank_pattern"] == {name: rank for name, rank in ranks.items() if rank < max(ranks.values())}
    more = answer(adapter, "--cumulative", "0.9", "--out", tmp_path / "cumulative")
    assert more["kept_energy"] > energy["kept_energy"], "a share of the sum is more than one of the sum of squares"
    uniform = answer(adapter, "--rank", 3, "--out", tmp_path / "uniform")
    within = answer(adapter, "--budget-rank", 3, "--out", tmp_path / "within")
    assert within["parameters_after"] <= uniform["parameters_after"]
    assert within["kept_energy"] > uniform["kept_energy"]


@pytest.mark.parametrize("most", ["0.003%", "0.01%"])
def test_one_rank_within_a_loss_budget_against_all_ranks(
    study: Study, adapter: Path, losses: dict[int, float], tmp_path: Path, most: str
) -> None:
    losses = dict(losses)
    whole = losses.pop(0)
    assert list(losses.values()) == sorted(losses.values(), reverse=True), "else the smallest may not be found"
    limit = float(most[:-1]) / 100
    expected = min(rank for rank, loss in losses.items() if loss <= whole * (1 + limit))
    assert 1 < expected < RANK, "an answer at the edge would show little"
    found = answer(adapter, "--max-loss-increase", most, "--uniform", "--out", tmp_path / "cut")
    assert {row["new_rank"] for row in found["layers"]} == {expected}
    loss = found["loss"]
    assert loss["before"] == pytest.approx(whole, rel=1e-5)
    assert loss["before"] == pytest.approx(study.results()["eval_loss"].item(), rel=1e-5)
    assert loss["after"] == pytest.approx(losses[expected], rel=1e-5)
    assert loss["difference"] == pytest.approx(losses[expected] - whole, abs=5e-6)
    assert loss["increase"] == pytest.approx(losses[expected] / whole - 1, abs=1e-6)
    assert (loss["max_increase"], loss["examples"]) == (limit, 12)
    assert 0 < loss["standard_error"] < 1
    assert all(one["within"] == (one["increase"] <= limit) for one in loss["tried"])
    for one in loss["tried"]:
        (rank,) = set(one["ranks"].values())
        assert one["loss"] == pytest.approx(losses[rank], rel=1e-5)


def test_ranks_by_layer_within_a_loss_budget(study: Study, adapter: Path, tmp_path: Path) -> None:
    uniform = answer(adapter, "--max-loss-increase", "0.01%", "--uniform", "--out", tmp_path / "uniform")
    found = answer(adapter, "--max-loss-increase", "0.0001", "--out", tmp_path / "cut")
    assert found["parameters_after"] <= uniform["parameters_after"]
    loss = mean_loss(study.spec.model.id, tmp_path / "cut", load(study.path / "data").eval)
    assert found["loss"]["after"] == pytest.approx(loss, rel=1e-5)
    assert found["loss"]["after"] <= 1.0001 * found["loss"]["before"]
    tried = found["loss"]["tried"]
    assert found["parameters_after"] == min(one["parameters"] for one in tried if one["within"])
    assert {one["rule"] for one in tried} == {"most_energy"}


def test_an_adapter_from_elsewhere_on_data_that_are_named(study: Study, tmp_path: Path) -> None:
    """Its base model is the one that it names; the held-out rows are those that a study on these data would have."""
    model = AutoModelForCausalLM.from_pretrained(study.spec.model.id)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["fc1"]))
    torch.manual_seed(0)
    for name, weight in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    adapted.save_pretrained(str(tmp_path / "adapter"))
    options = ["--max-loss-increase", "1%", "--dataset", study.spec.data.id, "--set", "data.eval_rows=12"]
    found = answer(tmp_path / "adapter", *options, "--device", "cpu", "--dtype", "float32")
    assert found["adapter"] == str(tmp_path / "adapter-loss0.01"), "beside it"
    assert read_adapter(tmp_path / "adapter-loss0.01").layers
    expected = mean_loss(study.spec.model.id, tmp_path / "adapter", load(study.path / "data").eval)
    assert found["loss"]["before"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("language", "said"),
    [
        ("en", ("Parameters:", "Energy kept:", "Held-out loss:")),
        ("ko", ("파라미터 수:", "유지된 에너지:", "검증 손실:")),
    ],
)
def test_what_is_shown(adapter: Path, tmp_path: Path, language: str, said: tuple[str, ...]) -> None:
    done = resize(adapter, "--max-loss-increase", "1%", "--uniform", "--out", tmp_path / "cut", "--lang", language)
    assert done.exit_code == 0, done.exception
    assert [words for words in said if words not in done.stdout] == []
    assert {"self_attn.q_proj", "fc1"} <= set(done.stdout.split())
    assert str(tmp_path / "cut") in done.stdout
    assert "{" not in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one of --rank, --energy, --cumulative, --budget-rank, --max-loss-increase"),
        (["--rank", 2, "--energy", 0.9], "--rank and --energy given"),
        (["--rank", RANK + 1], f"the adapter's largest rank is {RANK}"),
        (["--budget-rank", RANK + 1], f"the adapter's largest rank is {RANK}"),
        (["--energy", "0"], "not a share between 0 and 1"),
        (["--energy", "1"], "not a share between 0 and 1"),
        (["--cumulative", "120%"], "not a share between 0 and 1"),
        (["--energy", "much"], "not a share between 0 and 1"),
        (["--energy", "nan"], "not a share between 0 and 1"),
        (["--max-loss-increase", "-1%"], "not a share between 0 and 1"),
        (["--rank", 2, "--uniform"], "--uniform goes with --max-loss-increase alone"),
        (["--rank", 2, "--dataset", "x.json"], "--dataset goes with --max-loss-increase alone"),
        (["--rank", 2, "--set", "data.eval_rows=4"], "--set goes with --max-loss-increase alone"),
        (["--max-loss-increase", "1%", "--model", "x"], "--model needs --dataset"),
        (["--max-loss-increase", "1%", "--set", "data.eval_rows=4"], "--set needs --dataset"),
    ],
)
def test_what_cannot_be_meant_is_refused(adapter: Path, tmp_path: Path, arguments: list[Any], message: str) -> None:
    done = resize(adapter, *arguments, "--out", tmp_path / "cut")
    assert isinstance(done.exception, StudyError)
    assert message in str(done.exception)
    assert done.exception.exit_code == 2
    assert not (tmp_path / "cut").exists()


def test_nothing_is_overwritten(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    answer(adapter, "--rank", 2, "--out", tmp_path / "cut")
    before = (tmp_path / "cut" / WEIGHTS).read_bytes()
    for out in (tmp_path / "cut", adapter, tmp_path / "cut" / CONFIG):
        done = resize(adapter, "--rank", 3, "--out", out)
        assert isinstance(done.exception, StudyError)
        assert "not empty" in str(done.exception)
    assert (tmp_path / "cut" / WEIGHTS).read_bytes() == before


def test_where_an_adapter_is_written_by_default(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((adapter / name).read_bytes())
    monkeypatch.chdir(folder)
    for arguments, expected in (
        ((folder, "--rank", 2), folder.with_name("adapter-r2")),
        (("../adapter/", "--energy", "95%"), Path("../adapter-energy0.95")),
        ((".", "--budget-rank", 2), folder.with_name("adapter-budget2")),
    ):
        assert Path(answer(*arguments)["adapter"]) == expected
        assert read_adapter(expected).layers
    monkeypatch.setattr(
        "rankscope.resize.command.find_adapter", lambda name, revision: adapter
    )  # as one in the hub's cache
    assert answer("owner/name", "--rank", 2)["adapter"] == "name-r2"
    assert read_adapter(folder / "name-r2").layers


def test_without_a_study_data_and_model_must_be_named(adapter: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    alone.mkdir()
    for name in (CONFIG, WEIGHTS):
        (alone / name).write_bytes((adapter / name).read_bytes())
    assert "--dataset is missing" in str(resize(alone, "--max-loss-increase", "1%").exception)
    config = json.loads((alone / CONFIG).read_text())
    (alone / CONFIG).write_text(json.dumps(config | {"base_model_name_or_path": None}))
    done = resize(alone, "--max-loss-increase", "1%", "--dataset", "data.json")
    assert "--model is missing" in str(done.exception)
    (alone / CONFIG).unlink()
    assert isinstance(resize(alone, "--rank", 2).exception, ModelError)
    assert isinstance(resize(tmp_path / "nowhere", "--rank", 2).exception, RankscopeError)
    assert [path.name for path in tmp_path.iterdir()] == ["alone"]
