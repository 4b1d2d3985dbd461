"""`rankscope judge` on runs that TRL and transformers' Trainer really wrote (make_runs.py), and on files of documented
form: what is confounded, what the seeds show, and what is refused."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from rankscope.analysis.decision import lower_bound
from rankscope.cli import main
from rankscope.errors import DataError, StudyError
from rankscope.judge import readers
from rankscope.judge.command import Judged, describe, judge, study_text
from rankscope.judge.differences import _over_seeds, largest_spread
from rankscope.spec.resolve import resolve_spec
from rankscope.text.catalogue import load
from rankscope.ui.console import out_console

RUNS = Path(__file__).parents[1] / "fixtures" / "runs"
COLUMNS = ["Name", "State", "Created", "Runtime", "peft_config.default.r", "peft_config.default.lora_alpha"]
COLUMNS += ["learning_rate", "seed", "train/global_step", "eval/loss", "train/loss"]


def runs_of(found: Judged, what: str) -> set[str]:
    """Runs that a confounder or a doubt names; empty where there is none of this kind."""
    return {run for one in (*found.confounders, *found.limits) if one.what == what for run in one.runs}


def write_csv(file: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """A CSV as W&B exports its run table. Rows give `r`, `seed` and `eval`, and whatever differs from the defaults."""
    lines = [",".join(f'"{name}"' for name in COLUMNS)]
    for number, row in enumerate(rows):
        cells: dict[str, Any] = {
            "Name": f"run-{number}",
            "State": "finished",
            "Created": f"2026-01-01T{number:02d}:00:00.000Z",
        }
        cells |= {"Runtime": 60, "lora_alpha": 16, "learning_rate": 2e-4, "train/global_step": 100, "train/loss": 1.0}
        cells |= {"r": row["r"], "eval/loss": row["eval"], "seed": row.get("seed", 0), **row}
        lines.append(",".join(f'"{cells.get(name.removeprefix("peft_config.default."), "")}"' for name in COLUMNS))
    file.write_text("\n".join(lines) + "\n")
    return file


def peft_result(rank: int, **changes: Any) -> dict[str, Any]:
    """A result file of PEFT's method_comparison: fields of `log_results` in its MetaMathQA/utils.py."""
    train = {"step": 5000, "train loss": 0.6 - rank / 1e4, "test accuracy": 0.48 + rank / 1e4, "train samples": 20000}
    result: dict[str, Any] = {
        "run_info": {
            "created_at": "2025-06-19T16:55:20+00:00",
            "experiment_name": f"lora/llama-3.2-3B-rank{rank}",
            "train_config": {
                "model_id": "meta-llama/Llama-3.2-3B",
                "batch_size": 4,
                "max_steps": 5000,
                "max_seq_length": 768,
                "seed": 0,
                "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
                "lr_scheduler": "cosine",
            },
            "peft_config": {
                "peft_type": "LORA",
                "r": rank,
                "lora_alpha": 2 * rank,
                "target_modules": ["v_proj", "q_proj"],
            },
        },
        "train_info": {
            "accelerator_memory_max": 22_540_189_696,
            "train_time": 1853.5,
            "status": "success",
            "metrics": [{"step": 250, "valid accuracy": 0.38, "train loss": 0.94}, train],
        },
        "meta_info": {"dataset_info": {"metamath": {"sha": "aa4f34d3d2d3"}, "gsm8k": {"sha": "e53f048856ff"}}},
    }
    for path, value in changes.items():
        part, _, field = path.rpartition("__")
        place = result
        for key in part.split("__") if part else ():
            place = place[key]
        place[field] = value
    return result


@pytest.fixture
def confounded(tmp_path: Path) -> Path:
    """TRL's runs, with the times at which they ended: rank 2, then 4, then 8."""
    folder = shutil.copytree(RUNS / "trl-confounded", tmp_path / "trl")
    for hour, state in enumerate(sorted(folder.rglob(readers.STATE))):
        os.utime(state, (1.8e9 + 3600 * hour, 1.8e9 + 3600 * hour))
    return folder


def test_runs_that_cannot_support_a_conclusion_are_told_each_confounder(confounded: Path) -> None:
    found = judge([confounded])
    assert sorted(found.runs["rank"]) == [2, 4, 8]
    assert set(found.runs["run"]) == {"rank2", "rank4", "rank8"}, "a run with several checkpoints is one run"
    texts = {one.what: one.text for one in found.confounders}
    assert texts["learning_rate"].startswith("learning rate: 9e-4 at rank 2 (rank2); 8e-4 at rank 4 (rank4); 4.5e-4 at")
    assert "the highest that was logged" in texts["learning_rate"]
    assert texts["steps"] == "steps: 40 at rank 2, 8 (rank2, rank8); 20 at rank 4 (rank4)"
    assert "4 at rank 2 (rank2); 2 at rank 4 (rank4); 1 at rank 8 (rank8)" in texts["scaling"]
    assert "rank 2, 4, 8, one after the other" in texts["order"]
    assert runs_of(found, "no_seed") == {"rank2", "rank4", "rank8"}
    assert runs_of(found, "one_rate") == runs_of(found, "not_recorded") == {"rank2", "rank4", "rank8"}
    assert {"base_model", "target_modules", "dropout", "batch_size", "eval_rows"}.isdisjoint(texts), "they are alike"
    assert found.differences == []


def test_files_that_were_copied_together_have_no_order(confounded: Path) -> None:
    for state in confounded.rglob(readers.STATE):
        os.utime(state, (1.8e9, 1.8e9))
    assert not runs_of(judge([confounded]), "order")


def test_a_run_is_judged_by_its_last_checkpoint(confounded: Path) -> None:
    runs = judge([confounded]).runs.set_index("run")
    state = json.loads((confounded / "rank2" / "checkpoint-40" / readers.STATE).read_text())
    evaluated = [row for row in state["log_history"] if "eval_loss" in row]
    assert runs.loc["rank2", "steps"] == 40
    assert runs.loc["rank2", "eval_loss"] == evaluated[-1]["eval_loss"]
    assert runs.loc["rank2", "best_loss"] == min(row["eval_loss"] for row in evaluated)
    late = [row["loss"] for row in state["log_history"] if "loss" in row and row["step"] > 36]
    assert runs.loc["rank2", "train_loss"] == pytest.approx(np.mean(late))
    assert (runs["eval_rows"] == 20).all()
    assert (runs["batch_size"] == 8).all()
    assert (runs["base_model"] == "made-up/tiny-llama").all()


def test_seeds_alike_give_differences_as_scipy_has_them() -> None:
    found = judge([RUNS / "trainer"])
    assert {one.what for one in found.confounders} <= {"order"}
    (shown,) = found.differences
    losses = found.runs.pivot(index="rank", columns="seed", values="eval_loss")
    assert shown["ranks"] == [1, 4, 16]
    assert shown["seeds"] == [0, 1, 2], "Trainer's model card has the seed"
    assert (found.runs["data"] == "made-up-sums").all()
    best = min(shown["rows"], key=lambda row: row["mean"])["rank"]
    for row in shown["rows"]:
        assert row["mean"] == pytest.approx(losses.loc[row["rank"]].mean())
        if row["rank"] != best:
            apart = losses.loc[row["rank"]] - losses.loc[best]
            low, high = stats.t.interval(0.95, 2, apart.mean(), apart.std(ddof=1) / math.sqrt(3))
            assert row["regret"] == pytest.approx(apart.mean())
            assert row["high"] >= high - 1e-12, "the best of the sample owes something to luck"
            assert row["low"] <= max(0.0, low) + 1e-12
    assert shown["margin_of"] == "gain", "Trainer evaluated before the first step"
    assert shown["outcome"] is not None


def test_the_card_and_the_name_give_the_seed_that_the_state_lacks(tmp_path: Path) -> None:
    for name in ("r1-a", "r1-b"):
        shutil.copytree(RUNS / "trainer" / name, tmp_path / "runs" / name)
    (tmp_path / "runs" / "r1-b" / "README.md").unlink()
    (tmp_path / "runs" / "r1-b").rename(tmp_path / "runs" / "r1-seed7")
    found = judge([tmp_path / "runs"])
    assert dict(zip(found.runs["run"], found.runs["seed"], strict=True)) == {"r1-a": 0, "r1-seed7": 7}
    assert runs_of(found, "named_seed") == {"r1-seed7"}


EXACT = {"train/loss": 1.000013}  # of more digits than chance makes equal
NOISE = {8: (0.0, 0.011, -0.006), 64: (0.002, 0.008, -0.007)}


def several(eval_by_rank: Mapping[int, float], **changes: Any) -> list[dict[str, Any]]:
    return [
        {"r": rank, "seed": seed, "eval": eval_by_rank[rank] + noise, **changes}
        for rank, of in NOISE.items()
        for seed, noise in enumerate(of)
    ]


def test_a_table_of_wandb_with_seeds_shows_a_rank_that_is_worse(tmp_path: Path) -> None:
    found = judge([write_csv(tmp_path / "runs.csv", several({8: 1.9, 64: 1.5}))])
    (shown,) = found.differences
    assert [row["within_margin"] for row in shown["rows"]] == [False, True]
    apart = 0.4 + np.subtract(NOISE[8], NOISE[64])
    interval = stats.t.interval(0.95, 2, apart.mean(), apart.std(ddof=1) / math.sqrt(3))
    assert (shown["rows"][0]["low"], shown["rows"][0]["high"]) == pytest.approx(interval), "of two ranks, Student's"
    assert shown["outcome"] == "recommended"
    assert shown["rank"] == 64
    assert runs_of(found, "scaling") == set(found.runs["run"]), "alpha is 16 at both ranks"
    assert runs_of(found, "order") == set(found.runs["run"])


def test_close_ranks_stay_open_and_ask_for_seeds(tmp_path: Path) -> None:
    (shown,) = judge([write_csv(tmp_path / "runs.csv", several({8: 1.511, 64: 1.5}))]).differences
    assert [row["within_margin"] for row in shown["rows"]] == [None, True]
    assert (shown["rank"], shown["undetermined"]) == (64, ["8"])
    assert shown["more_seeds"] in (2, 5, 9)
    study = judge([tmp_path / "runs.csv"]).study
    assert study["seeds"] == list(range(3 + shown["more_seeds"]))


def test_a_setting_that_every_rank_has_is_no_confounder(tmp_path: Path) -> None:
    rows = [*several({8: 1.9, 64: 1.5}), *several({8: 1.8, 64: 1.45}, learning_rate=1e-4)]
    found = judge([write_csv(tmp_path / "runs.csv", rows)])
    assert not runs_of(found, "learning_rate")
    assert not runs_of(found, "one_rate")
    assert [one["at"] for one in found.differences] == [{"learning_rate": 2e-4}, {"learning_rate": 1e-4}]
    assert found.study["learning_rates"] == [1e-4, 2e-4]


def test_seeds_that_differ_between_ranks_are_a_confounder(tmp_path: Path) -> None:
    rows = [{"r": 8, "seed": 0, "eval": 1.61}, {"r": 64, "seed": 1, "eval": 1.52}]
    found = judge([write_csv(tmp_path / "runs.csv", rows)])
    assert runs_of(found, "seed") == {"run-0", "run-1"}
    assert found.differences == []


@pytest.mark.parametrize(
    ("rows", "what", "named"),
    [
        (
            [*several({8: 1.9, 64: 1.5}), {"r": 8, "seed": 0, "eval": 1.7}],
            "other_losses",
            {"run-0", "run-6"},
        ),
        ([*several({8: 1.9, 64: 1.5}), {"r": 8, "seed": 3, "eval": "NaN"}], "diverged", {"run-6"}),
        ([{"r": 8, "eval": ""}, {"r": 64, "eval": ""}], "no_loss", {"run-0", "run-1"}),
        ([{"r": 8, "eval": 1.5}, {"r": 8, "seed": 1, "eval": 1.6}], "one_rank", {"run-0", "run-1"}),
        ([{"r": 8, "eval": 1.5, "State": "crashed"}, {"r": 64, "eval": 1.6}], "unfinished", {"run-0"}),
        (
            [{"r": 8, "eval": 1.5, "State": "crashed", "train/global_step": ""}, {"r": 64, "eval": 1.6}],
            "unfinished",
            {"run-0"},
        ),
        ([{"r": 8, "eval": 1.5, "seed": ""}, {"r": 64, "eval": 1.6}], "no_seed", {"run-0"}),
        ([{"r": 8, "eval": 1.5, "learning_rate": ""}, {"r": 64, "eval": 1.6}], "only_others", {"run-0"}),
        ([{"r": 8, "eval": 1.5, "lora_alpha": ""}, {"r": 64, "eval": 1.6}], "only_others", {"run-0"}),
    ],
)
def test_doubtful_runs_are_named(tmp_path: Path, rows: list[Mapping[str, Any]], what: str, named: set[str]) -> None:
    assert runs_of(judge([write_csv(tmp_path / "runs.csv", rows)]), what) == named


def test_a_rank_that_diverged_once_is_compared_with_none(tmp_path: Path) -> None:
    rows = [*several({8: 1.9, 64: 1.5}), {"r": 8, "seed": 3, "eval": "NaN"}]
    assert judge([write_csv(tmp_path / "runs.csv", rows)]).differences == []


@pytest.mark.parametrize("steps", ["", 100])
def test_a_run_that_crashed_is_compared_nowhere(tmp_path: Path, steps: Any) -> None:
    changes = {"train/global_step": steps, "State": "crashed"}
    rows = [row | (changes if row["seed"] == 2 else {"train/global_step": steps}) for row in several({8: 1.9, 64: 1.5})]
    (shown,) = judge([write_csv(tmp_path / "runs.csv", rows)]).differences
    assert shown["seeds"] == [0, 1]


def test_seeds_of_equal_rounded_losses_are_no_copies(tmp_path: Path) -> None:
    losses = {8: (1.53, 1.53, 1.55), 64: (1.5, 1.51, 1.49)}
    rows = [{"r": rank, "seed": seed, "eval": one} for rank, of in losses.items() for seed, one in enumerate(of)]
    found = judge([write_csv(tmp_path / "runs.csv", rows)])
    assert len(found.runs) == 6
    assert [one["seeds"] for one in found.differences] == [[0, 1, 2]]
    found = judge([write_csv(tmp_path / "runs.csv", [*rows, rows[0]])])
    assert len(found.runs) == 6
    assert found.skipped == [("run-6", "a copy of another run")]
    same = [row | {"train/loss": "", "eval": row["eval"] + 1e-7} for row in rows]
    assert not judge([write_csv(tmp_path / "runs.csv", same)]).skipped, "one of the two losses is missing"


@pytest.mark.parametrize("changes", [{"seed": 3}, {"seed": 3, "learning_rate": 1e-4}, {"learning_rate": 2.0000001e-4}])
def test_exact_losses_of_another_run_are_a_copy_whatever_its_seed_or_rate(
    tmp_path: Path, changes: Mapping[str, Any]
) -> None:
    rows = [*several({8: 1.9, 64: 1.5}, **EXACT), {"r": 8, "seed": 0, "eval": 1.9, **EXACT, **changes}]
    found = judge([write_csv(tmp_path / "runs.csv", rows)])
    assert found.skipped == [("run-6", "a copy of another run")]
    assert [one["seeds"] for one in found.differences] == [[0, 1, 2]]


def test_runs_that_diverged_are_no_copies(tmp_path: Path) -> None:
    diverged = [{"r": 8, "seed": seed, "eval": 1.9, "train/loss": "inf"} for seed in (3, 3)]
    assert not judge([write_csv(tmp_path / "runs.csv", [*several({8: 1.9, 64: 1.5}), *diverged])]).skipped


def test_runs_without_a_seed_do_not_count_as_further_seeds(tmp_path: Path) -> None:
    rows = [row | {"seed": ""} for row in several({8: 1.9, 64: 1.5})]
    assert judge([write_csv(tmp_path / "runs.csv", rows)]).differences == []


def test_losses_of_too_few_digits_show_nothing(tmp_path: Path) -> None:
    rows = [{"r": rank, "seed": seed, "eval": loss} for rank, loss in ((8, 1.52), (64, 1.5)) for seed in range(3)]
    rows = [row | {"eval": round(row["eval"] + 0.01 * row["seed"], 2)} for row in rows]
    (shown,) = judge([write_csv(tmp_path / "runs.csv", rows)]).differences
    assert shown["coarse"]
    assert shown["outcome"] is None


def test_one_seed_says_which_spread_would_do(tmp_path: Path) -> None:
    rows = [{"r": 8, "eval": 1.53}, {"r": 64, "eval": 1.5}, {"r": 256, "eval": 1.51}]
    (shown,) = judge([write_csv(tmp_path / "runs.csv", rows)]).differences
    assert shown["gap"] == pytest.approx(0.03)
    assert shown["outcome"] is None


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_largest_spread_is_where_the_rule_of_the_verdict_turns(ranks: int) -> None:
    for seeds, spread in largest_spread(0.02, ranks).items():
        pattern = np.linspace(-1, 1, seeds)
        for share, shown in ((0.999, True), (1.001, False)):
            values = 0.02 + share * spread * pattern / pattern.std(ddof=1)
            level = {3: 0.6, 5: 0.15, 8: 0.1, 12: 0.1}[seeds] * 0.05 / (ranks - 1) ** 2
            assert (lower_bound(_over_seeds(values), seeds - 1, level) > 0) == shown


def test_results_of_peft_have_scores_and_no_loss_to_compare(tmp_path: Path) -> None:
    for rank in (32, 64):
        (tmp_path / f"rank{rank}.json").write_text(json.dumps(peft_result(rank)))
    (tmp_path / "failed.json").write_text(json.dumps(peft_result(8, train_info__status="failed")))
    (tmp_path / "ia3.json").write_text(json.dumps(peft_result(8, run_info__peft_config={"peft_type": "IA3", "r": 8})))
    found = judge([tmp_path])
    row = found.runs.set_index("run").loc["lora/llama-3.2-3B-rank64"]
    assert (row["rank"], row["alpha"], row["learning_rate"], row["steps"]) == (64, 128, 1e-4, 5000)
    assert row["score"] == pytest.approx(0.4864)
    assert row["memory_gib"] == pytest.approx(20.99, abs=0.01)
    assert row["target_modules"] == "q_proj, v_proj"
    assert {Path(one.path).name for one in found.skipped} == {"failed.json", "ia3.json"}
    assert all(len(runs_of(found, what)) == 2 for what in ("score", "no_loss", "one_seed"))
    assert found.differences == []
    assert found.confounders == [], "alpha/rank is 2 at both"


def test_other_data_is_a_confounder(tmp_path: Path) -> None:
    other = peft_result(64, meta_info__dataset_info={"metamath": {"sha": "bbbbbbbbbb"}})
    for number, result in enumerate((peft_result(32), other)):
        (tmp_path / f"{number}.json").write_text(json.dumps(result))
    assert "data" in {one.what for one in judge([tmp_path]).confounders}


def edited_state(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((folder / readers.STATE).read_text())
    for row in state["log_history"]:
        change(row)
    (folder / readers.STATE).write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("key", "share", "column"),
    [
        ("eval_runtime", 1.06, "eval_rows"),
        ("eval_runtime", 1.002, None),
        ("eval_loss", 1.01, "untrained_loss"),
        ("eval_loss", 1 + 1e-6, None),
    ],
)
def test_another_evaluation_set_shows_in_its_rows_or_in_the_loss_before_training(
    tmp_path: Path, key: str, share: float, column: str | None
) -> None:
    folder = shutil.copytree(RUNS / "trainer", tmp_path / "runs")
    for seed in "abc":
        edited_state(folder / f"r4-{seed}", lambda row: row.update({key: row[key] * share} if key in row else {}))
    found = judge([folder])
    named = {one.what for one in found.confounders} & {"eval_rows", "untrained_loss"}
    assert named == ({column} if column else set())
    assert [one["ranks"] for one in found.differences] == ([[1, 16]] if column else [[1, 4, 16]])


def test_of_two_evaluations_at_one_step_the_first_is_of_the_run(tmp_path: Path) -> None:
    folder = shutil.copytree(RUNS / "trainer" / "r4-a", tmp_path / "r4")
    state = json.loads((folder / readers.STATE).read_text())
    last = next(row for row in reversed(state["log_history"]) if "eval_loss" in row)
    last["eval_loss"] = 9.0
    state["log_history"].append(last | {"eval_loss": 1.0})  # of the best checkpoint, loaded at the end
    (folder / readers.STATE).write_text(json.dumps(state))
    found = judge([folder])
    assert found.runs["eval_loss"].tolist() == [9.0]
    assert runs_of(found, "overfits") == {"r4"}


DAMAGED: dict[str, tuple[Callable[[Path], object], str]] = {
    "torn": (lambda file: file.write_text('{"log_history": ['), "not JSON"),
    "empty": (lambda file: file.write_text(""), "not JSON"),
    "nested": (lambda file: file.write_text("[" * 200_000), "not JSON"),
    "a number of too many digits": (lambda file: file.write_text('{"global_step": ' + "9" * 5000 + "}"), "not JSON"),
    "a list": (lambda file: file.write_text("[]"), "expected an object, found list"),
    "not UTF-8": (lambda file: file.write_bytes(b"\xff\xfe"), "cannot be read"),
    "huge": (lambda file: file.write_text(" " * 3000), "not a regular file of at most"),
    "a folder": (lambda file: file.mkdir(), "not a regular file"),
    "a pipe": (lambda file: os.mkfifo(file), "not a regular file"),
    "a link out": (lambda file: file.symlink_to("/etc/hostname"), "a symbolic link that leads out of"),
    "a circle": (lambda file: file.symlink_to(file.name), f"no {readers.STATE}"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_skipped_by_name(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        (tmp_path / name / readers.CONFIG).write_text('{"peft_type": "LORA", "r": 8}')
        (tmp_path / name / readers.STATE).write_text('{"global_step": 5, "log_history": []}')
    os.mkfifo(tmp_path / "good" / "training_args.bin")  # opening it would block
    monkeypatch.setattr(readers, "MAX_BYTES", 250_000 if damage == "nested" else 2000 if damage == "huge" else 10_000)
    (tmp_path / "bad" / readers.STATE).unlink()
    how, reason = DAMAGED[damage]
    how(tmp_path / "bad" / readers.STATE)
    found = judge([tmp_path])
    assert list(found.runs["run"]) == ["good"]
    (skipped,) = found.skipped
    assert skipped.path == str(tmp_path / "bad")
    assert reason in skipped.reason
    assert "\n" not in skipped.reason


def test_values_that_are_none_are_not_taken_for_some(tmp_path: Path) -> None:
    state = {"global_step": True, "epoch": "x", "log_history": [{"loss": None}, 5, {"eval_loss": "1e999", "step": 3}]}
    state |= {"train_batch_size": -8, "max_steps": 10**400}
    (tmp_path / readers.STATE).write_text(json.dumps(state))
    config = {
        "r": 8,
        "lora_alpha": "many",
        "target_modules": {"a": 1},
        "base_model_name_or_path": "\x1b[31m" + "x" * 999,
    }
    (tmp_path / readers.CONFIG).write_text(json.dumps(config))
    row = judge([tmp_path]).runs.iloc[0]
    assert row[["steps", "epochs", "batch_size", "planned_steps", "alpha"]].isna().all()
    assert row["diverged"]
    assert len(row["base_model"]) == 300


@pytest.mark.parametrize("rank", [0, -8, 8.5, True, "eight", None, 2**20 + 1, 10**30, [8]])
def test_a_rank_that_is_none_is_refused(tmp_path: Path, rank: Any) -> None:
    (tmp_path / readers.STATE).write_text("{}")
    (tmp_path / readers.CONFIG).write_text(json.dumps({"r": rank}))
    with pytest.raises(DataError, match="no rank from 1 to"):
        judge([tmp_path])


def test_what_holds_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no such file"):
        judge([tmp_path / "nowhere"])
    with pytest.raises(DataError, match="no run of a LoRA adapter"):
        judge([tmp_path])
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no row with a rank in a column r or lora_r"):
        judge([tmp_path / "table.csv"])
    (tmp_path / readers.CONFIG).write_text('{"r": 8}')
    with pytest.raises(DataError, match=f"no {readers.STATE}"):
        judge([tmp_path])


def test_one_run_given_twice_counts_once(confounded: Path) -> None:
    assert len(judge([confounded, confounded / "rank2", confounded / "rank4" / ".."]).runs) == 3


@pytest.mark.parametrize("source", ["trl-confounded", "trainer"])
def test_the_proposed_study_is_one(source: str, tmp_path: Path) -> None:
    out = tmp_path / "study.yaml"
    found = judge([RUNS / source], out)
    spec = resolve_spec(yaml.safe_load(out.read_text()))
    assert list(spec.ranks) == sorted(set(found.runs["rank"]))
    assert len(spec.seeds) >= 3
    assert list(spec.learning_rates) == sorted(set(found.runs["learning_rate"]))
    assert spec.training.steps == found.runs["steps"].max()
    assert spec.adapter.target_modules == ("q_proj", "up_proj", "v_proj")
    assert spec.adapter.alpha == ("2r" if source == "trainer" else (8, "4r"))
    with pytest.raises(StudyError, match="exists"):
        judge([RUNS / source], out)


@pytest.mark.parametrize("variants", [["use_dora"], ["use_rslora", "use_dora"], ["use_rslora"]])
def test_the_proposed_study_has_rslora_and_names_what_it_leaves_out(tmp_path: Path, variants: list[str]) -> None:
    for rank in (8, 64):
        (tmp_path / f"r{rank}").mkdir()
        config = {"r": rank, "lora_alpha": 32} | dict.fromkeys(variants, True)
        (tmp_path / f"r{rank}" / readers.CONFIG).write_text(json.dumps(config))
        (tmp_path / f"r{rank}" / readers.STATE).write_text("{}")
    found = judge([tmp_path])
    adapter = resolve_spec(yaml.safe_load(study_text(found, load("en")))).adapter
    rslora = "use_rslora" in variants
    assert (adapter.use_rslora, adapter.alpha) == (rslora, 32 if rslora else (32, "4r"))
    assert ("# Not in this study, though in runs: 'DoRA'." in study_text(found, load("en"))) == ("use_dora" in variants)
    assert "rsLoRA" not in study_text(found, load("en"))


def test_a_study_is_proposed_whatever_the_names(tmp_path: Path) -> None:
    (tmp_path / readers.STATE).write_text("{}")
    config = {"r": 8, "target_modules": r".*\.(q|v)_proj", "base_model_name_or_path": "a: b\n- c"}
    (tmp_path / readers.CONFIG).write_text(json.dumps(config))
    resolve_spec(yaml.safe_load(study_text(judge([tmp_path]), load("en"))))


def run_command(arguments: list[str], monkeypatch: pytest.MonkeyPatch, width: int = 80) -> int:
    monkeypatch.setattr(sys, "argv", ["rankscope", "judge", *arguments])
    monkeypatch.setattr(out_console, "width", width)
    with pytest.raises(SystemExit) as end:
        main()
    return int(end.value.code or 0)


def test_the_terminal_says_what_is_not_supported(
    confounded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([str(confounded)], monkeypatch) == 0
    shown = capsys.readouterr().out
    assert "These runs support no conclusion about rank." in shown
    assert "losses are not compared" in shown
    assert max(map(len, shown.partition("The same")[0].splitlines())) <= 80, "a table for 80 columns"


def test_the_terminal_says_what_the_seeds_show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([str(RUNS / "trainer")], monkeypatch) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "no conclusion" not in shown
    assert "95% interval" in shown
    assert "This holds for these held-out rows" in shown


def test_the_terminal_names_the_settings_of_each_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*several({8: 1.9, 64: 1.5}), *several({8: 1.4, 64: 1.6}, learning_rate=1e-4)]
    assert run_command([str(write_csv(tmp_path / "runs.csv", rows))], monkeypatch, 200) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for at, rank in (("2e-4 (run-0, run-1, run-2, run-3 and 2 more)", 64), ("1e-4 (run-6, run-7, run-8, run-9 and", 8)):
        assert shown.count(f"At learning rate {at}") == 2, "in the title and in the sentence"
        assert f": Rank {rank} is the smallest shown" in shown.partition(f"At learning rate {at}")[2]
    assert "Each holds at its own settings, none at the best rate of each rank, and at 95% by itself" in shown


@pytest.mark.parametrize(
    ("source", "conclusion"), [("trl-confounded", "결론을 낼 수 없습니다"), ("trainer", "이 검증 데이터")]
)
def test_the_terminal_speaks_the_language_that_is_asked_for(
    source: str, conclusion: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command([str(RUNS / source), "--lang", "ko"], monkeypatch, 400) == 0
    shown, _, study = capsys.readouterr().out.partition("대신 실행할 스터디")
    assert conclusion in shown
    assert "검증 손실" in shown.splitlines()[0], "in the table's header"
    sentences = [line for line in shown.splitlines() if line.startswith("- ") or line.endswith((".", ":"))]
    assert len(sentences) > 3
    assert [line for line in sentences if not re.search("[가-힣]", line)] == []
    assert [line for line in study.splitlines() if line.startswith("#") and not re.search("[가-힣]", line)] == []


def test_an_unreadable_file_is_skipped(confounded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.json", "b.csv"):
        (confounded / name).write_text("")
    opened = Path.open

    def refuse(path: Path, *arguments: Any, **how: Any) -> Any:  # as of mode 000, which root may read
        if path.suffix in (".json", ".csv") and path.parent == confounded:
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **how)

    monkeypatch.setattr(Path, "open", refuse)
    found = judge([confounded])
    assert [Path(one.path).name for one in found.skipped] == ["a.json", "b.csv"]
    assert all("Permission denied" in one.reason for one in found.skipped)
    assert len(found.runs) == 3


@pytest.mark.parametrize("of_a_study", [True, False])
def test_a_study_s_own_table_sends_to_report(
    of_a_study: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "runs.csv", several({8: 1.9, 64: 1.5}))
    if of_a_study:
        file.write_text(file.read_text().replace('"Name"', '"trial"', 1))
    assert run_command([str(file)], monkeypatch, width=200) == 0
    said = capsys.readouterr().out
    assert "without the loss of each row" in said
    assert ("which `rankscope report DIR` reads" in said) == of_a_study


def test_json_is_one_object_without_nan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_csv(tmp_path / "runs.csv", [*several({8: 1.9, 64: 1.5}), {"r": 9, "seed": 3, "eval": "NaN"}])
    assert run_command([str(file), "--json"], monkeypatch) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 7
    assert found["runs"][6]["eval_loss"] is None
    assert found["runs"][6]["diverged"]
    assert found["differences"][0]["outcome"] == "recommended"
    json.dumps(describe(judge([RUNS / "trainer"])), allow_nan=False)


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = (
        "import sys; from pathlib import Path; import rankscope.ui.judge; from rankscope.judge.command import judge;"
        f"judge([Path({str(RUNS)!r})]); sys.exit(bool(sys.modules.keys() & {{'torch', 'transformers', 'peft'}}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
